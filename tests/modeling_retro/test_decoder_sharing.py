"""A RETRO on any decoder is saved, opened, copied, resized and shared with the same logits."""

import copy
import gc
import json
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GptOssConfig, MixtralConfig, PreTrainedModel

from modeling_retro import RetroConfig, RetroForCausalLM, RetroModel

from ..support.by_hand import HashRetriever, greedy_by_hand
from ..support.decoders import (
    COPYING,
    GROUPED,
    READING,
    SIZES,
    SOME,
    decoder_batch,
    open_decoder,
    retrieving_retro,
    retro,
    small_decoder,
    untrained_retro,
)
from ..support.retro_models import CHUNK, VOCAB, random_tokens
from .test_sharing import run_without_the_project
from .test_training_features import training_batch


@pytest.fixture
def inputs():
    return decoder_batch()


def same_settings(config, other):
    """Compare all settings but the names that the configurations were opened by."""
    return without_names(config.to_dict()) == without_names(other.to_dict())


def without_names(settings):
    if not isinstance(settings, dict):
        return settings
    return {name: without_names(value) for name, value in settings.items() if name != "_name_or_path"}


def test_the_defaults_are_a_copy_head_and_four_neighbors(folder):
    config = RetroConfig.from_pretrained(folder)
    decoder = AutoConfig.from_pretrained(folder)
    assert (config.copy_head, config.cca_layers, config.num_neighbors) == (True, [], 4)
    assert same_settings(config.text_config, decoder)
    assert (config.vocab_size, config.n_embd, config.n_layer, config.n_positions) == (VOCAB, 16, 3, 64)
    assert config.chunk_size == 64 and config.neighbor_length == 128
    model = RetroForCausalLM.from_pretrained(folder)
    assert not hasattr(model.transformer, "encoder") and hasattr(model, "copy_head")
    numbers = {name for name, _ in model.named_parameters() if "decoder." not in name}
    assert all(name.startswith("copy_head.") for name in numbers)


@pytest.mark.parametrize("make", [MixtralConfig, GptOssConfig])
@torch.no_grad()
def test_experts_are_computed_as_in_the_decoder(make, tmp_path, inputs):
    torch.manual_seed(0)
    config = make(**GROUPED, num_local_experts=4, num_experts_per_tok=2, head_dim=8)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "decoder")
    decoder, model = open_decoder(tmp_path / "decoder"), retro(tmp_path / "decoder")
    assert torch.equal(model(**inputs, use_retrieval=False).logits, decoder(inputs["input_ids"]).logits)
    model.save_pretrained(tmp_path / "saved")
    again = RetroForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="eager")
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    for opened in (model, again):
        kind = opened.transformer.decoder.config._experts_implementation
        assert kind == decoder.config._experts_implementation


@pytest.mark.parametrize("family", ["llama"], indirect=True)
@torch.no_grad()
def test_a_configuration_is_taken_in_every_form(folder, tmp_path, inputs):
    expected = open_decoder(folder)(inputs["input_ids"]).logits
    given = RetroConfig.from_pretrained(folder, chunk_size=9, cca_layers=[1])
    given.save_pretrained(tmp_path / "settings")
    for config in (given, tmp_path / "settings", str(tmp_path / "settings")):
        model = RetroForCausalLM.from_pretrained(folder, config=config, attn_implementation="eager", **SIZES)
        assert model.config.cca_layers == [1] and model.config.retrieval_stride == CHUNK
        assert torch.equal(model(**inputs).logits, expected)
    model = RetroForCausalLM.from_pretrained(folder, dtype="auto", tie_word_embeddings=False)
    assert not model.config.tie_word_embeddings and model.dtype == torch.float32
    with pytest.raises(ValueError, match="config is a dict. Give a configuration"):
        RetroForCausalLM.from_pretrained(folder, config=given.to_dict())
    model = retro(folder, cca_layers=[1])
    model.save_pretrained(tmp_path / "saved")
    again = RetroForCausalLM.from_pretrained(tmp_path / "saved", config=model.config, num_neighbors=3)
    assert again.config.num_neighbors == 3 and again.config.cca_layers == [1]
    with pytest.raises(ValueError, match="config is a LlamaConfig, but the model is a RETRO"):
        RetroForCausalLM.from_pretrained(tmp_path / "saved", config=AutoConfig.from_pretrained(folder))


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_a_class_of_another_name_extends_it(folder, tmp_path, inputs):
    class Mine(RetroForCausalLM):
        pass

    model = Mine.from_pretrained(folder, **SIZES, **READING)
    model.save_pretrained(tmp_path)
    again = Mine.from_pretrained(tmp_path)
    assert isinstance(model, Mine) and isinstance(again, Mine)
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    with pytest.raises(ValueError, match="RetroModel cannot be built on .*Use RetroForCausalLM"):
        RetroModel.from_pretrained(folder)


