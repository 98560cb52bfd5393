"""RetroReadingModel: the steps of a forward that all decoders share.

Shapes: B rows, T tokens of this call, L tokens including those in the cache, d hidden size; C
retrieval points reached in this call, k neighbors of a point, r tokens of a neighbor, m tokens of a
chunk, the longest query of a point; G groups of w tokens that read one point's neighbors; n tokens
that are matched.
"""

from dataclasses import dataclass

import torch
from transformers import Cache
from transformers.masking_utils import find_packed_sequence_indices
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from .attention_plan import AttentionPlan, plan_attention
from .cache import RetroCache
from .chunk_grid import ChunkGrid, PackedChunkGrid, check_mask_covers, content_positions
from .copy_head import CopyCandidates, find_candidates
from .loading import NameWithRetriever
from .matching import match_next_token, match_tokens
from .neighbor_encoder import NeighborEncoder, UnencodedNeighbors
from .neighbor_fetching import RetrievalLog, Retriever, check_retriever, fetch_neighbors
from .neighbor_inputs import NeighborInputs
from .pretrained import RetroPreTrainedModel
from .reading import Reading
from .retrieval_points import RetrievalPoints


@dataclass
class RetroModelOutput(BaseModelOutputWithPastAndCrossAttentions):
    """The library's output, with the copy head's candidates if it has any.

    A model that calls a whole decoder also returns its logits (B, T', V). `last_hidden_state` is
    then (B, T', d), the states that these logits are computed from.
    """

    copy_candidates: CopyCandidates | None = None
    logits: torch.Tensor | None = None


