"""Asking a retriever for the neighbors of the chunks that a call completes, each chunk once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from configuration_retro import RetroConfig

from .chunk_grid import ChunkGrid, take_chunks

# neighbor_ids and neighbor_attention_mask (B, C, k, r), neighbor_scores (B, C, k)
FetchedNeighbors = tuple[torch.LongTensor, torch.BoolTensor, torch.FloatTensor]


class Retriever(Protocol):
    """The interface that a model needs of a knowledge base; `retrieval.MilvusRetriever` has it.

    `retrieve(chunks)` takes (n, m) token ids and returns an object with `ids` (n, k, r) int64, `attention_mask`
    (n, k, r) bool, `doc_ids` (n lists of k names or None), `chunk_indices` (n, k) int64 and `scores` (n, k) float.
    If it has `describe()`, the model card shows the names and values that this returns.
    """

    chunk_size: int
    num_neighbors: int
    neighbor_length: int
    vocab_size: int
    embedding_model: str

    def retrieve(self, chunks: torch.LongTensor, exclude_doc_ids: Sequence | None = None) -> Any: ...


@dataclass
class RetrievedChunk:
    """The neighbors that one chunk read: for each of the k, its document, its chunk there, and the similarity.

    A missing neighbor has document None, chunk index -1 and score nan.
    """

    chunk: int  # the chunk's number in its row
    doc_ids: list[str | None]
    chunk_indices: list[int]
    scores: list[float]


class RetrievalLog:
    """All that one `generate()` has retrieved, by the chunk's tokens: beams that share a chunk share its neighbors.

    Attributes (set while it runs):
        prompt_mask: (rows, prompt tokens), 0 for padding.
        first_chunk: (rows, 1) the chunk that slot 0 of neighbors given to `generate()` stands for.
        cross_attentions: of each forward pass that read neighbors, if attention weights are asked for.
    """

    def __init__(self):
        self._neighbors: dict[tuple[int, ...], tuple[Any, int]] = {}  # chunk -> (a retrieve() result, row in it)
        self.prompt_mask: torch.Tensor | None = None
        self.first_chunk: torch.LongTensor | None = None
        self.cross_attentions: list[tuple[torch.Tensor, ...]] = []

    def __len__(self) -> int:
        return len(self._neighbors)

    def __contains__(self, chunk: tuple[int, ...]) -> bool:
        return chunk in self._neighbors

    def retrieve(self, retriever: Retriever, chunks: Sequence[tuple[int, ...]]) -> None:
        """Fetch those of `chunks` that are not here yet, in one call."""
        missing = [chunk for chunk in dict.fromkeys(chunks) if chunk not in self]
        if missing:
            neighbors = retriever.retrieve(torch.tensor(missing))
            self._neighbors.update({chunk: (neighbors, row) for row, chunk in enumerate(missing)})

    def tensors(self, chunk: tuple[int, ...]) -> tuple[torch.LongTensor, torch.BoolTensor, torch.FloatTensor]:
        """The neighbors of a chunk: ids (k, r), mask (k, r) and scores (k), 0 where there is none."""
        neighbors, row = self._neighbors[chunk]
        return neighbors.ids[row], neighbors.attention_mask[row], neighbors.scores[row].nan_to_num(0.0)

    def read_by(self, tokens: Sequence[int], chunk_size: int) -> list[RetrievedChunk]:
        """Return the neighbors retrieved for the chunks of a row of content tokens, in order."""
        read = []
        for number in range(len(tokens) // chunk_size):
            chunk = tuple(tokens[number * chunk_size : (number + 1) * chunk_size])
            if chunk in self:
                neighbors, row = self._neighbors[chunk]
                read.append(
                    RetrievedChunk(
                        number,
                        list(neighbors.doc_ids[row]),
                        neighbors.chunk_indices[row].tolist(),
                        neighbors.scores[row].tolist(),
                    )
                )
        return read


# a compiled model's graph ends before the search, and another one begins after it
@torch.compiler.disable(
    reason="a knowledge base cannot be searched inside a graph. Give the neighbors to the model (neighbor_ids, "
    "neighbor_attention_mask, neighbor_scores; RetroDataCollator and generate() do), or compile without fullgraph=True"
)
def fetch_neighbors(
    retriever: Retriever, grid: ChunkGrid, tokens: torch.LongTensor, log: RetrievalLog
) -> FetchedNeighbors:
    """Neighbors of every chunk that this call completes, searched in one batch.

    Args:
        tokens: (B, L) all columns so far, those of the cache first; -1 where a token is unknown. A chunk with an
            unknown token cannot be searched and gets no neighbors.

    Returns:
        neighbor_ids, neighbor_attention_mask (B, C, k, r) and neighbor_scores (B, C, k) on the tokens' device; C = 0 if
        no row completes a chunk.
    """
    size = grid.chunk_size
    counts = grid.num_completed.squeeze(1).tolist()
    num_slots = max(counts)
    shape = (len(counts), num_slots, retriever.num_neighbors, retriever.neighbor_length)
    ids = torch.zeros(shape, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.bool)
    scores = torch.zeros(shape[:3])
    if num_slots:
        columns = grid.chunk_columns(num_slots, tokens.shape[1])
        chunk_tokens = tokens.gather(1, columns).unflatten(1, (num_slots, size)).tolist()
        chunks = {
            (row, slot): tuple(chunk_tokens[row][slot])
            for row, count in enumerate(counts)
            for slot in range(count)
            if min(chunk_tokens[row][slot]) >= 0
        }
        log.retrieve(retriever, list(chunks.values()))
        for place, chunk in chunks.items():
            ids[place], mask[place], scores[place] = log.tensors(chunk)
    return ids.to(tokens.device), mask.to(tokens.device), scores.to(tokens.device)


def given_neighbors(
    grid: ChunkGrid,
    first_chunk: torch.LongTensor,
    neighbor_ids: torch.LongTensor,
    mask: torch.Tensor | None,
    scores: torch.Tensor | None,
) -> FetchedNeighbors:
    """Select the given neighbors of the chunks completed in this call.

    Args:
        first_chunk: (B, 1) the chunk that slot 0 stands for.
        neighbor_ids, mask: (B, C, k, r); mask None: all are there.
        scores: (B, C, k); None: 0.

    Returns:
        neighbor_ids, neighbor_attention_mask (B, C', k, r) and neighbor_scores (B, C', k); chunks beyond the given ones
        have no neighbors.
    """
    mask = torch.ones_like(neighbor_ids, dtype=torch.bool) if mask is None else mask.bool()
    scores = torch.zeros(neighbor_ids.shape[:3], device=neighbor_ids.device) if scores is None else scores
    num_slots = int(grid.num_completed.max()) if neighbor_ids.shape[1] else 0
    slots = grid.first_chunk - first_chunk + torch.arange(num_slots, device=first_chunk.device)
    is_given = slots < neighbor_ids.shape[1]
    slots = slots.clamp(max=neighbor_ids.shape[1] - 1)
    mask = take_chunks(mask, slots) & is_given[..., None, None]
    return take_chunks(neighbor_ids, slots), mask, take_chunks(scores, slots)


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
                f"{name} is {getattr(config, name)} in the model and {getattr(retriever, name)} in the retriever. {remedy}"
            )
    if retriever.vocab_size > config.vocab_size:
        raise ValueError(
            f"The knowledge base has {retriever.vocab_size} token ids, the model's vocabulary only {config.vocab_size}. Build it "
            "with the model's tokenizer."
        )
    if config.embedding_model is not None and retriever.embedding_model != config.embedding_model:
        raise ValueError(
            f"The model was trained with neighbors found by embedding model {config.embedding_model!r}, the knowledge "
            f"base is built with {retriever.embedding_model!r}. Use a knowledge base built with the former, or set "
            "config.embedding_model to the latter if you mean to change it."
        )
