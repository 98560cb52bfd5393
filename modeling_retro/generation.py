"""Retrieval inside `generate()`: a point's neighbors are fetched in the step that reaches it."""

import copy
from functools import wraps
from itertools import compress
from typing import Any, NoReturn

import torch
from transformers import (
    Cache,
    CompileConfig,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.utils import ModelOutput

from configuration_retro import RetroConfig

from .cache import RetroCache
from .chunk_grid import ChunkGrid
from .drafts import MOST_LENGTH, AfterPrompt, NeighborDrafts
from .library import CACHE, argument_names, check_arguments, either_cache
from .neighbor_fetching import RetrievalLog, RetrievedChunk, Retriever, fetch_neighbors, select_given
from .neighbor_inputs import NeighborInputs
from .retrieval_points import RetrievalPoints

NEIGHBOR_ARGUMENTS = ("neighbor_ids", "neighbor_attention_mask", "neighbor_scores")
POINT_ARGUMENTS = ("first_point", "retrieval_stride")


class RetroGenerationMixin(PreTrainedModel, GenerationMixin):
    """`generate()` with a retriever. All strategies go through `prepare_inputs_for_generation`."""

    config: RetroConfig
    retriever: Retriever | None

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        align_to_prompt: bool = True,
        draft_from_neighbors: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Generate as `GenerationMixin.generate`, with neighbors for every retrieval point.

        Args:
            align_to_prompt: make the end of the prompt a retrieval point, so that the first new
                token reads neighbors, however short the prompt is. The points before it lie every
                `retrieval_stride` tokens. False begins after the first chunk, as the paper does. A
                cache from an earlier call keeps its points and gets one more at the new prompt's
                end.
            draft_from_neighbors: propose what the neighbors say next, and verify it in one forward.
                The text stays the same, token for token if decoded greedily, and in its
                distribution if sampled. For one row at a time, with a dynamic cache.
            first_point: (rows,) int64, each row's first point (see `RetroModel.forward`), instead
                of one that follows from the prompt.
            retrieval_stride: tokens between two points, from 1 to chunk_size. Default: the setting
                in the configuration.
            neighbor_ids, neighbor_attention_mask, neighbor_scores: neighbors of the prompt's points
                (see `RetroModel.forward`). If they are given, the retriever is not asked in this
                call, and the points are the ends of chunks unless `first_point` is given.
            use_retrieval: False generates without neighbors.

        Returns:
            What `GenerationMixin.generate` returns. With `return_dict_in_generate=True` the output
            has an entry `retrieved`: a list of `RetrievedChunk` for each returned row, with the
            documents found at its points and their similarities. With `output_attentions=True` it
            also has `cross_attentions`: for each forward pass and cross-attention layer, (rows,
            heads, tokens of the pass, k·r) over the neighbors.

        Raises:
            ValueError: drafts are asked for together with another kind of draft, for several rows,
                or without a cache that can be cropped.
        """
        has_points = any(kwargs.get(name) is not None for name in ("neighbor_ids", "first_point"))
        log = RetrievalLog(align_to_prompt and not has_points)
        if draft_from_neighbors:
            generation_config, kwargs = self._drafting(generation_config, kwargs)
            log.drafts = True
        cache = either_cache(kwargs.pop("past_key_values", None), kwargs.pop("cache", None))
        if cache is not None:
            kwargs[CACHE] = cache
        if self.training and getattr(self.base_model, "gradient_checkpointing", False):
            kwargs["use_cache"] = False  # checkpointed layers keep no cache
        outputs = super().generate(  # type: ignore[misc]
            inputs, generation_config, *args, retrieval_log=log, **kwargs
        )
        if isinstance(outputs, ModelOutput):
            eos_token_id = kwargs.get("eos_token_id", (generation_config or self.generation_config).eos_token_id)
            outputs["retrieved"] = self._retrieved(outputs.sequences, log, eos_token_id)
            if log.cross_attentions:
                outputs["cross_attentions"] = tuple(log.cross_attentions)
        return outputs

    def _drafting(
        self, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
    ) -> tuple[GenerationConfig | None, dict[str, Any]]:
        """Return the settings of `generate()` under which the library verifies drafts.

        Raises:
            ValueError: there is another kind of draft, more than one beam, or no dynamic cache.
        """
        other = "assistant_model" if kwargs.get("assistant_model") is not None else "prompt_lookup_num_tokens"
        if kwargs.get(other, getattr(generation_config, other, None)) is not None:
            raise ValueError(f"draft_from_neighbors and {other} both draft. Give one of them.")
        defaults = generation_config or self.generation_config
        beams, use_cache, kind = (
            kwargs.get(name, getattr(defaults, name)) for name in ("num_beams", "use_cache", "cache_implementation")
        )
        if (beams or 1) > 1:
            raise ValueError(f"num_beams is {beams}, but draft_from_neighbors follows one text. Leave one of them out.")
        if use_cache is False or "static" in str(kind):
            raise ValueError(
                f"use_cache is {use_cache} and cache_implementation is {kind}, but draft_from_neighbors needs a "
                "dynamic cache, which can be cropped. Leave them out."
            )
        if generation_config is None:
            return None, kwargs | {"prompt_lookup_num_tokens": MOST_LENGTH}
        drafting = copy.deepcopy(generation_config)
        drafting.prompt_lookup_num_tokens = MOST_LENGTH
        return drafting, kwargs

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
        """Prepare one forward of `generate()`, with neighbors of the points that it reaches."""
        kwargs.pop("tokenizer", None)  # generate() passes on the tokenizer of its stop strings
        check_arguments("prepare_inputs_for_generation", kwargs, argument_names(type(self).forward))
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
        """Return the given or fetched neighbors of the points that a forward reaches, if any.

        The points are put into the forward's inputs, or into the cache if it has begun.
        """
        tokens = model_inputs.get("input_ids")
        if tokens is None:
            tokens = torch.full(model_inputs["inputs_embeds"].shape[:2], -1, device=self.device)
        past_length = 0 if cache is None else cache.past_length
        if log.prompt_mask is None:
            every = tokens.new_ones(len(tokens), past_length + tokens.shape[1])
            log.prompt_mask = every if attention_mask is None else attention_mask
        is_given = model_inputs.get("neighbor_ids") is not None
        if not is_given and self.retriever is None:
            return None

        columns = past_length + tokens.shape[1]
        if cache is not None:
            is_pause = past_length in log.pause and columns in log.pause
            cache.reads_on = is_pause and not cache.is_compileable
            if is_pause:
                for name in POINT_ARGUMENTS:  # the cache has them
                    model_inputs.pop(name, None)
                return log.nothing(self.config, tokens)
        points = self._step_points(model_inputs, cache if past_length else None, log)
        log.find_pause(columns)
        grid = ChunkGrid.build(
            points,
            (tokens.shape[0], tokens.shape[1]),
            past_length,
            attention_mask,
            model_inputs.get("position_ids"),
            tokens.device,
        )
        if is_given:
            return _select_given(model_inputs, grid, log)
        if input_ids.shape[1] == columns:  # all are known, also where embeddings replace them
            tokens = input_ids
        elif cache is not None and cache.tokens is not None:
            tokens = torch.cat([cache.tokens.to(tokens.device), tokens], dim=1)
        assert self.retriever is not None
        return fetch_neighbors(self.retriever, grid, tokens, log)

    def _step_points(
        self, model_inputs: dict[str, Any], cache: RetroCache | None, log: RetrievalLog
    ) -> RetrievalPoints:
        """Return the points of a forward, after aligning them to the prompt in the first one.

        Args:
            model_inputs: the forward's; they get its first point.
            cache: one that holds tokens. It keeps its points.
        """
        first_point, stride = (model_inputs.pop(name, None) for name in POINT_ARGUMENTS)
        known = None if cache is None else cache.points
        if log.points is None:
            assert log.prompt_mask is not None, "set in the first step"
            log.points = RetrievalPoints.of(self.config, len(log.prompt_mask), first_point, stride, known)
            if log.align_to_prompt and cache is not None:
                log.points = cache.points = log.points.with_prompt_end(log.prompt_mask.shape[1])
            elif log.align_to_prompt:
                log.points = log.points.aligned_to(log.prompt_mask.bool().sum(1))
        if cache is not None and cache.points is not None:
            return cache.points
        first = log.points.first
        model_inputs |= {
            "first_point": None if first is None else first.squeeze(1),
            "retrieval_stride": log.points.stride,
        }
        return log.points

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

    def _default_compile_config(self) -> CompileConfig:
        # The library's default replays CUDA graphs, whose outputs the next step overwrites. RETRO's
        # memory of the tokens is such an output and grows with every token.
        if self.config.use_retrieval:
            return CompileConfig(mode="default")
        return super()._default_compile_config()

    def _prefill(  # type: ignore[override]
        self, input_ids: torch.Tensor, generation_config: GenerationConfig, model_kwargs: dict, **kwargs: Any
    ) -> Any:
        # a prompt that is prefilled in pieces never reaches prepare_inputs_for_generation as a
        # whole
        _record_prompt(input_ids, model_kwargs)
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
        # a first forward with a draft holds more than the prompt
        _record_prompt(kwargs["input_ids"], model_kwargs)
        log = model_kwargs.get("retrieval_log")
        if log is not None and log.drafts:
            return self._neighbor_drafts(log, model_kwargs, kwargs["input_ids"], kwargs["generation_config"])
        # an assistant drafts with its own retrieval, if any; this model's neighbors are not its
        # arguments
        if assistant_model is not None:
            own = ("retrieval_log", "use_retrieval", *NEIGHBOR_ARGUMENTS, *POINT_ARGUMENTS)
            model_kwargs = {name: value for name, value in model_kwargs.items() if name not in own}
        return super()._get_candidate_generator(  # type: ignore[misc]
            model_kwargs=model_kwargs, assistant_model=assistant_model, **kwargs
        )

    @wraps(GenerationMixin._assisted_decoding)  # the library reads the names of its arguments
    def _assisted_decoding(  # type: ignore[override]
        self, input_ids: torch.Tensor, *args: Any, stopping_criteria: StoppingCriteriaList, **kwargs: Any
    ) -> Any:
        log = kwargs.get("retrieval_log")
        if log is not None and log.drafts:  # the library does not tell the drafts when a text stops
            log.stopping_criteria = stopping_criteria = AfterPrompt(stopping_criteria, input_ids.shape[1])
        return super()._assisted_decoding(  # type: ignore[misc]
            input_ids,  # type: ignore[arg-type]  # mypy cannot tell it from a LongTensor
            *args,
            stopping_criteria=stopping_criteria,
            **kwargs,
        )

    def _neighbor_drafts(
        self, log: RetrievalLog, model_kwargs: dict, input_ids: torch.Tensor, generation_config: GenerationConfig
    ) -> NeighborDrafts:
        if len(input_ids) > 1:
            raise ValueError(
                f"draft_from_neighbors drafts for one row at a time, but there are {len(input_ids)}. Generate row by "
                "row, or leave it out."
            )
        ids, mask, scores = (model_kwargs.get(name) for name in NEIGHBOR_ARGUMENTS)
        given = None if ids is None else NeighborInputs.from_arguments(ids, mask, scores)
        return NeighborDrafts(self, input_ids, log, given, generation_config)

    def _validate_generated_length(
        self, generation_config: GenerationConfig, input_ids_length: int, has_default_max_length: bool
    ) -> None:
        super()._validate_generated_length(  # type: ignore[misc]
            generation_config, input_ids_length, has_default_max_length
        )
        most, max_length = self.base_model.max_positions, generation_config.max_length
        if most is not None and max_length > most:
            raise ValueError(
                f"Prompt and continuation come to {max_length} tokens, but the model has "
                f"{most} positions (n_positions). Shorten the prompt ({input_ids_length} tokens) or set a smaller "
                "max_new_tokens."
            )
        switch = _position_switch(self.config)
        if switch is not None and generation_config.use_cache and input_ids_length <= switch < max_length:
            raise ValueError(
                f"Prompt and continuation come to {max_length} tokens, but this decoder counts positions in another "
                f"way beyond {switch} (longrope), where its cache is no longer right. Set a smaller max_new_tokens or "
                "use_cache=False."
            )

    def _retrieved(
        self, sequences: torch.Tensor, log: RetrievalLog, eos_token_id: int | list[int] | None
    ) -> list[list[RetrievedChunk]]:
        """Return what was retrieved for each of the sequences, up to the end of its text."""
        if log.prompt_mask is None or log.points is None:  # retrieval was off
            return [[] for _ in sequences]
        eos = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id or [])
        masks = log.prompt_mask.bool().tolist()
        retrieved = []
        for number, row in enumerate(sequences.tolist()):
            prompt_row = number * len(masks) // len(sequences)  # rows that grew from one prompt are adjacent
            mask = masks[prompt_row]
            if len(row) < len(mask):  # a prompt of embeddings, which is not in the sequence
                row = [-1] * len(mask) + row
            prompt = list(compress(row, mask))
            generated = row[len(mask) :]
            end = next((place + 1 for place, token in enumerate(generated) if token in eos), len(generated))
            text = prompt + generated[:end]
            points = log.points.of_row(prompt_row, mask + [True] * end)
            retrieved.append(log.retrieved(text, points, self.config.chunk_size))
        return retrieved


def _select_given(model_inputs: dict[str, Any], grid: ChunkGrid, log: RetrievalLog) -> NeighborInputs:
    """Return the neighbors given to `generate()` of the points that a forward reaches."""
    if log.first_given is None:
        log.first_given = grid.first_reached
    ids, mask, scores = (model_inputs.get(name) for name in NEIGHBOR_ARGUMENTS)
    assert ids is not None, "asked for where they are given"
    return select_given(grid, log.first_given, NeighborInputs.from_arguments(ids, mask, scores))


def _position_switch(config: RetroConfig) -> int | None:
    """Return the length of text at which a decoder's rotary positions change, if there is one."""
    rope = getattr(config.text_config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    own = getattr(config.text_config, "original_max_position_embeddings", None)
    return own or rope.get("original_max_position_embeddings")


def _record_prompt(input_ids: torch.Tensor, model_kwargs: dict[str, Any]) -> None:
    """Record which columns of the prompt are tokens in the log, unless it is known already."""
    log, mask = model_kwargs.get("retrieval_log"), model_kwargs.get("attention_mask")
    if log is None or log.prompt_mask is not None:
        return
    if mask is None:
        embeds = model_kwargs.get("inputs_embeds")
        mask = torch.ones_like(input_ids if embeds is None else embeds[..., 0], dtype=torch.long)
    log.prompt_mask = mask
