"""A reader is saved without its decoder, and read by the decoder that it was trained on."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from configuration_retro import RetroConfig
from modeling_retro import RetroForCausalLM

from ..support.decoders import READING, SIZES, decoder_batch, retro, small_decoder
from ..support.hub import Hub
from ..support.retro_models import VOCAB, open_weights


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    small_decoder("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=16, n_layer=3, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_a_copy_heads_reader_is_small_and_reads_as_its_model(llama, tmp_path):
    model = retro(llama, cca_layers=[])
    model.save_reader(tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 5_000
    assert all(name.startswith("copy_head.") for name in load_file(tmp_path / "reader.safetensors"))
    again, info = RetroForCausalLM.from_pretrained(
        llama, reader=tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    batch = decoder_batch()
    assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_a_reader_with_cross_attention_reads_as_its_model(llama, tmp_path):
    model = retro(llama, encoder_num_layers=1, n_inner=24, activation_function="relu")
    model.save_reader(tmp_path)
    again = RetroForCausalLM.from_pretrained(llama, reader=tmp_path, attn_implementation="eager")
    batch = decoder_batch()
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert again.config.attention_branch == "self_attn"


def test_gpt2_has_readers_too(gpt2, tmp_path):
    model = RetroForCausalLM.from_pretrained(gpt2, **{**SIZES, **READING}).eval()
    open_weights(model, [p for name, p in model.named_parameters() if "copy_head" in name or "cca" in name], 0.3)
    model.save_reader(tmp_path)
    again, info = RetroForCausalLM.from_pretrained(gpt2, reader=tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    batch = decoder_batch()
    assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_settings_that_fit_the_reader_may_be_changed_and_others_are_refused(llama, tmp_path):
    retro(llama, cca_layers=[]).save_reader(tmp_path)
    assert RetroForCausalLM.from_pretrained(llama, reader=tmp_path, num_neighbors=3).config.num_neighbors == 3
    with pytest.raises(ValueError, match=r"of shape \(10,\), the model \(7,\). Leave out settings"):
        RetroForCausalLM.from_pretrained(llama, reader=tmp_path, match_length=3, initial_match_weights=[8, 6, 4])


def test_a_reader_of_another_decoder_is_refused_with_both_named(llama, gpt2, tmp_path):
    retro(llama, cca_layers=[]).save_reader(tmp_path)
    with pytest.raises(ValueError, match="for another decoder: model_type is 'gpt2', not 'llama'"):
        RetroForCausalLM.from_pretrained(gpt2, reader=tmp_path)
    wide = small_decoder("llama", hidden_size=32, vocab_size=VOCAB + 3)
    wide.save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match=r"n_embd is 32, not 16; vocab_size is 64, not 61.*train a reader"):
        RetroForCausalLM.from_pretrained(tmp_path / "wide", reader=tmp_path)


def test_a_reader_of_a_decoder_with_another_name_is_refused(llama, tmp_path):
    model = retro(llama, cca_layers=[], base_model="owner/llama")
    model.save_reader(tmp_path)
    RetroForCausalLM.from_pretrained(llama, reader=tmp_path)  # a local decoder has no name to compare
    stored = json.loads((tmp_path / "reader_config.json").read_text())
    assert stored["decoder"]["name"] == "owner/llama"
    retro(llama, base_model="owner/other").save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="name is 'owner/other', not 'owner/llama'"):
        RetroForCausalLM.from_pretrained(tmp_path / "other", reader=tmp_path)


def test_a_folder_without_a_reader_is_refused(llama):
    with pytest.raises(OSError, match="is not a reader: it has no reader_config.json.*Give a folder"):
        RetroForCausalLM.from_pretrained(llama, reader=llama)


def test_a_damaged_reader_is_refused(llama, tmp_path):
    retro(llama).save_reader(tmp_path)
    weights = load_file(tmp_path / "reader.safetensors")
    del weights["copy_head.gate_scale"]
    save_file(weights, tmp_path / "reader.safetensors")
    with pytest.raises(ValueError, match="lacks copy_head.gate_scale, so its copy head would be half new. Save or"):
        RetroForCausalLM.from_pretrained(llama, reader=tmp_path)
    (tmp_path / "reader.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="is damaged .*Save or download it again"):
        RetroForCausalLM.from_pretrained(llama, reader=tmp_path)
    (tmp_path / "reader_config.json").write_text('{"decoder": {')
    with pytest.raises(ValueError, match="is damaged .*Save or download it again"):
        RetroForCausalLM.from_pretrained(llama, reader=tmp_path)


@pytest.mark.parametrize("decoder", ["llama", "gpt2"])
def test_a_reader_is_put_on_whatever_configuration_is_given(decoder, request, tmp_path):
    folder = request.getfixturevalue(decoder)
    model = RetroForCausalLM.from_pretrained(folder, **{**SIZES, **READING}).eval()
    open_weights(model, [p for name, p in model.named_parameters() if "copy_head" in name or "cca" in name], 0.3)
    model.save_reader(tmp_path / "reader")
    model.save_pretrained(tmp_path / "saved")
    batch = decoder_batch()
    expected = model(**batch).logits
    for name, config in [
        (folder, RetroConfig.from_pretrained(folder)),
        (folder, AutoConfig.from_pretrained(folder)),
        (tmp_path / "saved", RetroConfig.from_pretrained(tmp_path / "saved")),
    ]:
        again = RetroForCausalLM.from_pretrained(name, reader=tmp_path / "reader", config=config)
        assert torch.equal(again(**batch).logits, expected)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", reader=tmp_path / "reader")
    assert torch.equal(again(**batch).logits, expected)


PUSH = """
import sys, torch
from modeling_retro import RetroForCausalLM
from tests.support.decoders import decoder_batch, open_decoder, retro
open_decoder(sys.argv[1]).push_to_hub("owner/llama")
model = retro(sys.argv[1], cca_layers=[], base_model="owner/llama")
model.save_reader("folder", push_to_hub=True, repo_id="owner/reader")
pulled = RetroForCausalLM.from_pretrained("owner/llama", reader="owner/reader", attn_implementation="eager")
assert torch.equal(pulled(**decoder_batch()).logits, model(**decoder_batch()).logits)
"""


def test_a_reader_is_pushed_with_a_card_and_opened_by_its_name(llama, tmp_path):
    with Hub() as hub:
        environment = hub.environment(tmp_path / "hf") | {"HF_TOKEN": "hf_secret", "HF_HUB_DISABLE_XET": "1"}
        environment["PYTHONPATH"] = ":".join(filter(None, sys.path))
        ran = subprocess.run(
            [sys.executable, "-c", PUSH, str(llama)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert ran.returncode == 0, ran.stderr[-2000:]
    files = hub.files["owner/reader"]
    assert {"reader.safetensors", "reader_config.json", "README.md"} <= set(files)
    card = files["README.md"].decode()
    assert 'from_pretrained("owner/llama", reader="owner/reader"' in card and "base_model_relation: adapter" in card
    for content in files.values():
        assert b"secret" not in content and str(tmp_path).encode() not in content