class RetroReadingModel(RetroPreTrainedModel):
    """A decoder that reads neighbors, without a language-modeling head."""

    encoder: NeighborEncoder
    retriever: Retriever | None

    @property
    def max_positions(self) -> int | None:
        """The most tokens of a text. None: the decoder has no limit of its own."""
        raise NotImplementedError

    def set_retriever(self, retriever: Retriever | None) -> None:
        """Set the knowledge base that neighbors are fetched from when a call gets none.

        With None, no neighbors are fetched.

        Raises:
            ValueError: the knowledge base does not match the model (chunk size, number or length of
                neighbors, vocabulary, embedding model).
        """
        if retriever is not None:
            check_retriever(retriever, self.config)
        self.retriever = retriever
        if name := str(self.config.name_or_path):
            self.config._name_or_path = name if retriever is None else NameWithRetriever(name, retriever)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.set_retriever(self.retriever)  # pickle drops the retriever from the configuration's name

    # The steps of forward, in order

    def _prepare_cache(
        self, cache: Cache | None, use_cache: bool | None, use_retrieval: bool
    ) -> tuple[Cache | None, RetroCache | None, bool | None]:
        """Return the cache; the same cache if this call reads neighbors; whether to return it."""
        if self.gradient_checkpointing and self.training:
            use_cache, cache = False, None
        if use_cache and not isinstance(cache, RetroCache) and (use_retrieval or cache is None):
            cache = RetroCache(cache, config=self.config)
        return cache, cache if use_retrieval and isinstance(cache, RetroCache) else None, use_cache

    def _locate_and_read(
        self,
        inputs_embeds: torch.Tensor,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None,
        position_ids: torch.Tensor | None,
        points: tuple[torch.Tensor | None, int | None],
        given: tuple[torch.Tensor | None, ...] | None,
        cache: Cache | None,
        memory: RetroCache | None,
    ) -> tuple[torch.Tensor, Reading]:
        """Return the position of each token (B, T), and the neighbors that this call reads.

        Args:
            points: the call's first point and stride, if given.
            given: the forward's neighbor arguments. None: the call reads no neighbors.
        """
        if isinstance(attention_mask, dict):
            attention_mask = next(iter(attention_mask.values()))
        length = inputs_embeds.shape[1]
        if given is None:
            positions = self._positions_without_grid(inputs_embeds, attention_mask, position_ids, cache)
            return positions, Reading(None, None, None, None, memory, self.config)
        if memory is not None and memory.begin_call(length) and not self._is_full(memory.past_length):
            return self._read_on(inputs_embeds, input_ids, position_ids, memory)
        grid, past_length = self._build_grid(inputs_embeds, points, attention_mask, position_ids, cache, memory)
        positions = self._check_positions(grid.positions, past_length, position_ids)
        reading = self._read(grid, inputs_embeds, input_ids, given, memory)
        if memory is not None and length == 1 and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            memory.last_plan, memory.last_positions = reading.plan, grid.positions
        return positions, reading

    def _is_full(self, past_length: int) -> bool:
        """Return True if one more token is beyond the model's last position."""
        return self.max_positions is not None and past_length >= self.max_positions

    def _positions_without_grid(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Cache | None,
    ) -> torch.Tensor:
        """Return the position of each token (B, T) of a call that reads no neighbors."""
        batch_size, length = inputs_embeds.shape[:2]
        past_length = 0 if cache is None else cache.get_seq_length()
        if not torch.compiler.is_compiling():  # reading a static cache's length would break the graph
            past_length = int(past_length)
        if attention_mask is not None and attention_mask.ndim == 2:
            if isinstance(past_length, int):
                check_mask_covers(attention_mask, past_length, length)
            positions = content_positions(attention_mask.to(device=inputs_embeds.device, dtype=torch.bool), length)
        else:
            columns = torch.arange(length, device=inputs_embeds.device) + past_length
            positions = columns.expand(batch_size, length)
        if isinstance(past_length, int):
            return self._check_positions(positions, past_length, position_ids)
        return positions.clamp(min=0) if position_ids is None else position_ids

    def _read_on(
        self,
        inputs_embeds: torch.Tensor,
        input_ids: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        memory: RetroCache,
    ) -> tuple[torch.Tensor, Reading]:
        """Return positions and neighbors for one token a row that reads what the last call read.

        Nothing that depends on the points alone is computed again.
        """
        plan = memory.last_plan
        assert isinstance(plan, AttentionPlan) and memory.last_positions is not None, "kept by the last call"
        memory.last_positions = memory.last_positions + 1
        memory.append_tokens(torch.full_like(memory.last_positions, -1) if input_ids is None else input_ids)
        matches = match_next_token(self.config, plan, inputs_embeds, memory)
        candidates = find_candidates(self.config, plan, matches, None)
        positions = memory.last_positions if position_ids is None else position_ids
        return positions, Reading(plan, matches, None, candidates, memory, self.config)

    def _build_grid(
        self,
        inputs_embeds: torch.Tensor,
        points: tuple[torch.Tensor | None, int | None],
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Cache | None,
        memory: RetroCache | None,
    ) -> tuple[ChunkGrid, int]:
        """Return the chunk grid of this call, and the number of tokens before it.

        Args:
            points: the call's first point and stride, if given.
        """
        batch_size, length = inputs_embeds.shape[:2]
        known = memory.points if memory is not None and memory.tokens is not None else None
        retrieval_points = RetrievalPoints.of(self.config, batch_size, *points, known)
        past_length = 0
        if memory is not None:
            past_length = memory.past_length
        elif cache is not None:
            past_length = int(cache.get_seq_length())

        texts = None
        if position_ids is not None and attention_mask is None and cache is None:
            texts = find_packed_sequence_indices(position_ids.expand(batch_size, -1))  # as create_causal_mask does
        if texts is not None:
            grid: ChunkGrid = PackedChunkGrid.from_texts(retrieval_points, texts)
        else:
            shape, device = (batch_size, length), inputs_embeds.device
            grid = ChunkGrid.build(retrieval_points, shape, past_length, attention_mask, position_ids, device)
        if memory is not None:
            memory.points = grid.points
        return grid, past_length

    def _check_positions(
        self, positions: torch.Tensor, past_length: int, position_ids: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the position of each token (B, T), given its content position.

        Raises:
            ValueError: one is beyond `max_positions`.
        """
        length = positions.shape[1]
        if position_ids is None:
            position_ids = positions.clamp(min=0)
        # int() waits for the device, so check only calls that are long enough to exceed the limit
        most = self.max_positions
        if most is not None and past_length + length > most and (last := int(position_ids.max())) >= most:
            raise ValueError(
                f"The sequence has {last + 1} tokens, but the model has {most} positions (n_positions). Shorten it."
            )
        return position_ids

    def _read(
        self,
        grid: ChunkGrid,
        inputs_embeds: torch.Tensor,
        input_ids: torch.Tensor | None,
        given: tuple[torch.Tensor | None, ...],
        memory: RetroCache | None,
    ) -> Reading:
        """Get the neighbors of the points that this call reaches, and prepare them for the layers.

        Args:
            inputs_embeds: (B, T, d) the token embeddings.
            given: the forward's neighbor arguments.
        """
        config, embed = self.config, self.get_input_embeddings()
        # 2. get the neighbors, given or fetched
        neighbors = self._get_neighbors(given, input_ids, grid, memory)
        # 3. plan which tokens attend to which neighbors, and prepare the neighbors for the encoder
        plan = plan_attention(config, grid, inputs_embeds, neighbors, memory)
        embeds = None if neighbors is None else embed(neighbors.ids)  # (B, C, k, r, d)
        unencoded = self._prepare_encoder(embeds, neighbors, grid, memory)
        # 4. match the last tokens with those of the neighbors, which the copy head may copy
        if neighbors is not None and self.gradient_checkpointing and self.training and config.copy_head:
            embeds = embed(neighbors.ids)  # checkpointing frees the graph of the encoder's embeddings
        matches = match_tokens(config, grid, plan, inputs_embeds, neighbors, embeds, memory)  # (n, B·G, w, k·r)
        candidates = find_candidates(config, plan, matches, neighbors)
        return Reading(plan, matches, unencoded, candidates, memory, config)

    def _get_neighbors(
        self,
        given: tuple[torch.Tensor | None, ...],
        input_ids: torch.Tensor | None,
        grid: ChunkGrid,
        memory: RetroCache | None,
    ) -> NeighborInputs | None:
        """Return the given or fetched neighbors of the points that this call reaches, if any."""
        tokens = input_ids
        if memory is not None:
            unknown = torch.full_like(grid.positions, -1)
            tokens = memory.append_tokens(unknown if input_ids is None else input_ids)  # (B, L)
        ids, mask, scores = given
        if ids is not None:
            neighbors = NeighborInputs.from_arguments(ids, mask, scores)
        elif self.retriever is not None and tokens is not None:
            neighbors = fetch_neighbors(self.retriever, grid, tokens, RetrievalLog())
        else:
            return None
        neighbors.check_fit(self.config, grid)
        return neighbors if neighbors.num_slots else None

    def _prepare_encoder(
        self,
        embeds: torch.Tensor | None,
        neighbors: NeighborInputs | None,
        grid: ChunkGrid,
        memory: RetroCache | None,
    ) -> UnencodedNeighbors | None:
        """Return the encoder's inputs, without the states that the layers have yet to compute."""
        if neighbors is None or embeds is None or not self.config.cca_layers:
            return None
        seen = grid.positions if memory is None or memory.tokens is None else memory.tokens  # (B, L)
        columns, exists = grid.query_columns(neighbors.num_slots, seen.shape[1])  # (B, C·m)
        mask = exists.unflatten(1, (neighbors.num_slots, -1)) if grid.points.has_short_queries else None
        return UnencodedNeighbors(self.encoder, embeds, neighbors.mask, columns, mask)

    def _embed_tokens(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the token embeddings (B, T, d)."""
        if input_ids is not None and inputs_embeds is None:
            self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
            return self.get_input_embeddings()(input_ids)
        if input_ids is None and inputs_embeds is not None:
            return inputs_embeds
        raise ValueError("Give either input_ids or inputs_embeds.")
