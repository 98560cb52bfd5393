"""Cross-attention that goes by matches learns to read in a few steps; the paper's, from the same weights, does not."""

import json

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from modeling_retro import RetroConfig, RetroForCausalLM

from .conftest import LONG, NEIGHBORS, VOCAB, rows_that_repeat_their_neighbors


@pytest.mark.parametrize("cca_match", [True, False])
def test_cross_attention_alone_reads_within_a_few_steps_if_it_goes_by_matches(tmp_path, cca_match):
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": VOCAB, "n_positions": 64}
    # embeddings long enough for a frozen decoder to be certain of a token
    GPT2LMHeadModel(GPT2Config(initializer_range=0.2, **sizes)).save_pretrained(tmp_path)
    changes = {"chunk_size": LONG, "num_neighbors": NEIGHBORS, "cca_layers": [1], "cca_match": cca_match}
    model = RetroForCausalLM.from_pretrained(tmp_path, **changes).train()
    model.freeze_backbone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(60):
        model(**rows_that_repeat_their_neighbors(step)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    batch = rows_that_repeat_their_neighbors(1000)
    with torch.no_grad():
        on, off = model(**batch).loss, model(**batch, use_retrieval=False).loss
    assert on < off - 2 if cca_match else on > off - 1  # what follows is in the neighbors, four times in five


def test_it_comes_with_the_copy_head_and_a_saved_model_keeps_what_it_had(tmp_path):
    assert not RetroConfig().cca_match and RetroConfig(copy_head=True).cca_match
    assert not RetroConfig(copy_head=True, cca_match=False).cca_match
    RetroConfig().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["cca_match"] is False
    assert not RetroConfig.from_pretrained(tmp_path, copy_head=True).cca_match
