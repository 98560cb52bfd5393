"""RETRO: GPT-2, a neighbor encoder and chunked cross-attention (Borgeaud et al., 2022, arXiv 2112.04426), or a copy head.

Shapes: B rows, T tokens of this call, d hidden size; C chunks completed in this call, k neighbors a chunk, r tokens a
neighbor, m tokens a chunk.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import Cache
from transformers.masking_utils import create_causal_mask, find_packed_sequence_indices
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions, CausalLMOutputWithCrossAttentions
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention, GPT2Block, GPT2PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from configuration_retro import RetroConfig

from .activation import LeanGELU
from .cache import RetroCache
from .chunk_grid import ChunkGrid, Movable, PackedChunkGrid, take_rows
from .chunked_cross_attention import ChunkedCrossAttention
from .copy_head import CopyHead, Copying, build_copying
from .generation import RetroGenerationMixin
from .library import CACHE, LOSS_ARGUMENTS, check_arguments, either_cache
from .loading import LoadingMixin, NameWithRetriever, is_added
from .matching import match_context
from .neighbor_encoder import NeighborEncoder
from .neighbor_fetching import RetrievalLog, Retriever, check_retriever, fetch_neighbors
from .reading import Reading, build_reading
from .sharing import SharingMixin


@dataclass
class RetroModelOutput(BaseModelOutputWithPastAndCrossAttentions):
    """The library's output, and what a copy head reads: None without one, or as long as there are no neighbors."""

    copying: Copying | None = None


@dataclass
class EncoderCall(Movable):
    """The neighbor encoder and one call's inputs to it, but for the chunks' states, which the decoder has yet to compute.

    token_embeds (B, C, k, r, d), attention_mask (B, C, k, r), both None if no chunk completes; cache to remember states.
    """

    encoder: NeighborEncoder
    grid: ChunkGrid
    cache: RetroCache | None
    token_embeds: torch.Tensor | None
    attention_mask: torch.BoolTensor | None

    def __call__(self, states: torch.Tensor) -> torch.Tensor | None:
        """Decoder states of this call (B, T, d) -> encoded neighbors (B, C, k·r, d)."""
        if self.cache is not None:
            states = self.cache.append_chunk_states(states)
        if self.token_embeds is None:
            return None
        columns = self.grid.chunk_columns(self.token_embeds.shape[1], states.shape[1])
        chunk_states = take_rows(states, columns).unflatten(1, (-1, self.grid.chunk_size))
        return self.encoder(self.token_embeds, self.attention_mask, chunk_states).to(states.device)


