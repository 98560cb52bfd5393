"""REPLUG equals distributions that are computed one by one and averaged by hand."""

import math

import pytest
import torch

from evaluation_retro.in_context import in_context_nats, in_context_prompts
from evaluation_retro.replug import replug_nats

from ..support.rivals import CHUNK, LENGTH, K, plain_decoder, point_before, prompt_by_definition, texts_with_neighbors


@pytest.fixture(scope="module")
def decoder():
    return plain_decoder()


@pytest.fixture
def texts():
    """Texts and neighbors with scores, nan where one is missing."""
    tokens, ids, mask = texts_with_neighbors()
    scores = torch.rand(ids.shape[:3], generator=torch.Generator().manual_seed(2)) * 4 - 2
    return tokens, ids, mask, scores.masked_fill(~mask.any(-1), torch.nan)


@torch.no_grad()
def averaged_by_hand(decoder, texts, first_points, stride, separator, max_tokens):
    tokens, ids, mask, scores = texts
    nats = torch.zeros(len(tokens), LENGTH - 1)
    for row in range(len(tokens)):
        for i in range(LENGTH - 1):
            slot, _, following = point_before(i, first_points[row], stride)
            there = [] if slot is None else [j for j in range(K) if mask[row, slot, j].any()]
            parts = [(ids[row, slot, j][mask[row, slot, j]].tolist(), float(scores[row, slot, j])) for j in there]
            total, weights = 0.0, sum(math.exp(score) for _, score in parts)
            for neighbor, score in parts or [([], 0.0)]:
                before = [neighbor + list(separator)] if neighbor else []
                prompt = prompt_by_definition(tokens[row], i, before, following, max_tokens)
                probabilities = decoder(torch.tensor([prompt])).logits[0, -1].softmax(-1)
                share = math.exp(score) / weights if parts else 1.0
                total += share * float(probabilities[tokens[row, i + 1]])
            nats[row, i] = -math.log(total)
    return nats


@pytest.mark.parametrize("separator", [(), (3, 4)])
@pytest.mark.parametrize("max_tokens", [None, 26])
@pytest.mark.parametrize(("first_points", "stride"), [(None, None), ([1, 7], 8), ([4, 10], 3)])
def test_nats_are_those_of_the_weighted_mean(decoder, texts, first_points, stride, max_tokens, separator):
    given = None if first_points is None else torch.tensor(first_points)
    nats = replug_nats(decoder, *texts, CHUNK, given, stride, separator, max_tokens)
    expected = averaged_by_hand(decoder, texts, first_points or [CHUNK] * 2, stride or CHUNK, separator, max_tokens)
    torch.testing.assert_close(nats, expected, atol=1e-4, rtol=1e-4)


def test_points_beyond_the_last_slot_have_the_text_alone(decoder, texts):
    tokens, ids, mask, scores = texts
    nats = replug_nats(decoder, tokens, ids[:, :1], mask[:, :1], scores[:, :1], CHUNK)
    whole = replug_nats(decoder, *texts, CHUNK)
    alone = in_context_nats(decoder, in_context_prompts(tokens, ids[:, :0], mask[:, :0], CHUNK), tokens)
    end = 2 * CHUNK - 1
    torch.testing.assert_close(nats[:, :end], whole[:, :end], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(nats[:, end:], alone[:, end:], atol=1e-4, rtol=1e-4)
    none = replug_nats(decoder, tokens, ids[:, :0], mask[:, :0], scores[:, :0], CHUNK)
    torch.testing.assert_close(none, alone, atol=1e-4, rtol=1e-4)


def test_one_neighbor_is_in_context_retrieval(decoder, texts):
    tokens, ids, mask, scores = (tensor[:, :, :1] if tensor.ndim > 2 else tensor for tensor in texts)
    nats = replug_nats(decoder, tokens, ids, mask, scores, CHUNK, first=11)
    expected = in_context_nats(decoder, in_context_prompts(tokens, ids, mask, CHUNK, first=11), tokens)
    torch.testing.assert_close(nats, expected, atol=1e-4, rtol=1e-4, equal_nan=True)
    assert nats[:, :11].isnan().all()


def test_no_prompt_is_read_for_a_missing_neighbor(decoder, texts):
    tokens, ids, mask, scores = texts
    lengths = []

    def counting(input_ids, **settings):
        lengths.append(len(input_ids))
        return decoder(input_ids=input_ids, **settings)

    replug_nats(counting, *texts, CHUNK)
    there = mask[:, :4].any(-1)
    assert sum(lengths) == 2 + int(there.sum(-1).clamp(min=1).sum())
