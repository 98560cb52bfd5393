"""Fetching: ask a retriever for the neighbors of each point that a call reaches, once."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import StoppingCriteriaList
from transformers.utils import logging

from configuration_retro import RetroConfig

from .chunk_grid import ChunkGrid
from .neighbor_inputs import NeighborInputs
from .retrieval_points import RetrievalPoints

logger = logging.get_logger(__name__)

Query = tuple[int, ...]  # the tokens that are searched for


class Neighbors(Protocol):
    """The neighbors of n queries, as a retriever returns them."""

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

    If there is a method `describe()`, the model card shows the names and values that it returns. If
    there is an attribute `search`, it names the kind of search (see `RetroConfig.search`).
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
    def embedding_model(self) -> str | None:
        """Name of the embedding model. None: the knowledge base has none."""

    def retrieve(
        self, chunks: Sequence[Sequence[int]], exclude_doc_ids: Sequence[Collection[str]] | None = None
    ) -> Neighbors:
        """Return the nearest neighbors of n queries, without those from excluded documents.

        A query has 1 to chunk_size token ids.
        """


@dataclass
class RetrievedChunk:
    """The neighbors that were retrieved at one point of a row.

    A missing neighbor has document None, chunk index -1 and score nan.

    Attributes:
        chunk: the point's number in its row.
        start, end: the query, the tokens [start, end) of the row without its padding.
        doc_ids: for each of the k neighbors, its document.
        chunk_indices: for each, its number in its document.
        scores: for each, its similarity.
    """

    chunk: int
    start: int
    end: int
    doc_ids: list[str | None]
    chunk_indices: list[int]
    scores: list[float]


class RetrievalLog:
    """All neighbors that one `generate()` has retrieved. Beams that share a query share them.

    Args:
        align_to_prompt: the end of the prompt is a retrieval point.

    Attributes (set by the first steps of `generate()`):
        prompt_mask: (rows, prompt tokens), 0 for padding.
        points: where the retrieval points lie.
        first_given: (rows, 1) the number of the point in slot 0 of the neighbors given to
            `generate()`.
        cross_attentions: attention weights over the neighbors, one entry for each forward pass, if
            asked for.
        pause: the numbers of columns at which no row has reached a further point. No step in it
            waits for the device.
        drafts: True if tokens are drafted from the neighbors.
        stopping_criteria: those of `generate()`, where tokens are drafted.
    """

    def __init__(self, align_to_prompt: bool = False) -> None:
        self.align_to_prompt = align_to_prompt
        self.drafts = False
        self.stopping_criteria = StoppingCriteriaList()
        self._neighbors: dict[Query, tuple[Neighbors, int]] = {}  # query -> (a retriever's answer, row in it)
        self.prompt_mask: torch.Tensor | None = None
        self.points: RetrievalPoints | None = None
        self.first_given: torch.Tensor | None = None
        self.pause = range(0)
        self._nothing: NeighborInputs | None = None
        self._paddings: list[int] | None = None
        self.cross_attentions: list[tuple[torch.Tensor, ...]] = []

    def __len__(self) -> int:
        return len(self._neighbors)

    def __contains__(self, query: Query) -> bool:
        return query in self._neighbors

    def find_pause(self, columns: int) -> None:
        """Set `pause`, while a forward that comes to this number of columns is prepared."""
        mask, points = self.prompt_mask, self.points
        self.pause = range(0)
        if mask is None or points is None or mask.ndim != 2 or columns < mask.shape[1]:
            return
        if self._paddings is None:
            self._paddings = (mask == 0).sum(1).tolist()
        self.pause = points.pause(self._paddings, columns)

    def nothing(self, config: RetroConfig, tokens: torch.Tensor) -> NeighborInputs:
        """Return the neighbors of a call with tokens (B, T) that reaches no point: no slot."""
        known = self._nothing
        if known is None or len(known.ids) != len(tokens) or known.ids.device != tokens.device:
            known = self._nothing = NeighborInputs.none(config, len(tokens), tokens.device)
        return known

    def queries(self) -> list[Query]:
        """Return all that was searched for, the first search first."""
        return list(self._neighbors)

    def retrieve(self, retriever: Retriever, queries: Sequence[Query]) -> None:
        """Fetch the neighbors of those queries that are not here yet, in one search."""
        missing = [query for query in dict.fromkeys(queries) if query not in self]
        if missing:
            neighbors = retriever.retrieve([list(query) for query in missing])
            self._neighbors.update({query: (neighbors, row) for row, query in enumerate(missing)})

    def tensors(self, query: Query) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return a query's neighbors: ids (k, r), mask (k, r) and scores (k)."""
        neighbors, row = self._neighbors[query]
        return neighbors.ids[row], neighbors.attention_mask[row], neighbors.scores[row]

    def retrieved(self, tokens: Sequence[int], points: Sequence[int], chunk_size: int) -> list[RetrievedChunk]:
        """Return the neighbors retrieved at the points of a row without padding, in order."""
        found = []
        for number, end in enumerate(points):
            start = max(end - chunk_size, 0)
            query = tuple(tokens[start:end])
            if query in self:
                neighbors, row = self._neighbors[query]
                found.append(
                    RetrievedChunk(
                        number,
                        start,
                        end,
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
    """Fetch the neighbors of every point that this call reaches, in one search.

    Args:
        tokens: (B, L) int64, all columns so far, those in the cache first; -1 where a token is
            unknown. A query with an unknown token cannot be searched for and gets no neighbors.

    Returns:
        The neighbors, on the tokens' device. They have no slot (C = 0) if no row reaches a point.
    """
    counts = grid.num_reached.squeeze(1).tolist()
    num_slots = max(counts)
    shape = (len(counts), num_slots, retriever.num_neighbors, retriever.neighbor_length)
    ids = torch.zeros(shape, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.bool)
    scores = torch.zeros(shape[:3])
    if num_slots:
        columns, exists = grid.query_columns(num_slots, tokens.shape[1])
        query_tokens = tokens.gather(1, columns).unflatten(1, (num_slots, -1)).tolist()
        lengths = exists.unflatten(1, (num_slots, -1)).sum(-1).tolist()
        queries = {
            (row, slot): tuple(query_tokens[row][slot][-lengths[row][slot] :])
            for row, count in enumerate(counts)
            for slot in range(count)
        }
        queries = {place: query for place, query in queries.items() if min(query) >= 0}
        log.retrieve(retriever, list(queries.values()))
        for place, query in queries.items():
            ids[place], mask[place], scores[place] = log.tensors(query)
    return NeighborInputs(ids, mask, scores).to(tokens.device)


def select_given(grid: ChunkGrid, first_given: torch.Tensor, given: NeighborInputs) -> NeighborInputs:
    """Select the given neighbors of the points that this call reaches. Later points have none.

    Args:
        first_given: (B, 1) the number of the point that slot 0 of the given neighbors stands for.
    """
    num_slots = int(grid.num_reached.max()) if given.num_slots else 0
    return given.take_slots(grid.first_reached - first_given + torch.arange(num_slots, device=first_given.device))


def check_retriever(retriever: Retriever, config: RetroConfig) -> None:
    """Refuse a knowledge base that does not fit the model; say if it is searched in another way.

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
    warn_of_another_search(config, getattr(retriever, "search", None))
    if None not in (config.embedding_model, retriever.embedding_model) and (
        retriever.embedding_model != config.embedding_model
    ):
        raise ValueError(
            f"The model was trained with neighbors found by embedding model {config.embedding_model!r}, but the "
            f"knowledge base was built with {retriever.embedding_model!r}. Use a knowledge base built with the former, "
            "or set config.embedding_model to the latter to change it."
        )


def warn_of_another_search(config: RetroConfig, search: str | None) -> None:
    """Say in one line that neighbors are found by another search than in training, if so."""
    if None not in (search, config.search) and search != config.search:
        logger.warning(
            "The model was trained with neighbors found by %s search; these are found by %s search.",
            config.search,
            search,
        )