class RetroBlock(GPT2Block):
    """GPT-2's block, with chunked cross-attention between self-attention and MLP in the layers of `cca_layers`."""

    def __init__(self, config: RetroConfig, layer_idx: int):
        super().__init__(config, layer_idx=layer_idx)
        if config.activation_function == "gelu_new":
            self.mlp.act = LeanGELU()
        if layer_idx in config.cca_layers:
            self.ln_cca = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
            self.cca = ChunkedCrossAttention(config, layer_idx=layer_idx)

    def forward(
        self,
        hidden_states: torch.Tensor,  # (B, T, d)
        encoded: torch.Tensor | None = None,  # (B, C, k·r, d)
        encode: EncoderCall
        | None = None,  # given to the first layer of cca_layers: its states are what the encoder reads
        reading: Reading | None = None,
        **kwargs,  # of self-attention
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # hidden_states, encoded
        attn_output, _ = self.attn(self.ln_1(hidden_states), **kwargs)
        hidden_states = attn_output + hidden_states

        if encode is not None:
            encoded = encode(hidden_states)
        if reading is not None and hasattr(self, "cca"):
            cca_output, _ = self.cca(self.ln_cca(hidden_states), encoded, reading)
            hidden_states = hidden_states + cca_output

        return hidden_states + self.mlp(self.ln_2(hidden_states)), encoded


class RetroPreTrainedModel(LoadingMixin, SharingMixin, GPT2PreTrainedModel):
    """Weights, initialization and what the library may do with RETRO models."""

    config: RetroConfig
    config_class = RetroConfig
    _no_split_modules = ["RetroBlock", "RetroEncoderLayer"]
    _skip_keys_device_placement = [CACHE]
    _can_record_outputs = {
        "hidden_states": RetroBlock,
        "attentions": OutputRecorder(GPT2Attention, layer_name=".attn", index=1),
        "cross_attentions": OutputRecorder(ChunkedCrossAttention, index=1),
    }

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # For code outside its own tree transformers passes over modules that hold no parameter themselves, and with them
        # GPT-2's scaled and our zero projections. All initialization here respects loaded weights, as its own does.
        super()._initialize_weights(module, is_custom_code=False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ChunkedCrossAttention | CopyHead):
            module.init_weights()


class RetroModel(RetroPreTrainedModel):
    """The decoder with its neighbor encoder, without a language-modelling head."""

    def __init__(self, config: RetroConfig):
        super().__init__(config)
        self.embed_dim = config.n_embd
        self.wte = nn.Embedding(config.vocab_size, self.embed_dim)
        self.wpe = nn.Embedding(config.n_positions, self.embed_dim)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList([RetroBlock(config, layer_idx=i) for i in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(self.embed_dim, eps=config.layer_norm_epsilon)
        if config.cca_layers:
            self.encoder = NeighborEncoder(config)
        self.retriever: Retriever | None = None
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.wte

    def set_input_embeddings(self, new_embeddings: nn.Module) -> None:
        self.wte = new_embeddings

    def set_retriever(self, retriever: Retriever | None) -> None:
        """Fetch neighbors from this knowledge base wherever none are given; None: from no knowledge base.

        Raises:
            ValueError: the knowledge base has another chunk size, vocabulary or embedding model than this model.
        """
        if retriever is not None:
            check_retriever(retriever, self.config)
        self.retriever = retriever
        if name := str(self.config.name_or_path):
            self.config._name_or_path = name if retriever is None else NameWithRetriever(name, retriever)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.set_retriever(self.retriever)  # the name in a pickled configuration has none

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        neighbor_ids: torch.LongTensor | None = None,
        neighbor_attention_mask: torch.BoolTensor | None = None,
        neighbor_scores: torch.FloatTensor | None = None,
        use_retrieval: bool | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> RetroModelOutput:
        """The arguments of `GPT2Model.forward`, and:

        Args:
            cache, past_key_values: the cache of earlier tokens, under its name of either transformers version.
            attention_mask: (B, tokens in the cache and in this call), 0 for padding on the left or right of a row.
            position_ids: default: content positions (a row's first real token is 0).
            neighbor_ids: (B, C, k, r) int64; slot j holds the neighbors of the j-th chunk that the row completes in
                this call. Without them a retriever that is set is asked; without one it is plain GPT-2.
            neighbor_attention_mask: (B, C, k, r), 0 for padding and for slots and neighbors that are not there.
                Default: all there.
            neighbor_scores: (B, C, k) retrieval similarity, which a copy head takes into account; 0 where there is no
                neighbor. Default: 0 everywhere.
            use_retrieval: False leaves neighbors out, given or not. Default: the configuration's.

        Raises:
            ValueError: neighbor tensors of another shape or type; more tokens than `n_positions`; an attention mask
                that does not cover the cache; a cache that was filled without this model's memory.
        """
        kwargs.pop("output_attentions", None)
        kwargs.pop("output_hidden_states", None)
        check_arguments("forward", kwargs)
        cache = either_cache(past_key_values, cache)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds.")
        if input_ids is not None:
            self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
            inputs_embeds = self.wte(input_ids)
        batch_size, length = inputs_embeds.shape[:2]
        use_retrieval = self.config.use_retrieval if use_retrieval is None else use_retrieval

        if self.gradient_checkpointing and self.training:
            use_cache, cache = False, None
        if use_cache and not isinstance(cache, RetroCache) and (use_retrieval or cache is None):
            cache = RetroCache(cache, config=self.config)
        memory = cache if use_retrieval and isinstance(cache, RetroCache) else None
        past_length = 0
        if memory is not None:
            past_length = memory.past_length
        elif cache is not None:
            past_length = int(cache.get_seq_length())

        texts = None  # packed into one row, and told by their positions, as create_causal_mask does
        if position_ids is not None and attention_mask is None and cache is None:
            texts = find_packed_sequence_indices(position_ids.expand(batch_size, -1))
        if texts is not None:
            grid = PackedChunkGrid.from_texts(self.config.chunk_size, texts)
        else:
            grid = ChunkGrid.build(
                self.config.chunk_size,
                batch_size,
                length,
                past_length,
                attention_mask,
                position_ids,
                inputs_embeds.device,
            )
        if position_ids is None:
            position_ids = grid.positions.clamp(min=0)
        self._check_positions(past_length + length, position_ids)

        if memory is not None:
            unknown = torch.full((batch_size, length), -1, device=inputs_embeds.device)
            memory.append_tokens(unknown if input_ids is None else input_ids)
        if not use_retrieval:
            neighbor_ids = None
        elif neighbor_ids is None and self.retriever is not None and (memory is not None or input_ids is not None):
            tokens = input_ids if memory is None else memory.tokens
            fetched = fetch_neighbors(self.retriever, grid, tokens, RetrievalLog())
            neighbor_ids, neighbor_attention_mask, neighbor_scores = fetched
        if neighbor_ids is not None:
            neighbor_attention_mask, neighbor_scores = self._check_neighbors(
                neighbor_ids, neighbor_attention_mask, neighbor_scores, batch_size, length
            )
        if neighbor_ids is None or neighbor_ids.shape[1] == 0:
            neighbor_ids = neighbor_embeds = neighbor_attention_mask = neighbor_scores = None
        else:
            neighbor_embeds = self.wte(neighbor_ids)

        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: cache},
        )
        hidden_states = inputs_embeds + self.wpe(position_ids).to(inputs_embeds.device)
        if token_type_ids is not None:
            hidden_states = hidden_states + self.wte(token_type_ids)
        hidden_states = self.drop(hidden_states)

        reading = encode = encoded = copying = None
        if use_retrieval:
            slot_mask = None if neighbor_attention_mask is None else neighbor_attention_mask.flatten(2)
            reading = build_reading(self.config, grid, hidden_states, slot_mask, memory)
            if self.config.cca_layers and (reading is not None or memory is not None):
                encode = EncoderCall(self.encoder, grid, memory, neighbor_embeds, neighbor_attention_mask)
            if self.config.copy_head or self.config.cca_match:
                # cross-attention's matches have no gradient; the copy head's not through the encoder's embeddings, whose
                # gradient checkpointing may have gone through them by itself
                with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.copy_head):
                    embeds = None if neighbor_ids is None else self.wte(neighbor_ids)
                    matches = match_context(
                        self.config, grid, reading, inputs_embeds, embeds, neighbor_attention_mask, memory
                    )
                if reading is not None:
                    reading.matches = matches
            if self.config.copy_head and reading is not None:
                copying = build_copying(reading, neighbor_ids, neighbor_attention_mask, neighbor_scores)
        for layer_idx, block in enumerate(self.h):
            hidden_states, encoded = block(
                hidden_states,
                encoded,
                encode=encode if layer_idx in self.config.cca_layers[:1] else None,
                reading=reading,
                attention_mask=causal_mask,
                use_cache=use_cache,
                position_ids=position_ids,
                **{CACHE: cache},
                **kwargs,
            )
        return RetroModelOutput(
            last_hidden_state=self.ln_f(hidden_states),
            copying=copying,
            **{CACHE: cache if use_cache else None},
        )

    def _check_positions(self, num_columns: int, position_ids: torch.LongTensor) -> None:
        # only rows of more columns than positions can run past them, so that no other call waits for the device
        if num_columns > self.config.n_positions and (last := int(position_ids.max())) >= self.config.n_positions:
            raise ValueError(
                f"The sequence has {last + 1} tokens, the model {self.config.n_positions} positions (n_positions): "
                "shorten it, or generate fewer tokens."
            )

    def _check_neighbors(
        self,
        neighbor_ids: torch.Tensor,
        mask: torch.Tensor | None,
        scores: torch.Tensor | None,
        batch_size: int,
        length: int,
    ) -> tuple[torch.BoolTensor, torch.FloatTensor]:
        """Raise ValueError for neighbor tensors that do not fit; returns mask (B, C, k, r) and scores (B, C, k)."""
        config = self.config
        most = (length + config.chunk_size - 1) // config.chunk_size
        expected = (batch_size, neighbor_ids.shape[1] if neighbor_ids.ndim == 4 else -1, config.num_neighbors)
        expected += (config.neighbor_length,)
        if neighbor_ids.shape != expected or neighbor_ids.shape[1] > most:
            raise ValueError(
                f"neighbor_ids has shape {tuple(neighbor_ids.shape)}; expected (batch {batch_size}, at most {most} "
                f"chunks for {length} tokens, num_neighbors {config.num_neighbors}, neighbor_length "
                f"{config.neighbor_length})."
            )
        if neighbor_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"neighbor_ids must be integer token ids (int64), not {neighbor_ids.dtype}.")
        if mask is None:
            mask = torch.ones_like(neighbor_ids, dtype=torch.bool)
        if mask.shape != neighbor_ids.shape:
            raise ValueError(
                f"neighbor_attention_mask has shape {tuple(mask.shape)}, neighbor_ids {tuple(neighbor_ids.shape)}: "
                "they must be the same."
            )
        if scores is None:
            scores = torch.zeros(neighbor_ids.shape[:3], device=neighbor_ids.device)
        if scores.shape != neighbor_ids.shape[:3]:
            raise ValueError(
                f"neighbor_scores has shape {tuple(scores.shape)}, neighbor_ids {tuple(neighbor_ids.shape)}: there must be "
                "one score a neighbor."
            )
        mask = mask.bool()
        return mask, scores.masked_fill(~mask.any(-1), 0.0)  # a retriever says nan where there is no neighbor


