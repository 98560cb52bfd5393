"""RetroDecoderModel: any decoder of transformers, called as it is, that reads neighbors.

What RETRO adds stands beside the decoder. Forward hooks put cross-attention behind the attention of
some layers, and keep the states that enter the output embeddings for the copy head.

Shapes: B rows, T tokens of this call, T' tokens whose logits are computed, L tokens including those
in the cache, d hidden size, V vocabulary; C retrieval points reached in this call, k neighbors of a
point, r tokens of a neighbor.
"""

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Cache, PreTrainedConfig, PreTrainedModel
from transformers.utils import can_return_tuple

from configuration_retro import RetroConfig

from .attention_branch import find_attention_branch, find_layers
from .decoder_calls import DecoderCall, add_layer_hooks, add_output_hook, changes_logits
from .library import CACHE, argument_names, check_arguments, either_cache
from .neighbor_encoder import NeighborEncoder
from .reading_layer import CrossAttentionBeside
from .reading_model import RetroModelOutput, RetroReadingModel
from .wrapping import check_decoder_class


class RetroDecoderModel(RetroReadingModel):
    """A causal language model that reads neighbors.

    `decoder` is the whole model, with its head; this one returns its last hidden states, and its
    logits if asked for.
    """

    def __init__(self, config: RetroConfig, decoder: PreTrainedModel | None = None):
        text_config = config.text_config
        assert isinstance(text_config, PreTrainedConfig), "built with the configuration"
        # left to itself, the library checks the attention implementation against this class alone
        attention = text_config._attn_implementation or config._attn_implementation
        super().__init__(config)
        decoder_class = check_decoder_class(text_config)
        if attention == "sdpa" and not decoder_class._supports_sdpa:  # RETRO's default
            attention = None
        if decoder is None:
            settings = {} if attention is None else {"attn_implementation": attention}
            decoder = AutoModelForCausalLM.from_config(text_config, dtype=torch.get_default_dtype(), **settings)
        else:
            for module in decoder.modules():
                module._is_hf_initialized = True  # type: ignore[assignment]  # post_init() leaves its weights alone
        self.decoder = decoder
        config.text_config = decoder.config
        config._attn_implementation = decoder.config._attn_implementation
        if decoder.get_output_embeddings() is None:
            raise ValueError(
                f"{type(decoder).__name__} has no output embeddings, so RETRO cannot be built on it. Give a causal "
                "language model."
            )
        if config.cca_layers:
            self._check_width()
            self.encoder = NeighborEncoder(config)
            self.cross_attention = nn.ModuleDict(
                {str(layer): CrossAttentionBeside(config, layer) for layer in config.cca_layers}
            )
        self.retriever = None
        self.gradient_checkpointing = False
        self._has_layer_hooks = False
        self._has_other_logits: bool | None = None  # None: not known yet
        # read once: a compiled forward cannot look at signatures
        self._takes_positions, self._takes_logits_to_keep = (
            name in argument_names(type(decoder).forward) for name in ("position_ids", "logits_to_keep")
        )
        tables = [name for name, module in decoder.named_modules() if isinstance(module, nn.Embedding)]
        self._has_position_table = any("pos" in name or name.endswith("wpe") for name in tables)
        add_output_hook(decoder.get_output_embeddings())
        self.post_init()
        is_here = not any(parameter.is_meta for parameter in decoder.parameters())
        if config.cca_layers and (is_here or config.attention_branch is not None):
            self.hook_layers()

    def _check_width(self) -> None:
        embed: Any = self.decoder.get_input_embeddings()
        if embed.weight.shape[1] != self.config.n_embd:
            raise ValueError(
                f"The input embeddings of {type(self.decoder).__name__} have width {embed.weight.shape[1]}, its layers "
                f"{self.config.n_embd}, and the neighbor encoder needs one width. Set cca_layers=[] and use the copy "
                "head."
            )

    @property
    def max_positions(self) -> int | None:
        """The most tokens of a text, if the decoder looks positions up in a table; else None."""
        return self.config.n_positions if self._has_position_table else None

    def hook_layers(self) -> None:
        """Let the layers of `cca_layers` read neighbors, once.

        Raises:
            ValueError: the decoder's layers have no known place for cross-attention.
        """
        config = self.config
        if self._has_layer_hooks or not config.cca_layers:
            return
        if config.attention_branch is None:
            config.attention_branch = find_attention_branch(self.decoder, config.cca_layers)
        layers = find_layers(self.decoder)
        for layer in config.cca_layers:
            branch = layers[layer].get_submodule(config.attention_branch)
            add_layer_hooks(layers[layer], branch, layer)
        self._has_layer_hooks = True

    @torch.compiler.assume_constant_result
    def _changes_logits(self) -> bool:
        if self._has_other_logits is None:
            self._has_other_logits = changes_logits(self.decoder)
        return self._has_other_logits

    def get_input_embeddings(self) -> nn.Module:
        """Return the decoder's input embeddings, which the neighbors share."""
        return self.decoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Set the decoder's input embeddings."""
        self.decoder.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Return the decoder's output embeddings."""
        return self.decoder.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Set the decoder's output embeddings."""
        self.decoder.set_output_embeddings(new_embeddings)
        add_output_hook(new_embeddings)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,  # (B, T) int64
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        neighbor_ids: torch.Tensor | None = None,
        neighbor_attention_mask: torch.Tensor | None = None,
        neighbor_scores: torch.Tensor | None = None,
        first_point: torch.Tensor | None = None,
        retrieval_stride: int | None = None,
        use_retrieval: bool | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor | None = None,
        skip_logits: bool = False,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> RetroModelOutput:
        """Run the decoder with arguments of `RetroModel.forward`, and:

        Args:
            position_ids: (B, T). Default: with an attention mask, content positions (a row's first
                real token is at 0), else the decoder's own.
            logits_to_keep: return the logits of only the last tokens, or of the columns with these
                indices. 0: of all. None: return no logits.
            skip_logits: return only the states that enter the output embeddings, unless the decoder
                changes the logits behind these, as by a soft cap.

        Raises:
            ValueError: as `RetroModel.forward`, but for the number of tokens, which the decoder
                limits.
        """
        check_arguments("forward", kwargs)
        for name in ("output_attentions", "output_hidden_states"):
            if kwargs.get(name) is None and getattr(self.config, name):
                kwargs[name] = True
        self.hook_layers()  # unless done; the weights may not have been there when the model was built
        use_retrieval = self.config.use_retrieval if use_retrieval is None else use_retrieval
        use_cache = self.config.use_cache if use_cache is None else use_cache
        cache, memory, use_cache = self._prepare_cache(either_cache(past_key_values, cache), use_cache, use_retrieval)

        # 1. embed the tokens and locate them on the chunk grid
        embeds = self._embed_tokens(input_ids, inputs_embeds, attention_mask)  # (B, T, d)
        points = first_point, retrieval_stride
        # 2. to 4. get the neighbors of the points that this call reaches, and prepare them
        given = (neighbor_ids, neighbor_attention_mask, neighbor_scores) if use_retrieval else None
        content_positions, reading = self._locate_and_read(
            embeds, input_ids, attention_mask, position_ids, points, given, cache, memory
        )
        if attention_mask is not None:
            position_ids = content_positions

        # 5. run the decoder, which reads them through its hooks
        layers = {layer: self.cross_attention[str(layer)] for layer in self.config.cca_layers or ()}
        call = DecoderCall(reading, layers)  # type: ignore[arg-type]  # a ModuleDict does not know its modules' type
        arguments = {
            "input_ids": input_ids,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "use_cache": use_cache,
            CACHE: cache,
            **kwargs,
        }
        call.skips_logits = skip_logits and not self._changes_logits()
        outputs, hidden_states, logits = self._run_decoder(call, arguments, logits_to_keep)

        # 6. return the last hidden states, and what the copy head needs
        weights = [layer for layer in call.weights if layer is not None] if kwargs.get("output_attentions") else []
        return RetroModelOutput(
            last_hidden_state=hidden_states,  # type: ignore[arg-type]  # mypy cannot tell it from a FloatTensor
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            cross_attentions=tuple(weights) or None,  # type: ignore[arg-type]
            copy_candidates=reading.candidates,
            logits=logits,
            **{CACHE: cache if use_cache else None},
        )

    def _run_decoder(
        self, call: DecoderCall, arguments: dict[str, Any], logits_to_keep: int | torch.Tensor | None
    ) -> tuple[Any, torch.Tensor, torch.Tensor | None]:
        """Return the decoder's output, its last hidden states (B, T', d) and logits (B, T', V)."""
        model = self.decoder.base_model if logits_to_keep is None else self.decoder
        if not self._takes_positions:
            del arguments["position_ids"]  # such a decoder takes positions from the attention mask
        if logits_to_keep is None:
            outputs = call.run(model, **arguments, return_dict=True)
            return outputs, outputs.last_hidden_state, None
        if self._takes_logits_to_keep:
            arguments["logits_to_keep"] = logits_to_keep
        outputs = call.run(model, **arguments, return_dict=True)
        states, logits = call.output_states, outputs.logits
        if call.skips_logits and states is not None:
            return outputs, states, None
        if states is None:
            raise ValueError(
                f"{type(model).__name__} computes its logits without calling its output embeddings, so the copy head "
                "cannot see its last hidden states. RETRO cannot be built on it."
            )
        if not self._takes_logits_to_keep:
            columns = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            states, logits = states[:, columns], logits[:, columns]
        return outputs, states.to(logits.device), logits
