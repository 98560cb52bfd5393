"""Measure time and memory of RETRO's forward pass and training step beside GPT-2 and retro-pytorch.

    pip install --no-deps retro-pytorch==0.3.9 && pip install einops
    python benchmarks/model_speed.py

retro-pytorch is installed without its dependencies, which want an older numpy: its model needs
only torch and einops. Leave it out with `--sides`. All models have the sizes of gpt2-small, random
weights, float32 and no dropout.

Each side runs in its own process, so that its memory can be told apart. The sides take turns;
median, least and most over the rounds are printed. A step is forward and backward with the loss.
Memory is the peak of the process, or of the GPU, over the measured steps. `--compile` compiles all
sides with inductor, in the warm-up, which is not measured.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gpt2_small import (
    GPT2_SMALL,
    Loss,
    build_gpt2,
    build_retro,
    build_retro_pytorch,
    gpt2_loss,
    retro_loss,
    retro_pytorch_loss,
)
from workers import Worker, serve

SIDES = (
    "GPT2LMHeadModel",
    "RETRO, neighbors off",
    "RETRO, neighbors on",
    "RETRO, neighbors on, copy head",
    "RETRO, neighbors on, copy head, matches",
    "retro-pytorch, neighbors on",
)
TASKS = ("forward", "step")


def build(side: str, length: int) -> tuple[torch.nn.Module, Loss]:
    """Return a side's model and its loss function."""
    if side.startswith("retro-pytorch"):
        theirs = build_retro_pytorch(GPT2_SMALL, length)
        return theirs, retro_pytorch_loss(theirs)
    if side == "GPT2LMHeadModel":
        gpt2 = build_gpt2(GPT2_SMALL, length)
        return gpt2, gpt2_loss(gpt2)
    retro = build_retro(GPT2_SMALL, length, copy_head="copy head" in side, cca_match="matches" in side)
    retro.config.use_retrieval = not side.endswith("off")
    return retro, retro_loss(retro)


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


def serve_side(side: str, batch_size: int, length: int, device: torch.device, is_compiled: bool) -> None:
    """Run one side: a task names "forward" or "step", and the answer has "seconds" and "gib"."""
    torch.manual_seed(0)
    model, loss_of = build(side, length)
    model.to(device).train()
    if is_compiled:
        model.compile()
    tokens = GPT2_SMALL.random_tokens(batch_size, length, device=device)
    ids = GPT2_SMALL.random_neighbors(batch_size, length // GPT2_SMALL.chunk, device)
    memory = Memory(device)

    def measure(task: dict[str, Any]) -> dict[str, float]:
        is_step = task["what"] == "step"
        model.zero_grad(set_to_none=True)
        memory.reset()
        start = time.perf_counter()
        with torch.set_grad_enabled(is_step):
            loss = loss_of(tokens, ids)
            if is_step:
                loss.backward()
        loss.item()  # waits for the device
        return {"seconds": time.perf_counter() - start, "gib": memory.peak()}

    serve(lambda: measure)


class Side:
    """The process that runs one side, and what it measured."""

    def __init__(self, name: str, tasks: Sequence[str]) -> None:
        self.name = name
        self.results: dict[str, list[tuple[float, float]]] = {what: [] for what in tasks}  # seconds and GiB
        self.worker = Worker(name, [__file__, *sys.argv[1:], "--serve", name])

    def measure(self, what: str) -> None:
        """Run a forward pass or a step and keep its result.

        Raises:
            RuntimeError: the side failed.
        """
        self.worker.ask(what=what)
        answer = self.worker.answer()
        if "error" in answer:
            raise RuntimeError(f"{self.name} failed: {answer['error']}. Leave it out with --sides.")
        self.results[what].append((answer["seconds"], answer["gib"]))

    def row(self, tokens: int) -> str:
        """Return the side's row of the table, without the warm-up; a batch has `tokens` tokens."""
        cells = [self.name]
        for results in self.results.values():
            seconds, memory = zip(*results[1:], strict=True)
            median = statistics.median(seconds)
            cells += [f"{median:.2f} ({min(seconds):.2f}-{max(seconds):.2f})", f"{max(memory):.2f}"]
            cells.append(f"{tokens / median:.0f}")
        return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Print a table of all sides, or serve one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="+", default=SIDES, choices=SIDES, help="default: all")
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS, help="default: both")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after a warm-up")
    parser.add_argument("--batch_size", type=int, default=4, help="rows")
    parser.add_argument("--length", type=int, default=1024, help="tokens in a row, a multiple of 64")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="compile all sides with inductor")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve_side(options.serve, options.batch_size, options.length, options.device, options.compile)

    sides = [Side(name, options.tasks) for name in options.sides]
    for _ in range(options.rounds + 1):
        for side in sides:
            for what in side.results:
                side.measure(what)
    for side in sides:
        side.worker.close()

    is_gpu = options.device.type == "cuda"
    device = torch.cuda.get_device_name(options.device) if is_gpu else f"{os.cpu_count()} CPU cores"
    how = "compiled" if options.compile else "eager"
    batch = f"{options.batch_size} × {options.length} tokens"
    print(f"{device}, {platform.machine()}, torch {torch.__version__}, {how}; {batch}")
    print("| | " + " | ".join(f"{what} s (min-max) | GiB | tokens/s" for what in options.tasks) + " |")
    print("|---" * (1 + 3 * len(options.tasks)) + "|")
    for side in sides:
        print(side.row(options.batch_size * options.length))


if __name__ == "__main__":
    main()
