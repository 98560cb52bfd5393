"""Sampling from a trained model: settings, the model with its knowledge base, and samples beside what they read."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, set_seed

from modeling_retro import RetroForCausalLM
from retrieval.arguments import KnowledgeBaseArguments


@dataclass
class GenerateArguments(KnowledgeBaseArguments):
    """The settings: what to sample, from which model, with which knowledge base."""

    model: str = field(
        kw_only=True, metadata={"help": "RETRO or GPT-2 weights, a hub name or folder, with their tokenizer."}
    )
    prompt: str = field(default="", metadata={"help": "Text to continue, or FILE:path. Default: a new document."})
    num_samples: int = field(default=1, metadata={"help": "Continuations of the prompt."})
    max_new_tokens: int = field(default=200, metadata={"help": "Tokens to write at most."})
    temperature: float = field(
        default=0.8, metadata={"help": "Below 1: more likely text. 0: always the likeliest token."}
    )
    top_k: int = field(default=200, metadata={"help": "Draw from the k likeliest tokens only. 0: from all."})
    seed: int = field(default=1337, metadata={"help": "The same seed gives the same samples."})
    device: str | None = field(default=None, metadata={"help": "Default: a GPU if there is one."})

    def __post_init__(self):
        for name, least in (("num_samples", 1), ("max_new_tokens", 1), ("temperature", 0), ("top_k", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {least} or more.")
        if self.temperature == 0 and self.num_samples > 1:
            raise ValueError(
                f"num_samples is {self.num_samples} at temperature 0: all samples would be the same. Set a temperature "
                "above 0, or num_samples to 1."
            )
        if self.prompt.startswith("FILE:"):
            self.prompt = Path(self.prompt.removeprefix("FILE:")).read_text(encoding="utf-8")


def load(arguments: GenerateArguments) -> tuple[RetroForCausalLM, PreTrainedTokenizerBase]:
    """The model on its device, with the knowledge base as its retriever if there is one, and the tokenizer."""
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


def sample(model: RetroForCausalLM, tokenizer: PreTrainedTokenizerBase, arguments: GenerateArguments):
    """Continue the prompt.

    Returns:
        What `generate` returns: `sequences` (num_samples, prompt and new tokens), and `retrieved`, for each of them a
        list of what each chunk read.

    Raises:
        ValueError: prompt and max_new_tokens come to more than the model's n_positions.
    """
    set_seed(arguments.seed)
    # an empty prompt begins a document: end-of-text is what the model has seen before one
    ids = tokenizer(arguments.prompt, add_special_tokens=False)["input_ids"] or [tokenizer.eos_token_id]
    sampling = {"do_sample": False}
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


def describe(tokens: list[int], retrieved: list, tokenizer: PreTrainedTokenizerBase, chunk_size: int) -> str:
    """One sample as text, then a line for each document that a chunk read."""
    lines = [tokenizer.decode(tokens, skip_special_tokens=True)]
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