class RetroForCausalLM(RetroPreTrainedModel, RetroGenerationMixin):
    """RETRO with a language-modelling head tied to the token embeddings.

    ```python
    model = RetroForCausalLM.from_pretrained("gpt2", retriever=MilvusRetriever.from_uri("knowledge.db", tokenizer=…))
    output = model.generate(**tokenizer("…", return_tensors="pt"), return_dict_in_generate=True)
    output.sequences, output.retrieved  # what it wrote, and what it read for each chunk
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
        if retriever is not None:  # or a second model of one configuration would take its name from the first
            self.set_retriever(retriever)

    @property
    def retriever(self) -> Retriever | None:
        return self.transformer.retriever

    def set_retriever(self, retriever: Retriever | None) -> None:
        """See [`RetroModel.set_retriever`]."""
        self.transformer.set_retriever(retriever)

    def freeze_backbone(self) -> None:
        """Train what RETRO adds and nothing else: RETROfitting (paper, section 4.3).

        The decoder's own weights, embeddings among them, keep their values, so that with `use_retrieval=False` the
        model stays its GPT-2 exactly.
        """
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(is_added(name))

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        neighbor_ids: torch.LongTensor | None = None,
        neighbor_attention_mask: torch.BoolTensor | None = None,
        neighbor_scores: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_retrieval: bool | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Cache | None = None,
        doc_ids: None = None,
        **kwargs,
    ) -> CausalLMOutputWithCrossAttentions:
        """The arguments of [`RetroModel.forward`] and of `GPT2LMHeadModel.forward`.

        Args:
            labels: (B, T); shifted inside the model, -100 is not counted.
            logits_to_keep: compute the logits of the last tokens only (0: of all), or of the columns with these indices.
            doc_ids: always None. `Trainer` keeps the columns of a dataset that are named here, and `RetroDataCollator` needs
                this one: it finds neighbors from other documents, and gives them as neighbor_ids.

        Returns:
            logits (B, T, vocabulary), the loss in nats a token if labels are given, the cache; `cross_attentions` are
            over the neighbors: for each cross-attention layer (B, heads, T, k·r), for the chunk that each token reads.
        """
        if doc_ids is not None:
            raise ValueError(
                "doc_ids are read by the data collator (RetroDataCollator), not by the model. Give it as data_collator, or give "
                "the model neighbor_ids."
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
            use_retrieval=use_retrieval,
            use_cache=use_cache,
            past_key_values=past_key_values,
            cache=cache,
            **kwargs,
        )
        columns = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden_states = outputs.last_hidden_state[:, columns, :]
        logits = self.lm_head(hidden_states)
        if outputs.copying is not None:
            logits = self.copy_head(logits, hidden_states, outputs.copying, columns)
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


# The library's list of causal language models names only its own. Trainer shifts the labels of these alone when it smooths
# them; its model cards and lm-eval go by the list, too.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[RetroConfig.model_type] = RetroForCausalLM.__name__
