"""RETRO (Borgeaud et al., 2022): a decoder with cross-attention to neighbors, a copy head, or both.

Shapes: B rows, T tokens of this call, L tokens including those in the cache, d hidden size; C
retrieval points reached in this call, k neighbors of a point, r tokens of a neighbor, m tokens of a
chunk, the longest query of a point; G groups of w tokens that read one point's neighbors; n tokens
that are matched.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from configuration_retro import RetroConfig

from .chunked_loss import NOT_COUNTED, VocabularyTerms, takes_chunks
from .copy_head import CopyHead
from .decoder_block import RetroBlock
from .decoder_model import RetroDecoderModel
from .generation import RetroGenerationMixin
from .library import CACHE, LOSS_ARGUMENTS, check_arguments, either_cache
from .loading import is_added
from .neighbor_encoder import NeighborEncoder
from .neighbor_fetching import Retriever
from .pretrained import RetroPreTrainedModel
from .reading import Reading
from .reading_model import RetroModelOutput, RetroReadingModel


class RetroModel(RetroReadingModel):
    """GPT-2 with a neighbor encoder, without a language-modeling head."""

    _input_embed_layer = "wte"

    def __init__(self, config: RetroConfig):
        super().__init__(config)
        if config.text_config is not None:
            raise ValueError(
                "RetroModel is GPT-2, but the configuration is of another decoder (text_config). Use "
                "RetroForCausalLM(config) or AutoModel.from_config(config)."
            )
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

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """Open a model. One on another decoder than GPT-2 is a [`RetroDecoderModel`]."""
        stored = cls._stored_config(pretrained_model_name_or_path, kwargs) or {}
        if stored.get("text_config") is not None:
            return RetroDecoderModel.from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)

    @classmethod
    def _from_config(cls, config: RetroConfig, **kwargs: Any) -> Any:
        if config.text_config is not None:
            return RetroDecoderModel._from_config(config, **kwargs)
        return super()._from_config(config, **kwargs)

    @property
    def max_positions(self) -> int:
        """The most tokens of a text, since positions are looked up in a table."""
        return self.config.n_positions

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
        # `memory` is the same cache, but only if this call reads neighbors
        cache, memory, use_cache = self._prepare_cache(cache, use_cache, use_retrieval)

        # 1. embed the tokens and locate them on the chunk grid
        inputs_embeds = self._embed_tokens(input_ids, inputs_embeds, attention_mask)  # (B, T, d)
        points = first_point, retrieval_stride
        # 2. to 4. get the neighbors of the points that this call reaches, and prepare them
        given = (neighbor_ids, neighbor_attention_mask, neighbor_scores) if use_retrieval else None
        position_ids, reading = self._locate_and_read(
            inputs_embeds, input_ids, attention_mask, position_ids, points, given, cache, memory
        )
        hidden_states = self._add_positions(inputs_embeds, position_ids, token_type_ids)  # (B, T, d)

        # 5. run the layers
        kwargs |= {"position_ids": position_ids, "use_cache": use_cache, CACHE: cache}  # for self-attention
        hidden_states = self._run_layers(hidden_states, reading, attention_mask=attention_mask, **kwargs)

        # 6. return the last hidden states, and what the copy head needs
        outputs: dict[str, Any] = {CACHE: cache if use_cache else None}
        hidden_states = self.ln_f(hidden_states)
        return RetroModelOutput(last_hidden_state=hidden_states, copy_candidates=reading.candidates, **outputs)

    # The steps of forward, in order

    def _add_positions(
        self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor, token_type_ids: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the hidden states (B, T, d) that enter the first layer."""
        hidden_states = inputs_embeds + self.wpe(position_ids).to(inputs_embeds.device)
        if token_type_ids is not None:
            hidden_states = hidden_states + self.wte(token_type_ids)
        return self.drop(hidden_states)

    def _run_layers(
        self,
        hidden_states: torch.Tensor,
        reading: Reading,
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
                plan=reading.plan,
                matches=reading.cross_attention_matches,
                unencoded=reading.unencoded if layer_idx == first_cca_layer else None,
                memory=reading.memory if layer_idx == first_cca_layer else None,
                attention_mask=causal_mask,
                **kwargs,
            )
        return hidden_states


