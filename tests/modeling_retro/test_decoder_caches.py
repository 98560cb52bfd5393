"""Other decoders' caches, sliding windows among them: split, padded, reordered and cropped."""

import pytest
import torch
from transformers import StaticCache, cache_utils

from modeling_retro import RetroCache
from modeling_retro.library import CACHE

from ..support.by_hand import Grid, greedy_by_hand, next_token_logits
from ..support.decoders import FAMILIES, SLIDING, SOME, WINDOW, open_decoder, retrieving_retro
from ..support.retro_models import CHUNK, random_tokens
from .test_retrieval_points import SPLITS, in_calls

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
LENGTH = 2 * WINDOW + CHUNK + 3
PROMPT = random_tokens(3 * CHUNK + 1, seed=3)


@pytest.fixture
def model(family, saved_decoder):
    return retrieving_retro(saved_decoder(family))


def whole(model, tokens, grid):
    """Return the logits (T, V) of one forward without a cache."""
    return model(torch.tensor([tokens]), use_cache=False, **grid.arguments()).logits[0]


@pytest.mark.parametrize("split", ["prefill, then token by token", "pieces"])
@torch.no_grad()
def test_every_split_into_calls_gives_the_same_logits(model, split):
    tokens, grid = random_tokens(LENGTH, seed=1), Grid(3, 3)
    logits, cache = in_calls(model, [tokens], [grid], SPLITS[split](LENGTH))
    torch.testing.assert_close(logits[0], whole(model, tokens, grid), **TOLERANCE)
    assert isinstance(cache, RetroCache) and cache.get_seq_length() == LENGTH


@torch.no_grad()
def test_a_window_is_no_longer_than_it_should_be(family, saved_decoder):
    """The cache of a sliding layer forgets what lies before its window."""
    model = retrieving_retro(saved_decoder(family))
    _, cache = in_calls(model, [random_tokens(LENGTH, seed=1)], [Grid()], [LENGTH - 1, LENGTH])
    decoder = open_decoder(saved_decoder(family))
    own = decoder(torch.tensor([random_tokens(LENGTH - 1, seed=1)]), use_cache=True)[CACHE]
    decoder(torch.tensor([random_tokens(1, seed=2)]), **{CACHE: own})
    assert [layer.keys.shape for layer in cache.layers] == [layer.keys.shape for layer in own.layers]
    assert (cache.layers[0].keys.shape[2] < LENGTH) == (family in SLIDING)


@torch.no_grad()
def test_left_padded_rows_give_the_logits_they_give_alone(model):
    rows = [random_tokens(length, seed=length) for length in (LENGTH, LENGTH - 1, 2 * CHUNK, CHUNK - 1, 1)]
    grids = [Grid(first, 3) for first in (1, 6, 4, 3, 2)]
    for split in ("one forward", "pieces"):
        logits, _ = in_calls(model, rows, grids, SPLITS[split](LENGTH))
        for number, (row, grid) in enumerate(zip(rows, grids, strict=True)):
            torch.testing.assert_close(logits[number, LENGTH - len(row) :], whole(model, row, grid), **TOLERANCE)


# OPT and Falcon do not tell packed texts apart in transformers
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("opt", "falcon")], indirect=True)
@torch.no_grad()
def test_packed_texts_give_the_logits_they_give_alone(model):
    texts = [random_tokens(length, seed=length) for length in (CHUNK - 1, 3 * CHUNK + 1, 1, CHUNK)]
    position_ids = torch.tensor([[place for text in texts for place in range(len(text))]])
    logits = model(torch.tensor([sum(texts, [])]), position_ids=position_ids, use_cache=False).logits[0]
    torch.testing.assert_close(logits, torch.cat([whole(model, text, Grid()) for text in texts]), **TOLERANCE)


@torch.no_grad()
def test_the_cache_reorders_repeats_and_selects_rows(model):
    rows, grids = [random_tokens(LENGTH, seed) for seed in (1, 2)], [Grid(2, 3), Grid(5, 3)]
    _, cache = in_calls(model, rows, grids, [LENGTH])
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3, 2]))
    more = random_tokens(CHUNK + 1, seed=3)
    logits = model(torch.tensor([more] * 3), **{CACHE: cache}).logits[:, -1]
    for number, own in zip([1, 0, 0], logits, strict=True):
        torch.testing.assert_close(own, next_token_logits(model, rows[number] + more, grids[number]), **TOLERANCE)


