"""Retrieval points: the places in a text at which a knowledge base is searched.

A point after e tokens has as its query the last min(m, e) of them, m being the chunk size. The last
of these tokens is the first that reads the point's neighbors. In the paper, the points are the ends
of chunks; here the first point and the stride between points are free.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from configuration_retro import RetroConfig

from .movable import Movable


def retrieval_points(length: int, first_point: int, stride: int) -> range:
    """Return the retrieval points of a text: the numbers of tokens before each search.

    Args:
        length: tokens of the text.
        first_point: f, the first point, from 1 to chunk_size + stride − 1.
        stride: s, the tokens between two points.
    """
    return range(first_point, length + 1, stride)


def last_point_number(seen: torch.Tensor, first_point: torch.Tensor | int, stride: int) -> torch.Tensor:
    """Return the number of the last point within the first `seen` tokens, below 0 for none."""
    return (seen - first_point) // stride


def aligned_first_point(length: int, chunk_size: int, stride: int) -> int:
    """Return the first point for which the end of a text is a point, and no query needlessly short.

    An empty text gets the paper's.
    """
    if 0 < length < chunk_size:
        return length
    return chunk_size + (length - chunk_size) % stride if length else chunk_size


@dataclass
class RetrievalPoints(Movable):
    """The retrieval points of a batch: f, f + s, f + 2s, … content tokens, and ends of prompts.

    Attributes:
        chunk_size: m, the most tokens of a query.
        stride: s, the tokens between two points.
        first: (B, 1) int64, each row's first point f. None: m for all rows, as in the paper.
        prompt_ends: numbers of columns, padding included, after which there is a point, too.
    """

    chunk_size: int
    stride: int
    first: torch.Tensor | None
    prompt_ends: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        config: RetroConfig,
        batch_size: int,
        first_point: torch.Tensor | None = None,
        stride: int | None = None,
        known: "RetrievalPoints | None" = None,
    ) -> "RetrievalPoints":
        """Return the points of a call.

        Args:
            config: its chunk size and stride are the defaults.
            batch_size: B, rows of the call.
            first_point: (B,) int64, each row's first point. Default: that of the earlier calls, or
                the paper's.
            stride: tokens between two points. Default: that of the earlier calls.
            known: the points of earlier calls, from the cache.

        Raises:
            ValueError: a first point or a stride has another shape or type or is out of its range,
                or is not that of the earlier calls.
        """
        if known is not None:
            known._check_same(first_point, stride)
            return known
        size = config.chunk_size
        stride = config.retrieval_stride if stride is None else stride
        if type(stride) is not int or not 1 <= stride <= size:
            raise ValueError(f"retrieval_stride is {stride!r}. Give an int from 1 to chunk_size ({size}).")
        if first_point is None:
            return cls(size, stride, None)
        if not isinstance(first_point, torch.Tensor):
            raise ValueError(f"first_point is {first_point!r}. Give a tensor with one int64 number for each row.")
        if first_point.dtype != torch.int64 or first_point.shape != (batch_size,):
            raise ValueError(
                f"first_point has shape {tuple(first_point.shape)} and type {first_point.dtype}. Give one int64 number "
                f"for each of the {batch_size} rows."
            )
        if not torch.compiler.is_compiling():  # reading a number would break the graph
            least, most = (int(number) for number in first_point.aminmax())
            if least < 1 or most >= size + stride:
                raise ValueError(
                    f"first_point is {first_point.tolist()}. Give numbers from 1 to {size + stride - 1} (chunk_size + "
                    "retrieval_stride − 1)."
                )
        return cls(size, stride, first_point.unsqueeze(1))

    def _check_same(self, first_point: torch.Tensor | None, stride: int | None) -> None:
        """Refuse a first point or a stride that is not that of these points."""
        if stride not in (None, self.stride):
            raise ValueError(
                f"retrieval_stride is {stride}, but the cache was filled with stride {self.stride}. Leave it out, or "
                "begin without a cache."
            )
        if first_point is None:
            return
        own = torch.full_like(first_point, self.chunk_size) if self.first is None else self.first.squeeze(1)
        if first_point.shape != own.shape or (first_point != own.to(first_point.device)).any():
            raise ValueError(
                f"first_point is {first_point.tolist()}, but the cache was filled with {own.tolist()}. Leave it out: "
                "a cache keeps its points."
            )

    @property
    def has_short_queries(self) -> bool:
        """True if the query of some point may be shorter than a chunk."""
        return self.first is not None or bool(self.prompt_ends)

    @property
    def least_first(self) -> int:
        """A number that no row's first point is below, known without reading the tensor."""
        return self.chunk_size if self.first is None else 1

    def aligned_to(self, lengths: torch.Tensor) -> "RetrievalPoints":
        """Return these points, moved so that the end of each row's prompt is one.

        Args:
            lengths: (B,) int64, the tokens of the prompts.
        """
        firsts = [aligned_first_point(length, self.chunk_size, self.stride) for length in lengths.tolist()]
        first = torch.tensor(firsts, device=lengths.device).unsqueeze(1)
        return replace(self, first=first)

    def with_prompt_end(self, column: int) -> "RetrievalPoints":
        """Return these points with one more after the given number of columns."""
        return replace(self, prompt_ends=tuple(sorted({*self.prompt_ends, column})))

    def cropped(self, num_columns: int) -> "RetrievalPoints":
        """Return these points without prompt ends beyond the given number of columns."""
        return replace(self, prompt_ends=tuple(end for end in self.prompt_ends if end <= num_columns))

    def most(self, num_columns: int) -> int:
        """Return the greatest number of points in a row of this many columns."""
        return max(0, (num_columns - self.least_first) // self.stride + 1) + len(self.prompt_ends)

    def of_row(self, row: int, mask: list[bool]) -> list[int]:
        """Return the points of one row; in its mask, padding is False."""
        first = self._first_of(row)
        ends = {sum(mask[:column]) for column in self.prompt_ends} - {0}
        return sorted({*retrieval_points(sum(mask), first, self.stride), *ends})

    def after(self, row: int, length: int) -> int:
        """Return the first point of one row behind this many tokens, prompt ends aside."""
        first = self._first_of(row)
        return first + len(retrieval_points(length, first, self.stride)) * self.stride

    def pause(self, paddings: Sequence[int], columns: int) -> range:
        """Return the numbers of columns, from this one on, before any row reaches its next point.

        Args:
            paddings: columns of padding in each row. They and the prompt end before `columns`.
            columns: the columns now, padding included.
        """
        nexts = (padding + self.after(row, columns - padding) for row, padding in enumerate(paddings))
        return range(columns, min(nexts))

    def _first_of(self, row: int) -> int:
        return self.chunk_size if self.first is None else int(self.first[row])
