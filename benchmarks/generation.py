"""Measure generation with retrieval beside GPT-2's, in turns, and the parts of a chunk's life.

    python benchmarks/generation.py runs/generation                          # one row
    python benchmarks/generation.py runs/generation --batch_size 8
    python benchmarks/generation.py runs/generation --prompt 896 --new 128   # at 1,000 tokens
    python benchmarks/generation.py runs/generation --profile

The models have the sizes of gpt2-small and random weights, in float32. The knowledge base holds
sources of Python's standard library, in Milvus Lite, embedded by MiniLM and indexed by words. It is
built once and kept in the folder. Prompts are the beginnings of files that it does not hold.
What follows is forced to be the files' text, so that all sides write the same tokens and every
search has a query of real text. The time counts the prompt and all searches.

The sides take turns; median, least and most over the rounds are printed. "Of GPT-2" is the median
over the rounds of a side's tokens per second divided by GPT-2's in the same round.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from chunk_life import Stopwatch
from forced import Forced
from gpt2_small import GPT2_SMALL, build_gpt2, build_retro
from machine import MINILM, machine, read_files, source_files, source_tokenizer, spread
from transformers import LogitsProcessorList, PreTrainedTokenizerFast

from modeling_retro import RetroForCausalLM
from retrieval import BulkTokenizer, Document, Embedder, MilvusRetriever, MilvusStore, chunk_documents, ingest

CHUNK = GPT2_SMALL.chunk
MOST_TOKENS = 1024  # of prompt and continuation
HELD_OUT = 10  # one file of so many is not in the knowledge base
COLLECTION = "text"
OPEN_GATE = 0.5  # a fresh copy head is closed and would cost nothing
GPT2 = "GPT2LMHeadModel"
# name -> settings of the model, and how the knowledge base is searched; None for not at all
SIDES: dict[str, tuple[dict[str, Any], str | None]] = {
    GPT2: ({}, None),
    "off": ({}, None),
    "cross-attention": ({}, "dense"),
    "copy head": ({"copy_head": True, "cca_layers": []}, "dense"),
    "copy head, BM25": ({"copy_head": True, "cca_layers": []}, "bm25"),
    "cross-attention by matches, copy head": ({"copy_head": True, "cca_match": True}, "dense"),
}
DEFAULT_SIDES = list(SIDES)[:5]


def documents(parts: Sequence[int]) -> list[Document]:
    """Return the sources whose number, modulo `HELD_OUT`, is one of some."""
    files = source_files()
    return [document for n, document in enumerate(read_files(files)) if n % HELD_OUT in parts]


def knowledge_base(folder: Path, chunks: int, tokenizer: BulkTokenizer) -> MilvusStore:
    """Open the knowledge base of at least so many chunks in a folder, or build it."""
    store = MilvusStore(str(folder / "kb.db"), COLLECTION)
    if not (folder / "built").exists():
        some, total = [], 0
        for document in documents(range(1, HELD_OUT)):
            if total >= chunks:
                break
            some.append(document)
            total += sum(1 for _ in chunk_documents([document], tokenizer, CHUNK))
        ingest(some, store, tokenizer, Embedder(str(MINILM)), search="hybrid", chunk_size=CHUNK, progress=True)
        (folder / "built").touch()
    return store


def held_out_texts(tokenizer: BulkTokenizer, rows: int, length: int) -> torch.Tensor:
    """Return the first tokens of held-out files, (rows, length)."""
    encoded = (tokenizer.encode_batch([document.text[: 20 * length]])[0] for document in documents([0]))
    long = (tokens[:length] for tokens in encoded if len(tokens) >= length)
    return torch.tensor(list(itertools.islice(long, rows)))


def build_models(sides: Sequence[str]) -> dict[str, Any]:
    """Return the sides' models; sides with the same settings share one."""
    models: dict[str, Any] = {}
    shared: dict[str, RetroForCausalLM] = {}
    for side in sides:
        torch.manual_seed(0)
        settings, _ = SIDES[side]
        if side == GPT2:
            models[side] = build_gpt2(GPT2_SMALL, MOST_TOKENS).eval()
            continue
        key = str(settings)
        if key not in shared:
            shared[key] = build_retro(GPT2_SMALL, MOST_TOKENS, **settings).eval()
            if settings.get("copy_head"):
                torch.nn.init.constant_(shared[key].copy_head.gate_scale, OPEN_GATE)
        models[side] = shared[key]
    return models


