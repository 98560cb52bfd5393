"""Fetching: ask a retriever for the neighbors of each chunk that a call completes, once."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from configuration_retro import RetroConfig

from .chunk_grid import ChunkGrid
from .neighbor_inputs import NeighborInputs

Chunk = tuple[int, ...]  # a chunk's token ids


class Neighbors(Protocol):
    """The neighbors of n chunks, as a retriever returns them."""

    @property
    def ids(self) -> torch.Tensor:
        """(n, k, r) int64 token ids."""

    @property
    def attention_mask(self) -> torch.Tensor:
        """(n, k, r) bool, False for padding and for missing neighbors."""

    @property
    def doc_ids(self) -> list[list[str | None]]:
        """The documents' names: n lists of k, None for missing neighbors."""

    @property
    def chunk_indices(self) -> torch.Tensor:
        """(n, k) int64, the neighbor's number in its document, -1 for missing neighbors."""

    @property
    def scores(self) -> torch.Tensor:
        """(n, k) float similarities, nan for missing neighbors."""


class Retriever(Protocol):
    """The interface that a model needs of a knowledge base; see `retrieval.MilvusRetriever`.

    If there is a method `describe()`, the model card shows the names and values that it returns.
    """

    @property
    def chunk_size(self) -> int:
        """Tokens in a chunk."""

    @property
    def num_neighbors(self) -> int:
        """Neighbors of each chunk."""

    @property
    def neighbor_length(self) -> int:
        """Tokens of one neighbor."""

    @property
    def vocab_size(self) -> int:
        """Token ids of the knowledge base's tokenizer."""

    @property
    def embedding_model(self) -> str:
        """Name of the embedding model."""

    def retrieve(self, chunks: torch.Tensor, exclude_doc_ids: Sequence[Collection[str]] | None = None) -> Neighbors:
        """Return the nearest neighbors of chunks (n, m), without those from excluded documents."""


@dataclass
class RetrievedChunk:
    """The neighbors that were retrieved for one chunk of a row.

    A missing neighbor has document None, chunk index -1 and score nan.

    Attributes:
        chunk: the chunk's number in its row.
        doc_ids: for each of the k neighbors, its document.
        chunk_indices: for each, its number in its document.
        scores: for each, its similarity.
    """

    chunk: int
    doc_ids: list[str | None]
    chunk_indices: list[int]
    scores: list[float]