@torch.no_grad()
def test_a_cropped_cache_goes_on_as_if_never_longer(family, model):
    """The library refuses to crop a sliding window that has forgotten tokens."""
    kept = random_tokens(LENGTH, seed=1)
    _, cache = in_calls(model, [kept], [Grid(2, 3)], [LENGTH])
    if family in SLIDING:
        with pytest.raises(RuntimeError, match="crop"):
            cache.crop(-3)
        _, cache = in_calls(model, [kept[: WINDOW - 1]], [Grid(2, 3)], [WINDOW - 1])
        kept = kept[: WINDOW - 1]
    cache.crop(-3)
    more = random_tokens(CHUNK + 1, seed=3)
    logits = model(torch.tensor([more]), **{CACHE: cache}).logits[0, -1]
    torch.testing.assert_close(logits, next_token_logits(model, kept[:-3] + more, Grid(2, 3)), **TOLERANCE)


@torch.no_grad()
def test_a_static_cache_can_be_reset_and_used_again(model):
    cache = RetroCache(StaticCache(config=model.config, max_cache_len=LENGTH))
    tokens = random_tokens(LENGTH, seed=1)
    in_calls(model, [tokens[::-1]], [Grid(1, 2)], [CHUNK, LENGTH], cache)
    cache.reset()
    logits, _ = in_calls(model, [tokens], [Grid(3, 3)], SPLITS["prefill, then token by token"](LENGTH), cache)
    torch.testing.assert_close(logits[0], whole(model, tokens, Grid(3, 3)), **TOLERANCE)


def test_a_cache_without_retros_memory_is_refused(model):
    tokens = torch.tensor([random_tokens(CHUNK, seed=1)])
    plain = model(tokens, use_cache=True, use_retrieval=False)[CACHE]
    plain = plain if not isinstance(plain, RetroCache) else StaticCache(config=model.config, max_cache_len=LENGTH)
    with torch.no_grad():
        model(tokens, use_retrieval=False, **{CACHE: plain})
    with pytest.raises(ValueError, match="tokens.*has 0"):
        model(tokens[:, :1], **{CACHE: plain})


def test_more_tokens_than_a_table_of_positions_holds_are_refused(saved_decoder):
    model = retrieving_retro(saved_decoder("opt"))
    with pytest.raises(ValueError, match="65 tokens.* 64 positions"):
        model(torch.zeros(1, 65, dtype=torch.long))
    with pytest.raises(ValueError, match="68 tokens.* 64 positions"):
        model.generate(torch.tensor([random_tokens(8, seed=1)]), max_new_tokens=60)


@pytest.mark.parametrize("family", ["llama", "gemma3"], indirect=True)
@torch.no_grad()
def test_other_positions_go_on_as_the_decoder_does(family, model, saved_decoder):
    tokens, grid = random_tokens(70, seed=1), Grid(CHUNK, CHUNK)
    expected = open_decoder(saved_decoder(family))(torch.tensor([tokens])).logits
    assert torch.equal(model(torch.tensor([tokens]), use_retrieval=False).logits, expected)
    logits, _ = in_calls(model, [tokens], [grid], [62, 66, 70])
    torch.testing.assert_close(logits[0], whole(model, tokens, grid), **TOLERANCE)


class Unrounded(cache_utils.QuantizedLayer):
    """A layer that keeps its states as a quantized one does, but does not round them."""

    def _quantize(self, tensor, axis):
        return tensor

    def _dequantize(self, tensor):
        return tensor


@pytest.mark.parametrize("family", SOME, indirect=True)
def test_a_quantized_cache_is_right_and_that_of_a_window_is_refused(family, model, monkeypatch):
    monkeypatch.setattr(cache_utils, "QuantoQuantizedLayer", Unrounded)
    settings = {"max_new_tokens": 2 * CHUNK, "do_sample": False}
    settings |= {"cache_implementation": "quantized", "cache_config": {"backend": "quanto", "residual_length": 3}}
    if family in SLIDING:
        with pytest.raises(ValueError, match="only full attention layers"):
            model.generate(torch.tensor([PROMPT]), **settings)
        return
    written = model.generate(torch.tensor([PROMPT]), **settings)
    assert written[0].tolist() == greedy_by_hand(model, PROMPT, 2 * CHUNK)
    for mode in ({"num_beams": 2}, {"prompt_lookup_num_tokens": 3}):
        with pytest.raises(ValueError, match="quantized cache only grows|cache that can be cropped"):
            model.generate(torch.tensor([PROMPT[:5] * 3]), **settings, **mode)