class Bench:
    """The models, the knowledge base and the texts of one measurement."""

    def __init__(self, options: argparse.Namespace) -> None:
        options.folder.mkdir(parents=True, exist_ok=True)
        path = options.folder / "tokenizer"
        if not path.exists():
            source_tokenizer(source_files()).save_pretrained(path)
        tokenizer = BulkTokenizer(PreTrainedTokenizerFast.from_pretrained(path))
        self.store = knowledge_base(options.folder, options.chunks, tokenizer)
        embedder = Embedder(str(MINILM))
        self.retrievers = {
            "dense": MilvusRetriever(self.store, tokenizer, embedder, search="dense"),
            "bm25": MilvusRetriever(self.store, tokenizer, search="bm25"),
        }
        self.prompt, self.new = options.prompt, options.new
        self.text = held_out_texts(tokenizer, options.batch_size, options.prompt + options.new)
        self.models = build_models(options.sides)

    def run(self, side: str, new: int | None = None, **arguments: Any) -> tuple[float, float]:
        """Generate; return the seconds of all, and the seconds without the prompt.

        Args:
            arguments: further ones of `generate()`.
        """
        new, model, search = new or self.new, self.models[side], SIDES[side][1]
        if side != GPT2:
            model.set_retriever(None if search is None else self.retrievers[search])
            arguments["use_retrieval"] = search is not None
        forced, tokens = Forced(self.text), self.text[:, : self.prompt]
        started = time.perf_counter()
        output = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            logits_processor=LogitsProcessorList([forced]),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            **arguments,
        )
        ended = time.perf_counter()
        assert torch.equal(output, self.text[:, : self.prompt + new]), "the text is forced"
        return ended - started, ended - forced.times[0]

    def profile(self, side: str) -> None:
        """Print the parts of one generation of a side, after the prompt's."""
        searches, tokens = (self.new - 1) // CHUNK, self.new
        stopwatch = Stopwatch()
        self.run(side, CHUNK)
        with stopwatch.watch():
            seconds, _ = self.run(side)
        print(f"\n{side}: {tokens} tokens, {searches} searches after the prompt's\n")
        print(*stopwatch.table(seconds, searches + 1, tokens), sep="\n")


def measure(bench: Bench, sides: Sequence[str], rounds: int) -> None:
    """Print a line of the table for each side."""
    whole: dict[str, list[float]] = {side: [] for side in sides}
    decoding: dict[str, list[float]] = {side: [] for side in sides}
    for side in sides:
        bench.run(side, CHUNK)  # warm
    for number in range(rounds):
        turn = number % len(sides)
        for side in [*sides[turn:], *sides[:turn]]:
            seconds, after_prompt = bench.run(side)
            whole[side].append(seconds)
            decoding[side].append(after_prompt)
    tokens = bench.text.shape[0] * bench.new
    print("| | tokens/s | of GPT-2 | ms a step, without the prompt | of GPT-2 |\n|---|---|---|---|---|")
    for side in sides:
        speeds = [tokens / seconds for seconds in whole[side]]
        steps = [1000 * seconds / (bench.new - 1) for seconds in decoding[side]]
        shares = ["", ""]
        if GPT2 in sides:
            faster = [gpt2 / own for gpt2, own in zip(whole[GPT2], whole[side], strict=True)]
            slower = [own / gpt2 for gpt2, own in zip(decoding[GPT2], decoding[side], strict=True)]
            shares = [spread(faster, digits=3), spread(slower, digits=3)]
        print(f"| {side} | {spread(speeds)} | {shares[0]} | {spread(steps)} | {shares[1]} |")
    if GPT2 in sides:
        print(f"\nGPT-2: {statistics.median(whole[GPT2]):.1f} s a round")


def main() -> None:
    """Print the table of sides, or the parts of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="keeps the knowledge base")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=DEFAULT_SIDES, help="default: the first five")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds, after a warm-up")
    parser.add_argument("--batch_size", type=int, default=1, help="rows")
    parser.add_argument("--prompt", type=int, default=128, help="tokens in a prompt")
    parser.add_argument("--new", type=int, default=384, help="tokens to generate")
    parser.add_argument("--chunks", type=int, default=7168, help="chunks of the knowledge base, at least")
    parser.add_argument("--profile", action="store_true", help="print the parts of each side instead")
    options = parser.parse_args()
    bench = Bench(options)
    print(f"{machine()}; {bench.store.count():,} chunks; {options.batch_size} × ({options.prompt} + {options.new})")
    if options.profile:
        for side in options.sides:
            bench.profile(side)
    else:
        measure(bench, options.sides, options.rounds)
    bench.store.close()


if __name__ == "__main__":
    main()
