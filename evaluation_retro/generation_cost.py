"""The costs of each row of the comparison: time, memory, and bytes of the store.

Time is that of greedy generation after prompts, prefill and searches included. All rows are timed
in turns, round by round, in one process. No row excludes documents from its searches: the time of a
search hardly depends on it, and users who generate exclude nothing.

Extra memory is counted, not observed:

    parameters   those that the row adds to the decoder, with buffers, in bytes
    cache        the largest cache of one text while it is generated (keys and values of all layers;
                 RETRO's memory of its neighbors), less the decoder's

Embedding models and what Milvus keeps in memory are not counted: nearly all rows share them.
"""

import hashlib
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from modeling_retro.loading import is_added

from .compare_nats import HELD_OUT, RowNats
from .compare_rows import Method, Row
from .kept import Arrays
from .machine import computing_on
from .rival_generation import continue_greedily, generate_in_context, generate_knn, generate_replug
from .row_generation import generate_copying, generate_retro, generate_retro_in_context

RUN = time.time()  # tells which times were measured in one process


@dataclass
class Cost:
    """The costs of one row.

    Attributes:
        milliseconds: of each new token (all texts' tokens counted), one number for each round, by
            the number of texts that are generated at a time.
        parameter_bytes, cache_bytes: the extra memory; see the module.
        store_bytes: of the knowledge base or of kNN-LM's keys; None if a server does not tell.
        runs: the processes in which the times were measured.
    """

    milliseconds: dict[int, list[float]]
    parameter_bytes: int
    cache_bytes: int
    store_bytes: int | None
    runs: set[float] = field(default_factory=set)

    def median(self, batch: int) -> float:
        """Return the median of the rounds, in milliseconds a new token."""
        return statistics.median(self.milliseconds[batch])


