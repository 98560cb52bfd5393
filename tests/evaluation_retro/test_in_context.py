"""In-context retrieval equals prompts that are built and read one position at a time."""

import pytest
import torch

from evaluation_retro.in_context import in_context_nats, in_context_prompts

from ..support.rivals import CHUNK, LENGTH, plain_decoder, point_before, prompt_by_definition, texts_with_neighbors


@pytest.fixture(scope="module")
def decoder():
    return plain_decoder()


@pytest.fixture
def texts():
    return texts_with_neighbors()


@torch.no_grad()
def one_by_one(decoder, tokens, ids, mask, first_points, stride, separator, max_tokens=None):
    nats = torch.zeros(len(tokens), LENGTH - 1)
    for row in range(len(tokens)):
        for i in range(LENGTH - 1):
            slot, _, following = point_before(i, first_points[row], stride)
            neighbors = []
            if slot is not None:
                for place in (2, 1, 0):  # the best one last
                    found = ids[row, slot, place][mask[row, slot, place]].tolist()
                    neighbors += [found + list(separator)] if found else []
            prompt = prompt_by_definition(tokens[row], i, neighbors, following, max_tokens)
            probabilities = decoder(torch.tensor([prompt])).logits[0, -1].softmax(-1)
            nats[row, i] = -probabilities[tokens[row, i + 1]].log()
    return nats


@pytest.mark.parametrize("separator", [(), (3, 4)])
@pytest.mark.parametrize("max_tokens", [None, 50])
@pytest.mark.parametrize(("first_points", "stride"), [(None, None), ([1, 7], 8), ([4, 10], 3), ([8, 9], 2)])
def test_nats_equal_those_of_prompts_read_one_by_one(decoder, texts, first_points, stride, max_tokens, separator):
    given = None if first_points is None else torch.tensor(first_points)
    prompts = in_context_prompts(*texts, CHUNK, given, stride, separator, max_tokens)
    batches = []
    nats = in_context_nats(decoder, prompts, texts[0], lambda numbers: batches.extend(numbers) or numbers)
    expected = one_by_one(decoder, *texts, first_points or [CHUNK] * 2, stride or CHUNK, separator, max_tokens)
    torch.testing.assert_close(nats, expected, atol=1e-4, rtol=1e-4)
    assert len(batches) == -(-len(prompts) // 2)
    longest = max(len(prompt.tokens) for prompt in prompts)
    assert longest == max_tokens or (max_tokens is None and longest > 50)  # the window has an effect


def test_a_window_is_refused_if_neighbors_leave_no_room_for_the_predicted_tokens(texts):
    fits = max(len(prompt.tokens) - prompt.columns.start for prompt in in_context_prompts(*texts, CHUNK))
    assert fits == CHUNK
    with pytest.raises(ValueError, match=r"The neighbors have \d+ tokens, and 8 tokens of text must follow them, but"):
        in_context_prompts(*texts, CHUNK, max_tokens=30)


@pytest.mark.parametrize("first", [0, 1, 3 * CHUNK - 1, 3 * CHUNK + 2, LENGTH - 2])
def test_positions_before_the_first_one_are_not_predicted(decoder, texts, first):
    some, whole = (in_context_prompts(*texts, CHUNK, max_tokens=50, first=start) for start in (first, 0))
    nats, all_nats = (in_context_nats(decoder, prompts, texts[0]) for prompts in (some, whole))
    assert torch.equal(nats.isnan(), (torch.arange(LENGTH - 1) < first).expand(2, -1))
    torch.testing.assert_close(nats[:, first:], all_nats[:, first:], atol=1e-4, rtol=1e-4)
    assert sum(len(prompt.positions) for prompt in some) == 2 * (LENGTH - 1 - first)


@pytest.mark.parametrize("max_tokens", [None, 46])
@pytest.mark.parametrize(("first_points", "stride", "first"), [([8, 8], 8, 0), ([1, 7], 3, 9), ([4, 10], 5, 17)])
def test_prompts_know_their_slot_and_the_tokens_before_their_point(texts, first_points, stride, first, max_tokens):
    tokens, ids, mask = texts
    prompts = in_context_prompts(*texts, CHUNK, torch.tensor(first_points), stride, (), max_tokens, first)
    seen = set()
    for prompt in prompts:
        slot, point, _ = point_before(prompt.positions.start, first_points[prompt.row], stride)
        if slot is None or not mask[prompt.row, slot].any():
            assert prompt.slot is None and prompt.point is None
            continue
        neighbors = int(mask[prompt.row, slot].sum())
        cut = neighbors + prompt.positions.stop - len(prompt.tokens)  # tokens of the text that are left out
        assert (prompt.slot, prompt.point) == (slot, neighbors + point - cut)
        assert prompt.tokens[prompt.point - 1] == tokens[prompt.row, point - 1]
        seen.add(cut > 0)
    assert seen == ({False} if max_tokens is None else {False, True})


def test_only_the_given_prompts_are_read(decoder, texts):
    prompts = in_context_prompts(*texts, CHUNK)
    some = [prompt for prompt in prompts if prompt.positions.start == 3 * CHUNK - 1]
    nats, whole = (in_context_nats(decoder, which, texts[0]) for which in (some, prompts))
    asked = torch.zeros_like(nats, dtype=torch.bool)
    asked[:, 3 * CHUNK - 1 : 4 * CHUNK - 1] = True
    assert torch.equal(nats.isnan(), ~asked)
    torch.testing.assert_close(nats[asked], whole[asked], atol=1e-4, rtol=1e-4)


def test_without_neighbors_the_decoder_stands_alone(decoder, texts):
    tokens, ids, mask = texts
    nats = in_context_nats(decoder, in_context_prompts(tokens, ids, torch.zeros_like(mask), CHUNK), tokens)
    with torch.no_grad():
        alone = torch.nn.functional.cross_entropy(
            decoder(tokens).logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none"
        )
    torch.testing.assert_close(nats, alone, atol=1e-4, rtol=1e-4)
