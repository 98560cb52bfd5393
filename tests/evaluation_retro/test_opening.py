"""A model and its knowledge base open together, or a sentence says why not."""

from copy import copy

import pytest
import torch
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from evaluation_retro.opening import (
    ModelSettings,
    config_fingerprint,
    describe_retriever,
    fingerprint,
    open_model,
    plain_decoder,
)
from modeling_retro import RetroConfig, RetroForCausalLM
from retrieval import KnowledgeBaseError, Reranker

from ..support.decoders import retro, small_decoder
from ..support.evaluated import place_of
from ..support.small_models import train_tokenizer


@torch.no_grad()
@pytest.mark.parametrize("which", ["copier", "attender"])
def test_the_plain_decoder_is_gpt2_with_the_same_weights(which, request, tmp_path):
    model = RetroForCausalLM.from_pretrained(request.getfixturevalue(which)).eval()
    decoder = plain_decoder(model)
    assert type(decoder) is GPT2LMHeadModel
    decoder.save_pretrained(tmp_path)
    alone = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    tokens = torch.randint(0, model.config.vocab_size, (2, 30))
    expected = model(tokens, use_retrieval=False).logits
    assert torch.equal(decoder(tokens).logits, alone(tokens).logits)
    torch.testing.assert_close(alone(tokens).logits, expected, atol=1e-5, rtol=0)
    assert decoder.transformer.wte.weight.data_ptr() == model.transformer.wte.weight.data_ptr()


def test_the_plain_decoder_of_another_family_is_the_decoder_itself(tmp_path):
    small_decoder("llama").save_pretrained(tmp_path)
    assert type(plain_decoder(retro(tmp_path))) is LlamaForCausalLM


def test_the_opened_model_reads_the_knowledge_base(opened):
    assert opened.model.retriever is opened.retriever and not opened.model.training
    assert opened.retriever.num_neighbors == opened.model.config.num_neighbors


def test_equal_weights_have_one_fingerprint_and_others_another(copier, attender):
    one, same, other = (RetroForCausalLM.from_pretrained(folder) for folder in (copier, copier, attender))
    assert fingerprint(one) == fingerprint(same) != fingerprint(other)


def test_without_a_knowledge_base_there_is_nothing_to_measure(copier):
    with pytest.raises(ValueError, match="knowledge_base is not given"):
        open_model(ModelSettings(model=str(copier)))
    assert open_model(ModelSettings(model=str(copier), device="cpu"), needs_neighbors=False).retriever is None


def test_a_decoder_that_was_never_trained_to_read_is_refused(world, copier, tokenizer, tmp_path):
    plain_decoder(RetroForCausalLM.from_pretrained(copier)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no weights that read neighbors"):
        open_model(ModelSettings(model=str(tmp_path), **place_of(world)))


def test_a_knowledge_base_of_another_tokenizer_is_refused(world, config, tmp_path):
    tokenizer = train_tokenizer(["completely different words are here"], 290)
    RetroForCausalLM(RetroConfig(**config.to_dict() | {"vocab_size": len(tokenizer)})).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(KnowledgeBaseError, match="tokenizer"):
        open_model(ModelSettings(model=str(tmp_path), **place_of(world)))


def test_a_device_that_is_not_there_is_refused(copier):
    with pytest.raises(ValueError, match="device is 'gpu'.*Give cpu"):
        open_model(ModelSettings(model=str(copier), device="gpu"), needs_neighbors=False)


@pytest.mark.parametrize("changes", [{"retrieval_stride": 4}, {"gate_log_prob_scale": 5.0}, {"search": "bm25"}])
def test_a_measurement_belongs_to_a_configuration(opened, changes, tmp_path):
    before = opened.describe()
    opened.model.save_pretrained(tmp_path)
    again = RetroForCausalLM.from_pretrained(tmp_path)
    assert config_fingerprint(again.config) == before["configuration"]
    assert config_fingerprint(RetroForCausalLM.from_pretrained(tmp_path, **changes).config) != before["configuration"]


def test_a_measurement_belongs_to_a_way_of_searching(world, copier, opened):
    before = opened.describe()
    fewer = opened.retriever.with_neighbors(1)
    assert describe_retriever(fewer)["neighbors"] != before["neighbors"]
    reranked = copy(opened.retriever)
    reranked.reranker = Reranker(type("Longest", (), {"predict": lambda pairs: [len(text) for _, text in pairs]}))
    assert describe_retriever(reranked)["reranker"] == ["type", opened.retriever._rows_wanted]
    assert {**describe_retriever(reranked), "reranker": None}.items() <= before.items()
