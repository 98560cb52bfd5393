"""Where the chunks of each row lie among the columns of one call: the index arithmetic of RETRO, and nothing else.

Letters: B rows, T columns (tokens) of this call, L columns so far with those in the cache, m tokens a chunk.
A column's *content position* is the number of real tokens before it in its row; chunk u is positions [u·m, (u+1)·m).
"""

from dataclasses import dataclass, replace

import torch


class Movable:
    """A dataclass of tensors that accelerate takes along to a layer's device, as it does with whatever has `to`."""

    def to(self, device: torch.device, **kwargs) -> "Movable":
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor | Movable)}
        return replace(self, **{name: value.to(device, **kwargs) for name, value in tensors.items()})


@dataclass
class ChunkGrid(Movable):
    """The chunks of one call; padding may stand anywhere in a row.

    positions:   (B, T) content position of each column, -1 for padding.
    first:       (B, 1) content position of the row's first real column in this call.
    end:         (B, 1) one past the content position of its last one.
    offset:      (B, 1) column (counted from the start of the cache) of the row's content position 0.
    real:        (B, L) the 2D mask that the positions come from; None: the row is content from `offset` on.
    """

    chunk_size: int
    positions: torch.LongTensor
    first: torch.LongTensor
    end: torch.LongTensor
    offset: torch.LongTensor
    real: torch.BoolTensor | None = None

    @classmethod
    def build(
        cls,
        chunk_size: int,
        batch_size: int,
        length: int,
        past_length: int,
        attention_mask: torch.Tensor | None,
        position_ids: torch.LongTensor | None,
        device: torch.device,
    ) -> "ChunkGrid":
        """Content positions from the 2D mask (B, L); without one, from `position_ids` if the mask is a prepared 4D one
        (padding then repeats position 0), else every column is content.

        Raises:
            ValueError: the 2D mask does not cover the cache's columns and this call's.
        """
        columns = torch.arange(past_length, past_length + length, device=device)
        real = None
        if attention_mask is not None and attention_mask.ndim == 2:
            if attention_mask.shape[1] != past_length + length:
                raise ValueError(
                    f"attention_mask covers {attention_mask.shape[1]} tokens, but there are {past_length} in the cache "
                    f"and {length} in this call: it must cover all {past_length + length}."
                )
            real = attention_mask.to(device=device, dtype=torch.bool)
            positions = real.long().cumsum(-1)[:, past_length:] - 1
            positions = positions.masked_fill(~real[:, past_length:], -1)
        elif attention_mask is not None and position_ids is not None:
            positions = position_ids.to(device).expand(batch_size, length)
            # of a run of zeros, the last one is the row's first token
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

    @property
    def first_chunk(self) -> torch.LongTensor:
        """(B, 1) the first chunk that the row can complete in this call."""
        return self.first // self.chunk_size

    @property
    def num_completed(self) -> torch.LongTensor:
        """(B, 1) how many chunks the row completes in this call."""
        return (self.end // self.chunk_size - self.first_chunk).clamp(min=0)

    @property
    def chunks(self) -> torch.LongTensor:
        """(B, T) the chunk that each column reads, c(i) = ⌊(i+1)/m⌋ − 1 (paper, section 2.4); -1: none."""
        return (self.positions + 1) // self.chunk_size - 1

    def completed(self, num_slots: int) -> torch.BoolTensor:
        """(B, num_slots) True where slot j stands for a chunk that the row completes in this call."""
        return torch.arange(num_slots, device=self.first.device) < self.num_completed

    def chunk_columns(self, num_slots: int, num_columns: int) -> torch.LongTensor:
        """(B, num_slots · m) columns, from the start of the cache, of the chunks in this call's slots.

        Slots that no chunk fills point to some column below `num_columns`.
        """
        places = torch.arange(num_slots * self.chunk_size, device=self.first.device)
        return self._columns_of(self.first_chunk * self.chunk_size + places, num_columns)

    def columns_before(self, number: int, num_columns: int) -> tuple[torch.LongTensor, torch.BoolTensor]:
        """The columns of each column's token and of those before it in its text, `number` in all, itself first.

        Returns:
            columns (B, T, number), from the start of the cache, below `num_columns`; exists (B, T, number), False
            where the text has not begun yet.
        """
        positions = self.positions.unsqueeze(-1) - torch.arange(number, device=self.positions.device)
        return self._columns_of(positions.flatten(1), num_columns).view_as(positions), positions >= 0

    def _columns_of(self, positions: torch.LongTensor, num_columns: int) -> torch.LongTensor:
        """positions (B, N) -> their columns (B, N), from the start of the cache."""
        if self.real is None:
            return (self.offset + positions).clamp(0, num_columns - 1)
        content = self.real.int().argsort(dim=1, descending=True, stable=True)  # a row's real columns, in order
        return content.gather(1, positions.clamp(0, num_columns - 1))

    def readers(self, first_group: torch.LongTensor, num_groups: int) -> "Readers":
        """Group this call's columns by the chunk they read.

        Args:
            first_group: (B, 1) the chunk of group 0; group g stands for chunk first_group + g.
            num_groups: G, how many groups there are.
        """
        batch_size, length = self.positions.shape
        width = min(self.chunk_size, length)
        chunk = self.chunks
        group = chunk - first_group
        # a group's first reader is the chunk's last token, or the row's first token of this call
        first_reader = (self.positions + 1) // self.chunk_size * self.chunk_size - 1
        place = self.positions - torch.maximum(self.first, first_reader)
        reads = (self.positions >= 0) & (chunk >= 0) & (group >= 0) & (group < num_groups)
        unused = num_groups * width  # one slot past the last, for the columns that read nothing
        slots = torch.where(reads, group * width + place, unused)
        columns = torch.arange(length, device=slots.device).expand(batch_size, length)
        slot_columns = slots.new_zeros(batch_size, unused + 1).scatter(1, slots, columns)[:, :unused]
        return Readers(num_groups, width, slot_columns, slots.clamp(max=unused - 1), reads)


@dataclass
class PackedChunkGrid(ChunkGrid):
    """Rows that hold several texts end to end: each has chunks of its own and reads no other's.

    Positions are counted within a text; chunks are numbered through the row, complete ones alone.
    """

    @classmethod
    def from_texts(cls, chunk_size: int, texts: torch.LongTensor) -> "PackedChunkGrid":
        """texts: (B, T) the number of the text that each column belongs to."""
        columns = torch.arange(texts.shape[1], device=texts.device).expand_as(texts)
        starts = columns.masked_fill(texts == texts.roll(1, dims=1), 0).cummax(1).values
        zero = torch.zeros_like(columns[:, :1])
        return cls(chunk_size, columns - starts, first=zero, end=zero + texts.shape[1], offset=zero)

    @property
    def _ends_chunk(self) -> torch.BoolTensor:
        return (self.positions + 1) % self.chunk_size == 0

    @property
    def num_completed(self) -> torch.LongTensor:
        return self._ends_chunk.sum(1, keepdim=True)

    @property
    def chunks(self) -> torch.LongTensor:
        before_its_first = self.positions + 1 < self.chunk_size
        return (self._ends_chunk.cumsum(1) - 1).masked_fill(before_its_first, -1)

    def chunk_columns(self, num_slots: int, num_columns: int) -> torch.LongTensor:
        ends = self._ends_chunk
        slots = torch.where(ends & (self.chunks < num_slots), self.chunks, num_slots)  # one past the last, for the rest
        columns = torch.arange(num_columns, device=slots.device).expand_as(slots)
        last = slots.new_zeros(slots.shape[0], num_slots + 1).scatter(1, slots, columns)[:, :num_slots]
        within = torch.arange(1 - self.chunk_size, 1, device=slots.device)
        return (last.unsqueeze(-1) + within).clamp(min=0).flatten(1)

    def columns_before(self, number: int, num_columns: int) -> tuple[torch.LongTensor, torch.BoolTensor]:
        distances = torch.arange(number, device=self.positions.device)
        columns = torch.arange(num_columns, device=distances.device).unsqueeze(-1) - distances
        return columns.clamp(min=0).expand(*self.positions.shape, -1), self.positions.unsqueeze(-1) >= distances


@dataclass
class Readers(Movable):
    """Columns grouped by the chunk that they read, G groups of w places.

    slot_columns: (B, G·w) the column in each place (column 0 in places that nobody takes).
    slots:        (B, T) the place of each column.
    reads:        (B, T) whether the column reads a group at all.
    """

    num_groups: int
    width: int
    slot_columns: torch.LongTensor
    slots: torch.LongTensor
    reads: torch.BoolTensor

    def group(self, states: torch.Tensor) -> torch.Tensor:
        """(B, T, d) -> (B·G, w, d)."""
        grouped = take_rows(states, self.slot_columns)
        return grouped.view(-1, self.width, states.shape[-1])

    def ungroup(self, grouped: torch.Tensor) -> torch.Tensor:
        """(B·G, w, d) -> (B, T, d). Columns that read nothing get what stands in some place: mask them with `reads`."""
        return take_rows(grouped.reshape(self.slots.shape[0], -1, grouped.shape[-1]), self.slots)


def take_rows(states: torch.Tensor, index: torch.LongTensor) -> torch.Tensor:
    """states (B, N, d), index (B, I) -> (B, I, d): row b's entries index[b]."""
    return states.gather(1, index.unsqueeze(-1).expand(-1, -1, states.shape[-1]))


def take_chunks(memory: torch.Tensor, chunks: torch.LongTensor) -> torch.Tensor:
    """memory (B, C, …), chunks (B, G) -> (B, G, …)."""
    rows = torch.arange(memory.shape[0], device=memory.device).unsqueeze(1)
    return memory[rows, chunks]