class RetrievalLog:
    """All neighbors that one `generate()` has retrieved. Beams that share a chunk share them.

    Attributes (set by the first steps of `generate()`):
        prompt_mask: (rows, prompt tokens), 0 for padding.
        first_chunk: (rows, 1) the chunk in slot 0 of the neighbors given to `generate()`.
        cross_attentions: attention weights over the neighbors, one entry for each forward pass, if
            asked for.
    """

    def __init__(self) -> None:
        self._neighbors: dict[Chunk, tuple[Neighbors, int]] = {}  # chunk -> (a retriever's answer, row in it)
        self.prompt_mask: torch.Tensor | None = None
        self.first_chunk: torch.Tensor | None = None
        self.cross_attentions: list[tuple[torch.Tensor, ...]] = []

    def __len__(self) -> int:
        return len(self._neighbors)

    def __contains__(self, chunk: Chunk) -> bool:
        return chunk in self._neighbors

    def retrieve(self, retriever: Retriever, chunks: Sequence[Chunk]) -> None:
        """Fetch the neighbors of those chunks that are not here yet, in one search."""
        missing = [chunk for chunk in dict.fromkeys(chunks) if chunk not in self]
        if missing:
            neighbors = retriever.retrieve(torch.tensor(missing))
            self._neighbors.update({chunk: (neighbors, row) for row, chunk in enumerate(missing)})

    def tensors(self, chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return a chunk's neighbors: ids (k, r), mask (k, r) and scores (k)."""
        neighbors, row = self._neighbors[chunk]
        return neighbors.ids[row], neighbors.attention_mask[row], neighbors.scores[row]

    def retrieved(self, tokens: Sequence[int], chunk_size: int) -> list[RetrievedChunk]:
        """Return the neighbors retrieved for the chunks of a row without padding, in order."""
        found = []
        for number in range(len(tokens) // chunk_size):
            chunk = tuple(tokens[number * chunk_size : (number + 1) * chunk_size])
            if chunk in self:
                neighbors, row = self._neighbors[chunk]
                found.append(
                    RetrievedChunk(
                        number,
                        list(neighbors.doc_ids[row]),
                        neighbors.chunk_indices[row].tolist(),
                        neighbors.scores[row].tolist(),
                    )
                )
        return found


# a compiled model's graph ends before the search, and another one begins after it
@torch.compiler.disable(
    reason="a knowledge base cannot be searched inside a graph. Give the neighbors to the model (neighbor_ids, "
    "neighbor_attention_mask, neighbor_scores; RetroDataCollator and generate() do), or compile without fullgraph=True"
)
def fetch_neighbors(retriever: Retriever, grid: ChunkGrid, tokens: torch.Tensor, log: RetrievalLog) -> NeighborInputs:
    """Fetch the neighbors of every chunk that this call completes, in one search.

    Args:
        tokens: (B, L) int64, all columns so far, those in the cache first; -1 where a token is
            unknown. A chunk with an unknown token cannot be searched for and gets no neighbors.

    Returns:
        The neighbors, on the tokens' device. They have no slot (C = 0) if no row completes a chunk.
    """
    counts = grid.num_completed.squeeze(1).tolist()
    num_slots = max(counts)
    shape = (len(counts), num_slots, retriever.num_neighbors, retriever.neighbor_length)
    ids = torch.zeros(shape, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.bool)
    scores = torch.zeros(shape[:3])
    if num_slots:
        columns = grid.chunk_columns(num_slots, tokens.shape[1])
        chunk_tokens = tokens.gather(1, columns).unflatten(1, (num_slots, -1)).tolist()
        chunks = {
            (row, slot): tuple(chunk_tokens[row][slot])
            for row, count in enumerate(counts)
            for slot in range(count)
            if min(chunk_tokens[row][slot]) >= 0
        }
        log.retrieve(retriever, list(chunks.values()))
        for place, chunk in chunks.items():
            ids[place], mask[place], scores[place] = log.tensors(chunk)
    return NeighborInputs(ids, mask, scores).to(tokens.device)


def select_given(grid: ChunkGrid, first_chunk: torch.Tensor, given: NeighborInputs) -> NeighborInputs:
    """Select the given neighbors of the chunks that this call completes. Later chunks have none.

    Args:
        first_chunk: (B, 1) the chunk that slot 0 of the given neighbors stands for.
    """
    num_slots = int(grid.num_completed.max()) if given.num_slots else 0
    return given.take_slots(grid.first_chunk - first_chunk + torch.arange(num_slots, device=first_chunk.device))


def check_retriever(retriever: Retriever, config: RetroConfig) -> None:
    """Refuse a knowledge base that does not fit the model.

    Raises:
        ValueError: names the setting and both sides' values.
    """
    for name, remedy in (
        (
            "chunk_size",
            "Build the knowledge base with the model's chunk size, or the model with the knowledge base's.",
        ),
        ("num_neighbors", "Set both to the same number: MilvusRetriever(num_neighbors=…), config.num_neighbors."),
        ("neighbor_length", "Set both to the same number: MilvusRetriever(neighbor_length=…), RetroConfig."),
    ):
        if getattr(retriever, name) != getattr(config, name):
            raise ValueError(
                f"{name} is {getattr(config, name)} in the model and {getattr(retriever, name)} in the retriever. "
                f"{remedy}"
            )
    if retriever.vocab_size > config.vocab_size:
        raise ValueError(
            f"The knowledge base has {retriever.vocab_size} token ids, the model's vocabulary only "
            f"{config.vocab_size}. Build it with the model's tokenizer."
        )
    if config.embedding_model is not None and retriever.embedding_model != config.embedding_model:
        raise ValueError(
            f"The model was trained with neighbors found by embedding model {config.embedding_model!r}, but the "
            f"knowledge base was built with {retriever.embedding_model!r}. Use a knowledge base built with the former, "
            "or set config.embedding_model to the latter to change it."
        )
