"""Retrieval inside `generate()`: a chunk's neighbors are fetched in the step that completes it."""

import functools
import inspect
from collections.abc import Callable
from itertools import compress
from typing import Any, NoReturn

import torch
from transformers import Cache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from configuration_retro import RetroConfig

from .cache import RetroCache
from .chunk_grid import ChunkGrid
from .library import CACHE, check_arguments, either_cache
from .neighbor_fetching import RetrievalLog, RetrievedChunk, Retriever, fetch_neighbors, select_given
from .neighbor_inputs import NeighborInputs

NEIGHBOR_ARGUMENTS = ("neighbor_ids", "neighbor_attention_mask", "neighbor_scores")


@functools.cache
def _argument_names(function: Callable) -> frozenset[str]:
    """Return the names of a function's arguments."""
    return frozenset(inspect.signature(function).parameters)


class RetroGenerationMixin(PreTrainedModel, GenerationMixin):
    """`generate()` with a retriever. All strategies go through `prepare_inputs_for_generation`."""

    config: RetroConfig
    retriever: Retriever | None

    @torch.no_grad()
    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Generate as `GenerationMixin.generate`, with neighbors for every chunk that completes.

        Args:
            neighbor_ids, neighbor_attention_mask, neighbor_scores: neighbors of the prompt's chunks
                (see `RetroModel.forward`). If they are given, the retriever is not asked in this
                call.
            use_retrieval: False generates without neighbors.

        Returns:
            What `GenerationMixin.generate` returns. With `return_dict_in_generate=True` the output
            has an entry `retrieved`: a list of `RetrievedChunk` for each returned row, with the
            documents found for its chunks and their similarities. With `output_attentions=True` it
            also has `cross_attentions`: for each forward pass and cross-attention layer, (rows,
            heads, tokens of the pass, k·r) over the neighbors.
        """
        log = RetrievalLog()
        cache = either_cache(kwargs.pop("past_key_values", None), kwargs.pop("cache", None))
        if cache is not None:
            kwargs[CACHE] = cache
        if self.training and getattr(self.base_model, "gradient_checkpointing", False):
            kwargs["use_cache"] = False  # checkpointed layers keep no cache
        outputs = super().generate(inputs, *args, retrieval_log=log, **kwargs)  # type: ignore[misc]
        if isinstance(outputs, ModelOutput):
            generation_config = kwargs.get("generation_config") or self.generation_config
            eos_token_id = kwargs.get("eos_token_id", generation_config.eos_token_id)
            outputs["retrieved"] = self._retrieved(outputs.sequences, log, eos_token_id)
            if log.cross_attentions:
                outputs["cross_attentions"] = tuple(log.cross_attentions)
        return outputs

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        retrieval_log: RetrievalLog | None = None,
        use_retrieval: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Prepare one forward of `generate()`, with neighbors of the chunks that it completes."""
        kwargs.pop("tokenizer", None)  # generate() passes on the tokenizer of its stop strings
        check_arguments("prepare_inputs_for_generation", kwargs, _argument_names(type(self).forward))
        use_retrieval = self.config.use_retrieval if use_retrieval is None else use_retrieval
        cache = either_cache(past_key_values, cache)
        if use_retrieval and cache is not None and not isinstance(cache, RetroCache):
            cache = RetroCache(cache)
        model_inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids,  # type: ignore[arg-type]  # mypy cannot tell it from a LongTensor
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,  # type: ignore[arg-type]
            inputs_embeds=inputs_embeds,  # type: ignore[arg-type]
            is_first_iteration=is_first_iteration,
            use_retrieval=use_retrieval,
            **{CACHE: cache},
            **kwargs,
        )
        if use_retrieval:
            assert cache is None or isinstance(cache, RetroCache)
            log = RetrievalLog() if retrieval_log is None else retrieval_log
            neighbors = self._step_neighbors(model_inputs, input_ids, attention_mask, cache, log)
            if neighbors is not None:
                model_inputs |= neighbors.as_arguments()
        return model_inputs

    def _step_neighbors(
        self,
        model_inputs: dict[str, Any],
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: RetroCache | None,
        log: RetrievalLog,
    ) -> NeighborInputs | None:
        """Return the given or fetched neighbors of the chunks that a forward completes, if any."""
        tokens = model_inputs.get("input_ids")
        if tokens is None:
            tokens = torch.full(model_inputs["inputs_embeds"].shape[:2], -1, device=self.device)
        if log.prompt_mask is None:
            log.prompt_mask = torch.ones_like(tokens) if attention_mask is None else attention_mask
        is_given = model_inputs.get("neighbor_ids") is not None
        if not is_given and self.retriever is None:
            return None

        past_length = 0 if cache is None else cache.past_length
        grid = ChunkGrid.build(
            self.config.chunk_size,
            (tokens.shape[0], tokens.shape[1]),
            past_length,
            attention_mask,
            model_inputs.get("position_ids"),
            tokens.device,
        )
        if is_given:
            if log.first_chunk is None:
                log.first_chunk = grid.first_chunk
            ids, mask, scores = (model_inputs.get(name) for name in NEIGHBOR_ARGUMENTS)
            assert ids is not None
            return select_given(grid, log.first_chunk, NeighborInputs.from_arguments(ids, mask, scores))
        if input_ids.shape[1] == past_length + tokens.shape[1]:  # all are known, also where embeddings replace them
            tokens = input_ids
        elif cache is not None and cache.tokens is not None:
            tokens = torch.cat([cache.tokens.to(tokens.device), tokens], dim=1)
        assert self.retriever is not None
        return fetch_neighbors(self.retriever, grid, tokens, log)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse `generate_batch()` and its like, which bypass `generate()` and its cache.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "Continuous batching (generate_batch, transformers serve) packs texts into one row with a paged cache, "
            "which cannot hold RETRO's neighbors. Use generate() with a batch of left-padded prompts instead."
        )

    # Private methods of the library that have no public counterpart

    def _prefill(  # type: ignore[override]
        self, input_ids: torch.Tensor, generation_config: GenerationConfig, model_kwargs: dict, **kwargs: Any
    ) -> Any:
        # a prompt that is prefilled in pieces never reaches prepare_inputs_for_generation as a
        # whole
        log, mask = model_kwargs.get("retrieval_log"), model_kwargs.get("attention_mask")
        if log is not None and log.prompt_mask is None:
            log.prompt_mask = mask
        return super()._prefill(input_ids, generation_config, model_kwargs, **kwargs)  # type: ignore[misc, arg-type]

    def _update_model_kwargs_for_generation(  # type: ignore[override]
        self, outputs: ModelOutput, model_kwargs: dict, **kwargs: Any
    ) -> dict:
        # the library keeps cross-attentions of encoder-decoder models only
        log = model_kwargs.get("retrieval_log")
        if log is not None and outputs.get("cross_attentions"):
            log.cross_attentions.append(outputs["cross_attentions"])
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)

    def _get_candidate_generator(  # type: ignore[override]
        self, *, model_kwargs: dict, assistant_model: PreTrainedModel | None = None, **kwargs: Any
    ) -> Any:
        # an assistant drafts with its own retrieval, if any; this model's neighbors are not its
        # arguments
        if assistant_model is not None:
            own = ("retrieval_log", "use_retrieval", *NEIGHBOR_ARGUMENTS)
            model_kwargs = {name: value for name, value in model_kwargs.items() if name not in own}
        return super()._get_candidate_generator(  # type: ignore[misc]
            model_kwargs=model_kwargs, assistant_model=assistant_model, **kwargs
        )

    def _validate_generated_length(
        self, generation_config: GenerationConfig, input_ids_length: int, has_default_max_length: bool
    ) -> None:
        super()._validate_generated_length(  # type: ignore[misc]
            generation_config, input_ids_length, has_default_max_length
        )
        if generation_config.max_length > self.config.n_positions:
            raise ValueError(
                f"Prompt and continuation come to {generation_config.max_length} tokens, but the model has "
                f"{self.config.n_positions} positions (n_positions). Shorten the prompt ({input_ids_length} tokens) or "
                "set a smaller max_new_tokens."
            )

    def _retrieved(
        self, sequences: torch.Tensor, log: RetrievalLog, eos_token_id: int | list[int] | None
    ) -> list[list[RetrievedChunk]]:
        """Return the retrieved chunks of each of the sequences, up to the end of its text."""
        if log.prompt_mask is None:  # retrieval was off
            return [[] for _ in sequences]
        eos = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id or [])
        masks = log.prompt_mask.bool().tolist()
        retrieved = []
        for number, row in enumerate(sequences.tolist()):
            mask = masks[number * len(masks) // len(sequences)]  # rows that grew from one prompt are adjacent
            if len(row) < len(mask):  # a prompt of embeddings, which is not in the sequence
                row = [-1] * len(mask) + row
            prompt = list(compress(row, mask))
            generated = row[len(mask) :]
            end = next((place + 1 for place, token in enumerate(generated) if token in eos), len(generated))
            retrieved.append(log.retrieved(prompt + generated[:end], self.config.chunk_size))
        return retrieved
