"""NeighborInputs: the one form in which neighbors reach the model, given or fetched."""

from dataclasses import dataclass

import torch

from configuration_retro import RetroConfig

from .chunk_grid import ChunkGrid, take_points
from .movable import Movable


@dataclass
class NeighborInputs(Movable):
    """The neighbors of the points that one call reaches. The shapes are checked when it is built.

    Shapes: B rows, C slots, each for one point, k neighbors of a point, r tokens of a neighbor.

    Attributes:
        ids: (B, C, k, r) int64 or int32 token ids.
        mask: (B, C, k, r) bool, False for padding and for neighbors that are not there. Other types
            are converted.
        scores: (B, C, k) float, the similarity that each neighbor was found with. It becomes 0
            where there is no neighbor, and where it is nan.

    Raises:
        ValueError: a tensor of another shape or type.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    scores: torch.Tensor

    def __post_init__(self) -> None:
        if self.ids.ndim != 4:
            raise ValueError(
                f"neighbor_ids has shape {tuple(self.ids.shape)}. Give (batch, points, num_neighbors, neighbor_length)."
            )
        if self.ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"neighbor_ids has type {self.ids.dtype}. Give integer token ids (int64).")
        if self.mask.shape != self.ids.shape:
            raise ValueError(
                f"neighbor_attention_mask has shape {tuple(self.mask.shape)}, neighbor_ids {tuple(self.ids.shape)}. "
                "Give both the same shape."
            )
        if self.scores.shape != self.ids.shape[:3]:
            raise ValueError(
                f"neighbor_scores has shape {tuple(self.scores.shape)}, neighbor_ids {tuple(self.ids.shape)}. "
                "Give one score for each neighbor."
            )
        self.mask = self.mask.bool()
        self.scores = self.scores.masked_fill(~self.mask.any(-1) | self.scores.isnan(), 0.0)

    @classmethod
    def from_arguments(
        cls, neighbor_ids: torch.Tensor, mask: torch.Tensor | None, scores: torch.Tensor | None
    ) -> "NeighborInputs":
        """Build from a forward's arguments. Default: all neighbors are there, with score 0."""
        if mask is None:
            mask = torch.ones_like(neighbor_ids, dtype=torch.bool)
        if scores is None:
            scores = torch.zeros(neighbor_ids.shape[:3], device=neighbor_ids.device)
        return cls(neighbor_ids, mask, scores)

    @classmethod
    def none(cls, config: RetroConfig, batch_size: int, device: torch.device) -> "NeighborInputs":
        """Return the neighbors of a call that reaches no point: there is no slot."""
        assert config.num_neighbors is not None and config.neighbor_length is not None, "set when it is built"
        ids = torch.empty(batch_size, 0, config.num_neighbors, config.neighbor_length, dtype=torch.long, device=device)
        return cls.from_arguments(ids, None, None)

    def as_arguments(self) -> dict[str, torch.Tensor]:
        """Return the arguments of a forward."""
        return {"neighbor_ids": self.ids, "neighbor_attention_mask": self.mask, "neighbor_scores": self.scores}

    @property
    def num_slots(self) -> int:
        """C, the number of slots."""
        return self.ids.shape[1]

    def check_fit(self, config: RetroConfig, grid: ChunkGrid) -> None:
        """Compare the shape with the model's and the call's.

        Raises:
            ValueError: another batch size, number or length of neighbors, or more points than the
                call can reach.
        """
        batch_size, length = grid.positions.shape
        most = grid.most_slots()
        expected = (batch_size, self.num_slots, config.num_neighbors, config.neighbor_length)
        if self.ids.shape != expected or self.num_slots > most:
            raise ValueError(
                f"neighbor_ids has shape {tuple(self.ids.shape)}. Give (batch {batch_size}, at most {most} retrieval "
                f"points for {length} tokens, num_neighbors {config.num_neighbors}, neighbor_length "
                f"{config.neighbor_length})."
            )

    def take_slots(self, slots: torch.Tensor) -> "NeighborInputs":
        """Return the neighbors in the given slots (B, C'). Slots beyond the last are empty."""
        exists = slots < self.num_slots
        slots = slots.clamp(max=self.num_slots - 1)
        mask = take_points(self.mask, slots) & exists[..., None, None]
        return NeighborInputs(take_points(self.ids, slots), mask, take_points(self.scores, slots))
