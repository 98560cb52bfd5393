"""Greedy generation with RETRO's rivals: in-context retrieval, REPLUG and kNN-LM.

Each rival is an ordinary decoder with a cache, run by its `generate()`. In-context retrieval and
REPLUG search at the prompt's end and after every `stride` new tokens. After each search they read
neighbors and text anew. REPLUG has a row for each neighbor, and averages their distributions at
each token. kNN-LM searches for the nearest keys at each token.

All generate exactly n tokens: no token ends a text.

Shapes: B rows, T tokens of the longest prompt, n new tokens, k neighbors, V vocabulary.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from retrieval import MilvusRetriever, Neighbors

from .in_context import neighbor_tokens, with_neighbors
from .key_building import output_states
from .key_store import KeyStore
from .knn_lm import KnnSettings
from .replug import replug_weights

# how all rows generate: exactly as many tokens as are asked for
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "use_cache": True,
    "eos_token_id": None,
    "pad_token_id": 0,
}
PROMPT_LOOKUP = 10  # tokens of a draft
Excluded = Sequence[Collection[str]]  # for each row, documents that nothing may come from
Texts = list[list[int]]


def generate_in_context(
    decoder: PreTrainedModel,
    retriever: MilvusRetriever,
    input_ids: torch.Tensor,
    new_tokens: int,
    *,
    attention_mask: torch.Tensor | None = None,
    stride: int | None = None,
    separator: Sequence[int] = (),
    max_tokens: int | None = None,
    exclude_doc_ids: Excluded | None = None,
    prompt_lookup: bool = False,
) -> torch.Tensor:
    """Generate with the neighbors in front of the text; see [`evaluation_retro.in_context`].

    Args:
        decoder: a causal language model of transformers, in evaluation mode.
        retriever: finds the neighbors of the text's last chunk.
        input_ids: (B, T) int64, the prompts, padded on the left.
        new_tokens: n, the tokens to generate.
        attention_mask: (B, T), 0 for padding. Default: there is none.
        stride: new tokens between two searches. Default: the retriever's chunk size.
        separator: tokens after each neighbor.
        max_tokens: the window. The text's beginning is cut off so that all fits. Default: no
            limit.
        exclude_doc_ids: for each row, documents whose chunks are not read.
        prompt_lookup: draft from the neighbors and the text, for one row.

    Returns:
        (B, n) int64, the new tokens.

    Raises:
        ValueError: the neighbors leave no room in the window for the new tokens.
        KnowledgeBaseError: the knowledge base does not answer.
    """

    def write(texts: Texts, found: Neighbors, count: int) -> torch.Tensor:
        prompts = [
            cut_prompt(neighbor_tokens(ids, mask, separator), text, count, max_tokens)
            for text, ids, mask in zip(texts, found.ids, found.attention_mask, strict=True)
        ]
        return continue_greedily(decoder, prompts, count, prompt_lookup=prompt_lookup)

    return write_in_strides(write, retriever, _rows(input_ids, attention_mask), new_tokens, stride, exclude_doc_ids)


def generate_replug(
    decoder: PreTrainedModel,
    retriever: MilvusRetriever,
    input_ids: torch.Tensor,
    new_tokens: int,
    *,
    attention_mask: torch.Tensor | None = None,
    stride: int | None = None,
    separator: Sequence[int] = (),
    max_tokens: int | None = None,
    exclude_doc_ids: Excluded | None = None,
) -> torch.Tensor:
    """Generate with an ensemble of prompts with one neighbor; see [`evaluation_retro.replug`].

    Arguments, result and errors as for [`generate_in_context`].
    """

    def write(texts: Texts, found: Neighbors, count: int) -> torch.Tensor:
        k = found.ids.shape[1]
        prompts = [
            cut_prompt(neighbor_tokens(ids[None], mask[None], separator), text, count, max_tokens)
            for text, its_ids, its_mask in zip(texts, found.ids, found.attention_mask, strict=True)
            for ids, mask in zip(its_ids, its_mask, strict=True)
        ]
        weights = replug_weights(found.attention_mask, found.scores)
        return continue_greedily(decoder, prompts, count, _Ensemble(weights.to(decoder.device)))[::k]

    return write_in_strides(write, retriever, _rows(input_ids, attention_mask), new_tokens, stride, exclude_doc_ids)


def generate_knn(
    decoder: PreTrainedModel,
    keys: KeyStore,
    settings: KnnSettings,
    input_ids: torch.Tensor,
    new_tokens: int,
    *,
    attention_mask: torch.Tensor | None = None,
    exclude_doc_ids: Excluded | None = None,
) -> torch.Tensor:
    """Generate with votes of the nearest keys at each token; see [`evaluation_retro.knn_lm`].

    Args:
        decoder: the one that the keys were made with, in evaluation mode.
        keys: as [`evaluation_retro.key_building.build_keys`] returns them.
        settings: as [`evaluation_retro.knn_lm.choose_knn`] chooses them.
        exclude_doc_ids: for each row, documents whose keys do not vote.
        input_ids, new_tokens, attention_mask: as for [`generate_in_context`].

    Returns:
        (B, n) int64, the new tokens.
    """
    texts = _rows(input_ids, attention_mask)
    with output_states(decoder) as states:
        return continue_greedily(decoder, texts, new_tokens, _Votes(states, keys, settings, exclude_doc_ids))


class _Ensemble(LogitsProcessor):
    """Averages the distributions of k rows, and gives the mean to each of them.

    Args:
        log_weights: (B, k), the rows' weights.
    """

    def __init__(self, log_weights: torch.Tensor) -> None:
        self.log_weights = log_weights

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return log-probabilities (B k, V), given logits of that shape."""
        rows, k = self.log_weights.shape
        log_probs = scores.float().log_softmax(-1).view(rows, k, -1)
        return (log_probs + self.log_weights[..., None]).logsumexp(1).repeat_interleave(k, 0)


