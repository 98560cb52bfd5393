"""The chunk grid: where each row's retrieval points lie among the columns of one call.

All of RETRO's index arithmetic is here. Shapes: B rows, T columns (tokens) of this call, L columns
including those in the cache, m tokens in a chunk, s tokens between points, X ends of prompts. A
column's *content position* is the number of real tokens before it in its row. A row's points are
numbered from 0. A *slot* is a place for one point that the row reaches in this call: slot j holds
the j-th. By default point u ends chunk u, the positions [u·m, (u+1)·m).
"""

from dataclasses import dataclass

import torch

from .movable import Movable
from .retrieval_points import RetrievalPoints, last_point_number

NEVER = torch.iinfo(torch.int64).max // 2  # the place of a point that no text reaches


@dataclass
class ChunkGrid(Movable):
    """The retrieval points of one call. Padding may stand anywhere in a row.

    Attributes:
        points: where the points of all rows lie.
        positions: (B, T) int64, the content position of each column, -1 for padding.
        first: (B, 1) int64, the content position of the row's first real column in this call.
        end: (B, 1) int64, one more than the content position of its last real column.
        offset: (B, 1) int64, the column of the row's content position 0, counted from the start of
            the cache.
        past_length: the columns in the cache.
        real: (B, L) bool, the 2D mask that the positions come from. None: every column from
            `offset` on is real.
        prompt_points: (B, X) int64, the points that only the ends of prompts give, NEVER where an
            end gives none. None: there are no ends.
    """

    points: RetrievalPoints
    positions: torch.Tensor
    first: torch.Tensor
    end: torch.Tensor
    offset: torch.Tensor
    past_length: int = 0
    real: torch.Tensor | None = None
    prompt_points: torch.Tensor | None = None

    @classmethod
    def build(
        cls,
        points: RetrievalPoints,
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
            check_mask_covers(attention_mask, past_length, length)
            real = attention_mask.to(device=device, dtype=torch.bool)
            positions = content_positions(real, length)
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
        end = positions.amax(1, keepdim=True) + 1
        grid = cls(points.to(device), positions, first, end, offset, past_length, real)
        if points.prompt_ends:
            grid.prompt_points = grid._points_of_prompt_ends()
        return grid

    # Points among content positions

    @property
    def _first_point(self) -> torch.Tensor | int:
        """The first point of each row, (B, 1), or the same number for all."""
        return self.points.chunk_size if self.points.first is None else self.points.first

    def _points_before(self, ends: torch.Tensor) -> torch.Tensor:
        """Return how many points lie after at most `ends` tokens (B, N), (B, N)."""
        number = (last_point_number(ends, self._first_point, self.points.stride) + 1).clamp(min=0)
        if self.prompt_points is not None:
            number = number + (self.prompt_points.unsqueeze(1) <= ends.unsqueeze(-1)).sum(-1)
        return number

    def _last_point(self, ends: torch.Tensor) -> torch.Tensor:
        """Return the last point after at most `ends` tokens (B, N), (B, N), below 1 for none."""
        first, stride = self._first_point, self.points.stride
        last = first + last_point_number(ends, first, stride) * stride
        if self.prompt_points is not None:
            extra = self.prompt_points.unsqueeze(1)
            last = torch.maximum(last, torch.where(extra <= ends.unsqueeze(-1), extra, -1).amax(-1))
        return last

    def _points_of_prompt_ends(self) -> torch.Tensor:
        """Return `prompt_points`: ends that are points anyway, or of an empty prompt, give none."""
        ends = torch.tensor(self.points.prompt_ends, device=self.positions.device)
        if self.real is None:
            tokens = ends - self.offset
        else:
            tokens = self.real.long().cumsum(1)[:, (ends - 1).clamp(max=self.real.shape[1] - 1)]
        is_known = ends <= self.past_length + self.positions.shape[1]  # not of later calls
        is_new = (tokens < self._first_point) | ((tokens - self._first_point) % self.points.stride != 0)
        is_new[:, 1:] &= tokens[:, 1:] != tokens[:, :-1]
        return tokens.masked_fill(~(is_known & is_new & (tokens > 0)), NEVER)

    def _prompt_ends_after(self, column: int) -> int:
        """Return how many ends of prompts lie after more than `column` columns."""
        return sum(column < end <= self.past_length + self.positions.shape[1] for end in self.points.prompt_ends)

    # Which points the call reaches, and which point's neighbors each column reads

    @property
    def first_reached(self) -> torch.Tensor:
        """The number of the point in slot 0, (B, 1), the first that this call can reach."""
        return self._points_before(self.first)

    @property
    def num_reached(self) -> torch.Tensor:
        """How many points the row reaches in this call, (B, 1)."""
        return (self._points_before(self.end) - self.first_reached).clamp(min=0)

    @property
    def read_points(self) -> torch.Tensor:
        """The number of the point whose neighbors each column reads, (B, T), -1 for none.

        By default this is c(i) = ⌊(i+1)/m⌋ − 1 of the paper's section 2.4.
        """
        return self._points_before(self.positions + 1) - 1

    @property
    def first_read(self) -> torch.Tensor:
        """The number of the point that the call's first column reads, (B, 1), -1 for none."""
        return self._points_before(self.first + 1) - 1

    def most_read(self) -> int:
        """Return the greatest number of points that the columns of a row can read in this call."""
        stride = self.points.stride
        return (self.positions.shape[1] + stride - 2) // stride + 1 + self._prompt_ends_after(self.past_length + 1)

    def most_slots(self) -> int:
        """Return the greatest number of points that a row of this call's length can reach."""
        stride = self.points.stride
        return (self.positions.shape[1] + stride - 1) // stride + self._prompt_ends_after(self.past_length)

    def is_reached(self, num_slots: int) -> torch.Tensor:
        """Return (B, num_slots) bool, True where a slot holds a point that the row reaches."""
        return torch.arange(num_slots, device=self.first.device) < self.num_reached

    # Where tokens are

    def _slot_points(self, num_slots: int) -> torch.Tensor:
        """Return the points in this call's slots, (B, num_slots). Empty slots hold later ones."""
        first, stride = self._first_point, self.points.stride
        # by earlier calls, without prompt ends
        reached = (last_point_number(self.first, first, stride) + 1).clamp(min=0)
        points = first + (reached + torch.arange(num_slots, device=self.first.device)) * stride
        if self.prompt_points is not None:
            extra = self.prompt_points.masked_fill(self.prompt_points <= self.first, NEVER)
            points = torch.cat([points, extra], dim=1).sort(1).values[:, :num_slots]
        return points

    def query_columns(self, num_slots: int, num_columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the columns of the queries of the points in this call's slots.

        Returns:
            columns (B, num_slots · m), from the start of the cache and below `num_columns`;
            exists (B, num_slots · m) bool, False before the first token of a query that is shorter
            than m. Empty slots point to some columns.
        """
        size = self.points.chunk_size
        within = torch.arange(-size, 0, device=self.first.device)
        positions = (self._slot_points(num_slots).unsqueeze(-1) + within).flatten(1)
        return self._columns_of(positions, num_columns), positions >= 0

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

    def group_queries(self, first_point: torch.Tensor, num_groups: int) -> "QueryGroups":
        """Group this call's columns by the point whose neighbors they read.

        Args:
            first_point: (B, 1) the number of the point of group 0. Group g is point
                first_point + g.
            num_groups: G, the number of groups.
        """
        batch_size, length = self.positions.shape
        width = min(self.points.stride, length)
        point = self.read_points
        group = point - first_point
        # a group's first query is the token before the point, or the row's first token of this call
        place_in_group = self.positions - torch.maximum(self.first, self._last_point(self.positions + 1) - 1)
        is_grouped = (self.positions >= 0) & (point >= 0) & (group >= 0) & (group < num_groups)
        unused = num_groups * width  # one place past the last, for the columns of no group
        places = torch.where(is_grouped, group * width + place_in_group, unused)
        columns = torch.arange(length, device=places.device).expand(batch_size, length)
        columns_by_place = places.new_zeros(batch_size, unused + 1).scatter(1, places, columns)[:, :unused]
        return QueryGroups(num_groups, width, columns_by_place, places.clamp(max=unused - 1), is_grouped)


@dataclass
class PackedChunkGrid(ChunkGrid):
    """A chunk grid for rows of several texts packed end to end, each with points of its own.

    Positions are counted within a text, and so are points: each text of a row has the row's first
    point. Points are numbered through the row.
    """

    @classmethod
    def from_texts(cls, points: RetrievalPoints, texts: torch.Tensor) -> "PackedChunkGrid":
        """Locate the columns of packed texts, given the number (B, T) of each column's text."""
        columns = torch.arange(texts.shape[1], device=texts.device).expand_as(texts)
        starts = columns.masked_fill(texts == texts.roll(1, dims=1), 0).cummax(1).values
        zero = torch.zeros_like(columns[:, :1])
        points = points.to(texts.device)
        return cls(points, columns - starts, first=zero, end=zero + texts.shape[1], offset=zero)

    @property
    def _reaches_point(self) -> torch.Tensor:
        """True for each column after which there is a point, (B, T)."""
        beyond_first = self.positions + 1 - self._first_point
        return (beyond_first >= 0) & (beyond_first % self.points.stride == 0)

    @property
    def num_reached(self) -> torch.Tensor:
        """How many points there are in the row, (B, 1)."""
        return self._reaches_point.sum(1, keepdim=True)

    @property
    def read_points(self) -> torch.Tensor:
        """The number of the point whose neighbors each column reads, (B, T), -1 for none."""
        before_its_first = self.positions + 1 < self._first_point
        return (self._reaches_point.cumsum(1) - 1).masked_fill(before_its_first, -1)

    def most_slots(self) -> int:
        """Return the greatest number of points that a row of this call's length can reach."""
        least = min(self.points.least_first, self.points.stride)  # tokens of a point, if all texts are short
        return (self.positions.shape[1] + least - 1) // least

    def query_columns(self, num_slots: int, num_columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the columns of the queries of the row's points, and which of them exist."""
        points, size = self.read_points, self.points.chunk_size
        # one slot past the last, for all other columns
        slots = torch.where(self._reaches_point & (points < num_slots), points, num_slots)
        columns = torch.arange(num_columns, device=slots.device).expand_as(slots)
        last = slots.new_zeros(slots.shape[0], num_slots + 1).scatter(1, slots, columns)[:, :num_slots]
        within = torch.arange(1 - size, 1, device=slots.device)
        exists = self.positions.gather(1, last).unsqueeze(-1) + within >= 0
        return (last.unsqueeze(-1) + within).clamp(min=0).flatten(1), exists.flatten(1)

    def columns_before(self, number: int, num_columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the columns of each column's last `number` tokens, its own token first."""
        distances = torch.arange(number, device=self.positions.device)
        columns = torch.arange(num_columns, device=distances.device).unsqueeze(-1) - distances
        return columns.clamp(min=0).expand(*self.positions.shape, -1), self.positions.unsqueeze(-1) >= distances


@dataclass
class QueryGroups(Movable):
    """A call's columns as attention queries, grouped by the point whose neighbors they read.

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

    @property
    def is_trivial(self) -> bool:
        """True for one column a row in one place: states are then grouped as they are.

        A compiled graph is to hold for all sizes, and never asks.
        """
        return not torch.compiler.is_compiling() and self.num_groups * self.width == self.places.shape[1] == 1

    def group(self, states: torch.Tensor) -> torch.Tensor:
        """Return states (B, T, d) as (B·G, w, d)."""
        if self.is_trivial:
            return states
        grouped = take_columns(states, self.columns_by_place)
        return grouped.view(-1, self.width, states.shape[-1])

    def ungroup(self, grouped: torch.Tensor) -> torch.Tensor:
        """Return grouped states (B·G, w, d) as (B, T, d). Other columns get any states."""
        if self.is_trivial:
            return grouped
        return take_columns(grouped.reshape(self.places.shape[0], -1, grouped.shape[-1]), self.places)


def check_mask_covers(attention_mask: torch.Tensor, past_length: int, length: int) -> None:
    """Refuse a mask (B, L) that does not cover the cache's columns and this call's.

    Raises:
        ValueError: names the three numbers.
    """
    if attention_mask.shape[1] != past_length + length:
        raise ValueError(
            f"attention_mask covers {attention_mask.shape[1]} tokens, but there are {past_length} in the cache "
            f"and {length} in this call. It must cover all {past_length + length}."
        )


def content_positions(real: torch.Tensor, length: int) -> torch.Tensor:
    """Return the content positions of the last columns (B, T), -1 for padding.

    Args:
        real: (B, L) bool, False for padding.
        length: T, the columns of this call.
    """
    start = real.shape[1] - length
    return (real.long().cumsum(-1)[:, start:] - 1).masked_fill(~real[:, start:], -1)


def take_columns(states: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return the given columns (B, I) of states (B, N, d), as (B, I, d)."""
    return states.gather(1, columns.unsqueeze(-1).expand(-1, -1, states.shape[-1]))


def take_points(states: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Return the given points (B, G) of states (B, C, …), as (B, G, …)."""
    rows = torch.arange(states.shape[0], device=states.device).unsqueeze(1)
    return states[rows, points]
