"""A stopwatch for the parts of generation: where a chunk's life, from tokens to attention, goes."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from modeling_retro import generation, reading_model
from modeling_retro.chunk_grid import ChunkGrid
from modeling_retro.chunked_cross_attention import ChunkedCrossAttention
from modeling_retro.copy_head import CopyHead
from modeling_retro.neighbor_encoder import NeighborEncoder
from retrieval import BulkTokenizer, Embedder, MilvusRetriever, MilvusStore

# What is timed: the part's name, the owner of a function, and the function's name. A part's time is
# its own: that of parts that run inside it is theirs.
PARTS: list[tuple[str, Any, str]] = [
    ("detokenize", BulkTokenizer, "decode_text"),
    ("embed", Embedder, "encode"),
    ("search", MilvusStore, "search"),
    ("search", MilvusStore, "search_words"),
    ("search", MilvusStore, "search_both"),
    ("retriever, the rest", MilvusRetriever, "retrieve"),
    ("collect neighbors", generation, "fetch_neighbors"),
    ("encode", NeighborEncoder, "forward"),
    ("project keys and values", ChunkedCrossAttention, "_keys_values"),
    ("locate on the grid", ChunkGrid, "build"),
    ("prepare the step", generation.RetroGenerationMixin, "_step_neighbors"),
    ("plan attention", reading_model, "plan_attention"),
    ("match tokens", reading_model, "match_tokens"),
    ("match tokens", reading_model, "match_next_token"),
    ("find candidates", reading_model, "find_candidates"),
    ("attend", ChunkedCrossAttention, "forward"),
    ("mix by the copy head", CopyHead, "forward"),
]


class Stopwatch:
    """Add up the milliseconds that each part takes on its own, and count its calls."""

    def __init__(self) -> None:
        self.milliseconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        self._inner: list[float] = [0.0]  # of the parts that run inside those that are running

    def timed(self, part: str, function: Callable) -> Callable:
        """Return a function that does the same, and is timed as a part."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                whole = 1000 * (time.perf_counter() - started)
                own = whole - self._inner.pop()
                self._inner[-1] += whole
                self.milliseconds[part] = self.milliseconds.get(part, 0.0) + own
                self.calls[part] = self.calls.get(part, 0) + 1

        return run

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Time all `PARTS` in this block."""
        kept = [(owner, name, vars(owner)[name]) for _, owner, name in PARTS]
        try:
            for (part, owner, name), (_, _, function) in zip(PARTS, kept, strict=True):
                if isinstance(function, classmethod):
                    setattr(owner, name, classmethod(self.timed(part, function.__func__)))
                else:
                    setattr(owner, name, self.timed(part, function))
            yield
        finally:
            for owner, name, function in kept:
                setattr(owner, name, function)

    def table(self, seconds: float, searches: int, tokens: int) -> Iterator[str]:
        """Yield the lines of the table of parts, in Markdown; `seconds` is the time of all."""
        yield "| part | calls | ms a search | ms a token | % |"
        yield "|---|---|---|---|---|"
        rest = 1000 * seconds - sum(self.milliseconds.values())
        order = dict.fromkeys(part for part, _, _ in PARTS if part in self.milliseconds)
        for part in [*order, "the decoder and the rest"]:
            own = self.milliseconds.get(part, rest)
            share = own / seconds / 10
            yield (f"| {part} | {self.calls.get(part, '')} | {own / searches:.2f} | {own / tokens:.3f} | {share:.1f} |")
