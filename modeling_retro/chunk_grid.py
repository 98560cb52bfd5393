"""The chunk grid: where each row's chunks lie among the columns of one call.

All of RETRO's index arithmetic is here. Shapes: B rows, T columns (tokens) of this call, L columns
including those in the cache, m tokens in a chunk. A column's *content position* is the number of
real tokens before it in its row; chunk u covers positions [u·m, (u+1)·m). A *slot* is a place for
one chunk that the row completes in this call: slot j holds the j-th.
"""

from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

M = TypeVar("M", bound="Movable")


def retrieval_points(length: int, first_point: int, stride: int) -> range:
    """Return the retrieval points of a text: the numbers of tokens after which it is searched for.

    Args:
        length: tokens of the text.
        first_point: f, the first point, from 1 to chunk_size + stride − 1.
        stride: s, the tokens between two points.
    """
    return range(first_point, length + 1, stride)


def aligned_first_point(length: int, chunk_size: int, stride: int) -> int:
    """Return the first point for which the end of a text is a point, and no query needlessly short.

    An empty text gets the paper's grid.
    """
    if 0 < length < chunk_size:
        return length
    return chunk_size + (length - chunk_size) % stride if length else chunk_size


class Movable:
    """A dataclass of tensors with a `to` method; accelerate moves it to a layer's device."""

    def to(self: M, device: torch.device, **kwargs: Any) -> M:
        """Return a copy whose tensors are on the device."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor | Movable)}
        return replace(self, **{name: value.to(device, **kwargs) for name, value in tensors.items()})  # type: ignore[type-var]


@dataclass
class ChunkGrid(Movable):
    """The chunks of one call. Padding may stand anywhere in a row.

    Attributes:
        chunk_size: m, the tokens in a chunk.
        positions: (B, T) int64, the content position of each column, -1 for padding.
        first: (B, 1) int64, the content position of the row's first real column in this call.
        end: (B, 1) int64, one more than the content position of its last real column.
        offset: (B, 1) int64, the column of the row's content position 0, counted from the start of
            the cache.
        real: (B, L) bool, the 2D mask that the positions come from. None: every column from
            `offset` on is real.
    """

    chunk_size: int
    positions: torch.Tensor
    first: torch.Tensor
    end: torch.Tensor
    offset: torch.Tensor
    real: torch.Tensor | None = None

    @classmethod
    def build(
        cls,
        chunk_size: int,
        shape: tuple[int, int],
        past_length: int,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        device: torch.device,
    ) -> "ChunkGrid":
        """Locate a call's columns.

        Content positions come from a 2D mask (B, L). With a prepared 4D mask they come from
        `position_ids`, in which padding repeats position 0. Without a mask every column is real.

        Args:
            shape: (B, T), the rows and columns of this call.
            past_length: the columns in the cache.

        Raises:
            ValueError: the 2D mask does not cover the cache's columns and this call's.
        """
        batch_size, length = shape
        columns = torch.arange(past_length, past_length + length, device=device)
        real = None
        if attention_mask is not None and attention_mask.ndim == 2:
            if attention_mask.shape[1] != past_length + length:
                raise ValueError(
                    f"attention_mask covers {attention_mask.shape[1]} tokens, but there are {past_length} in the cache "
                    f"and {length} in this call. It must cover all {past_length + length}."
                )
            real = attention_mask.to(device=device, dtype=torch.bool)
            positions = real.long().cumsum(-1)[:, past_length:] - 1
            positions = positions.masked_fill(~real[:, past_length:], -1)
        elif attention_mask is not None and position_ids is not None:
            positions = position_ids.to(device).expand(batch_size, length)
            # in a run of zeros, the last one is the row's first token
            padding = torch.zeros_like(positions, dtype=torch.bool)
            padding[:, :-1] = (positions[:, :-1] == 0) & (positions[:, 1:] == 0)
            positions = positions.masked_fill(padding, -1)
        else:
            positions = columns.expand(batch_size, length)

        is_real = positions >= 0
        beyond = past_length + length
        first = positions.masked_fill(~is_real, beyond).amin(1, keepdim=True)
        offset = (columns - positions).masked_fill(~is_real, beyond).amin(1, keepdim=True)
        return cls(chunk_size, positions, first, positions.amax(1, keepdim=True) + 1, offset, real)

    # Which chunks the call completes, and which chunk each column attends to

    @property
    def first_chunk(self) -> torch.Tensor:
        """The chunk in slot 0, (B, 1): the first that the row can complete in this call."""
        return self.first // self.chunk_size

    @property
    def num_completed(self) -> torch.Tensor:
        """The number of chunks that the row completes in this call, (B, 1)."""
        return (self.end // self.chunk_size - self.first_chunk).clamp(min=0)

    @property
    def attended_chunks(self) -> torch.Tensor:
        """The chunk whose neighbors each column attends to, (B, T), -1 for none.

        This is c(i) = ⌊(i+1)/m⌋ − 1 of the paper's section 2.4.
        """
        return (self.positions + 1) // self.chunk_size - 1

    @property
    def first_attended_chunk(self) -> torch.Tensor:
        """The chunk that the row's first column of this call attends to, (B, 1), -1 for none."""
        return (self.first + 1) // self.chunk_size - 1

    def most_attended_chunks(self) -> int:
        """Return the greatest number of chunks that a row of this call's length can attend to."""
        return (self.positions.shape[1] + self.chunk_size - 2) // self.chunk_size + 1

    def most_slots(self) -> int:
        """Return the greatest number of chunks that a row of this call's length can complete."""
        return (self.positions.shape[1] + self.chunk_size - 1) // self.chunk_size

    def num_chunks(self, num_columns: int) -> int:
        """Return the greatest number of complete chunks in a row of `num_columns` columns."""
        return num_columns // self.chunk_size

    def is_completed(self, num_slots: int) -> torch.Tensor:
        """Return (B, num_slots) bool, True where a slot holds a chunk that the row completes."""
        return torch.arange(num_slots, device=self.first.device) < self.num_completed

    # Where their tokens are

    def chunk_columns(self, num_slots: int, num_columns: int) -> torch.Tensor:
        """Return the columns of the chunks in this call's slots, (B, num_slots · m).

        They are counted from the start of the cache. Empty slots point to some column below
        `num_columns`.
        """
        places = torch.arange(num_slots * self.chunk_size, device=self.first.device)
        return self._columns_of(self.first_chunk * self.chunk_size + places, num_columns)

    def columns_before(self, number: int, num_columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the columns of each column's last `number` tokens, its own token first.

        Returns:
            columns (B, T, number), from the start of the cache and below `num_columns`;
            exists (B, T, number) bool, False where the text has not begun yet.
        """
        positions = self.positions.unsqueeze(-1) - torch.arange(number, device=self.positions.device)
        return self._columns_of(positions.flatten(1), num_columns).view_as(positions), positions >= 0

    def _columns_of(self, positions: torch.Tensor, num_columns: int) -> torch.Tensor:
        """Return the columns (B, N) of content positions (B, N), from the start of the cache."""
        if self.real is None:
            return (self.offset + positions).clamp(0, num_columns - 1)
        content = self.real.int().argsort(dim=1, descending=True, stable=True)  # a row's real columns, in order
        return content.gather(1, positions.clamp(0, num_columns - 1))

    def group_queries(self, first_chunk: torch.Tensor, num_groups: int) -> "QueryGroups":
        """Group this call's columns by the chunk whose neighbors they attend to.

        Args:
            first_chunk: (B, 1) the chunk of group 0. Group g is chunk first_chunk + g.
            num_groups: G, the number of groups.
        """
        batch_size, length = self.positions.shape
        width = min(self.chunk_size, length)
        chunk = self.attended_chunks
        group = chunk - first_chunk
        # a group's first query is the chunk's last token, or the row's first token of this call
        first_query = (self.positions + 1) // self.chunk_size * self.chunk_size - 1
        place_in_group = self.positions - torch.maximum(self.first, first_query)
        is_grouped = (self.positions >= 0) & (chunk >= 0) & (group >= 0) & (group < num_groups)
        unused = num_groups * width  # one place past the last, for the columns of no group
        places = torch.where(is_grouped, group * width + place_in_group, unused)
        columns = torch.arange(length, device=places.device).expand(batch_size, length)
        columns_by_place = places.new_zeros(batch_size, unused + 1).scatter(1, places, columns)[:, :unused]
        return QueryGroups(num_groups, width, columns_by_place, places.clamp(max=unused - 1), is_grouped)


@dataclass
class PackedChunkGrid(ChunkGrid):
    """A chunk grid for rows of several texts packed end to end, each with chunks of its own.

    Positions are counted within a text. Chunks are numbered through the row, complete ones only.
    """

    @classmethod
    def from_texts(cls, chunk_size: int, texts: torch.Tensor) -> "PackedChunkGrid":
        """Locate the columns of packed texts, given the number (B, T) of each column's text."""
        columns = torch.arange(texts.shape[1], device=texts.device).expand_as(texts)
        starts = columns.masked_fill(texts == texts.roll(1, dims=1), 0).cummax(1).values
        zero = torch.zeros_like(columns[:, :1])
        return cls(chunk_size, columns - starts, first=zero, end=zero + texts.shape[1], offset=zero)

    @property
    def _ends_chunk(self) -> torch.Tensor:
        return (self.positions + 1) % self.chunk_size == 0

    @property
    def num_completed(self) -> torch.Tensor:
        """The number of chunks in the row, (B, 1)."""
        return self._ends_chunk.sum(1, keepdim=True)

    @property
    def attended_chunks(self) -> torch.Tensor:
        """The chunk whose neighbors each column attends to, (B, T), -1 for none."""
        before_its_first = self.positions + 1 < self.chunk_size
        return (self._ends_chunk.cumsum(1) - 1).masked_fill(before_its_first, -1)

    def chunk_columns(self, num_slots: int, num_columns: int) -> torch.Tensor:
        """Return the columns of the row's chunks, (B, num_slots · m)."""
        chunks = self.attended_chunks
        # one slot past the last, for all other columns
        slots = torch.where(self._ends_chunk & (chunks < num_slots), chunks, num_slots)
        columns = torch.arange(num_columns, device=slots.device).expand_as(slots)
        last = slots.new_zeros(slots.shape[0], num_slots + 1).scatter(1, slots, columns)[:, :num_slots]
        within = torch.arange(1 - self.chunk_size, 1, device=slots.device)
        return (last.unsqueeze(-1) + within).clamp(min=0).flatten(1)

    def columns_before(self, number: int, num_columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the columns of each column's last `number` tokens, its own token first."""
        distances = torch.arange(number, device=self.positions.device)
        columns = torch.arange(num_columns, device=distances.device).unsqueeze(-1) - distances
        return columns.clamp(min=0).expand(*self.positions.shape, -1), self.positions.unsqueeze(-1) >= distances


@dataclass
class QueryGroups(Movable):
    """A call's columns as attention queries, grouped by the chunk whose neighbors they attend to.

    Attributes:
        num_groups: G, the number of groups.
        width: w, the places in a group.
        columns_by_place: (B, G·w) int64, the column in each place, 0 in empty places.
        places: (B, T) int64, the place of each column.
        is_grouped: (B, T) bool, True where the column belongs to a group.
    """

    num_groups: int
    width: int
    columns_by_place: torch.Tensor
    places: torch.Tensor
    is_grouped: torch.Tensor

    def group(self, states: torch.Tensor) -> torch.Tensor:
        """Return states (B, T, d) as (B·G, w, d)."""
        grouped = take_columns(states, self.columns_by_place)
        return grouped.view(-1, self.width, states.shape[-1])

    def ungroup(self, grouped: torch.Tensor) -> torch.Tensor:
        """Return grouped states (B·G, w, d) as (B, T, d). Other columns get any states."""
        return take_columns(grouped.reshape(self.places.shape[0], -1, grouped.shape[-1]), self.places)


def take_columns(states: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return the given columns (B, I) of states (B, N, d), as (B, I, d)."""
    return states.gather(1, columns.unsqueeze(-1).expand(-1, -1, states.shape[-1]))


def take_chunks(states: torch.Tensor, chunks: torch.Tensor) -> torch.Tensor:
    """Return the given chunks (B, G) of states (B, C, …), as (B, G, …)."""
    rows = torch.arange(states.shape[0], device=states.device).unsqueeze(1)
    return states[rows, chunks]