class RetroForCausalLM(RetroPreTrainedModel, RetroGenerationMixin):
    """A causal language model that reads neighbors: GPT-2, or any other decoder.

    ```python
    retriever = MilvusRetriever.from_uri("knowledge.db", tokenizer=tokenizer)
    model = RetroForCausalLM.from_pretrained("gpt2", retriever=retriever)
    output = model.generate(**tokenizer("…", return_tensors="pt"), return_dict_in_generate=True)
    output.sequences, output.retrieved  # the text, and the neighbors of each of its chunks
    ```
    """

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: RetroConfig, retriever: Retriever | None = None, decoder: PreTrainedModel | None = None):
        """Build a model.

        Args:
            retriever: a knowledge base (see `set_retriever`).
            decoder: the causal language model that `config.text_config` describes, with its
                weights. Default: one with random weights.
        """
        super().__init__(config)
        self.transformer: RetroModel | RetroDecoderModel
        if config.text_config is None:
            self.transformer = RetroModel(config)
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        else:
            self._tied_weights_keys = {}  # the decoder has its own
            self.transformer = RetroDecoderModel(config, decoder)
        if config.copy_head:
            self.copy_head = CopyHead(config)
        self.post_init()
        if retriever is not None:  # None would also clear the name in a configuration shared with another model
            self.set_retriever(retriever)

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embeddings, which the neighbors share."""
        return self.transformer.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Set the token embeddings."""
        self.transformer.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Return the language-modeling head."""
        return self.lm_head if isinstance(self.transformer, RetroModel) else self.transformer.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Set the language-modeling head."""
        if isinstance(self.transformer, RetroModel):
            self.lm_head = new_embeddings
        else:
            self.transformer.set_output_embeddings(new_embeddings)

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
        the model therefore stays its decoder exactly.
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
        skip_logits: bool | None = None,
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
            skip_logits: compute the loss, but return no logits: the same loss and gradients in less
                time and memory (see `chunked_loss`). Needs labels. Default: False.
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
        loss_arguments = {name: kwargs.pop(name) for name in LOSS_ARGUMENTS if name in kwargs}
        if token_type_ids is not None:
            kwargs["token_type_ids"] = token_type_ids  # GPT-2's
        targets = None
        if skip_logits:
            if not isinstance(logits_to_keep, int) or logits_to_keep:
                raise ValueError(
                    f"skip_logits=True returns no logits, but logits_to_keep is {logits_to_keep}. Leave one out."
                )
            targets = self._targets(labels, **loss_arguments)
        if isinstance(self.transformer, RetroDecoderModel):
            kwargs["logits_to_keep"] = logits_to_keep
            kwargs["skip_logits"] = targets is not None
        outputs = self.transformer(
            input_ids,
            attention_mask=attention_mask,
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
            return_dict=True,
            **kwargs,
        )
        loss: Any = None
        logits: Any = None
        if targets is not None and outputs.logits is None:
            loss = self._chunked_loss(outputs, targets, kwargs.get("num_items_in_batch"))
        else:
            logits = self._logits(outputs, logits_to_keep)
            if labels is not None:
                loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **loss_arguments, **kwargs)
            if skip_logits:
                logits = None
        return CausalLMOutputWithCrossAttentions(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
            **{CACHE: outputs.get(CACHE)},
        )

    def _logits(self, outputs: RetroModelOutput, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
        """Return the logits (B, T', V), mixed with the copy distribution if there is one."""
        columns = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden_states, logits = outputs.last_hidden_state, outputs.logits
        assert hidden_states is not None, "every model returns them"
        if logits is None:
            hidden_states = hidden_states[:, columns, :]  # type: ignore[assignment]  # no FloatTensor to mypy
            logits = self.lm_head(hidden_states)
        assert logits is not None, "they are there or were just computed"
        if outputs.copy_candidates is not None:
            logits = self.copy_head(logits, hidden_states, outputs.copy_candidates, columns)
        return logits

    def _targets(
        self, labels: torch.Tensor | None, shift_labels: torch.Tensor | None = None, ignore_index: int = NOT_COUNTED
    ) -> torch.Tensor | None:
        """Return the token (B, T) that each column should predict, for the loss without logits.

        None: the loss needs logits, since the loss function or the output embeddings are not the
        usual ones.

        Raises:
            ValueError: there are no labels.
        """
        if labels is None:
            raise ValueError("skip_logits=True returns the loss alone, but there are no labels. Give labels as well.")
        if self.loss_function is not ForCausalLMLoss or not takes_chunks(self.get_output_embeddings()):
            return None
        targets = F.pad(labels[:, 1:], (0, 1), value=ignore_index) if shift_labels is None else shift_labels
        return targets.masked_fill(targets == ignore_index, NOT_COUNTED)

    def _chunked_loss(
        self, outputs: RetroModelOutput, targets: torch.Tensor, num_items: torch.Tensor | int | None
    ) -> torch.Tensor:
        """Return the loss in nats a token, without logits."""
        head, states, candidates = self.get_output_embeddings(), outputs.last_hidden_state, outputs.copy_candidates
        assert isinstance(head, nn.Linear) and states is not None, "see `_targets`; every model returns its states"
        if candidates is None:
            targets = targets.to(states.device)
            terms = VocabularyTerms(head, states, targets)
            losses = terms.log_sums - terms.target_logits
        else:
            device = self.copy_head.gate_scale.device
            targets = targets.to(device)
            losses, terms = self.copy_head.losses(head, states.to(device), targets, candidates.to(device))
        is_counted = targets != NOT_COUNTED
        total = terms.attach(torch.where(is_counted, losses, 0.0).sum())
        items = is_counted.sum() if num_items is None else num_items
        return total / (items.to(total.device) if isinstance(items, torch.Tensor) else items)


# Register RETRO as a causal language model. Trainer (label smoothing, model cards) and lm-eval look
# models up in this list.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[RetroConfig.model_type] = RetroForCausalLM.__name__
