"""A fake knowledge base, and generation by hand: one forward of the whole row for each token."""

from dataclasses import dataclass

import torch

from . import reference
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
        queries = [tuple(map(int, query)) for query in chunks]
        assert all(1 <= len(query) <= CHUNK for query in queries)
        self.calls.append(queries)
        seeds = [sum(token * 7**i for i, token in enumerate(query)) for query in queries]
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


@dataclass(frozen=True)
class Grid:
    """Retrieval points by definition: after `first` tokens, every `stride` more, and at `ends`."""

    first: int = CHUNK
    stride: int = CHUNK
    ends: tuple = ()

    @classmethod
    def aligned_to(cls, prompt, stride=CHUNK):
        """Return the grid with a point at the prompt's end and full queries before it."""
        firsts = range(CHUNK, CHUNK + stride)
        at_the_end = [first for first in firsts if (len(prompt) - first) % stride == 0]
        return cls(len(prompt) if len(prompt) < CHUNK else at_the_end[0], stride)

    def points(self, tokens):
        lengths = range(1, len(tokens) + 1)
        return [e for e in lengths if e in self.ends or (e >= self.first and (e - self.first) % self.stride == 0)]

    def queries(self, tokens):
        return [tuple(tokens[max(end - CHUNK, 0) : end]) for end in self.points(tokens)]

    def arguments(self, rows=1):
        return {"first_point": torch.tensor([self.first] * rows), "retrieval_stride": self.stride}


def next_token_logits(model, tokens, grid):
    """Return the true logits: one forward of the whole row, with its neighbors given."""
    queries = grid.queries(tokens)
    if not queries:
        return model(torch.tensor([tokens]), use_retrieval=False).logits[0, -1]
    if grid.ends:  # which no argument of the model gives
        return true_log_probs(model, tokens, grid)[-1]
    found = HashRetriever().retrieve(queries)
    return model(
        torch.tensor([tokens]),
        neighbor_ids=found.ids[None],
        neighbor_attention_mask=found.attention_mask[None],
        neighbor_scores=found.scores[None],
        **grid.arguments(),
    ).logits[0, -1]


@torch.no_grad()
def true_log_probs(model, tokens, grid):
    """Return the slow reference's log-probabilities (T, V), with the fake knowledge base."""
    points, neighbors, scores = grid.points(tokens), {}, {}
    if points:
        found = HashRetriever().retrieve(grid.queries(tokens))
        for u in range(len(points)):
            pairs = zip(found.ids[u], found.attention_mask[u], strict=True)
            neighbors[u], scores[u] = [ids[mask].tolist() for ids, mask in pairs], found.scores[u]
    return reference.log_probs(model, list(tokens), neighbors, scores, points)


@torch.no_grad()
def greedy_by_hand(model, prompt, steps, grid=None):
    """Return the prompt and the likeliest tokens. By default the prompt's end is a point."""
    grid = Grid.aligned_to(prompt) if grid is None else grid
    tokens = list(prompt)
    for _ in range(steps):
        tokens.append(int(next_token_logits(model, tokens, grid).argmax()))
    return tokens
