"""RetroCache: a decoder's key/value cache, and what RETRO must remember of a row beside it."""

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig


class RetroCache(Cache):
    """The decoder's cache layers (any kind that transformers knows), with RETRO's memory of the same tokens.

    Args:
        decoder_cache: the cache whose layers this one takes over. Default: a new `DynamicCache`.
        config: the model's configuration, for the default.

    Attributes (None until the first call; L tokens in the cache, C = ⌊L/m⌋ chunks, k·r neighbor tokens a chunk):
        tokens:          (B, L) int64 token ids, -1 where a token was given by its embedding.
        chunk_states:    (B, L, d) decoder states that the encoder attends to, so that a chunk may begin in one call
                         and end in another.
        neighbor_mask:   (B, C, k·r) bool, False where chunk c has no neighbor token.
        neighbor_memory: what each reader knows of each chunk's neighbors, prepared once, when the chunk completed: (B, C, …)
                         by name. Keys and values of a cross-attention layer, by its number; "match" and "copy".
        token_embeds:    (B, L, d) unit-length token embeddings, where something goes by matches.
    """

    def __init__(self, decoder_cache: Cache | None = None, config: PreTrainedConfig | None = None):
        # the layers stay the decoder cache's own: whatever holds a reference to it sees the same tokens
        vars(self).update(vars(decoder_cache if decoder_cache is not None else DynamicCache(config=config)))
        self.tokens: torch.LongTensor | None = None
        self.chunk_states: torch.Tensor | None = None
        self.neighbor_mask: torch.BoolTensor | None = None
        self.neighbor_memory: dict[int | str, dict[str, torch.Tensor]] = {}
        self.token_embeds: torch.Tensor | None = None

    @property
    def past_length(self) -> int:
        """Tokens in RETRO's memory.

        Raises:
            ValueError: the decoder's layers hold other tokens (they were filled without this memory).
        """
        recorded = 0 if self.tokens is None else self.tokens.shape[1]
        if torch.compiler.is_compiling():  # a static cache counts on the device: nothing to compare while tracing
            return recorded
        cached = self.get_seq_length()
        if recorded != cached:
            raise ValueError(
                f"The cache holds {int(cached)} tokens, but RETRO's memory of them has {recorded}: it was filled by "
                "another model, or with use_retrieval=False. Pass on the cache that this model returned, or call with "
                "use_retrieval=False."
            )
        return recorded

    def append_tokens(self, tokens: torch.LongTensor) -> None:
        """Remember this call's tokens (B, T)."""
        self.tokens = tokens if self.tokens is None else torch.cat([self.tokens, tokens], dim=1)

    def append_chunk_states(self, states: torch.Tensor) -> torch.Tensor:
        """Remember this call's states (B, T, d); returns all (B, L, d)."""
        self.chunk_states = states if self.chunk_states is None else torch.cat([self.chunk_states, states], dim=1)
        return self.chunk_states

    def append_token_embeds(self, embeds: torch.Tensor) -> torch.Tensor:
        """Remember this call's token embeddings (B, T, d); returns all (B, L, d)."""
        self.token_embeds = embeds if self.token_embeds is None else torch.cat([self.token_embeds, embeds], dim=1)
        return self.token_embeds

    def reset(self) -> None:
        super().reset()
        RetroCache.__init__(self, decoder_cache=self)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens (a negative number, as for every `Cache`: -3 removes three)."""
        super().crop(tokens_to_remove)
        # Chunks that are no longer complete stay: nothing reads them, and they are written anew when they complete.
        length = int(self.get_seq_length())
        for name in ("tokens", "chunk_states", "token_embeds"):
            if getattr(self, name) is not None:
                setattr(self, name, getattr(self, name)[:, :length])

    def _map_rows(self, change) -> None:
        for name in ("tokens", "chunk_states", "token_embeds", "neighbor_mask"):
            if getattr(self, name) is not None:
                setattr(self, name, change(getattr(self, name)))
        for states in self.neighbor_memory.values():
            for name in states:
                states[name] = change(states[name])

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._map_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._map_rows(lambda rows: rows[indices.to(rows.device)])
