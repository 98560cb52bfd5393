"""A saved model opens everywhere with the same logits; what is shared holds no secret."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from modeling_retro import RetroConfig, RetroForCausalLM, RetroModel

from ..support.by_hand import HashRetriever, retrieving_model
from ..support.hub import Hub
from ..support.old_checkpoints import write_as_of_old
from ..support.retro_models import CHUNK, RowNeighbors, neighbor_tensors, random_tokens, small_config, small_model

PROJECT = Path(__file__).parents[2]


@pytest.fixture
def inputs():
    ids, mask = neighbor_tensors([RowNeighbors(3, seed=5).chunks], 3)
    row = torch.tensor([random_tokens(3 * CHUNK + 2, seed=3)])
    return {"input_ids": row, "neighbor_ids": ids, "neighbor_attention_mask": mask}


@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_a_saved_model_opens_through_every_class(tmp_path, inputs, max_shard_size):
    model = small_model(attn_implementation="sdpa")
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert len(list(tmp_path.glob("*.safetensors"))) > (max_shard_size == "20KB")
    for opened in (RetroForCausalLM.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert type(opened) is RetroForCausalLM  # the installed code is used
        assert torch.equal(opened(**inputs).logits, model(**inputs).logits)
        assert opened.generation_config.max_new_tokens == 7
    assert type(AutoConfig.from_pretrained(tmp_path)) is RetroConfig
    decoder = AutoModel.from_pretrained(tmp_path)
    assert type(decoder) is RetroModel
    assert torch.equal(decoder(**inputs).last_hidden_state, model.transformer(**inputs).last_hidden_state)


CLEAN = """
import importlib.util, sys
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
import torch, transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
assert all(importlib.util.find_spec(name) is None for name in ("modeling_retro", "configuration_retro", "retrieval"))
inputs = load_file("inputs.safetensors")
expected = inputs.pop("logits")
installed, transformers.__version__ = transformers.__version__, "5.99.0"  # an unknown version
try:
    AutoModelForCausalLM.from_pretrained("saved", trust_remote_code=True)
except ImportError as error:
    assert "supports transformers 5.16 to" in str(error) and "5.99.0 is installed" in str(error), error
else:
    raise AssertionError("opened under an unknown version")
transformers.__version__ = installed
model = AutoModelForCausalLM.from_pretrained("saved", trust_remote_code=True)
assert torch.equal(model(**inputs).logits, expected)
assert type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()  # Trainer goes by this list
old = AutoModelForCausalLM.from_pretrained("old", trust_remote_code=True)  # weights of an earlier version
assert torch.equal(old(**inputs).logits, expected)
model.save_pretrained("again")
model = AutoModelForCausalLM.from_pretrained("again", trust_remote_code=True)
assert torch.equal(model(**inputs).logits, expected)
row = inputs["input_ids"]
cached, uncached = (model.generate(row, max_new_tokens=9, do_sample=False, use_cache=use) for use in (True, False))
assert torch.equal(cached, uncached)
"""


def run_without_the_project(code, folder):
    """Run code in a folder, in a venv with torch and transformers but without this project."""
    venv.create(folder / "venv", with_pip=False)
    # on this path torch and transformers are found, but not this project's editable install
    packages = Path(next((folder / "venv").rglob("site-packages")))
    packages.joinpath("libraries.pth").write_text("\n".join(path for path in sys.path if "site-packages" in path))
    python = next(path for path in (folder / "venv").glob("*/python*") if path.stem == "python")
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment = {**clean, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [python, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


def test_it_opens_as_remote_code_where_this_project_is_not_installed(tmp_path, inputs):
    model = small_model(attn_implementation="sdpa")
    model.save_pretrained(tmp_path / "saved")
    model.save_pretrained(tmp_path / "old")
    write_as_of_old(tmp_path / "old")
    save_file({**inputs, "logits": model(**inputs).logits.detach()}, tmp_path / "inputs.safetensors")
    ran = run_without_the_project(CLEAN, tmp_path)
    assert ran.returncode == 0, ran.stderr[-2000:]


PUSH = """
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from modeling_retro import RetroForCausalLM
from tests.support.by_hand import retrieving_model
gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_positions=64, n_embd=16, n_layer=4, n_head=2)).eval()
gpt2.push_to_hub("owner/base")
built = RetroForCausalLM.from_pretrained("owner/base")
assert built.config.base_model == "owner/base"
assert torch.equal(built(torch.arange(10)[None]).logits, gpt2(torch.arange(10)[None]).logits)
model = retrieving_model(embedding_model="test/hash", collection_name="passages", base_model="gpt2")
model.retriever.describe = lambda: {"chunks": 1234567, "sources": ["owner/texts"]}
model.retriever.uri, model.retriever.token = "http://user:secret@server:19530", "secret"
model.evaluation = {"bits_per_byte": 1.25, "off_bits_per_byte": 1.5}
model.push_to_hub("owner/reader")
model.save_pretrained("reader", push_to_hub=True, repo_id="owner/saved")
row = torch.arange(10)[None]
pulled = RetroForCausalLM.from_pretrained("owner/reader", attn_implementation="eager")
assert torch.equal(pulled(row).logits, model(row, use_retrieval=False).logits)
"""


def test_push_to_hub_writes_weights_code_and_a_card_and_no_address(tmp_path):
    with Hub() as hub:
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "hf"),
            "HF_TOKEN": "hf_secret",
            "PYTHONPATH": str(PROJECT),
        }
        ran = subprocess.run(
            [sys.executable, "-c", PUSH], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )
        assert ran.returncode == 0, ran.stderr[-2000:]
    for files in (hub.files["owner/reader"], hub.files["owner/saved"]):
        assert {"config.json", "model.safetensors", "modeling_retro.py", "cache.py", "README.md"} <= set(files)
        assert "AutoModelForCausalLM" in json.loads(files["config.json"])["auto_map"]
        card = files["README.md"].decode()
        for fact in ("gpt2", "test/hash", "passages", "1234567", "owner/texts", "1.2500", "RetroForCausalLM"):
            assert fact in card
        for name, content in files.items():
            assert b"secret" not in content and b"19530" not in content, name
            assert str(tmp_path).encode() not in content, name


def test_the_base_model_is_recorded_by_its_hub_name_only(tmp_path):
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_positions=64, n_embd=16, n_layer=4, n_head=2))
    gpt2.save_pretrained(tmp_path / "local")
    assert RetroForCausalLM.from_pretrained(tmp_path / "local").config.base_model is None
    assert small_config(base_model="gpt2").to_dict()["base_model"] == "gpt2"


def test_a_model_with_a_retriever_saves_none_of_it(tmp_path):
    model = retrieving_model()
    assert isinstance(model.retriever, HashRetriever)
    model.save_pretrained(tmp_path)
    assert "retriever" not in (tmp_path / "config.json").read_text()
    assert "retriever" not in (tmp_path / "generation_config.json").read_text()
    assert RetroForCausalLM.from_pretrained(tmp_path).retriever is None