@pytest.mark.parametrize("family", ["llama", "opt"], indirect=True)
@torch.no_grad()
def test_outputs_are_those_that_the_configuration_asks_for(folder, inputs):
    model = retro(folder)
    model.config.output_hidden_states = model.config.output_attentions = True
    outputs = model(**inputs)
    assert len(outputs.hidden_states) == 4 and len(outputs.attentions) == 3 and len(outputs.cross_attentions) == 2
    model.config.output_hidden_states = model.config.output_attentions = model.config.return_dict = False
    logits, *_ = model(**inputs)
    assert torch.equal(logits, outputs.logits)


@pytest.mark.parametrize("family", SOME, indirect=True)
@torch.no_grad()
def test_a_saved_model_opens_through_every_class(folder, tmp_path, inputs):
    model = retro(folder, "sdpa")
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert str(folder) not in (tmp_path / "config.json").read_text()  # local paths are private
    for opened in (RetroForCausalLM.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert type(opened) is type(model) and isinstance(opened, RetroForCausalLM)
        assert torch.equal(opened(**inputs).logits, model(**inputs).logits)
        assert opened.generation_config.max_new_tokens == 7
        assert opened.generation_config.pad_token_id == VOCAB - 1  # the decoder's
        assert same_settings(opened.config, model.config)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is RetroConfig
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is type(model.transformer) and isinstance(base, PreTrainedModel)
    assert not isinstance(base, RetroModel)
    assert torch.equal(base(**inputs).last_hidden_state, model.transformer(**inputs).last_hidden_state)
    built = AutoModelForCausalLM.from_config(config)
    assert isinstance(built, RetroForCausalLM)
    assert {name: p.shape for name, p in built.named_parameters()} == {
        name: p.shape for name, p in model.named_parameters()
    }
    assert isinstance(AutoModel.from_config(config), type(base))


@pytest.mark.parametrize("family", SOME, indirect=True)
def test_settings_may_be_changed_when_a_saved_model_is_opened(folder, tmp_path):
    retro(folder, **COPYING).save_pretrained(tmp_path)
    opened = RetroForCausalLM.from_pretrained(tmp_path, cca_layers=[1], chunk_size=8, neighbor_length=None)
    assert (opened.config.cca_layers, opened.config.chunk_size, opened.config.neighbor_length) == ([1], 8, 16)
    with torch.no_grad():
        tokens = torch.tensor([random_tokens(9, seed=1)])
        assert torch.equal(opened(tokens).logits, open_decoder(folder, "sdpa")(tokens).logits)


@pytest.mark.parametrize("family", ["llama", "llama_untied", "gemma3", "gpt_neox", "opt"], indirect=True)
def test_tied_weights_are_one_and_untied_ones_two(family, folder, tmp_path):
    model, tied = retro(folder), family not in ("llama_untied", "gpt_neox")
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        saved = set(file.keys())
    parameters = dict(model.named_parameters())
    assert saved == set(parameters)
    loaded = [RetroForCausalLM.from_pretrained(tmp_path), copy.deepcopy(model)]
    loaded.append(RetroForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).float())
    for opened in (model, *loaded):
        assert (opened.get_output_embeddings().weight is opened.get_input_embeddings().weight) == tied
        assert set(dict(opened.named_parameters())) == set(parameters)
        opened.tie_weights()
        assert (opened.get_output_embeddings().weight is opened.get_input_embeddings().weight) == tied
    assert model.get_input_embeddings() is model.transformer.decoder.get_input_embeddings()
    assert model.get_output_embeddings() is model.transformer.decoder.get_output_embeddings()


