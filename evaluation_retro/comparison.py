"""Comparison: what each row needs for the same tokens, and at what cost."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .compare_rows import Method, Row
from .generation_cost import Cost
from .statistics import Gain, bits_per_byte, gain

RIVALS = (Method.COPY_BASELINE, Method.IN_CONTEXT, Method.KNN_LM, Method.REPLUG, Method.SHUFFLED)


@dataclass
class Comparison:
    """The measurement of all rows on N windows, one of each document.

    Attributes:
        nats: (N,) of the last chunks, by row, the decoder first.
        text_bytes: (N,) of the last chunks.
        costs: by row; empty if none were measured.
        chosen: what rivals chose on training texts, by row.
        machine: where the costs were measured.
        repeated: for the measured and for the training windows, the share whose neighbors hold as
            many tokens in a row of the last chunk and its query as a chunk has.
    """

    nats: dict[Row, np.ndarray]
    text_bytes: np.ndarray
    costs: dict[Row, Cost]
    chosen: dict[Row, dict[str, Any]]
    machine: str
    repeated: dict[str, float] = field(default_factory=dict)

    @property
    def rows(self) -> list[Row]:
        """All rows, in the table's order."""
        return list(self.nats)

    def bits_per_byte(self, row: Row) -> float:
        """Return the bits per UTF-8 byte that a row needs."""
        return bits_per_byte(self.nats[row], self.text_bytes)

    def gain(self, row: Row, over: Row | None = None) -> Gain:
        """Return the bits per byte that a row saves over another one. Default: the decoder."""
        return gain(self.nats[over or Row(Method.DECODER)] - self.nats[row], self.text_bytes)

    def time_ratio(self, row: Row, over: Row) -> dict[int, float]:
        """Return a row's milliseconds a new token, divided by another one's, by number of texts.

        It has the numbers of texts with which both are timed.
        """
        costs = [self.costs[side] for side in (row, over) if side in self.costs]
        if len(costs) < 2:
            return {}
        batches = [batch for batch in costs[0].milliseconds if batch in costs[1].milliseconds]
        return {batch: costs[0].median(batch) / costs[1].median(batch) for batch in batches}

    def pairs(self) -> Iterator[tuple[Row, Row]]:
        """Yield each row with RETRO, and a rival of the same stride, which it should beat.

        A row with drafts meets rivals with drafts.
        """
        for row in self.rows:
            for over in self.rows:
                is_rival = over.method in RIVALS and over.stride in (None, row.stride) and over.drafts == row.drafts
                same_neighbors = over.k == row.k or over.method in (Method.IN_CONTEXT, Method.KNN_LM)
                if row.method is Method.RETRO and is_rival and same_neighbors:
                    yield row, over
                if row.method is Method.BOTH and over == replace(row, method=Method.IN_CONTEXT):
                    yield row, over
