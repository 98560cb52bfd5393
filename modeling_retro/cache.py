"""RetroCache: a decoder's key/value cache, and RETRO's memory of the same tokens."""

from collections.abc import Callable
from dataclasses import replace

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import QuantizedLayer

from .growing import Growth, grow_in_place
from .movable import Movable
from .retrieval_points import RetrievalPoints


class RetroCache(Cache):
    """A decoder's cache layers, of any kind, with RETRO's memory of the same tokens.

    Args:
        decoder_cache: the cache whose layers this one shares. Default: a new `DynamicCache`.
        config: the model's configuration, for the default.

    Attributes (None until the first call; L tokens in the cache, C retrieval points, k·r neighbor
    tokens for each):
        points: where the retrieval points lie. They are those of the first call, with one more for
            each prompt that `generate()` was given this cache with.
        tokens: (B, L) int64 token ids, -1 where a token was given by its embedding.
        query_states: (B, L, d) the decoder states that the encoder attends to. They are kept
            because a query may begin in one call and end in another.
        token_embeds: (B, L, d) unit-length token embeddings, if tokens are matched.
        neighbor_mask: (B, C, k·r) bool, True for neighbor tokens.
        neighbor_memory: states of the points' neighbors, prepared when a point was reached: owner
            -> name -> (B, C, …). An owner is a cross-attention layer, by its number, or "match" or
            "copy".
        reads_on: `generate()` sets it where the next call reaches no point in any row and holds
            tokens alone.
        last_plan: the `AttentionPlan` of the last call, if that call held one token a row.
        last_positions: (B, 1) int64, the content positions of these tokens.
        last_embeds: (B, n, d) the embeddings of the last n tokens, the last first, if tokens are
            matched.
    """

    def __init__(self, decoder_cache: Cache | None = None, config: PreTrainedConfig | None = None):
        shared = DynamicCache(config=config) if decoder_cache is None else decoder_cache
        if not shared.offloading:
            grow_in_place(shared)
        # the list itself is shared: whoever holds the decoder's cache sees the same tokens
        super().__init__(
            layers=shared.layers,
            offloading=shared.offloading,
            offload_only_non_sliding=getattr(shared, "only_non_sliding", True),
        )
        self.layer_class_to_replicate = shared.layer_class_to_replicate
        if shared.offloading:
            self.prefetch_stream = shared.prefetch_stream
        self._forget_all()

    def _forget_all(self) -> None:
        self.points: RetrievalPoints | None = None
        self.tokens: torch.Tensor | None = None
        self.query_states: torch.Tensor | None = None
        self.token_embeds: torch.Tensor | None = None
        self.neighbor_mask: torch.Tensor | None = None
        self.neighbor_memory: dict[int | str, dict[str, torch.Tensor]] = {}
        self._growth: dict[str, Growth] = {}
        self.reads_on = False
        self._forget_last_call()

    def _forget_last_call(self) -> None:
        self.last_plan: Movable | None = None
        self.last_positions: torch.Tensor | None = None
        self.last_embeds: torch.Tensor | None = None

    def begin_call(self, num_tokens: int) -> bool:
        """Return True if a call of so many tokens a row reads just what the last call read.

        If not, what is known of the last call is forgotten.
        """
        if torch.compiler.is_compiling():
            self._forget_last_call()
            return False
        reads_on = self.reads_on and num_tokens == 1 and self.last_plan is not None
        self.reads_on = False
        if not reads_on:
            self._forget_last_call()
        return reads_on

    @property
    def past_length(self) -> int:
        """The number of tokens in RETRO's memory.

        Raises:
            ValueError: the decoder's layers hold another number, since they were filled without
                this memory.
        """
        recorded = 0 if self.tokens is None else self.tokens.shape[1]
        if torch.compiler.is_compiling():  # a static cache counts on the device: nothing to compare while tracing
            return recorded
        cached = self.get_seq_length()
        if recorded != cached:
            raise ValueError(
                f"The cache holds {int(cached)} tokens, but RETRO's memory of them has {recorded}: it was filled by "
                "another model, or with use_retrieval=False. Give the cache that this model returned, or call with "
                "use_retrieval=False."
            )
        return recorded

    def append_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Remember this call's tokens (B, T); return all (B, L)."""
        self.tokens = self._append("tokens", self.tokens, tokens)
        return self.tokens

    def append_query_states(self, states: torch.Tensor) -> torch.Tensor:
        """Remember this call's states (B, T, d); return all (B, L, d)."""
        self.query_states = self._append("query_states", self.query_states, states)
        return self.query_states

    def append_token_embeds(self, embeds: torch.Tensor) -> torch.Tensor:
        """Remember this call's token embeddings (B, T, d); return all (B, L, d)."""
        self.token_embeds = self._append("token_embeds", self.token_embeds, embeds)
        return self.token_embeds

    def _append(self, name: str, known: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
        if known is None:
            return new
        if name not in self._growth:
            self._growth[name] = Growth(dim=1)
        return self._growth[name].append(known, new)

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self._forget_all()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens. The number is negative as in every `Cache`: -3 removes three."""
        self._check_can_change()
        super().crop(tokens_to_remove)
        if not tokens_to_remove:  # a draft without errors, or no draft
            return
        self._forget_last_call()
        # Points beyond the end stay: nothing reads them, and they are overwritten when they are
        # reached again.
        length = int(self.get_seq_length())
        if self.points is not None:
            self.points = self.points.cropped(length)
        for name in ("tokens", "query_states", "token_embeds"):
            if getattr(self, name) is not None:
                setattr(self, name, getattr(self, name)[:, :length])

    def _check_can_change(self) -> None:
        """Refuse to move or remove quantized tokens, which the library leaves where they are.

        Raises:
            ValueError: some layer is quantized.
        """
        if any(isinstance(layer, QuantizedLayer) for layer in self.layers):
            raise ValueError(
                "A quantized cache only grows: its rows and tokens cannot be reordered, repeated, selected or removed. "
                "Use another cache_implementation for beam search, assisted generation and prompt lookup."
            )

    def _map_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._forget_last_call()
        if self.points is not None and self.points.first is not None:
            self.points = replace(self.points, first=change(self.points.first))
        for name in ("tokens", "query_states", "token_embeds", "neighbor_mask"):
            if getattr(self, name) is not None:
                setattr(self, name, change(getattr(self, name)))
        for states in self.neighbor_memory.values():
            for name in states:
                states[name] = change(states[name])

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Replace row i by row beam_idx[i]."""
        self._check_can_change()
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]  # it cannot be told from a LongTensor
        self._map_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self._check_can_change()
        super().batch_repeat_interleave(repeats)
        self._map_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows with these indices."""
        self._check_can_change()
        super().batch_select_indices(indices)
        self._map_rows(lambda rows: rows[indices.to(rows.device)])
