"""Measure time and memory of RETRO's forward pass and training step beside GPT-2 and retro-pytorch.

    pip install transformers retro-pytorch==0.3.9 'pyarrow<20'
    python benchmarks/model_speed.py

retro-pytorch needs numpy 1, so install it in an environment of its own, or leave it out with
`--sides`. All models have the sizes of gpt2-small, random weights, float32 and no dropout.

Each side runs in its own process, so that its memory can be told apart. The sides take turns;
median, least and most over the rounds are printed. A step is forward and backward with the loss.
Memory is the peak of the process, or of the GPU, over the measured steps.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SIDES = (
    "GPT2LMHeadModel",
    "RETRO, neighbors off",
    "RETRO, neighbors on",
    "RETRO, neighbors on, copy head",
    "RETRO, neighbors on, copy head, matches",
    "retro-pytorch, neighbors on",
)
LAYERS, WIDTH, HEADS, VOCABULARY, CCA_LAYERS = 12, 768, 12, 50257, (5, 8, 11)
CHUNK, NEIGHBORS, NEIGHBOR_LENGTH = 64, 2, 128


Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of tokens and neighbor ids


def build(side: str, length: int) -> tuple[torch.nn.Module, Loss]:
    """Return a side's model and its loss function."""
    if side.startswith("retro-pytorch"):
        from retro_pytorch import RETRO

        model = RETRO(
            num_tokens=VOCABULARY,
            max_seq_len=length,
            chunk_size=CHUNK,
            enc_dim=WIDTH,
            enc_depth=2,
            enc_cross_attn_layers=(1,),
            dec_dim=WIDTH,
            dec_depth=LAYERS,
            dec_cross_attn_layers=tuple(layer + 1 for layer in CCA_LAYERS),
            dim_head=WIDTH // 8,  # 0.3.9 ignores `heads` and always has 8
        )
        # it predicts all of its tokens but the first, so it gets one more
        return model, lambda tokens, ids: model(torch.cat([tokens, tokens[:, :1]], 1), retrieved=ids, return_loss=True)

    from transformers import GPT2Config, GPT2LMHeadModel

    from modeling_retro import RetroConfig, RetroForCausalLM

    sizes: dict[str, Any] = {
        "n_layer": LAYERS,
        "n_embd": WIDTH,
        "n_head": HEADS,
        "vocab_size": VOCABULARY,
        "n_positions": length,
    }
    sizes |= {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "use_cache": False}
    if side == "GPT2LMHeadModel":
        gpt2 = GPT2LMHeadModel(GPT2Config(**sizes))
        return gpt2, lambda tokens, ids: gpt2(tokens, labels=tokens).loss
    retro = RetroForCausalLM(
        RetroConfig(
            **sizes,
            cca_layers=CCA_LAYERS,
            chunk_size=CHUNK,
            num_neighbors=NEIGHBORS,
            neighbor_length=NEIGHBOR_LENGTH,
            copy_head="copy head" in side,
            cca_match="matches" in side,
        )
    )
    if side.endswith("off"):
        return retro, lambda tokens, ids: retro(tokens, labels=tokens, use_retrieval=False).loss
    return retro, lambda tokens, ids: retro(tokens, labels=tokens, neighbor_ids=ids).loss


class Memory:
    """The peak memory since `reset`, of the process (on Linux) or of the GPU."""

    def __init__(self, device: torch.device):
        self.device = device

    def reset(self) -> None:
        """Start to measure."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> float:
        """Return the peak in GiB."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


def serve(side: str, batch_size: int, length: int, device: torch.device) -> None:
    """Run one side: read lines of "forward" or "step", run them, answer with [seconds, GiB]."""
    torch.manual_seed(0)
    model, loss_of = build(side, length)
    model.to(device).train()
    tokens = torch.randint(1, VOCABULARY, (batch_size, length), device=device)
    neighbors = (batch_size, length // CHUNK, NEIGHBORS, NEIGHBOR_LENGTH)
    ids = torch.randint(1, VOCABULARY, neighbors, device=device)  # 0 is padding to retro-pytorch
    memory = Memory(device)
    for line in sys.stdin:
        model.zero_grad(set_to_none=True)
        memory.reset()
        start = time.perf_counter()
        with torch.set_grad_enabled(line.strip() == "step"):
            loss = loss_of(tokens, ids)
            if line.strip() == "step":
                loss.backward()
        loss.item()  # waits for the device
        print(json.dumps([time.perf_counter() - start, memory.peak()]), flush=True)


class Side:
    """The process that runs one side, and what it measured."""

    def __init__(self, name: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        command = [sys.executable, __file__, *sys.argv[1:], "--serve", name]
        self.name = name
        self.results: dict[str, list[tuple[float, float]]] = {"forward": [], "step": []}  # seconds and GiB
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )

    def measure(self, what: str) -> None:
        """Run a forward pass or a step and keep its result."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(what, file=self.process.stdin, flush=True)
        self.results[what].append(json.loads(self.process.stdout.readline()))

    def row(self, tokens: int) -> str:
        """Return the side's row of the table, without the warm-up; a batch has `tokens` tokens."""
        cells = [self.name]
        for results in self.results.values():
            seconds, memory = zip(*results[1:], strict=True)
            median = statistics.median(seconds)
            cells += [f"{median:.2f} ({min(seconds):.2f}-{max(seconds):.2f})", f"{max(memory):.2f}"]
        return "| " + " | ".join([*cells, f"{tokens / median:.0f}"]) + " |"


def main() -> None:
    """Print a table of all sides, or serve one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="+", default=SIDES, choices=SIDES, help="default: all")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after a warm-up")
    parser.add_argument("--batch_size", type=int, default=4, help="rows")
    parser.add_argument("--length", type=int, default=1024, help="tokens in a row, a multiple of 64")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve, options.batch_size, options.length, options.device)

    sides = [Side(name) for name in options.sides]
    for _ in range(options.rounds + 1):
        for side in sides:
            for what in side.results:
                side.measure(what)
    for side in sides:
        side.process.communicate()

    is_gpu = options.device.type == "cuda"
    device = torch.cuda.get_device_name(options.device) if is_gpu else f"{os.cpu_count()} CPU cores"
    print(f"{device}, {platform.machine()}, torch {torch.__version__}; {options.batch_size} × {options.length} tokens")
    print("| | forward s (min-max) | GiB | step s (min-max) | GiB | step tokens/s |\n|---|---|---|---|---|---|")
    for side in sides:
        print(side.row(options.batch_size * options.length))


if __name__ == "__main__":
    main()
