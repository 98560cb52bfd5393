"""Sampling from a trained model: settings, the model, and samples with what they read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, set_seed

from evaluation_retro.opening import ModelSettings, open_model
from modeling_retro import RetrievedChunk, RetroForCausalLM
from retrieval.detokenization import token_bytes
from retrieval.tokenization import added_bos

FILE_PREFIX = "FILE:"  # of a prompt that names a file


@dataclass
class GenerateArguments(ModelSettings):
    """The settings of `generate_hf.py`: the model, its knowledge base, and how to sample."""

    prompt: str = field(
        default="", metadata={"help": f"Text to continue, or {FILE_PREFIX}path. Without, a new document begins."}
    )
    align_to_prompt: bool = field(
        default=True,
        metadata={"help": "Search at the prompt's end. False: first after chunk_size tokens, as the paper does."},
    )
    retrieval_stride: int | None = field(
        default=None, metadata={"help": "Tokens between two searches, at most chunk_size. By default the model's."}
    )
    draft_from_neighbors: bool = field(
        default=False,
        metadata={
            "help": "Draft what the neighbors say next, and verify it in one forward: the same text, often faster."
        },
    )
    num_samples: int = field(default=1, metadata={"help": "Number of continuations of the prompt."})
    max_new_tokens: int = field(default=200, metadata={"help": "Tokens to write at most."})
    temperature: float = field(
        default=0.8, metadata={"help": "Below 1, likely tokens become likelier. 0: always take the likeliest token."}
    )
    top_k: int = field(default=200, metadata={"help": "Draw from this many likeliest tokens. 0: from all."})
    seed: int = field(default=1337, metadata={"help": "Seed of the draws. The same seed gives the same samples."})
    compile: bool = field(
        default=False, metadata={"help": "Compile the model with torch.compile. The first tokens then take a minute."}
    )
    show_likeliest: int = field(
        default=0,
        metadata={
            "help": "After each retrieval, show this many of the likeliest next tokens with their probabilities, with "
            "neighbors and without. 0: none."
        },
    )

    def __post_init__(self) -> None:
        leasts = {"num_samples": 1, "max_new_tokens": 1, "temperature": 0, "top_k": 0, "show_likeliest": 0}
        for name, least in leasts.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {least} or more.")
        if self.temperature == 0 and self.num_samples > 1:
            raise ValueError(
                f"num_samples is {self.num_samples} at temperature 0, where all samples are the same. Set a "
                "temperature above 0, or num_samples to 1."
            )
        if self.draft_from_neighbors and self.num_samples > 1:
            raise ValueError(
                f"num_samples is {self.num_samples}, but draft_from_neighbors writes one at a time. Set num_samples to "
                "1, or leave draft_from_neighbors out."
            )
        if self.prompt.startswith(FILE_PREFIX):
            self.prompt = Path(self.prompt.removeprefix(FILE_PREFIX)).read_text(encoding="utf-8")


def load(arguments: GenerateArguments) -> tuple[RetroForCausalLM, PreTrainedTokenizerBase]:
    """Load the model onto its device, with the knowledge base as its retriever if there is one.

    Returns:
        the model and its tokenizer.
    """
    opened = open_model(arguments, needs_neighbors=False)
    if arguments.compile:
        opened.model.compile()
    return opened.model, opened.tokenizer.hf_tokenizer


def sample(model: RetroForCausalLM, tokenizer: PreTrainedTokenizerBase, arguments: GenerateArguments) -> Any:
    """Continue the prompt.

    Returns:
        the output of `generate`: `sequences` (num_samples, prompt and new tokens), `retrieved`, a
        list per sample of what each chunk read, and with `show_likeliest` also `logits`, a tensor
        (num_samples, vocabulary) for each new token.

    Raises:
        ValueError: prompt and max_new_tokens together exceed the model's n_positions.
    """
    set_seed(arguments.seed)
    # An empty prompt begins a document: in training, end-of-text comes before one.
    begin = added_bos(tokenizer)
    ids = [] if begin is None else [begin]
    ids = ids + tokenizer(arguments.prompt, add_special_tokens=False)["input_ids"] or [tokenizer.eos_token_id]
    sampling: dict[str, Any] = {"do_sample": False}
    if arguments.temperature > 0:
        sampling = {"do_sample": True, "temperature": arguments.temperature, "top_k": arguments.top_k}
    input_ids = torch.tensor([ids], device=model.device)
    return model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=arguments.max_new_tokens,
        num_return_sequences=arguments.num_samples,
        retrieval_stride=arguments.retrieval_stride,
        align_to_prompt=arguments.align_to_prompt,
        draft_from_neighbors=arguments.draft_from_neighbors,
        pad_token_id=tokenizer.eos_token_id,
        return_dict_in_generate=True,
        output_logits=arguments.show_likeliest > 0,
        **sampling,
    )


@dataclass
class Likeliest:
    """The likeliest tokens at one place of a sample.

    Attributes:
        read: (token id, probability) of each, the likeliest first, with the neighbors that were
            read.
        unread: those of the model without neighbors.
    """

    read: list[tuple[int, float]]
    unread: list[tuple[int, float]]


@torch.no_grad()
def likeliest_tokens(model: RetroForCausalLM, outputs: Any, count: int) -> list[dict[int, Likeliest]]:
    """Compute the likeliest tokens at every place of each sample that a new token was written to.

    Temperature and top_k, which the samples were drawn with, do not change them.

    Args:
        model: the model that wrote the samples.
        outputs: as returned by [`sample`] with `show_likeliest`.
        count: number of tokens at each place.

    Returns:
        for each sample a mapping from the number of tokens before a place to its likeliest tokens.
    """
    first = outputs.sequences.shape[1] - len(outputs.logits)  # the prompt's length
    unread = model(outputs.sequences[:, :-1], use_retrieval=False).logits[:, first - 1 :]
    read = torch.stack(outputs.logits, dim=1).to(unread.device)
    for logits in (read, unread):
        logits[..., model.generation_config.suppress_tokens or []] = -torch.inf
    (read_ids, read_shares), (unread_ids, unread_shares) = (_top(logits, count) for logits in (read, unread))
    return [
        {
            first + place: Likeliest(
                list(zip(read_ids[row][place], read_shares[row][place], strict=True)),
                list(zip(unread_ids[row][place], unread_shares[row][place], strict=True)),
            )
            for place in range(len(outputs.logits))
        }
        for row in range(len(outputs.sequences))
    ]


def _top(logits: torch.Tensor, count: int) -> tuple[list, list]:
    """Return the ids and the probabilities of the `count` likeliest tokens, for all logits."""
    shares, ids = logits.float().softmax(-1).topk(min(count, logits.shape[-1]))
    return ids.tolist(), shares.tolist()


def describe(
    tokens: list[int],
    retrieved: Sequence[RetrievedChunk],
    tokenizer: PreTrainedTokenizerBase,
    likeliest: Mapping[int, Likeliest] | None = None,
) -> str:
    """Return a sample as text, then a line for each document that was read.

    Args:
        tokens: the sample.
        retrieved: for each retrieval point a [`modeling_retro.RetrievedChunk`].
        tokenizer: decodes the tokens.
        likeliest: one sample's entry of [`likeliest_tokens`]. Shown are those of the first new
            token, and of the first token after each retrieval.
    """
    lines = [str(tokenizer.decode(tokens, skip_special_tokens=True))]
    places = likeliest or {}
    pieces = token_bytes(tokenizer).pieces if places else {}
    ends = {read.end: read for read in retrieved}  # tokens before what reads them
    if places and min(places) not in ends:
        first = min(places)
        lines += [f"\n  after the prompt's {first} tokens", *_describe_likeliest(places[first], pieces)]
    for end, read in ends.items():
        lines.append(f"\n  for tokens {read.start} to {end - 1}, read")
        found = [
            f"    {score:.3f}  {doc_id}, chunk {index}"
            for doc_id, index, score in zip(read.doc_ids, read.chunk_indices, read.scores, strict=True)
            if doc_id is not None
        ]
        lines += found or ["    nothing"]
        is_over = tokens[end - 1] == tokenizer.eos_token_id and end > min(places, default=end)
        if end in places and not is_over:
            lines += _describe_likeliest(places[end], pieces)
    return "\n".join(lines)


def _describe_likeliest(likeliest: Likeliest, pieces: Mapping[int, bytes]) -> list[str]:
    """Return two lines: the likeliest tokens with neighbors, and those without.

    Args:
        pieces: the bytes of each token, as [`retrieval.detokenization.token_bytes`] gives them.
    """

    def text(token: int) -> str:
        return pieces.get(token, b"").decode(errors="replace")

    return [
        f"    next, {how} neighbors: " + "  ".join(f"{text(token)!r} {share:.3f}" for token, share in top)
        for how, top in (("with", likeliest.read), ("without", likeliest.unread))
    ]
