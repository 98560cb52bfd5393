"""The model under the installed transformers: names of the cache, arguments, versions, warnings."""

import logging
import re
import warnings
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from configuration_retro.configuration_retro import (
    NEWEST_TRANSFORMERS,
    OLDEST_TORCH,
    OLDEST_TRANSFORMERS,
    check_versions,
)
from modeling_retro.library import CACHE

from ..support.by_hand import PROMPTS, Grid, greedy_by_hand, retrieving_model
from ..support.retro_models import CHUNK, random_tokens, small_model

PROJECT = Path(__file__).parents[2]
NAMES = ("cache", "past_key_values")


@pytest.mark.parametrize("name", NAMES)
def test_forward_accepts_the_cache_under_either_name(name):
    model = retrieving_model()
    tokens = torch.tensor([random_tokens(3 * CHUNK, seed=3)])
    full = model(tokens).logits
    cache = DynamicCache(config=model.config)
    first = model(tokens[:, : CHUNK + 1], use_cache=True, **{name: cache})
    second = model(tokens[:, CHUNK + 1 :], use_cache=True, **{name: first[CACHE]})
    assert second[CACHE] is first[CACHE]
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), full, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_generate_accepts_the_cache_under_either_name(name):
    model = retrieving_model()
    prompt = torch.tensor([PROMPTS[2]])
    part = model.generate(prompt, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    more = model.generate(part.sequences, max_new_tokens=CHUNK, do_sample=False, **{name: part[CACHE]})
    grid = Grid(Grid.aligned_to(PROMPTS[2]).first, ends=(part.sequences.shape[1],))
    assert more[0].tolist() == greedy_by_hand(model, part.sequences[0].tolist(), CHUNK, grid)


@pytest.mark.parametrize("name", NAMES)
def test_prepare_inputs_accepts_the_cache_under_either_name(name):
    model = retrieving_model()
    row = torch.tensor([random_tokens(CHUNK + 1, seed=1)])
    cache = model(row[:, :CHUNK], use_cache=True)[CACHE]
    inputs = model.prepare_inputs_for_generation(row, next_sequence_length=1, **{name: cache})
    assert inputs[CACHE] is cache and not set(NAMES) - {CACHE} & set(inputs)


def test_a_cache_under_both_names_is_refused():
    model = small_model()
    caches = {name: DynamicCache(config=model.config) for name in NAMES}
    tokens = torch.tensor([random_tokens(CHUNK, seed=0)])
    for call in (model, model.transformer, model.generate, model.prepare_inputs_for_generation):
        with pytest.raises(ValueError, match="given twice"):
            call(tokens, **caches)


def test_unknown_arguments_are_refused():
    model = small_model()
    tokens = torch.tensor([random_tokens(CHUNK, seed=0)])
    for call in (model, model.transformer, model.prepare_inputs_for_generation):
        with pytest.raises(TypeError, match="unexpected keyword arguments: encoder_hidden_states, neighbors"):
            call(tokens, neighbors=None, encoder_hidden_states=None)


def test_arguments_that_every_model_of_the_library_accepts_are_accepted():
    model = small_model()
    tokens = torch.tensor([random_tokens(CHUNK, seed=0)])
    summed = model(tokens, labels=tokens, num_items_in_batch=torch.tensor(1), output_attentions=True).loss
    torch.testing.assert_close(summed, model(tokens, labels=tokens).loss * (CHUNK - 1))
    shifted = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)
    given = model(tokens, labels=tokens, shift_labels=shifted).loss
    torch.testing.assert_close(given, model(tokens, labels=tokens).loss)


def test_ordinary_calls_give_no_warning(caplog):
    model = retrieving_model()
    tokens = torch.tensor([PROMPTS[2]])
    logging.getLogger("transformers").propagate = True
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        output = model(tokens, labels=tokens, use_cache=True)
        model(tokens[:, :1], use_cache=True, **{CACHE: output[CACHE]})
        model.generate(tokens, max_new_tokens=CHUNK, do_sample=False, num_beams=2)
        model.generate(tokens, max_new_tokens=CHUNK, do_sample=False, prefill_chunk_size=3)
    assert not caplog.records


def test_versions_outside_the_tested_range_are_refused():
    oldest, newest = (".".join(map(str, bound)) for bound in (OLDEST_TRANSFORMERS, NEWEST_TRANSFORMERS))
    for version in (f"{oldest}.0", f"{newest}.0", f"{newest}.7"):
        check_versions(version)
    after = f"{NEWEST_TRANSFORMERS[0]}.{NEWEST_TRANSFORMERS[1] + 1}"
    for version in ("4.57.1", "5.9.0", f"{after}.0", f"{after}.0.dev0", "6.0.0"):
        with pytest.raises(ImportError, match=rf"{oldest} to {newest}; {re.escape(version)} is installed"):
            check_versions(version)
    with pytest.raises(ImportError, match="torch 2.8 or newer; 2.7.1 is installed"):
        check_versions(torch_version="2.7.1")


def test_the_package_installs_the_versions_that_its_code_accepts():
    pyproject = (PROJECT / "pyproject.toml").read_text(encoding="utf-8")
    (major, minor), oldest = NEWEST_TRANSFORMERS, ".".join(map(str, OLDEST_TRANSFORMERS))
    assert f'"transformers>={oldest},<{major}.{minor + 1}",' in pyproject
    assert f'"torch>={".".join(map(str, OLDEST_TORCH))}",' in pyproject