@pytest.mark.parametrize("family", SOME, indirect=True)
def test_a_resized_vocabulary_serves_decoder_neighbors_and_head(folder, tmp_path):
    model, batch = retro(folder), training_batch()
    with torch.no_grad():
        before = model(**batch, use_retrieval=False).logits
        model.resize_token_embeddings(VOCAB + 5, mean_resizing=False)
        assert model.config.vocab_size == model.config.text_config.vocab_size == VOCAB + 5
        torch.testing.assert_close(model(**batch, use_retrieval=False).logits[..., :VOCAB], before)
        read = model(**batch).logits
        batch["neighbor_ids"][3, 0, 0, 0] = VOCAB + 4
        batch["neighbor_attention_mask"][3, 0, 0, 0] = True
        logits = model(**batch).logits
        assert logits.shape[-1] == VOCAB + 5 and not torch.equal(logits[3, CHUNK:], read[3, CHUNK:])
    batch["labels"][3, 1] = VOCAB + 4
    model(**batch).loss.backward()
    assert model.get_input_embeddings().weight.grad[VOCAB + 4].any()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        opened = RetroForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
        assert torch.equal(opened(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("family", SOME, indirect=True)
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@torch.no_grad()
def test_a_copy_is_independent_of_the_original(folder, inputs, how):
    model = retro(folder)
    expected = model(**inputs).logits
    copied = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    changed = copy.deepcopy(copied)
    for parameter in changed.parameters():
        parameter.mul_(1.1)
    assert torch.equal(model(**inputs).logits, expected)
    assert torch.equal(copied(**inputs).logits, expected)
    of_change = changed(**inputs).logits
    assert not torch.allclose(of_change, expected, atol=1e-3)
    for parameter in model.parameters():
        parameter.zero_()
    assert torch.equal(copied(**inputs).logits, expected)
    assert torch.equal(changed(**inputs).logits, of_change)
    del model
    gc.collect()
    assert torch.equal(copied(**inputs).logits, expected)
    with torch.enable_grad():  # through its own parts
        copied(**inputs).logits.sum().backward()
    assert all(p.grad is not None and p.grad.any() for n, p in copied.named_parameters() if "cross_attention" in n)


@pytest.mark.parametrize("family", SOME, indirect=True)
def test_a_decoder_of_other_precision_keeps_it(family, tmp_path, inputs):
    small_decoder(family).to(torch.bfloat16).save_pretrained(tmp_path)
    with torch.no_grad():
        for dtype in ({}, {"dtype": "auto"}, {"dtype": torch.bfloat16}, {"dtype": torch.float32}):
            decoder = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", **dtype)
            model = untrained_retro(tmp_path, **READING, **dtype)
            assert model.transformer.decoder.dtype == decoder.dtype
            assert torch.equal(model(**inputs).logits, decoder(inputs["input_ids"]).logits)
            model.save_pretrained(tmp_path / "saved")
            opened = RetroForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="eager")
            assert torch.equal(opened(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("family", SOME, indirect=True)
def test_a_retriever_is_taken_and_never_saved(folder, tmp_path):
    model = retrieving_retro(folder)
    model.save_pretrained(tmp_path)
    assert not any("retriever" in file.read_text(errors="ignore") for file in tmp_path.glob("*.json"))
    retriever = HashRetriever()
    opened = AutoModelForCausalLM.from_pretrained(tmp_path, retriever=retriever, attn_implementation="eager")
    assert opened.retriever is retriever
    prompt = random_tokens(2 * CHUNK + 1, seed=1)
    written = opened.generate(torch.tensor([prompt]), max_new_tokens=5, do_sample=False)
    assert written[0].tolist() == greedy_by_hand(model, prompt, 5)
    on_decoder = RetroForCausalLM.from_pretrained(folder, retriever=retriever, **SIZES, **READING)
    assert on_decoder.retriever is retriever
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "retro" and config["text_config"]["model_type"] != "retro"


CLEAN = """
import importlib.util, sys
from pathlib import Path
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
assert all(importlib.util.find_spec(name) is None for name in ("modeling_retro", "configuration_retro", "retrieval"))
for folder in sorted(Path("saved").iterdir()):
    inputs = load_file(folder / "inputs" / "inputs.safetensors")
    expected = inputs.pop("logits")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(model(**inputs).logits, expected), folder
    assert type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()  # Trainer goes by this list
    assert type(model.transformer.decoder).__module__.startswith("transformers.models."), folder
    model.save_pretrained("again")
    model = AutoModelForCausalLM.from_pretrained("again", trust_remote_code=True)
    assert torch.equal(model(**inputs).logits, expected), folder
    row = inputs["input_ids"]
    cached, uncached = (model.generate(row, max_new_tokens=9, do_sample=False, use_cache=use) for use in (True, False))
    assert torch.equal(cached, uncached), folder
print("opened")
"""


def test_they_open_as_remote_code_where_this_project_is_not_installed(saved_decoder, tmp_path, inputs):
    for family in ("llama", "gemma3", "gpt_neox"):
        model = retro(saved_decoder(family), "sdpa")
        model.save_pretrained(tmp_path / "saved" / family)
        (tmp_path / "saved" / family / "inputs").mkdir()
        # with gradients, as there: without them SDPA uses another kernel
        given = {**inputs, "logits": model(**inputs).logits.detach()}
        save_file(given, tmp_path / "saved" / family / "inputs" / "inputs.safetensors")
    ran = run_without_the_project(CLEAN, tmp_path)
    assert ran.returncode == 0 and "opened" in ran.stdout, ran.stderr[-2000:]
