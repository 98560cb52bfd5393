"""Record what a model read and what it changed: plain data for the inspector's page.

A text is generated or given. Then the model reads it twice, with neighbors and without, so that
each token has two log probabilities.
"""

import codecs
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import set_seed

from modeling_retro.retrieval_points import aligned_first_point, retrieval_points
from retrieval import BulkTokenizer, Neighbors
from retrieval.retriever import runs
from retrieval.tokenization import added_bos

from .opening import Opened

COPIED_RUN = 4  # tokens that a neighbor and a text share in a row, at least, to be called copied
LEAST_LOG_PROB = -999.0  # stands for minus infinity, which JSON does not have


@dataclass
class ShownNeighbor:
    """A neighbor of a chunk.

    Attributes:
        doc_id: its document.
        chunk_index: its number in the document.
        similarity: the search's score.
        tokens: its text and what follows it, as tokens.
        copied: spans [start, end) of these tokens that also stand in the chunk that reads them.
    """

    doc_id: str
    chunk_index: int
    similarity: float
    tokens: list[str]
    copied: list[tuple[int, int]]


@dataclass
class ShownChunk:
    """The tokens [start, end) that read the neighbors of one retrieval point.

    The query is the tokens [query_start, start).
    """

    query_start: int
    start: int
    end: int
    neighbors: list[ShownNeighbor] = field(default_factory=list)


@dataclass
class Inspection:
    """A text with what each chunk read and what the neighbors changed.

    Attributes:
        tokens: the text. A character that is split over tokens stands in the last of them.
        prompt_length: tokens of the prompt; all of them if the text was given.
        on: each token's log probability in nats with neighbors. The first token has none.
        off: the same without neighbors.
        chunks: one for each retrieval point.
        off_tokens: what the decoder alone writes after the prompt; empty if the text was given.
        copied_run: tokens of a copied span, at least.
    """

    tokens: list[str]
    prompt_length: int
    on: list[float | None]
    off: list[float | None]
    chunks: list[ShownChunk]
    off_tokens: list[str]
    copied_run: int = COPIED_RUN

    def as_json(self) -> dict[str, Any]:
        """Return plain data that `json` can write."""
        return asdict(self)


def token_texts(tokenizer: BulkTokenizer, tokens: Sequence[int], starts_text: bool = True) -> list[str]:
    """Return the text of each token; joined, they are the text of all.

    A character whose bytes are split over tokens stands in the last of them. The others are empty
    there. Bytes that are no character become U+FFFD.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    shown = []
    for place, token in enumerate(tokens):
        before = tokens[place - 1 : place] if place else []
        behind = tokenizer.decode_bytes([*before, token], starts_text and not place)
        piece = behind[len(tokenizer.decode_bytes(before, False)) :]
        shown.append(decoder.decode(piece, final=place == len(tokens) - 1))
    return shown


def copied_spans(neighbor: Sequence[int], text: Sequence[int], least: int = COPIED_RUN) -> list[tuple[int, int]]:
    """Return the spans [start, end) of a neighbor that lie in shared runs of at least `least`."""
    shared = runs(text, least)
    spans: list[tuple[int, int]] = []
    for start in range(len(neighbor) - least + 1):
        if tuple(neighbor[start : start + least]) not in shared:
            continue
        if spans and start < spans[-1][1]:  # the runs overlap
            spans[-1] = (spans[-1][0], start + least)
        else:
            spans.append((start, start + least))
    return spans


def inspect_text(opened: Opened, text: str) -> Inspection:
    """Read a given text with the retrieval points of the paper, the ends of chunks.

    Raises:
        ValueError: the text is too short to have a point, or longer than the model's positions.
        KnowledgeBaseError: the knowledge base does not answer.
    """
    tokens, size = encoded(opened, text), opened.model.config.chunk_size
    if len(tokens) <= size:
        raise ValueError(
            f"The text has {len(tokens)} tokens. Neighbors are found for a chunk of {size} tokens and predict what "
            f"follows it: give a text of {size + 1} tokens or more."
        )
    check_length(opened, len(tokens), 0)
    return look(opened, tokens, len(tokens), size, [])


def inspect_generation(
    opened: Opened, prompt: str, new_tokens: int, temperature: float = 0.0, seed: int = 0
) -> Inspection:
    """Continue a prompt with neighbors and without, and record what was read.

    Args:
        opened: a model with its knowledge base.
        prompt: the text to continue. The knowledge base is searched at its end.
        new_tokens: tokens to write, at most.
        temperature: 0 always takes the likeliest token.
        seed: of the draws.

    Raises:
        ValueError: the prompt is empty, a setting is out of its range, or prompt and new tokens do
            not fit the model's positions.
        KnowledgeBaseError: the knowledge base does not answer.
    """
    if not prompt:
        raise ValueError("The prompt is empty. Write a text to continue.")
    if new_tokens < 1 or temperature < 0:
        raise ValueError(
            f"new_tokens is {new_tokens} and temperature is {temperature}. Set 1 or more new tokens, and a "
            "temperature of 0 or more."
        )
    model, prompted = opened.model, encoded(opened, prompt)
    check_length(opened, len(prompted), new_tokens)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature}
    input_ids = torch.tensor([prompted], device=model.device)

    def write(use_retrieval: bool) -> list[int]:
        set_seed(seed)
        output = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=new_tokens,
            use_retrieval=use_retrieval,
            pad_token_id=opened.tokenizer.hf_tokenizer.eos_token_id,
            **sampling,
        )
        return output[0].tolist()

    tokens, alone = write(True), write(False)[len(prompted) :]
    first = aligned_first_point(len(prompted), model.config.chunk_size, stride_of(opened))
    return look(opened, tokens, len(prompted), first, token_texts(opened.tokenizer, alone, False))


def encoded(opened: Opened, text: str) -> list[int]:
    """Return a text's tokens, after the token with which the tokenizer begins a text."""
    begin = added_bos(opened.tokenizer.hf_tokenizer)
    (tokens,) = opened.tokenizer.encode_batch([text])
    return [*([] if begin is None else [begin]), *tokens]


