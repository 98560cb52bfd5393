"""Drafted tokens are no part of the prompt: its end stays the retrieval point."""

import pytest
import torch

from ..support.by_hand import Grid, greedy_by_hand, retrieving_model
from ..support.retro_models import CHUNK, random_tokens, small_model


@pytest.mark.parametrize("stride", [CHUNK, 3])
@pytest.mark.parametrize("length", [3, 2 * CHUNK + 1, 3 * CHUNK])
@pytest.mark.parametrize("mode", ["assistant", "prompt lookup"])
def test_a_draft_does_not_move_the_points(mode, length, stride):
    model, prompt = retrieving_model(), random_tokens(length, seed=1)
    draft = {"assistant_model": small_model()} if mode == "assistant" else {"prompt_lookup_num_tokens": 2}
    output = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=2 * CHUNK,
        do_sample=False,
        return_dict_in_generate=True,
        retrieval_stride=stride,
        **draft,
    )
    grid = Grid.aligned_to(prompt, stride)
    written = greedy_by_hand(model, prompt, 2 * CHUNK, grid)
    assert output.sequences[0].tolist() == written
    assert [chunk.end for chunk in output.retrieved[0]] == grid.points(written[:-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_a_mask_of_any_type_is_the_same_mask(dtype):
    model, tokens = retrieving_model(), torch.tensor([random_tokens(CHUNK + 1, seed=1)])
    settings = {"max_new_tokens": 3, "do_sample": False}
    masked = model.generate(tokens, attention_mask=torch.ones_like(tokens).to(dtype), **settings)
    assert torch.equal(masked, model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings))


@pytest.mark.parametrize("piece", [2, 5])
def test_pieces_of_a_prompt_without_padding_do_not_move_the_points(piece):
    model, prompt = retrieving_model(), random_tokens(2 * CHUNK + 3, seed=1)
    output = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=CHUNK,
        do_sample=False,
        return_dict_in_generate=True,
        prefill_chunk_size=piece,
    )
    grid = Grid.aligned_to(prompt)
    written = greedy_by_hand(model, prompt, CHUNK, grid)
    assert output.sequences[0].tolist() == written
    assert [chunk.end for chunk in output.retrieved[0]] == grid.points(written[:-1])
