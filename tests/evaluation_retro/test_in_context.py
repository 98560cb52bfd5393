"""In-context retrieval equals prompts that are built and read one position at a time."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from evaluation_retro.in_context import in_context_nats, in_context_prompts

VOCABULARY, CHUNK, LENGTH = 50, 8, 33


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, initializer_range=0.5, **sizes)).eval()


@pytest.fixture
def texts():
    """Two rows, and their neighbors of many lengths in up to 35 slots, some of them missing."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (2, LENGTH), generator=generator)
    ids = torch.randint(VOCABULARY, (2, 35, 3, 12), generator=generator)
    lengths = torch.randint(0, 13, (2, 35, 3, 1), generator=generator)
    mask = torch.arange(12) < lengths
    mask[0, 1] = False
    return tokens, ids, mask


@torch.no_grad()
def one_by_one(decoder, tokens, ids, mask, first_points, stride, separator):
    nats = torch.zeros(len(tokens), LENGTH - 1)
    for row in range(len(tokens)):
        points = list(range(first_points[row], LENGTH + 1, stride))
        for i in range(LENGTH - 1):
            prompt = []
            if seen := [slot for slot, point in enumerate(points) if point <= i + 1]:
                for neighbor in (2, 1, 0):  # the best one last
                    found = ids[row, seen[-1], neighbor][mask[row, seen[-1], neighbor]].tolist()
                    prompt += found + list(separator) if found else []
            prompt += tokens[row, : i + 1].tolist()
            probabilities = decoder(torch.tensor([prompt])).logits[0, -1].softmax(-1)
            nats[row, i] = -probabilities[tokens[row, i + 1]].log()
    return nats


@pytest.mark.parametrize("separator", [(), (3, 4)])
@pytest.mark.parametrize(("first_points", "stride"), [(None, None), ([1, 7], 8), ([4, 10], 3)])
def test_nats_equal_those_of_prompts_read_one_by_one(decoder, texts, first_points, stride, separator):
    given = None if first_points is None else torch.tensor(first_points)
    prompts = in_context_prompts(*texts, CHUNK, given, stride, separator)
    batches = []
    nats = in_context_nats(decoder, prompts, texts[0], lambda numbers: batches.extend(numbers) or numbers)
    expected = one_by_one(decoder, *texts, first_points or [CHUNK] * 2, stride or CHUNK, separator)
    torch.testing.assert_close(nats, expected, atol=1e-4, rtol=1e-4)
    assert len(batches) == -(-len(prompts) // 2)


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
