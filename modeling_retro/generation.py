"""Retrieval inside `generate()`: neighbors are fetched once for each chunk, in the step that completes it."""

import functools
import inspect
from itertools import compress

import torch
from transformers import Cache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from .cache import RetroCache
from .chunk_grid import ChunkGrid
from .library import CACHE, check_arguments, either_cache
from .neighbor_fetching import RetrievalLog, RetrievedChunk, fetch_neighbors, given_neighbors

NEIGHBOR_INPUTS = ("neighbor_ids", "neighbor_attention_mask", "neighbor_scores")


@functools.cache
def _forward_arguments(model_class: type[PreTrainedModel]) -> frozenset[str]:
    """Return the names of the arguments of a model's forward."""
    return frozenset(inspect.signature(model_class.forward).parameters)


class RetroGenerationMixin(GenerationMixin):
    """`generate()` with a retriever. Greedy search, sampling and beam search need no more than the hook below."""

    @torch.no_grad()
    def generate(self, inputs: torch.Tensor | None = None, *args, **kwargs):
        """`GenerationMixin.generate`, with neighbors for every chunk that completes.

        Args:
            neighbor_ids, neighbor_attention_mask, neighbor_scores: neighbors of the prompt's chunks (see
                `RetroModel.forward`). If they are given, the retriever is not asked in this call.
            use_retrieval: False generates without neighbors.

        Returns:
            What `GenerationMixin.generate` returns. With `return_dict_in_generate=True` the output has one more entry,
            `retrieved`: for each returned row a list of `RetrievedChunk`, which documents were read for each of its
            chunks and how similar they were. With `output_attentions=True` it has `cross_attentions` too: for each
            forward pass, for each cross-attention layer, (rows, heads, tokens of the pass, k·r) over the neighbors.
        """
        log = RetrievalLog()
        cache = either_cache(kwargs.pop("past_key_values", None), kwargs.pop("cache", None))
        if cache is not None:
            kwargs[CACHE] = cache
        if self.training and self.transformer.gradient_checkpointing:  # its layers keep no cache
            kwargs["use_cache"] = False
        outputs = super().generate(inputs, *args, retrieval_log=log, **kwargs)
        if isinstance(outputs, ModelOutput):
            generation_config = kwargs.get("generation_config") or self.generation_config
            eos_token_id = kwargs.get("eos_token_id", generation_config.eos_token_id)
            outputs["retrieved"] = self._retrieved(outputs.sequences, log, eos_token_id)
            if log.cross_attentions:
                outputs["cross_attentions"] = tuple(log.cross_attentions)
        return outputs

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        is_first_iteration: bool | None = False,
        retrieval_log: RetrievalLog | None = None,
        use_retrieval: bool | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> dict:
        """The hook that `generate()` calls before each forward: fetches neighbors for the chunks that it completes."""
        kwargs.pop("tokenizer", None)  # generate() passes on the one of its stop strings
        check_arguments("prepare_inputs_for_generation", kwargs, _forward_arguments(type(self)))
        use_retrieval = self.config.use_retrieval if use_retrieval is None else use_retrieval
        cache = either_cache(past_key_values, cache)
        if use_retrieval and cache is not None and not isinstance(cache, RetroCache):
            cache = RetroCache(cache)
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            use_retrieval=use_retrieval,
            **{CACHE: cache},
            **kwargs,
        )
        if not use_retrieval:
            return model_inputs

        tokens = model_inputs.get("input_ids")
        if tokens is None:
            tokens = torch.full(model_inputs["inputs_embeds"].shape[:2], -1, device=self.device)
        log = RetrievalLog() if retrieval_log is None else retrieval_log
        if log.prompt_mask is None:
            log.prompt_mask = torch.ones_like(tokens) if attention_mask is None else attention_mask
        given = kwargs.get("neighbor_ids") is not None
        if not given and self.retriever is None:
            return model_inputs

        past_length = 0 if cache is None else cache.past_length
        grid = ChunkGrid.build(
            self.config.chunk_size,
            *tokens.shape,
            past_length,
            attention_mask,
            model_inputs.get("position_ids"),
            tokens.device,
        )
        if given:
            if log.first_chunk is None:
                log.first_chunk = grid.first_chunk
            neighbors = given_neighbors(
                grid,
                log.first_chunk,
                kwargs["neighbor_ids"],
                kwargs.get("neighbor_attention_mask"),
                kwargs.get("neighbor_scores"),
            )
        else:
            if input_ids.shape[1] == past_length + tokens.shape[1]:  # all known, also where embeddings stand for them
                tokens = input_ids
            elif past_length > 0:
                tokens = torch.cat([cache.tokens.to(tokens.device), tokens], dim=1)
            neighbors = fetch_neighbors(self.retriever, grid, tokens, log)
        model_inputs |= dict(zip(NEIGHBOR_INPUTS, neighbors, strict=True))
        return model_inputs

    def init_continuous_batching(self, *args, **kwargs):
        """Refuse `generate_batch()` and its like, which bypass `generate()` and its cache.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "Continuous batching (generate_batch, transformers serve) packs texts into one row with a paged cache, which cannot "
            "hold what RETRO has read. Use generate(), with a batch of left-padded prompts for many."
        )

    def _prefill(self, input_ids: torch.LongTensor, generation_config: GenerationConfig, model_kwargs: dict, **kwargs):
        # a prompt that is prefilled piece by piece never reaches the hook as a whole
        log, mask = model_kwargs.get("retrieval_log"), model_kwargs.get("attention_mask")
        if log is not None and log.prompt_mask is None:
            log.prompt_mask = mask
        return super()._prefill(input_ids, generation_config, model_kwargs, **kwargs)

    def _update_model_kwargs_for_generation(self, outputs: ModelOutput, model_kwargs: dict, **kwargs) -> dict:
        # the library keeps the cross-attention of encoder-decoder models alone
        log = model_kwargs.get("retrieval_log")
        if log is not None and outputs.get("cross_attentions"):
            log.cross_attentions.append(outputs.cross_attentions)
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)

    def _get_candidate_generator(self, *, model_kwargs: dict, assistant_model: PreTrainedModel | None = None, **kwargs):
        # An assistant drafts with its own retrieval, if it has any: this model's neighbors are not its arguments.
        if assistant_model is not None:
            own = ("retrieval_log", "use_retrieval", *NEIGHBOR_INPUTS)
            model_kwargs = {name: value for name, value in model_kwargs.items() if name not in own}
        return super()._get_candidate_generator(model_kwargs=model_kwargs, assistant_model=assistant_model, **kwargs)

    def _validate_generated_length(
        self, generation_config: GenerationConfig, input_ids_length: int, has_default_max_length: bool
    ) -> None:
        super()._validate_generated_length(generation_config, input_ids_length, has_default_max_length)
        if generation_config.max_length > self.config.n_positions:
            raise ValueError(
                f"The prompt and what is to be generated come to {generation_config.max_length} tokens, the model has "
                f"{self.config.n_positions} positions (n_positions): shorten the prompt ({input_ids_length} tokens), or "
                "set a smaller max_new_tokens."
            )

    def _retrieved(
        self, sequences: torch.LongTensor, log: RetrievalLog, eos_token_id: int | list[int] | None
    ) -> list[list[RetrievedChunk]]:
        """Return the chunks of each returned row (rows, L) and what they read, up to the end of its text."""
        if log.prompt_mask is None:  # retrieval was off
            return [[] for _ in sequences]
        eos = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id or [])
        masks = log.prompt_mask.bool().tolist()
        read = []
        for number, row in enumerate(sequences.tolist()):
            mask = masks[number * len(masks) // len(sequences)]  # rows that grew from one prompt stand together
            if len(row) < len(mask):  # a prompt of embeddings, which is not in the sequence
                row = [-1] * len(mask) + row
            prompt = list(compress(row, mask))
            generated = row[len(mask) :]
            end = next((place + 1 for place, token in enumerate(generated) if token in eos), len(generated))
            read.append(log.read_by(prompt + generated[:end], self.config.chunk_size))
        return read
