"""Opening GPT-2 and RETRO checkpoints: equal logits, new parts named, lost weights reported."""

import copy
import json
import logging
import pickle

import pytest
import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from modeling_retro import RetroConfig, RetroForCausalLM

from ..support.by_hand import HashRetriever, greedy_by_hand
from ..support.retro_models import CHUNK, LENGTH, VOCAB, random_tokens, small_model

SIZES = {"chunk_size": CHUNK, "neighbor_length": LENGTH, "cca_layers": [1, 3]}

ATTENTION_VARIANTS = [
    {"scale_attn_by_inverse_layer_idx": True},
    {"reorder_and_upcast_attn": True},
    {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    {"scale_attn_weights": False},
]
VARIANTS = [
    {},
    *ATTENTION_VARIANTS,
    *({"activation_function": name} for name in ("gelu", "relu", "silu", "tanh", "gelu_fast", "quick_gelu")),
    {"activation_function": "gelu_pytorch_tanh"},
    {"tie_word_embeddings": False},
    {"n_inner": 24},
    {"layer_norm_epsilon": 1e-3},
    {"resid_pdrop": 0.5, "embd_pdrop": 0.3, "attn_pdrop": 0.2},
    {"summary_type": "last", "summary_use_proj": False},
    {"use_cache": False},
]


def gpt2_with(**variant):
    """A GPT-2 whose every weight is away from its start."""
    sizes = {"vocab_size": VOCAB, "n_positions": 64, "n_embd": 16, "n_layer": 4, "n_head": 2, "initializer_range": 0.3}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None, **variant))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.fixture
def logged(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    return caplog


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: ",".join(map(str, variant.items())) or "plain")
def test_every_variant_of_gpt2_is_that_gpt2_to_the_bit(variant, tmp_path):
    gpt2_with(**variant).save_pretrained(tmp_path)
    ids = torch.tensor([random_tokens(20, seed=1), random_tokens(20, seed=2)])
    gpt2 = GPT2LMHeadModel.from_pretrained(tmp_path)
    retro = RetroForCausalLM.from_pretrained(tmp_path, retriever=HashRetriever(), **SIZES)
    for attention in ("eager", "sdpa"):
        gpt2.set_attn_implementation(attention)
        retro.set_attn_implementation(attention)
        for training in (False, True):  # with the same dropout
            torch.manual_seed(1)
            expected = gpt2.train(training)(ids).logits
            torch.manual_seed(1)
            assert torch.equal(retro.train(training)(ids, use_retrieval=False).logits, expected)
        assert torch.equal(retro.eval()(ids).logits, gpt2.eval()(ids).logits)  # RETRO's parts are a no-op


@pytest.mark.parametrize("variant", ATTENTION_VARIANTS, ids=str)
def test_a_variant_with_neighbors_generates_the_same_with_a_cache(variant):
    model = small_model(**variant)
    model.set_retriever(HashRetriever())
    prompt = random_tokens(2 * CHUNK + 1, seed=3)
    written = model.generate(torch.tensor([prompt]), max_new_tokens=CHUNK + 1, do_sample=False)
    assert written[0].tolist() == greedy_by_hand(model, prompt, CHUNK + 1)


def test_a_gpt2_with_another_cross_attention_is_refused(tmp_path):
    gpt2_with(add_cross_attention=True).save_pretrained(tmp_path)
    with pytest.raises(StrictDataclassError, match="add_cross_attention=False"):
        RetroForCausalLM.from_pretrained(tmp_path, **SIZES)
    opened = RetroForCausalLM.from_pretrained(tmp_path, add_cross_attention=False, **SIZES)
    plain = GPT2LMHeadModel.from_pretrained(tmp_path)
    row = torch.tensor([random_tokens(9, seed=1)])
    assert torch.equal(opened(row).logits, plain(row).logits)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"cca_layers": [1, 3]}, "neighbor encoder, cross-attention in layers 1, 3"),
        ({"cca_layers": [2], "copy_head": True}, "neighbor encoder, cross-attention in layer 2, copy head"),
        ({"cca_layers": [], "copy_head": True}, "copy head"),
    ],
    ids=["cross_attention", "both", "copy_head"],
)
def test_new_parts_are_named_in_one_line(settings, parts, tmp_path, logged):
    gpt2_with().save_pretrained(tmp_path)
    logged.clear()
    model, info = RetroForCausalLM.from_pretrained(tmp_path, output_loading_info=True, **settings)
    own = set(gpt2_with().state_dict())
    new = {name: weight for name, weight in model.named_parameters() if name not in own}
    assert [record.getMessage() for record in logged.records] == [
        f"New, and a no-op until trained: {parts} ({sum(map(torch.numel, new.values())):,} parameters)."
    ]
    assert info["missing_keys"] == set(new)  # train_hf.py uses them


def test_a_copy_head_added_to_a_retro_checkpoint_is_named_in_one_line(tmp_path, logged):
    small_model(copy_head=False).save_pretrained(tmp_path)
    logged.clear()
    RetroForCausalLM.from_pretrained(tmp_path, copy_head=True)
    (record,) = logged.records
    assert record.getMessage().startswith("New, and a no-op until trained: copy head (")


