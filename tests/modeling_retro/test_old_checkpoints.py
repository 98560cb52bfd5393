"""Checkpoints of earlier versions, with other names and settings, load to the same model."""

import json
import logging

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from modeling_retro import RetroForCausalLM
from training_retro.assembly import add_adapters

from ..support.old_checkpoints import NEW_SETTINGS, write_as_of_old
from ..support.retro_models import small_model
from .test_training_features import training_batch

# PEFT reads the name that transformers 5.24 renames
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def model():
    return small_model()


@pytest.fixture
def old(model, tmp_path):
    """The folder of a checkpoint as earlier versions wrote it."""
    model.save_pretrained(tmp_path / "old")
    write_as_of_old(tmp_path / "old")
    return tmp_path / "old"


@torch.no_grad()
def assert_same_model(loaded, model):
    batch = training_batch()
    assert torch.equal(loaded.eval()(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("model_class", [RetroForCausalLM, AutoModelForCausalLM])
def test_a_checkpoint_loads_without_a_warning_and_is_saved_under_the_present_names(
    model_class, old, model, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    loaded, info = model_class.from_pretrained(old, attn_implementation="eager", output_loading_info=True)
    assert not caplog.records and not any(info.values())
    assert_same_model(loaded, model)
    loaded.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == {
        name for name in model.state_dict() if name != "lm_head.weight"
    }
    assert_same_model(model_class.from_pretrained(tmp_path / "again", attn_implementation="eager"), model)


def test_settings_missing_from_a_checkpoint_get_the_values_of_that_time(old):
    assert not NEW_SETTINGS & json.loads((old / "config.json").read_text()).keys()
    config = RetroForCausalLM.from_pretrained(old).config
    assert (config.match_length, config.match_scale, config.cca_match_output_scale) == (6, 30.0, 4.0)
    assert config.gate_log_prob_scale == 10.0
    assert config.initial_match_weights == [8.0, 6.0, 4.0, 3.0, 2.0, 2.0]


def test_a_checkpoint_loads_with_its_copy_head_on_disk(old, model, tmp_path):
    places = {"transformer": "cpu", "lm_head": "cpu", "copy_head": "disk"}
    loaded = RetroForCausalLM.from_pretrained(
        old, attn_implementation="eager", device_map=places, offload_folder=tmp_path / "offload"
    )
    assert_same_model(loaded, model)


def test_a_key_mapping_of_the_caller_is_applied_too(old, model):
    weights = load_file(old / "model.safetensors")
    weights = {name.replace("ln_f", "last_norm"): weight for name, weight in weights.items()}
    save_file(weights, old / "model.safetensors", metadata={"format": "pt"})
    mapping = {"last_norm": "ln_f"}
    assert_same_model(RetroForCausalLM.from_pretrained(old, attn_implementation="eager", key_mapping=mapping), model)


def test_a_state_dict_loads_into_the_model_and_into_its_copy_head(old, model):
    weights = load_file(old / "model.safetensors")
    loaded = small_model()
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    loaded.load_state_dict(weights | {"lm_head.weight": weights["transformer.wte.weight"]})
    assert "copy_head.valve" in weights  # it stays as it was
    assert_same_model(loaded, model)
    with torch.no_grad():
        loaded.copy_head.gate_scale.zero_()
    prefix = "copy_head."
    loaded.copy_head.load_state_dict(
        {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
    )
    assert_same_model(loaded, model)


def test_parameters_keep_the_order_of_saved_optimizer_states(model):
    names = [name for name, _ in model.copy_head.named_parameters()]
    assert names == ["match", "similarity", "gate_hidden", "gate_features", "gate_bias", "gate_scale"]


def adapt(folder):
    """Open a checkpoint and add adapters to it, with the copy head as a whole."""
    model = RetroForCausalLM.from_pretrained(folder, attn_implementation="eager")
    return add_adapters(model, {"r": 2, "target_modules": r".*\.attn\.c_attn", "modules_to_save": ["copy_head"]})


@pytest.mark.parametrize("base", ["old", "new"])
def test_an_adapter_with_a_whole_copy_head_loads_and_resumes(base, old, model, tmp_path):
    model.save_pretrained(tmp_path / "new")
    adapted = adapt(old)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    assert any(name.endswith("modules_to_save.default.gate_scale") for name, _ in adapted.named_parameters())
    adapted.save_pretrained(tmp_path / "adapter")
    write_as_of_old(tmp_path / "adapter", "adapter_model.safetensors")
    assert "base_model.model.copy_head.valve" in load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    opened = RetroForCausalLM.from_pretrained(tmp_path / base, attn_implementation="eager")
    assert_same_model(PeftModel.from_pretrained(opened, tmp_path / "adapter"), adapted.eval())
    resumed = adapt(tmp_path / base)
    resumed.load_adapter(str(tmp_path / "adapter"), "default", is_trainable=True)  # as Trainer does
    assert_same_model(resumed, adapted)
