"""The neighbors of one forward, prepared for the layers and the copy head.

Shapes: B rows, C retrieval points reached in this call, G groups of w queries (see `QueryGroups`),
k neighbors of a point, r tokens of a neighbor; n tokens that are matched.
"""

from dataclasses import dataclass

import torch

from configuration_retro import RetroConfig

from .attention_plan import AttentionPlan
from .cache import RetroCache
from .copy_head import CopyCandidates
from .neighbor_encoder import UnencodedNeighbors


@dataclass
class Reading:
    """The neighbors of one forward, prepared for the layers and the copy head.

    Attributes:
        plan: which tokens attend to which neighbors. None: there are none so far.
        matches: (n, B·G, w, k·r) how well the last tokens match those before each place.
        unencoded: the neighbors, for the encoder.
        candidates: what the copy head may copy.
        memory: the cache, if this call reads neighbors.
    """

    plan: AttentionPlan | None
    matches: torch.Tensor | None
    unencoded: UnencodedNeighbors | None
    candidates: CopyCandidates | None
    memory: RetroCache | None
    config: RetroConfig

    @property
    def cross_attention_matches(self) -> torch.Tensor | None:
        """The matches, if cross-attention uses them."""
        return self.matches if self.config.cca_match else None