@pytest.mark.parametrize(
    ("lost", "reported"),
    [
        (["transformer.h.2.mlp.c_fc.weight"], ["transformer.h.2.mlp.c_fc.weight"]),
        (["transformer.h.1.cca.c_proj.weight"], ["transformer.h.1.cca.c_proj.weight"]),
        (["copy_head."], ["MISSING", "copy_head.gate_scale"]),
        (["transformer.encoder."], ["MISSING", "transformer.encoder.wpe.weight"]),
        (
            [".cca.", ".ln_cca.", "transformer.encoder.", "copy_head."],
            ["MISSING", "copy_head.gate_scale", "transformer.encoder.wpe.weight"],
        ),
    ],
    ids=["decoder", "cross_attention", "copy_head", "encoder", "all"],
)
def test_weights_missing_from_a_retro_checkpoint_are_reported(lost, reported, tmp_path, logged):
    small_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not any(part in name for part in lost)}
    assert len(kept) < len(weights)
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    logged.clear()
    _, info = RetroForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert all(text in logged.text for text in ["LOAD REPORT", *reported])
    assert "no-op" not in logged.text
    assert info["missing_keys"] == weights.keys() - kept.keys()


def test_a_missing_decoder_weight_is_reported_beside_the_new_parts(tmp_path, logged):
    gpt2_with().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["transformer.h.0.ln_1.bias"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    logged.clear()
    RetroForCausalLM.from_pretrained(tmp_path, **SIZES)
    assert "transformer.h.0.ln_1.bias" in logged.text and "no-op until trained" in logged.text
    assert "cca.c_attn" not in logged.text


def test_a_model_opened_by_the_name_in_anothers_configuration_gets_its_retriever(tmp_path):
    folder = str(tmp_path / "model")
    small_model().save_pretrained(folder)
    first = RetroForCausalLM.from_pretrained(folder, retriever=HashRetriever())
    name = first.config._name_or_path
    for opened in (RetroForCausalLM.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name)):
        assert opened.retriever is first.retriever
    assert copy.deepcopy(first.config)._name_or_path.retriever is first.retriever
    for plain in (folder, str(name), pickle.loads(pickle.dumps(name))):
        assert type(plain) is str and RetroForCausalLM.from_pretrained(plain).retriever is None
    assert RetroForCausalLM.from_pretrained(name, retriever=None).retriever is None
    assert json.loads(json.dumps({"name": name})) == {"name": folder}
    for dumper in filter(
        None, (getattr(yaml, name, None) for name in ("Dumper", "SafeDumper", "CDumper", "CSafeDumper"))
    ):
        assert yaml.safe_load(yaml.dump({"name": name}, Dumper=dumper)) == {"name": folder}
    first.set_retriever(None)
    assert type(first.config._name_or_path) is str
    assert RetroConfig.from_pretrained(name) == RetroConfig.from_pretrained(folder)


def test_a_second_model_of_a_configuration_keeps_the_first_ones_name(tmp_path):
    small_model().save_pretrained(tmp_path)
    first = RetroForCausalLM.from_pretrained(tmp_path, retriever=HashRetriever())
    RetroForCausalLM(first.config)
    AutoModelForCausalLM.from_config(first.config)
    assert first.config._name_or_path.retriever is first.retriever


def test_a_pickled_model_gives_its_retriever_to_models_opened_by_its_name(tmp_path):
    small_model().save_pretrained(tmp_path)
    first = RetroForCausalLM.from_pretrained(tmp_path, retriever=HashRetriever())
    for again in (pickle.loads(pickle.dumps(first)), copy.deepcopy(first)):
        opened = RetroForCausalLM.from_pretrained(again.config._name_or_path)
        assert again.retriever is not first.retriever and opened.retriever is again.retriever


def test_a_name_with_an_unfit_retriever_says_how_to_open_without_it(tmp_path):
    small_model().save_pretrained(tmp_path)
    name = RetroForCausalLM.from_pretrained(tmp_path, retriever=HashRetriever()).config._name_or_path
    with pytest.raises(ValueError, match=r"num_neighbors is 4.*Pass retriever=None"):
        RetroForCausalLM.from_pretrained(name, num_neighbors=4)
    assert RetroForCausalLM.from_pretrained(name, num_neighbors=4, retriever=None).retriever is None


def test_new_parts_are_told_by_the_checkpoints_own_configuration(tmp_path, logged):
    small_model().save_pretrained(tmp_path / "retro")
    config = RetroConfig.from_pretrained(tmp_path / "retro")
    gpt2_with().save_pretrained(tmp_path / "gpt2")
    logged.clear()
    RetroForCausalLM.from_pretrained(tmp_path / "gpt2", config=config)
    assert "no-op until trained: neighbor encoder" in logged.text and "LOAD REPORT" not in logged.text
    weights = load_file(tmp_path / "retro" / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "copy_head." not in name}
    save_file(kept, tmp_path / "retro" / "model.safetensors", metadata={"format": "pt"})
    logged.clear()
    fresh = RetroConfig(
        **{name: getattr(config, name) for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")},
        chunk_size=CHUNK,
        neighbor_length=LENGTH,
        cca_layers=[1, 3],
        copy_head=True,
        cca_match=True,
    )
    RetroForCausalLM.from_pretrained(tmp_path / "retro", config=fresh)
    assert "copy_head.gate_scale" in logged.text and "no-op" not in logged.text
