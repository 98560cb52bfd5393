"""Milliseconds a generated token of RETRO with cross-attention, a copy head, or both; gpt2-small, random weights, one row.

    python benchmarks/decoding.py

The neighbors are random and cost nothing to find. The sides take turns, round by round.
"""

import argparse
import time

import torch
from machine import machine, spread

from modeling_retro import RetroConfig, RetroForCausalLM

SIDES = {
    "cross-attention": {},
    "cross-attention by matches": {"cca_match": True},
    "cross-attention and copy head": {"copy_head": True},
    "cross-attention by matches and copy head": {"copy_head": True, "cca_match": True},
    "copy head alone": {"copy_head": True, "cca_layers": []},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--new", type=int, default=64, help="tokens")
    arguments = parser.parse_args()
    print(machine())
    torch.manual_seed(0)
    tokens = torch.randint(0, 50_000, (1, arguments.prompt))
    ids = torch.randint(0, 50_000, (1, (arguments.prompt + arguments.new) // 64, 2, 128))
    models = {name: RetroForCausalLM(RetroConfig(**changes)).eval() for name, changes in SIDES.items()}
    measured: dict[str, list[float]] = {name: [] for name in SIDES}
    for _ in range(arguments.rounds + 1):  # the first warms up
        for name, model in models.items():
            if model.config.copy_head:
                torch.nn.init.constant_(model.copy_head.gate_scale, 0.5)
            lengths = {"max_new_tokens": arguments.new, "min_new_tokens": arguments.new, "do_sample": False}
            started = time.perf_counter()
            model.generate(tokens, neighbor_ids=ids, attention_mask=torch.ones_like(tokens), pad_token_id=0, **lengths)
            measured[name].append(1000 * (time.perf_counter() - started) / arguments.new)
    for name, milliseconds in measured.items():
        print(f"{name:42s} {spread(milliseconds[1:], ' ms a token')}")


if __name__ == "__main__":
    main()
