"""Retrieval inside `generate()`: neighbours are fetched once for each chunk, in the step that completes it."""

from itertools import compress

import torch
from transformers import Cache, GenerationConfig, GenerationMixin
from transformers.utils import ModelOutput

from .cache import RetroCache
from .chunk_grid import ChunkGrid
from .neighbor_fetching import RetrievalLog, RetrievedChunk, fetch_neighbors


class RetroGenerationMixin(GenerationMixin):
    """`generate()` with a retriever. Greedy search, sampling and beam search need no more than the hook below."""

    @torch.no_grad()
    def generate(self, inputs: torch.Tensor | None = None, *args, retrieval_log: RetrievalLog | None = None, **kwargs):
        """`GenerationMixin.generate`, with neighbours for every chunk that completes.

        Args:
            neighbor_ids, neighbor_attention_mask: neighbours of the prompt's chunks (see `RetroModel.forward`). If they
                are given, the retriever is not asked in this call.
            use_retrieval: False generates without neighbours.
            retrieval_log: where to keep what is retrieved; a new one if not given.

        Returns:
            What `GenerationMixin.generate` returns. With `return_dict_in_generate=True` the output has one more entry,
            `retrieved`: for each returned row a list of `RetrievedChunk`, which documents were read for each of its
            chunks and how similar they were.
        """
        log = RetrievalLog() if retrieval_log is None else retrieval_log
        outputs = super().generate(inputs, *args, retrieval_log=log, **kwargs)
        if isinstance(outputs, ModelOutput):
            generation_config = kwargs.get("generation_config") or self.generation_config
            eos_token_id = kwargs.get("eos_token_id", generation_config.eos_token_id)
            outputs["retrieved"] = self._retrieved(outputs.sequences, log, eos_token_id)
        return outputs

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        retrieval_log: RetrievalLog | None = None,
        use_retrieval: bool | None = None,
        **kwargs,
    ) -> dict:
        """The hook that `generate()` calls before each forward: fetches neighbours for the chunks that it completes."""
        use_retrieval = self.config.use_retrieval if use_retrieval is None else use_retrieval
        if use_retrieval and past_key_values is not None and not isinstance(past_key_values, RetroCache):
            past_key_values = RetroCache(past_key_values)
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            is_first_iteration=is_first_iteration,
            use_retrieval=use_retrieval,
            **kwargs,
        )
        if not use_retrieval:
            return model_inputs

        log = RetrievalLog() if retrieval_log is None else retrieval_log
        if log.prompt_mask is None:
            prompt = model_inputs.get("input_ids")
            prompt = model_inputs["inputs_embeds"][..., 0] if prompt is None else prompt
            log.prompt_mask = torch.ones_like(prompt) if attention_mask is None else attention_mask
        past_length = 0 if past_key_values is None else past_key_values.past_length
        if kwargs.get("neighbor_ids") is not None:
            if past_length > 0 and not is_first_iteration:  # they are in the cache already
                model_inputs["neighbor_ids"] = kwargs["neighbor_ids"][:, :0]
                model_inputs["neighbor_attention_mask"] = None
        elif self.retriever is not None:
            tokens = model_inputs.get("input_ids")
            if tokens is None:
                tokens = torch.full(model_inputs["inputs_embeds"].shape[:2], -1, device=self.device)
            grid = ChunkGrid.build(
                self.config.chunk_size,
                *tokens.shape,
                past_length,
                attention_mask,
                model_inputs.get("position_ids"),
                tokens.device,
            )
            if past_length > 0:
                tokens = torch.cat([past_key_values.tokens.to(tokens.device), tokens], dim=1)
            model_inputs["neighbor_ids"], model_inputs["neighbor_attention_mask"] = fetch_neighbors(
                self.retriever, grid, tokens, log
            )
        return model_inputs

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
        """What each returned row (rows, L) has read, up to the end of its text."""
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