def stride_of(opened: Opened) -> int:
    """Return the tokens between two retrieval points."""
    return opened.model.config.retrieval_stride or opened.model.config.chunk_size


def check_length(opened: Opened, length: int, new_tokens: int) -> None:
    """Raise ValueError if a text and its new tokens do not fit the model's positions."""
    most = opened.model.config.n_positions
    if length + new_tokens > most:
        writes = f" and {new_tokens} are to be written" if new_tokens else ""
        raise ValueError(
            f"The text has {length} tokens{writes}, but the model has {most} positions. Shorten the text or write less."
        )


@torch.no_grad()
def look(opened: Opened, tokens: list[int], prompt_length: int, first: int, off_tokens: list[str]) -> Inspection:
    """Search for the neighbors of a text and read it with them and without.

    Args:
        opened: a model with its knowledge base.
        tokens: the text.
        prompt_length: its tokens that were given.
        first: the first retrieval point.
        off_tokens: what the decoder alone wrote.
    """
    model, retriever, tokenizer = opened.model, opened.retriever, opened.tokenizer
    assert retriever is not None, "opened with a knowledge base"
    size, stride = model.config.chunk_size, stride_of(opened)
    points = list(retrieval_points(len(tokens) - 1, first, stride))
    reading: dict[str, Any] = {}
    chunks: list[ShownChunk] = []
    if points:
        found = retriever.retrieve([tokens[max(0, point - size) : point] for point in points])
        reading = {
            "neighbor_ids": found.ids[None].to(model.device),
            "neighbor_attention_mask": found.attention_mask[None].to(model.device),
            "neighbor_scores": found.scores.nan_to_num(0.0)[None].to(model.device),
            "first_point": torch.tensor([first], device=model.device),
            "retrieval_stride": stride,
        }
        ends = [*points[1:], len(tokens)]
        for number, (point, end) in enumerate(zip(points, ends, strict=True)):
            neighbors = shown_neighbors(tokenizer, found, number, tokens[point:end])
            chunks.append(ShownChunk(max(0, point - size), point, end, neighbors))
    input_ids = torch.tensor([tokens], device=model.device)

    def log_probs(**arguments: Any) -> list[float | None]:
        logits = model(input_ids=input_ids[:, :-1], use_cache=False, **arguments).logits[0].float()
        values = logits.log_softmax(-1).gather(1, input_ids[0, 1:, None]).squeeze(1)
        return [None, *(round(max(value, LEAST_LOG_PROB), 4) for value in values.tolist())]

    off = log_probs(use_retrieval=False)
    on = log_probs(**reading) if points else off
    return Inspection(token_texts(tokenizer, tokens), prompt_length, on, off, chunks, off_tokens)


def shown_neighbors(
    tokenizer: BulkTokenizer, found: Neighbors, number: int, text: Sequence[int]
) -> list[ShownNeighbor]:
    """Return the neighbors of one point, and what of them the text repeats."""
    shown = []
    for place, doc_id in enumerate(found.doc_ids[number]):
        if doc_id is None:
            continue
        tokens = found.ids[number, place][found.attention_mask[number, place]].tolist()
        index = int(found.chunk_indices[number, place])
        shown.append(
            ShownNeighbor(
                doc_id,
                index,
                round(float(found.scores[number, place]), 4),
                token_texts(tokenizer, tokens, index == 0),
                copied_spans(tokens, text),
            )
        )
    return shown
