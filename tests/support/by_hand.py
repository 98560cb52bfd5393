"""A fake knowledge base, and generation by hand: one forward of the whole row for each token."""

from dataclasses import dataclass

import torch

from .retro_models import CHUNK, LENGTH, NEIGHBORS, VOCAB, random_tokens, small_model


@dataclass
class Found:
    ids: torch.LongTensor
    attention_mask: torch.BoolTensor
    doc_ids: list
    chunk_indices: torch.LongTensor
    scores: torch.FloatTensor


class HashRetriever:
    """A fake knowledge base whose neighbors follow from a chunk's tokens. It records its calls."""

    chunk_size, num_neighbors, neighbor_length, vocab_size = CHUNK, NEIGHBORS, LENGTH, VOCAB
    embedding_model = "test/hash"

    def __init__(self):
        self.calls = []

    def retrieve(self, chunks, exclude_doc_ids=None):
        self.calls.append([tuple(chunk) for chunk in chunks.tolist()])
        seeds = [sum(token * 7**i for i, token in enumerate(chunk)) for chunk in chunks.tolist()]
        ids = torch.stack([torch.tensor(random_tokens(NEIGHBORS * LENGTH, seed)) for seed in seeds])
        ids = ids.view(-1, NEIGHBORS, LENGTH)
        lengths = torch.tensor([[1 + seed % LENGTH, LENGTH] for seed in seeds])
        return Found(
            ids,
            torch.arange(LENGTH) < lengths.unsqueeze(-1),
            [[f"doc{seed}", f"doc{seed + 1}"] for seed in seeds],
            torch.tensor([[seed % 5, seed % 7] for seed in seeds]),
            torch.tensor([[1.0, 1 / (1 + seed % 3)] for seed in seeds]),
        )


def retrieving_model(**changes):
    model = small_model(**changes)
    model.set_retriever(HashRetriever())
    model.generation_config.pad_token_id = VOCAB - 1
    return model


PROMPTS = [random_tokens(length, seed=length) for length in (2 * CHUNK + 1, CHUNK - 1, 3 * CHUNK, 1)]


def left_padded(prompts):
    longest = max(map(len, prompts))
    ids = torch.tensor([[VOCAB - 1] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def chunks_of(tokens):
    """Return the complete chunks of a row."""
    return [tuple(tokens[start : start + CHUNK]) for start in range(0, len(tokens) - CHUNK + 1, CHUNK)]


def next_token_logits(model, tokens):
    """Return the true logits: one forward of the whole row, with its neighbors given."""
    chunks = chunks_of(tokens)
    if not chunks:
        return model(torch.tensor([tokens]), use_retrieval=False).logits[0, -1]
    found = HashRetriever().retrieve(torch.tensor(chunks))
    return model(
        torch.tensor([tokens]),
        neighbor_ids=found.ids[None],
        neighbor_attention_mask=found.attention_mask[None],
        neighbor_scores=found.scores[None],
    ).logits[0, -1]


@torch.no_grad()
def greedy_by_hand(model, prompt, steps):
    tokens = list(prompt)
    for _ in range(steps):
        tokens.append(int(next_token_logits(model, tokens).argmax()))
    return tokens
