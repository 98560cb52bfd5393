"""One side of gpu.py's training: steps of AdamW under bfloat16 autocast, neighbors given.

Model FLOPs are those of the matrix products of a forward pass, times 3 for a step: the backward
pass has two products for each. What a side computes beside that, or computes again, does not count.
"""

import gc
import time
from typing import Any

import torch
from gpt2_small import (
    Loss,
    Sizes,
    build_gpt2,
    build_retro,
    build_retro_pytorch,
    gpt2_loss,
    retro_loss,
    retro_pytorch_loss,
)
from gpu_sides import TRAINING

STEP_TO_FORWARD = 3  # model FLOPs of a step by those of a forward pass


def forward_flops(sizes: Sizes, length: int, reads: bool, matched: int = 0) -> int:
    """Return the model FLOPs of a forward pass over one row of `length` tokens.

    A product of matrices (m, n) and (n, k) has 2·m·n·k. Attention counts all pairs of positions, as
    in PaLM (Chowdhery et al. 2022, appendix B), although half of them are masked.

    Args:
        reads: neighbors are encoded and attended to.
        matched: last tokens that are matched with the neighbors' for the copy head; 0 without one.
    """
    d, points = sizes.width, length // sizes.chunk
    dense = 24 * d * d  # of a token in a layer: 4 projections of attention and an MLP of 4·d
    flops = sizes.layers * length * (dense + 4 * length * d) + 2 * length * d * sizes.vocabulary
    per_point = sizes.neighbors * sizes.neighbor_length
    if reads:
        neighbor_tokens, queries = points * per_point, points * sizes.chunk
        flops += sizes.encoder_layers * neighbor_tokens * (dense + 4 * sizes.neighbor_length * d)
        # the encoder's one cross-attention: queries and output, keys and values, scores and sums
        flops += neighbor_tokens * (4 * d * d + 4 * sizes.chunk * d) + queries * 4 * d * d
        # each of the decoder's
        flops += len(sizes.cca_layers) * (
            length * 4 * d * d + neighbor_tokens * 4 * d * d + queries * 4 * per_point * d
        )
    return flops + 2 * points * sizes.chunk * matched * per_point * d


class Trainer:
    """A side's model and optimizer, and the tasks that they answer."""

    def __init__(self, side: str, sizes: Sizes, device: torch.device, length: int) -> None:
        torch.manual_seed(0)
        self.sizes, self.device, self.length = sizes, device, length
        own, matched = TRAINING[side], 0
        self.model: torch.nn.Module
        if own.kind == "retro":
            self.model = retro = build_retro(sizes, length, **own.settings)
            matched = retro.config.match_length if retro.config.copy_head else 0
            loss_of: Any = retro_loss
        elif own.kind == "gpt2":
            self.model, loss_of = build_gpt2(sizes, length), gpt2_loss
        else:
            self.model, loss_of = build_retro_pytorch(sizes, length), retro_pytorch_loss
        self.model.to(device).train()
        self.flops = STEP_TO_FORWARD * forward_flops(sizes, length, own.reads, matched)
        compiled = torch.compile(self.model, backend="inductor" if device.type == "cuda" else "aot_eager")
        self.losses: dict[str, Loss] = {"eager": loss_of(self.model), "compiled": loss_of(compiled)}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=device.type == "cuda")

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        """Run `steps` steps with a `mode` and some `rows`, after one that is not measured.

        Returns:
            seconds of each step; GiB at most, model, gradients and optimizer included; FLOPs of a
            step; the last loss.
        """
        try:
            return self._measure(task["mode"], task["rows"], task["steps"])
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # for the other sides

    def _measure(self, mode: str, batch_size: int, steps: int) -> dict[str, Any]:
        tokens = self.sizes.random_tokens(batch_size, self.length, device=self.device)
        neighbors = self.sizes.random_neighbors(batch_size, self.length // self.sizes.chunk, self.device)
        is_cuda = self.device.type == "cuda"
        started = time.perf_counter()
        loss = self._step(mode, tokens, neighbors)
        warm_up = time.perf_counter() - started
        if is_cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(steps):
            started = time.perf_counter()
            loss = self._step(mode, tokens, neighbors)
            seconds.append(time.perf_counter() - started)
        memory = torch.cuda.max_memory_allocated() / 2**30 if is_cuda else 0.0
        flops = batch_size * self.flops
        return {"seconds": seconds, "gib": memory, "flops": flops, "loss": loss, "warm_up": warm_up}

    def _step(self, mode: str, tokens: torch.Tensor, neighbors: torch.Tensor) -> float:
        """Take a step; return its loss, which waits for the device."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.losses[mode](tokens, neighbors)
        loss.backward()
        self.optimizer.step()
        return loss.item()


def measured_peak(device: torch.device, size: int) -> float:
    """Return the FLOP/s of a product of two random bfloat16 matrices (size, size), the median."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for number in range(15):
        started = time.perf_counter()
        product = left @ right
        product[0, 0].item()  # waits for the device
        if number >= 5:
            seconds.append(time.perf_counter() - started)
    return 2 * size**3 / sorted(seconds)[len(seconds) // 2]