class RowCosts:
    """Measures the costs of rows, and keeps them.

    Args:
        nats: the rows' quality, with the models and all that rows have chosen.
    """

    def __init__(self, nats: RowNats) -> None:
        self.nats, self.settings, self.kept = nats, nats.settings, nats.kept
        self.model, self.decoder, self.retriever = nats.model, nats.decoder, nats.retriever
        self.where = computing_on(self.decoder.device)
        self._warm: set[tuple[Row, int]] = set()

    def measure(self, rows: list[Row]) -> dict[Row, Cost]:
        """Return the costs of all rows that are timed."""
        rows = [row for row in rows if row.method.is_timed]
        caches = {row: self._cache_bytes(row) for row in rows}
        costs = {
            row: Cost(
                {batch: [] for batch in self.settings.cost_batches if row.is_timed_with(batch)},
                self._parameter_bytes() if row.method.has_retro else 0,
                caches[row] - caches[rows[0]],
                self._store_bytes(row),
            )
            for row in rows
        }
        turns = [
            (batch, number, row)
            for batch in self.settings.cost_batches
            for number in range(self.settings.rounds)
            for row in rows
            if row.is_timed_with(batch)
        ]
        for batch, number, row in tqdm(turns, desc="Timing", leave=False):
            timed = self._timed(row, batch, number)
            milliseconds = 1000 * float(timed["seconds"]) / (batch * self.settings.new_tokens)
            costs[row].milliseconds[batch].append(milliseconds)
            costs[row].runs.add(float(timed["run"]))
        return costs

    def _name(self, kind: str, row: Row) -> str:
        """Return the name of a kept part; another machine has other parts."""
        machine = hashlib.sha256(self.where.encode()).hexdigest()[:8]
        return f"{kind}_{row.key}_{self.settings.new_tokens}_{machine}"

    def _timed(self, row: Row, batch: int, number: int) -> Arrays:
        """Return the seconds of one generation, and the process that measured it."""

        def measure() -> Arrays:
            prompts = self._prompts(batch, number)
            if (row, batch) not in self._warm:
                self._generate(row, prompts, 1)
                self._warm.add((row, batch))
            self._synchronize()
            start = time.perf_counter()
            self._generate(row, prompts, self.settings.new_tokens)
            self._synchronize()
            return {"seconds": np.array(time.perf_counter() - start), "run": np.array(RUN)}

        return self.kept.arrays(f"{self._name('time', row)}_{batch}_{number}", measure)

    def _synchronize(self) -> None:
        if self.decoder.device.type != "cpu":
            torch.accelerator.synchronize()

    def _prompts(self, batch: int, number: int) -> torch.Tensor:
        """Return the prompts (batch, T − m) of one round: windows without their last chunk."""
        tokens = self.nats.windows[HELD_OUT].tokens
        places = [(batch * number + place) % len(tokens) for place in range(batch)]
        return tokens[places, : -self.nats.chunk].to(self.decoder.device)

    @torch.no_grad()
    def _generate(self, row: Row, prompts: torch.Tensor, new_tokens: int) -> torch.Tensor:
        """Return the new tokens (B, new_tokens)."""
        if row.method is Method.DECODER:
            return continue_greedily(self.decoder, prompts.tolist(), new_tokens)
        if row.method is Method.KNN_LM:
            return generate_knn(self.decoder, self.nats.keys, self.nats.knn, prompts, new_tokens)
        assert row.k is not None and row.stride is not None, "all other rows have neighbors"
        retriever = self.retriever.with_neighbors(row.k)
        if row.method is Method.RETRO:
            return generate_retro(self.model, retriever, prompts, new_tokens, row.stride, drafts=row.drafts)
        if row.method is Method.COPY_BASELINE:
            weight = self.nats.copy_weight(row.k, row.stride)
            return generate_copying(self.decoder, retriever, weight, prompts, new_tokens, row.stride)
        prompted = {"stride": row.stride, **self.nats.prompt_settings(row)}
        if row.method is Method.IN_CONTEXT:
            return generate_in_context(
                self.decoder, retriever, prompts, new_tokens, prompt_lookup=row.drafts, **prompted
            )
        if row.method is Method.BOTH:
            return generate_retro_in_context(self.model, retriever, prompts, new_tokens, **prompted)
        return generate_replug(self.decoder, retriever, prompts, new_tokens, **prompted)

    # Memory

    def _cache_bytes(self, row: Row) -> int:
        """Return the bytes of the largest cache while one text is generated."""

        def measure() -> Arrays:
            model = self.model if row.method.has_retro else self.decoder
            with _largest_cache(model) as largest:
                self._generate(row, self._prompts(1, 0), self.settings.new_tokens)
            return {"bytes": np.array(max(largest))}

        return int(self.kept.arrays(self._name("cache", row), measure)["bytes"])

    def _parameter_bytes(self) -> int:
        """Return the bytes of what RETRO adds to the decoder."""
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        return sum(tensor.numel() * tensor.element_size() for name, tensor in named if is_added(name))

    def _store_bytes(self, row: Row) -> int | None:
        if row.method is Method.DECODER:
            return 0
        if row.method is Method.KNN_LM:
            return self.nats.keys.num_bytes()
        return self.retriever.store.connection.address.bytes_on_disk()


@contextmanager
def _largest_cache(model: PreTrainedModel) -> Iterator[list[int]]:
    """Collect the bytes of the cache after each forward of a model in this block."""
    largest: list[int] = [0]

    def record(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        largest.append(tensor_bytes(output.past_key_values))

    hook = model.register_forward_hook(record)
    try:
        yield largest
    finally:
        hook.remove()


def tensor_bytes(value: Any) -> int:
    """Return the bytes in memory of all tensors in an object, its attributes and its containers."""
    memory: dict[int, int] = {}  # address -> bytes; tensors may share it
    seen: set[int] = set()  # objects, which may refer to each other
    open_values = [value]
    while open_values:
        one = open_values.pop()
        if isinstance(one, torch.Tensor):
            storage = one.untyped_storage()
            memory[storage.data_ptr()] = storage.nbytes()
        elif id(one) not in seen and not isinstance(one, type):
            seen.add(id(one))
            inner = vars(one) if hasattr(one, "__dict__") else one
            open_values += inner.values() if isinstance(inner, dict) else []
            open_values += inner if isinstance(inner, list | tuple) else []
    return sum(memory.values())
