"""RETRO (Borgeaud et al., 2022): GPT-2 with cross-attention to neighbors, a copy head, or both.

Shapes: B rows, T tokens of this call, L tokens including those in the cache, d hidden size; C
retrieval points reached in this call, k neighbors of a point, r tokens of a neighbor, m tokens of a
chunk, the longest query of a point; G groups of w tokens that read one point's neighbors; n tokens
that are matched.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.masking_utils import create_causal_mask, find_packed_sequence_indices
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions, CausalLMOutputWithCrossAttentions
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from configuration_retro import RetroConfig

from .attention_plan import AttentionPlan, plan_attention
from .cache import RetroCache
from .chunk_grid import ChunkGrid, PackedChunkGrid
from .copy_head import CopyCandidates, CopyHead, find_candidates
from .decoder_block import RetroBlock
from .generation import RetroGenerationMixin
from .library import CACHE, LOSS_ARGUMENTS, check_arguments, either_cache
from .loading import NameWithRetriever, is_added
from .matching import match_tokens
from .neighbor_encoder import NeighborEncoder, UnencodedNeighbors
from .neighbor_fetching import RetrievalLog, Retriever, check_retriever, fetch_neighbors
from .neighbor_inputs import NeighborInputs
from .pretrained import RetroPreTrainedModel
from .retrieval_points import RetrievalPoints


@dataclass
class RetroModelOutput(BaseModelOutputWithPastAndCrossAttentions):
    """The library's output, with the copy head's candidates if it has any."""

    copy_candidates: CopyCandidates | None = None


class RetroModel(RetroPreTrainedModel):
    """The decoder with its neighbor encoder, without a language-modeling head."""

    _input_embed_layer = "wte"

    def __init__(self, config: RetroConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList([RetroBlock(config, layer_idx=i) for i in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        if config.cca_layers:
            self.encoder = NeighborEncoder(config)
        self.retriever: Retriever | None = None
        self.gradient_checkpointing = False
        self.post_init()

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

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,  # (B, T) int64
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        neighbor_ids: torch.Tensor | None = None,
        neighbor_attention_mask: torch.Tensor | None = None,
        neighbor_scores: torch.Tensor | None = None,
        first_point: torch.Tensor | None = None,
        retrieval_stride: int | None = None,
        use_retrieval: bool | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> RetroModelOutput:
        """Run the model. Arguments are those of `GPT2Model.forward`, and:

        Args:
            cache, past_key_values: the cache of earlier tokens; transformers 5.24 renamed it, and
                both names are accepted.
            attention_mask: (B, L), 0 for padding, which may stand anywhere in a row.
            position_ids: (B, T). Default: content positions (a row's first real token is at 0).
            neighbor_ids: (B, C, k, r) int64. Slot j holds the neighbors of the j-th retrieval point
                that the row reaches in this call. If they are left out, the retriever is asked;
                without a retriever the model is plain GPT-2.
            neighbor_attention_mask: (B, C, k, r), 0 for padding and for missing points and
                neighbors. Default: none is missing.
            neighbor_scores: (B, C, k) retrieval similarities, used by the copy head. The values of
                missing neighbors are ignored. Default: 0.
            first_point: (B,) int64, the tokens before each row's first retrieval point, from 1 to
                chunk_size + retrieval_stride − 1. A cache keeps those of its first call. Default:
                chunk_size, so that points are the ends of chunks, as in the paper. Each text of a
                packed row has the row's.
            retrieval_stride: the tokens between two points, from 1 to chunk_size. A point after e
                tokens has the last min(chunk_size, e) of them as its query. Default: the setting in
                the configuration.
            use_retrieval: False ignores all neighbors, also given ones. Default: the setting in the
                configuration.

        Raises:
            ValueError: neighbor tensors of another shape or type; a first point or stride out of
                its range, or another one than the cache's; more tokens than `n_positions`; an
                attention mask that does not cover the cache; a cache that was filled without this
                model's memory.
        """
        kwargs.pop("output_attentions", None)  # capture_outputs has read them
        kwargs.pop("output_hidden_states", None)
        check_arguments("forward", kwargs)
        use_retrieval = self.config.use_retrieval if use_retrieval is None else use_retrieval
        cache = either_cache(past_key_values, cache)
        if self.gradient_checkpointing and self.training:
            use_cache, cache = False, None
        if use_cache and not isinstance(cache, RetroCache) and (use_retrieval or cache is None):
            cache = RetroCache(cache, config=self.config)
        # `memory` is the same cache, but only if this call reads neighbors
        memory = cache if use_retrieval and isinstance(cache, RetroCache) else None

        # 1. embed the tokens and locate them on the chunk grid
        inputs_embeds = self._embed_tokens(input_ids, inputs_embeds, attention_mask)  # (B, T, d)
        known = memory.points if memory is not None and memory.tokens is not None else None
        points = RetrievalPoints.of(self.config, inputs_embeds.shape[0], first_point, retrieval_stride, known)
        grid, position_ids = self._locate_tokens(inputs_embeds, points, attention_mask, position_ids, cache, memory)
        hidden_states = self._add_positions(inputs_embeds, position_ids, token_type_ids)  # (B, T, d)

        # 2. get the neighbors of the points that this call reaches, given or fetched
        given = (neighbor_ids, neighbor_attention_mask, neighbor_scores)
        neighbors = self._get_neighbors(given, input_ids, grid, memory) if use_retrieval else None

        # 3. plan which tokens attend to which neighbors, and prepare the neighbors for the encoder
        plan = plan_attention(self.config, grid, hidden_states, neighbors, memory)
        unencoded = self._prepare_encoder(neighbors, grid, memory)

        # 4. match the last tokens with those of the neighbors, which the copy head may copy
        matches = match_tokens(self.config, grid, plan, inputs_embeds, neighbors, self.wte, memory)  # (n, B·G, w, k·r)
        candidates = find_candidates(self.config, plan, matches, neighbors)

        # 5. run the layers
        kwargs |= {"position_ids": position_ids, "use_cache": use_cache, CACHE: cache}  # for self-attention
        hidden_states = self._run_layers(
            hidden_states, plan, matches, unencoded, memory, attention_mask=attention_mask, **kwargs
        )

        # 6. return the last hidden states, and what the copy head needs
        outputs: dict[str, Any] = {CACHE: cache if use_cache else None}
        return RetroModelOutput(last_hidden_state=self.ln_f(hidden_states), copy_candidates=candidates, **outputs)

    # The steps of forward, in order

    def _embed_tokens(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the token embeddings (B, T, d)."""
        if input_ids is not None and inputs_embeds is None:
            self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
            return self.wte(input_ids)
        if input_ids is None and inputs_embeds is not None:
            return inputs_embeds
        raise ValueError("Give either input_ids or inputs_embeds.")

    def _locate_tokens(
        self,
        inputs_embeds: torch.Tensor,
        points: RetrievalPoints,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Cache | None,
        memory: RetroCache | None,
    ) -> tuple[ChunkGrid, torch.Tensor]:
        """Return the chunk grid of this call, and the position of each token (B, T)."""
        batch_size, length = inputs_embeds.shape[:2]
        past_length = 0
        if memory is not None:
            past_length = memory.past_length
        elif cache is not None:
            past_length = int(cache.get_seq_length())

        texts = None
        if position_ids is not None and attention_mask is None and cache is None:
            texts = find_packed_sequence_indices(position_ids.expand(batch_size, -1))  # as create_causal_mask does
        if texts is not None:
            grid: ChunkGrid = PackedChunkGrid.from_texts(points, texts)
        else:
            shape, device = (batch_size, length), inputs_embeds.device
            grid = ChunkGrid.build(points, shape, past_length, attention_mask, position_ids, device)
        if memory is not None:
            memory.points = grid.points
        if position_ids is None:
            position_ids = grid.positions.clamp(min=0)
        # int() waits for the device, so check only calls that are long enough to exceed the limit
        most = self.config.n_positions
        if past_length + length > most and (last := int(position_ids.max())) >= most:
            raise ValueError(
                f"The sequence has {last + 1} tokens, but the model has {most} positions (n_positions). Shorten it."
            )
        return grid, position_ids

    def _add_positions(
        self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor, token_type_ids: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the hidden states (B, T, d) that enter the first layer."""
        hidden_states = inputs_embeds + self.wpe(position_ids).to(inputs_embeds.device)
        if token_type_ids is not None:
            hidden_states = hidden_states + self.wte(token_type_ids)
        return self.drop(hidden_states)

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
        self, neighbors: NeighborInputs | None, grid: ChunkGrid, memory: RetroCache | None
    ) -> UnencodedNeighbors | None:
        """Return the encoder's inputs, without the states that the layers have yet to compute."""
        if neighbors is None or not self.config.cca_layers:
            return None
        seen = grid.positions if memory is None or memory.tokens is None else memory.tokens  # (B, L)
        columns, exists = grid.query_columns(neighbors.num_slots, seen.shape[1])  # (B, C·m)
        mask = exists.unflatten(1, (neighbors.num_slots, -1)) if grid.points.has_short_queries else None
        return UnencodedNeighbors(self.encoder, self.wte(neighbors.ids), neighbors.mask, columns, mask)

    def _run_layers(
        self,
        hidden_states: torch.Tensor,
        plan: AttentionPlan | None,
        matches: torch.Tensor | None,
        unencoded: UnencodedNeighbors | None,
        memory: RetroCache | None,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,  # of self-attention
    ) -> torch.Tensor:
        """Return the hidden states (B, T, d) after the last layer."""
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            position_ids=kwargs["position_ids"],
            **{CACHE: kwargs[CACHE]},
        )
        encoded = None  # (B, C, k·r, d), from the first of cca_layers on
        first_cca_layer = min(self.config.cca_layers or (), default=None)
        for layer_idx, block in enumerate(self.h):
            hidden_states, encoded = block(
                hidden_states,
                encoded,
                plan=plan,
                matches=matches if self.config.cca_match else None,
                unencoded=unencoded if layer_idx == first_cca_layer else None,
                memory=memory if layer_idx == first_cca_layer else None,
                attention_mask=causal_mask,
                **kwargs,
            )
        return hidden_states


class RetroForCausalLM(RetroPreTrainedModel, RetroGenerationMixin):
    """RETRO with a language-modeling head tied to the token embeddings.

    ```python
    retriever = MilvusRetriever.from_uri("knowledge.db", tokenizer=tokenizer)
    model = RetroForCausalLM.from_pretrained("gpt2", retriever=retriever)
    output = model.generate(**tokenizer("…", return_tensors="pt"), return_dict_in_generate=True)
    output.sequences, output.retrieved  # the text, and the neighbors of each of its chunks
    ```
    """

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: RetroConfig, retriever: Retriever | None = None):
        super().__init__(config)
        self.transformer = RetroModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.copy_head:
            self.copy_head = CopyHead(config)
        self.post_init()
        if retriever is not None:  # None would also clear the name in a configuration shared with another model
            self.set_retriever(retriever)

    @property
    def retriever(self) -> Retriever | None:  # type: ignore[override]  # the mixin declares it
        """The knowledge base that neighbors are fetched from."""
        return self.transformer.retriever

    def set_retriever(self, retriever: Retriever | None) -> None:
        """Fetch neighbors from this knowledge base (see [`RetroModel.set_retriever`])."""
        self.transformer.set_retriever(retriever)

    def freeze_backbone(self) -> None:
        """Train only the parameters that RETRO adds: RETROfitting (paper, section 4.3).

        The decoder's weights, with the embeddings, keep their values. With `use_retrieval=False`
        the model therefore stays its GPT-2 exactly.
        """
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(is_added(name))

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        neighbor_ids: torch.Tensor | None = None,
        neighbor_attention_mask: torch.Tensor | None = None,
        neighbor_scores: torch.Tensor | None = None,
        first_point: torch.Tensor | None = None,
        retrieval_stride: int | None = None,
        labels: torch.Tensor | None = None,
        use_retrieval: bool | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Cache | None = None,
        doc_ids: None = None,
        doc_ends: None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithCrossAttentions:
        """Run the model with arguments of [`RetroModel.forward`] and `GPT2LMHeadModel.forward`.

        Args:
            labels: (B, T); shifted inside the model, -100 is not counted.
            logits_to_keep: compute the logits of only the last tokens, or of the columns with these
                indices. 0: of all.
            doc_ids, doc_ends: always None. `Trainer` keeps only those columns of a dataset that are
                named here, and `RetroDataCollator` needs these to leave out neighbors from a text's
                own documents.

        Returns:
            Logits (B, T, vocabulary), the loss in nats a token if labels are given, and the cache.
            The output's cross_attentions are over the neighbors that each token
            reads: (B, heads, T, k·r) for each layer with cross-attention.
        """
        if doc_ids is not None or doc_ends is not None:
            raise ValueError(
                "doc_ids and doc_ends are for the data collator (RetroDataCollator), not for the model. Give it as "
                "data_collator, or give the model neighbor_ids."
            )
        loss_arguments = {name: kwargs.pop(name) for name in LOSS_ARGUMENTS & kwargs.keys()}
        outputs = self.transformer(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            neighbor_ids=neighbor_ids,
            neighbor_attention_mask=neighbor_attention_mask,
            neighbor_scores=neighbor_scores,
            first_point=first_point,
            retrieval_stride=retrieval_stride,
            use_retrieval=use_retrieval,
            use_cache=use_cache,
            past_key_values=past_key_values,
            cache=cache,
            **kwargs,
        )
        columns = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden_states = outputs.last_hidden_state[:, columns, :]
        logits = self.lm_head(hidden_states)
        if outputs.copy_candidates is not None:
            logits = self.copy_head(logits, hidden_states, outputs.copy_candidates, columns)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **loss_arguments, **kwargs)
        return CausalLMOutputWithCrossAttentions(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
            **{CACHE: outputs.get(CACHE)},
        )


# Register RETRO as a causal language model. Trainer (label smoothing, model cards) and lm-eval look
# models up in this list.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[RetroConfig.model_type] = RetroForCausalLM.__name__
