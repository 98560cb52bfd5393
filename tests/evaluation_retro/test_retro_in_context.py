"""RETRO over prompts with neighbors equals the slow reference, whose points are given."""

import pytest
import torch

from evaluation_retro.in_context import in_context_nats, in_context_prompts
from evaluation_retro.retro_in_context import retro_in_context_nats
from modeling_retro.neighbor_inputs import NeighborInputs

from ..support import reference
from ..support.retro_models import CHUNK, RowNeighbors, neighbor_scores, neighbor_tensors, random_tokens, small_model

TEXT, SLOTS = 14, 12


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def texts():
    """Two rows of tokens, their neighbors as lists, and the same as tensors with scores."""
    lists = [RowNeighbors(SLOTS, seed, missing={1}).chunks for seed in range(2)]
    ids, mask = neighbor_tensors(lists, SLOTS)
    scores = torch.cat([neighbor_scores(SLOTS, seed) for seed in range(2)])
    tokens = torch.tensor([random_tokens(TEXT, seed) for seed in range(2)])
    return tokens, lists, NeighborInputs(ids, mask, scores)


@torch.no_grad()
def prompt_by_prompt(model, prompts, lists, scores, tokens):
    nats = torch.full((len(tokens), TEXT - 1), torch.nan)
    for prompt in prompts:
        neighbors = {} if prompt.slot is None else {0: lists[prompt.row][prompt.slot]}
        of_point = {} if prompt.slot is None else {0: scores[prompt.row, prompt.slot]}
        points = [] if prompt.slot is None else [prompt.point]
        log_probs = reference.log_probs(model, prompt.tokens, neighbors, of_point, points)
        for i, column in zip(prompt.positions, prompt.columns, strict=True):
            nats[prompt.row, i] = -log_probs[column, tokens[prompt.row, i + 1]]
    return nats


@pytest.mark.parametrize(
    ("first_points", "stride", "max_tokens", "first"),
    [(None, None, None, 0), ([1, 6], 3, None, 0), ([2, 4], 2, 18, 0), ([4, 7], 4, 17, 9)],
)
def test_nats_equal_the_slow_reference(model, texts, first_points, stride, max_tokens, first):
    tokens, lists, neighbors = texts
    given = None if first_points is None else torch.tensor(first_points)
    prompts = in_context_prompts(tokens, neighbors.ids, neighbors.mask, CHUNK, given, stride, (), max_tokens, first)
    nats = retro_in_context_nats(model, prompts, neighbors, tokens)
    expected = prompt_by_prompt(model, prompts, lists, neighbors.scores, tokens)
    torch.testing.assert_close(nats, expected, atol=1e-4, rtol=1e-4, equal_nan=True)
    assert torch.equal(nats.isnan(), (torch.arange(TEXT - 1) < first).expand(2, -1))


def test_reading_changes_the_nats_of_prompts_with_neighbors_alone(model, texts):
    tokens, _, neighbors = texts
    prompts = in_context_prompts(tokens, neighbors.ids, neighbors.mask, CHUNK)
    nats = retro_in_context_nats(model, prompts, neighbors, tokens)
    plain = in_context_nats(lambda **inputs: model(**inputs, use_retrieval=False), prompts, tokens)
    for prompt in prompts:
        here = prompt.row, slice(prompt.positions.start, prompt.positions.stop)
        assert torch.allclose(nats[here], plain[here], atol=1e-4) == (prompt.slot is None)
