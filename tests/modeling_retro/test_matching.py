"""Cross-attention with matches learns within few steps; the paper's does not."""

import json

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from modeling_retro import RetroForCausalLM

from ..support.retro_models import (
    CHUNK,
    LENGTH,
    LONG,
    NEIGHBORS,
    VOCAB,
    RowNeighbors,
    fit_readers,
    neighbor_tensors,
    random_tokens,
    rows_that_repeat_their_neighbors,
    small_model,
)


@pytest.mark.parametrize("cca_match", [True, False])
def test_cross_attention_learns_within_a_few_steps_with_matches_only(tmp_path, cca_match):
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": VOCAB, "n_positions": 64}
    # embeddings long enough for a frozen decoder to be certain of a token
    GPT2LMHeadModel(GPT2Config(initializer_range=0.2, **sizes)).save_pretrained(tmp_path)
    changes = {"chunk_size": LONG, "num_neighbors": NEIGHBORS, "cca_layers": [1], "cca_match": cca_match}
    model = RetroForCausalLM.from_pretrained(tmp_path, **changes)
    fit_readers(model, rows_that_repeat_their_neighbors)
    batch = rows_that_repeat_their_neighbors(1000)
    with torch.no_grad():
        on, off = model(**batch).loss, model(**batch, use_retrieval=False).loss
    assert on < off - 2 if cca_match else on > off - 1  # four of five tokens are in the neighbors


@torch.no_grad()
def test_a_model_saved_before_there_were_matches_loads_to_the_same_logits(tmp_path):
    old = small_model(cca_match=False)
    old.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    settings = json.loads(file.read_text())
    del settings["cca_match"]
    file.write_text(json.dumps(settings))
    ids, mask = neighbor_tensors([RowNeighbors(3, seed=5).chunks], 3)
    inputs = {"input_ids": torch.tensor([random_tokens(3 * CHUNK, seed=2)])}
    inputs |= {"neighbor_ids": ids, "neighbor_attention_mask": mask}
    loaded = RetroForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(loaded(**inputs).logits, old(**inputs).logits)
    given = RetroForCausalLM.from_pretrained(tmp_path, cca_match=True)
    for name, weight in old.state_dict().items():  # trained weights stay
        assert torch.equal(given.state_dict()[name], weight), name


@torch.no_grad()
@pytest.mark.parametrize("cca_layers", [[], [1, 3]])
def test_masked_neighbor_tokens_match_nothing_wherever_they_stand(cca_layers):
    model = small_model(cca_layers=cca_layers)
    tokens = torch.tensor([random_tokens(3 * CHUNK, seed=2)])
    ids = torch.randint(0, VOCAB, (1, 3, NEIGHBORS, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.6
    others = torch.where(mask, ids, (ids + 1) % VOCAB)
    logits = [model(tokens, neighbor_ids=given, neighbor_attention_mask=mask).logits for given in (ids, others)]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)
