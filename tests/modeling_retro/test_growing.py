"""Tensors that grow in place hold what concatenation gives, whatever happens to them in between."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from transformers import DynamicCache

from modeling_retro.cache import RetroCache
from modeling_retro.draft_lengths import DraftCosts
from modeling_retro.growing import ROOM, Growth
from modeling_retro.library import CACHE

from ..support.by_hand import retrieving_model
from ..support.retro_models import CHUNK, random_tokens


def pieces(number, length=1):
    return torch.randn(number, 2, 3, length, 4).unbind()


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 7])
def test_it_holds_what_concatenation_gives_beyond_its_room(length):
    first, *others = pieces(2 * ROOM // length + 3, length)
    growth, grown = Growth(2), first
    for new in others:
        grown = growth.append(grown, new)
    assert torch.equal(grown, torch.cat([first, *others], 2))


@torch.no_grad()
def test_a_token_is_written_without_a_copy_of_the_others():
    first, second, third = pieces(3)
    growth = Growth(2)
    before = growth.append(first, second)
    after = growth.append(before, third)
    assert after.data_ptr() == before.data_ptr()
    assert torch.equal(first, after[:, :, :1]) and torch.equal(before, torch.cat([first, second], 2))


@torch.no_grad()
def test_tensors_of_others_are_never_written_to():
    whole = torch.zeros(2, 3, 8, 4)
    Growth(2).append(whole[:, :, :4], torch.ones(2, 3, 1, 4))
    assert not whole.any()


@torch.no_grad()
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda its: pickle.loads(pickle.dumps(its))])
def test_a_copy_grows_by_itself(duplicate):
    first, second, third, fourth = pieces(4)
    growth = Growth(2)
    grown = growth.append(first, second)
    other, its = duplicate((growth, grown))
    one, two = growth.append(grown, third), other.append(its, fourth)
    assert torch.equal(one, torch.cat([first, second, third], 2))
    assert torch.equal(two, torch.cat([first, second, fourth], 2))


def test_gradients_reach_every_token():
    tokens = [piece.requires_grad_() for piece in pieces(3)]
    growth, grown = Growth(2), tokens[0]
    for new in tokens[1:]:
        grown = growth.append(grown, new)
    grown.sum().backward()
    assert all((token.grad == 1).all() for token in tokens)


def test_a_tensor_of_inference_mode_grows_outside_it():
    with torch.inference_mode():
        growth = Growth(2)
        first, second, third = pieces(3)
        grown = growth.append(first, second)
    with torch.no_grad():
        assert torch.equal(growth.append(grown, third), torch.cat([first, second, third], 2))


@torch.no_grad()
def test_cropped_layers_take_other_tokens_and_reordered_ones_too():
    states = pieces(6)
    plain, grown = DynamicCache(), RetroCache()
    for cache in (plain, grown):
        for new in states[:3]:
            cache.update(new, 2 * new, 0)
        cache.crop(-1)
        cache.update(states[3], 2 * states[3], 0)
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.update(states[4], 2 * states[4], 0)
        cache.batch_select_indices(torch.tensor([1]))
        cache.update(states[5][:1], 2 * states[5][:1], 0)
    assert torch.equal(grown.layers[0].keys, plain.layers[0].keys)
    assert torch.equal(grown.layers[0].values, plain.layers[0].values)


@pytest.mark.parametrize("may_draft", [False, True])
@torch.no_grad()
def test_steps_between_points_share_a_plan_and_those_at_points_do_not(may_draft, monkeypatch):
    monkeypatch.setattr(DraftCosts, "of", lambda _: DraftCosts(fixed=1e9, each=0.0))  # so no draft pays
    model = retrieving_model(copy_head=True, cca_match=True)
    plans = []
    read = model.transformer._locate_and_read

    def keep(*arguments):
        positions, reading = read(*arguments)
        plans.append(reading.plan)
        return positions, reading

    model.transformer._locate_and_read = keep
    new = 2 * CHUNK + 3
    tokens = torch.tensor([random_tokens(CHUNK, seed=1)])
    settings = {"max_new_tokens": new, "min_new_tokens": new, "draft_from_neighbors": may_draft}
    model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)
    steps = plans[1:]  # behind the prompt
    shared = [later is earlier for earlier, later in zip(steps[:-1], steps[1:], strict=True)]
    reaches_point = [(place + 2) % CHUNK == 0 for place in range(len(shared))]  # CHUNK + place + 2 tokens then
    assert shared == [not reaches for reaches in reaches_point]


@torch.no_grad()
def test_what_others_hold_is_never_overwritten():
    first, second, third, fourth = pieces(4)
    growth = Growth(2)
    begun = growth.append(first, second)
    held = growth.append(begun, third)
    other = growth.append(begun, fourth)  # as after a crop
    assert torch.equal(held, torch.cat([first, second, third], 2))
    assert torch.equal(other, torch.cat([first, second, fourth], 2))


def generated(model, tokens, cache, new):
    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    returned = {"return_dict_in_generate": True, "output_logits": True}
    return model.generate(tokens, attention_mask=torch.ones_like(tokens), **{CACHE: cache}, **settings, **returned)


def test_an_interrupted_step_leaves_nothing_behind():
    model = retrieving_model(copy_head=True)
    tokens = torch.tensor([random_tokens(CHUNK, seed=1)])
    begun = generated(model, tokens, RetroCache(), CHUNK // 2)
    caches = [copy.deepcopy(begun[CACHE]) for _ in range(2)]
    caches[1].reads_on = True  # it was prepared, and never made
    more = torch.cat([begun.sequences, torch.tensor([[5]])], 1)
    expected, found = (generated(model, more, cache, CHUNK) for cache in caches)
    assert torch.equal(torch.stack(found.logits), torch.stack(expected.logits))


def test_a_cache_dies_with_its_last_reference():
    model = retrieving_model(copy_head=True, cca_match=True)
    tokens = torch.tensor([random_tokens(CHUNK, seed=1)])
    gc.disable()
    try:
        cache = weakref.ref(generated(model, tokens, RetroCache(), 4)[CACHE])
        assert cache() is None
    finally:
        gc.enable()
