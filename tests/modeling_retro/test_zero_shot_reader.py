"""The reader in the package reads for decoders that it was never trained on."""

import pytest
import torch

from modeling_retro import RetroForCausalLM

from ..support.decoders import small_decoder
from ..support.retro_models import VOCAB

CHUNK, ROWS = 16, 8


@pytest.fixture(scope="module", params=["llama", "opt"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    small_decoder(request.param).save_pretrained(folder)
    model, info = RetroForCausalLM.from_pretrained(
        folder, reader="zero-shot", chunk_size=CHUNK, num_neighbors=2, output_loading_info=True
    )
    assert not info["missing_keys"]
    return model


def batch(seed=0):
    """Return rows whose second chunk stands in a neighbor of the first, and random neighbors."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB - 1, (ROWS, 2 * CHUNK), generator=draw)
    ids = torch.randint(0, VOCAB - 1, (ROWS, 1, 2, 2 * CHUNK), generator=draw)
    right = ids.clone()
    right[:, 0, 0] = tokens
    return tokens, right, ids


@torch.no_grad()
def test_it_copies_where_the_text_goes_on_as_a_neighbor_does(model):
    tokens, right, _ = batch()
    on = model(tokens, labels=tokens, neighbor_ids=right).loss
    assert on < model(tokens, labels=tokens).loss - 0.5


@torch.no_grad()
def test_it_leaves_wrong_neighbors_alone(model):
    tokens, _, wrong = batch()
    off = model(tokens, labels=tokens).loss
    assert model(tokens, labels=tokens, neighbor_ids=wrong).loss < 1.02 * off


def test_its_gate_does_not_see_the_decoder(model):
    assert not model.copy_head.gate_hidden.any() and not model.copy_head.gate_features[-1]
    assert not model.copy_head.similarity.any()  # nor the similarities, which differ between searches
