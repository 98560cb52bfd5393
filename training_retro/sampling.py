"""Sampling from a trained model: settings, the model, and samples with what they read."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, set_seed

from modeling_retro import RetroForCausalLM
from retrieval.arguments import KnowledgeBaseArguments

FILE_PREFIX = "FILE:"  # of a prompt that names a file


@dataclass
class GenerateArguments(KnowledgeBaseArguments):
    """The settings of `generate_hf.py`: the model, its knowledge base, and how to sample."""

    model: str = field(
        kw_only=True, metadata={"help": "RETRO or GPT-2 weights with their tokenizer, a Hub name or folder."}
    )
    prompt: str = field(
        default="", metadata={"help": f"Text to continue, or {FILE_PREFIX}path. Without, a new document begins."}
    )
    num_samples: int = field(default=1, metadata={"help": "Number of continuations of the prompt."})
    max_new_tokens: int = field(default=200, metadata={"help": "Tokens to write at most."})
    temperature: float = field(
        default=0.8, metadata={"help": "Below 1, likely tokens become likelier. 0: always take the likeliest token."}
    )
    top_k: int = field(default=200, metadata={"help": "Draw from this many likeliest tokens. 0: from all."})
    seed: int = field(default=1337, metadata={"help": "Seed of the draws. The same seed gives the same samples."})
    device: str | None = field(
        default=None, metadata={"help": "Device such as cpu or cuda:1. By default a GPU if there is one."}
    )

    def __post_init__(self) -> None:
        for name, least in (("num_samples", 1), ("max_new_tokens", 1), ("temperature", 0), ("top_k", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {least} or more.")
        if self.temperature == 0 and self.num_samples > 1:
            raise ValueError(
                f"num_samples is {self.num_samples} at temperature 0, where all samples are the same. Set a "
                "temperature above 0, or num_samples to 1."
            )
        if self.prompt.startswith(FILE_PREFIX):
            self.prompt = Path(self.prompt.removeprefix(FILE_PREFIX)).read_text(encoding="utf-8")


def load(arguments: GenerateArguments) -> tuple[RetroForCausalLM, PreTrainedTokenizerBase]:
    """Load the model onto its device, with the knowledge base as its retriever if there is one.

    Returns:
        the model and its tokenizer.
    """
    device = arguments.device or (torch.accelerator.current_accelerator() or torch.device("cpu"))
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = RetroForCausalLM.from_pretrained(arguments.model).eval().to(device)
    if arguments.knowledge_base is not None:
        config = model.config
        retriever = arguments.open_retriever(
            tokenizer,
            collection_name=config.collection_name,
            num_neighbors=config.num_neighbors,
            neighbor_length=config.neighbor_length,
        )
        model.set_retriever(retriever)
    return model, tokenizer


def sample(model: RetroForCausalLM, tokenizer: PreTrainedTokenizerBase, arguments: GenerateArguments) -> Any:
    """Continue the prompt.

    Returns:
        the output of `generate`: `sequences` (num_samples, prompt and new tokens), and `retrieved`,
        a list per sample of what each chunk read.

    Raises:
        ValueError: prompt and max_new_tokens together exceed the model's n_positions.
    """
    set_seed(arguments.seed)
    # An empty prompt begins a document: in training, end-of-text comes before one.
    ids = tokenizer(arguments.prompt, add_special_tokens=False)["input_ids"] or [tokenizer.eos_token_id]
    sampling: dict[str, Any] = {"do_sample": False}
    if arguments.temperature > 0:
        sampling = {"do_sample": True, "temperature": arguments.temperature, "top_k": arguments.top_k}
    input_ids = torch.tensor([ids], device=model.device)
    return model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=arguments.max_new_tokens,
        num_return_sequences=arguments.num_samples,
        pad_token_id=tokenizer.eos_token_id,
        return_dict_in_generate=True,
        **sampling,
    )


def describe(tokens: list[int], retrieved: Sequence, tokenizer: PreTrainedTokenizerBase, chunk_size: int) -> str:
    """Return a sample as text, then a line for each document that a chunk read.

    Args:
        tokens: the sample.
        retrieved: for each chunk a [`modeling_retro.RetrievedChunk`].
        tokenizer: decodes the tokens.
        chunk_size: tokens in a chunk.
    """
    lines = [str(tokenizer.decode(tokens, skip_special_tokens=True))]
    for read in retrieved:
        start = read.chunk * chunk_size
        lines.append(f"\n  chunk {read.chunk}, tokens {start} to {start + chunk_size - 1}, read")
        found = [
            f"    {score:.3f}  {doc_id}, chunk {index}"
            for doc_id, index, score in zip(read.doc_ids, read.chunk_indices, read.scores, strict=True)
            if doc_id is not None
        ]
        lines += found or ["    nothing"]
    return "\n".join(lines)
