"""Measure windows under any neighbors: the nats of each token, kept on disk.

With a frozen decoder and a copy head, the decoder's states do not depend on the neighbors. So they
are stored once, and each further measurement takes seconds. With cross-attention, every measurement
is a forward pass. Both give the same numbers.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from configuration_retro import RetroConfig
from modeling_retro import RetroForCausalLM

from .decoder_states import ReadSequences, few_logits, prepare, read_sequences
from .found import Found
from .kept import Arrays, Kept
from .windows import Windows

STATES = ("states", "log_sums")  # of `ReadSequences`
WINDOWS_KEPT = 8  # in one file: a break loses at most so many


class WindowNats:
    """The nats (N, T − 1) of the windows' tokens 1, …, T − 1, as float32.

    Args:
        model: RETRO in evaluation mode.
        windows: N windows of T tokens.
        kept: the folder that keeps all results.
        name: of the windows in that folder, such as "held_out".
        batch_size: windows in a forward pass.

    Raises:
        ValueError: the windows are longer than the model's positions.
    """

    def __init__(
        self, model: RetroForCausalLM, windows: Windows, kept: Kept, name: str = "held_out", batch_size: int = 4
    ) -> None:
        if windows.tokens.shape[1] > model.config.n_positions:
            raise ValueError(
                f"A window has {windows.tokens.shape[1]} tokens, but the model has {model.config.n_positions} "
                "positions. Set a smaller --window."
            )
        self.model, self.windows, self.kept, self.name, self.batch_size = model, windows, kept, name, batch_size
        self.stores_states = model.config.copy_head and not model.config.cca_layers

    def off(self) -> np.ndarray:
        """Measure the decoder alone."""
        if self.stores_states:
            return self._in_parts("off", self._plain)
        return self._in_parts("off", lambda rows: self._forward(rows, {"use_retrieval": False}))

    def on(self, name: str, found: Found) -> np.ndarray:
        """Measure RETRO with neighbors, of any number and stride.

        Args:
            name: of this measurement in the folder.
            found: the windows' neighbors.
        """
        return self._in_parts(name, lambda rows: self._reading(rows, found.rows(rows)))

    def _reading(self, rows: slice, found: Found) -> torch.Tensor:
        with configured(self.model.config, found) as config:
            if self.stores_states:
                batch = prepare(self.model, config, self._states(rows), found.inputs)
                return batch.nats(self.model.copy_head, 0)
            stride = {"retrieval_stride": found.stride}
            return self._forward(rows, found.inputs.to(self.model.device).as_arguments() | stride)

    def _in_parts(self, name: str, compute: Callable[[slice], torch.Tensor]) -> np.ndarray:
        """Return the nats of all windows, kept in parts and computed in batches."""

        @torch.no_grad()
        def measure(part: range) -> Arrays:
            starts = range(part.start, part.stop, self.batch_size)
            nats = [compute(slice(start, min(start + self.batch_size, part.stop))) for start in starts]
            return {"nats": torch.cat(nats).float().cpu().numpy()}

        return self.kept.parts(f"{self.name}_{name}", len(self.windows), WINDOWS_KEPT, measure)["nats"]

    def _forward(self, rows: slice, arguments: dict[str, Any]) -> torch.Tensor:
        tokens = self.windows.tokens[rows].to(self.model.device)
        logits = self.model(input_ids=tokens, use_cache=False, **arguments).logits[:, :-1]
        return F.cross_entropy(logits.float().transpose(1, 2), tokens[:, 1:], reduction="none")

    def _plain(self, rows: slice) -> torch.Tensor:
        """Return the decoder's nats from its stored states."""
        read = self._states(rows)
        logits = [
            few_logits(self.model, read.states[row : row + 1, :-1], read.tokens[row, 1:]) for row in range(len(read))
        ]
        right = torch.cat([its.diagonal(dim1=1, dim2=2) for its in logits])
        return read.log_sums[:, :-1] - right

    def _states(self, rows: slice) -> ReadSequences:
        """Return what the decoder computed for some windows of one part."""
        start = rows.start // WINDOWS_KEPT * WINDOWS_KEPT
        tokens = self.windows.tokens[start : start + WINDOWS_KEPT]

        def run() -> Arrays:
            parts = [read_sequences(self.model, part) for part in tokens.split(self.batch_size)]
            return {
                name: torch.cat([getattr(part, name) for part in parts]).cpu().numpy()
                for name in ("states", "log_sums")
            }

        stored = self.kept.arrays(f"{self.name}_states_{start}", run)
        own = slice(rows.start - start, rows.stop - start)
        states, log_sums = (
            torch.from_numpy(stored[name][own]).to(self.model.device) for name in ("states", "log_sums")
        )
        return ReadSequences(tokens[own].to(self.model.device), states, log_sums)


@contextlib.contextmanager
def configured(config: RetroConfig, found: Found) -> Iterator[RetroConfig]:
    """Set the number and stride of the neighbors that a model reads, in this block."""
    before = config.num_neighbors, config.retrieval_stride
    config.num_neighbors, config.retrieval_stride = found.ids.shape[2], found.stride
    try:
        yield config
    finally:
        config.num_neighbors, config.retrieval_stride = before
