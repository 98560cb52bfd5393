"""Time and peak memory of RETRO's forward and training step, beside GPT2LMHeadModel and retro-pytorch of the same sizes.

    pip install transformers retro-pytorch==0.3.9 'pyarrow<20'    # beside torch, in an environment of their own: it wants numpy 1
    python benchmarks/model_speed.py      # gpt2-small, 4 rows of 1024 tokens, random weights, float32, no dropout

`--sides` leaves sides out.

Each side has a process of its own, so that its memory is its own; the sides take turns, round by round. A step is forward
and backward with the loss. Memory is the most that the process (or the GPU) held in the measured steps.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

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


def build(side: str, length: int):
    """The model, and a function from (tokens, neighbor ids) to its loss."""
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
            dim_head=WIDTH // 8,  # it has 8 heads whatever `heads` says: 0.3.9 does not pass the number on
        )
        # it predicts all but the first of the tokens that it gets, so it gets one more
        return model, lambda tokens, ids: model(torch.cat([tokens, tokens[:, :1]], 1), retrieved=ids, return_loss=True)

    from transformers import GPT2Config, GPT2LMHeadModel

    from modeling_retro import RetroConfig, RetroForCausalLM

    sizes = {"n_layer": LAYERS, "n_embd": WIDTH, "n_head": HEADS, "vocab_size": VOCABULARY, "n_positions": length}
    sizes |= {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "use_cache": False}
    if side == "GPT2LMHeadModel":
        model = GPT2LMHeadModel(GPT2Config(**sizes))
        return model, lambda tokens, ids: model(tokens, labels=tokens).loss
    model = RetroForCausalLM(
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
        return model, lambda tokens, ids: model(tokens, labels=tokens, use_retrieval=False).loss
    return model, lambda tokens, ids: model(tokens, labels=tokens, neighbor_ids=ids).loss


class Memory:
    """Peak memory in GiB since `reset`: the process's (Linux), or the GPU's."""

    def __init__(self, device: torch.device):
        self.device = device

    def reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


def serve(side: str, batch_size: int, length: int, device: torch.device) -> None:
    """One side: reads "forward" or "step" a line, runs it, answers [seconds, GiB]."""
    torch.manual_seed(0)
    model, loss_of = build(side, length)
    model.to(device).train()
    tokens = torch.randint(1, VOCABULARY, (batch_size, length), device=device)
    ids = torch.randint(
        1, VOCABULARY, (batch_size, length // CHUNK, NEIGHBORS, NEIGHBOR_LENGTH), device=device
    )  # retro-pytorch takes 0 for padding
    memory = Memory(device)
    for line in sys.stdin:
        model.zero_grad(set_to_none=True)
        memory.reset()
        start = time.perf_counter()
        with torch.set_grad_enabled(line.strip() == "step"):
            loss = loss_of(tokens, ids)
            if line.strip() == "step":
                loss.backward()
        loss = loss.item()  # waits for the device
        print(json.dumps([time.perf_counter() - start, memory.peak()]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="+", default=SIDES, choices=SIDES)
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after one that warms up")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024, help="tokens a row, a multiple of 64")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve, options.batch_size, options.length, options.device)

    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    processes = {
        side: subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], "--serve", side],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        for side in options.sides
    }
    measured = {(side, what): [] for side in options.sides for what in ("forward", "step")}
    for _ in range(options.rounds + 1):
        for (side, what), results in measured.items():
            process = processes[side]
            process.stdin.write(what + "\n")
            process.stdin.flush()
            results.append(json.loads(process.stdout.readline()))
    for process in processes.values():
        process.stdin.close()
        process.wait()

    device = (
        torch.cuda.get_device_name(options.device) if options.device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    )
    print(f"{device}, {platform.machine()}, torch {torch.__version__}; {options.batch_size} × {options.length} tokens")
    print("| | forward s (min-max) | GiB | step s (min-max) | GiB | step tokens/s |\n|---|---|---|---|---|---|")
    for side in options.sides:
        cells = [side]
        for what in ("forward", "step"):
            seconds, memory = zip(*measured[side, what][1:], strict=True)
            median = statistics.median(seconds)
            cells += [f"{median:.2f} ({min(seconds):.2f}-{max(seconds):.2f})", f"{max(memory):.2f}"]
        cells.append(f"{options.batch_size * options.length / median:.0f}")
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
