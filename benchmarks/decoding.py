"""Measure the time per generated token of RETRO with cross-attention, a copy head, or both.

    python benchmarks/decoding.py

The models are gpt2-small with random weights and generate one row. The neighbors are random, so no
time goes into retrieval. The sides take turns; median, least and most over the rounds are printed.
"""

import argparse
import time
from typing import Any

import torch
from machine import machine, spread

from modeling_retro import RetroConfig, RetroForCausalLM

CHUNK, NEIGHBORS, NEIGHBOR_LENGTH = 64, 2, 128
TOKENS = 50_000  # ids are drawn below this
OPEN_GATE = 0.5  # a fresh copy head is closed and would cost nothing
SIDES: dict[str, dict[str, Any]] = {
    "cross-attention": {},
    "cross-attention by matches": {"cca_match": True},
    "cross-attention and copy head": {"copy_head": True},
    "cross-attention by matches and copy head": {"copy_head": True, "cca_match": True},
    "copy head alone": {"copy_head": True, "cca_layers": []},
}


def main() -> None:
    """Print a line of milliseconds for each side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds, after a warm-up")
    parser.add_argument("--prompt", type=int, default=512, help="tokens in the prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens to generate")
    arguments = parser.parse_args()
    print(machine())
    torch.manual_seed(0)
    tokens = torch.randint(0, TOKENS, (1, arguments.prompt))
    chunks = (arguments.prompt + arguments.new) // CHUNK
    ids = torch.randint(0, TOKENS, (1, chunks, NEIGHBORS, NEIGHBOR_LENGTH))
    models = {name: RetroForCausalLM(RetroConfig(**changes)).eval() for name, changes in SIDES.items()}
    for model in models.values():
        if model.config.copy_head:
            torch.nn.init.constant_(model.copy_head.gate_scale, OPEN_GATE)
    measured: dict[str, list[float]] = {name: [] for name in SIDES}
    for _ in range(arguments.rounds + 1):  # the first is the warm-up
        for name, model in models.items():
            lengths = {"max_new_tokens": arguments.new, "min_new_tokens": arguments.new, "do_sample": False}
            started = time.perf_counter()
            model.generate(tokens, neighbor_ids=ids, attention_mask=torch.ones_like(tokens), pad_token_id=0, **lengths)
            measured[name].append(1000 * (time.perf_counter() - started) / arguments.new)
    for name, milliseconds in measured.items():
        print(f"{name:42s} {spread(milliseconds[1:], ' ms per token')}")


if __name__ == "__main__":
    main()