class _Votes(LogitsProcessor):
    """Mixes the decoder's distribution with the votes of the keys nearest to its last state.

    Args:
        states: a list to which each forward adds its states; see [`output_states`].
        keys, settings, exclude_doc_ids: as for [`generate_knn`].
    """

    def __init__(
        self, states: list[torch.Tensor], keys: KeyStore, settings: KnnSettings, exclude_doc_ids: Excluded | None
    ) -> None:
        self.states, self.keys, self.settings, self.exclude_doc_ids = states, keys, settings, exclude_doc_ids

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return log-probabilities (B, V), given logits of that shape."""
        last = self.states[-1][:, -1].float().cpu().numpy()
        self.states.clear()
        found = self.keys.search(last, self.settings.k, self.exclude_doc_ids)
        distances, tokens = (torch.from_numpy(array).to(scores.device) for array in found)
        return self.settings.mixed(scores.float().log_softmax(-1), distances, tokens)


def _rows(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> Texts:
    """Return the prompts without their padding."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    return [row[is_real].tolist() for row, is_real in zip(input_ids, mask.bool(), strict=True)]


def write_in_strides(
    write: Callable[[Texts, Neighbors, int], torch.Tensor],
    retriever: MilvusRetriever,
    texts: Texts,
    new_tokens: int,
    stride: int | None,
    exclude_doc_ids: Excluded | None,
) -> torch.Tensor:
    """Search, write up to `stride` tokens, and repeat until there are enough.

    Args:
        write: returns the next tokens (B, count) of the texts, given their neighbors and the count.
    """
    size = retriever.chunk_size
    stride = size if stride is None else stride
    if not 1 <= stride <= size:
        raise ValueError(f"stride is {stride}. Give a number from 1 to the knowledge base's chunk size ({size}).")
    parts = []
    for done in range(0, new_tokens, stride):
        found = retriever.retrieve([text[-size:] for text in texts], exclude_doc_ids=exclude_doc_ids)
        parts.append(write(texts, found, min(stride, new_tokens - done)))
        texts = [[*text, *new] for text, new in zip(texts, parts[-1].tolist(), strict=True)]
    return torch.cat(parts, dim=1)


def cut_prompt(before: list[int], text: list[int], count: int, max_tokens: int | None) -> list[int]:
    """Return neighbors and text, cut so that the window has room for `count` new tokens.

    The last new token is not read, so it needs no room.
    """
    later = [0] * (count - 1)
    tokens = with_neighbors(before, text + later, max_tokens, count)
    return tokens[: len(tokens) - len(later)]


def left_padded(prompts: Texts, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return prompts as tokens and mask (rows, length), padded on the left."""
    longest = max(map(len, prompts))
    ids = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def continue_greedily(
    decoder: PreTrainedModel, prompts: Texts, count: int, *processors: LogitsProcessor, prompt_lookup: bool = False
) -> torch.Tensor:
    """Return the next tokens (rows, count), chosen greedily with a cache.

    With `prompt_lookup`, the library drafts tokens from one prompt (Saxena, 2023).
    """
    ids, mask = left_padded(prompts, decoder.device)
    output = decoder.generate(  # type: ignore[operator]  # it is a causal language model
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=count,
        logits_processor=LogitsProcessorList(processors),
        prompt_lookup_num_tokens=PROMPT_LOOKUP if prompt_lookup else None,
        **GREEDY,
    )
    return output[:, ids.shape[1] :]
