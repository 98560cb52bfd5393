"""Time generation with RETRO beside what other systems do, in turns.

    pip install --target runs/others --no-deps retro-pytorch==0.3.9 einops
    PYTHONPATH=runs/others python benchmarks/other_systems.py runs/generation

Models, texts and knowledge base are those of generation.py, which keeps them in the folder. All
read the same two neighbors every 64 tokens, and the time counts the prompt and all searches.

- RETRO: cross-attention, with a cache. With drafts, tokens are accepted where the file's text
  follows its neighbors or itself, as with prompt lookup.
- In-context retrieval puts the neighbors in front of the text and reads all anew at each search.
- Whole sequence: RETRO without a cache computes all tokens again for each new one, as other open
  code of RETRO does. retro-pytorch is run as its own `generate` runs it, on the same neighbors.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from generation import CHUNK, GPT2, MOST_TOKENS, Bench
from gpt2_small import GPT2_SMALL, build_retro_pytorch
from machine import machine, spread

from evaluation_retro.rival_generation import PROMPT_LOOKUP, generate_in_context

RETRO = "cross-attention"


def run_retro_pytorch(model: torch.nn.Module, bench: Bench, new: int) -> None:
    """Compute all tokens for each new one, and search at the end of each chunk."""
    retriever = bench.retrievers["dense"]
    neighbors: list[torch.Tensor] = []
    for length in range(bench.prompt, bench.prompt + new):
        while CHUNK * (len(neighbors) + 1) <= length:
            query = bench.text[:, CHUNK * len(neighbors) : CHUNK * (len(neighbors) + 1)]
            neighbors.append(retriever.retrieve(query.tolist()).ids)
        model(bench.text[:, :length], retrieved=torch.stack(neighbors, 1))


@torch.no_grad()
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="keeps the knowledge base")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds, after a warm-up")
    parser.add_argument("--prompt", type=int, default=128, help="tokens in a prompt, at least a chunk")
    parser.add_argument("--new", type=int, default=128, help="tokens to generate")
    parser.set_defaults(batch_size=1, chunks=7168, sides=[GPT2, RETRO])
    options = parser.parse_args()
    bench = Bench(options)
    decoder, prompts = bench.models[GPT2], bench.text[:, : bench.prompt]
    torch.manual_seed(0)
    theirs = build_retro_pytorch(GPT2_SMALL, MOST_TOKENS).eval()
    rows: dict[str, Callable[[int], object]] = {
        GPT2: lambda new: bench.run(GPT2, new),
        "GPT-2, prompt lookup": lambda new: bench.run(GPT2, new, prompt_lookup_num_tokens=PROMPT_LOOKUP),
        "RETRO": lambda new: bench.run(RETRO, new),
        "RETRO, drafts": lambda new: bench.run(RETRO, new, draft_from_neighbors=True),
        "in-context retrieval": lambda new: generate_in_context(decoder, bench.retrievers["dense"], prompts, new),
        "RETRO, whole sequence": lambda new: bench.run(RETRO, new, use_cache=False),
        "retro-pytorch": lambda new: run_retro_pytorch(theirs, bench, new),
    }
    seconds: dict[str, list[float]] = {row: [] for row in rows}
    for write in rows.values():
        write(4)  # warm
    for number in range(options.rounds):
        turn = number % len(rows)
        for row, write in [*rows.items()][turn:] + [*rows.items()][:turn]:
            started = time.perf_counter()
            write(bench.new)
            seconds[row].append(time.perf_counter() - started)
    print(f"{machine()}; {bench.store.count():,} chunks; {options.prompt} + {options.new} tokens\n")
    print("| | tokens/s | of GPT-2 |\n|---|---|---|")
    for row, times in seconds.items():
        shares = [gpt2 / own for gpt2, own in zip(seconds[GPT2], times, strict=True)]
        print(f"| {row} | {spread([bench.new / each for each in times])} | {spread(shares, digits=2)} |")
    bench.store.close()


if __name__ == "__main__":
    main()
