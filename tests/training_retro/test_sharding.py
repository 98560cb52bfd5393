"""The accelerate configurations for 8 GPUs that spread weights over processes, on two CPUs, against one process.

FSDP and DeepSpeed spread over accelerators alone; `cpus_as_accelerators` runs train_hf.py where the CPU passes for one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_hf
from modeling_retro import RetroForCausalLM

from ..support.once import made_once
from ..support.processes import ACCELERATE, Forked
from ..support.runs import OVERRIDES, flags, knowledge_base

ROOT = Path(train_hf.__file__).parent
OVERRIDES = OVERRIDES.replace(
    "embd_pdrop: 0.0", "copy_head: true, cca_match: true, embd_pdrop: 0.0, attn_pdrop: 0.0, resid_pdrop: 0.0"
)
DEEPSPEED = ("deepspeed", "einops", "hjson", "msgpack", "ninja", "nvidia-ml-py", "py-cpuinfo")


@pytest.fixture(scope="module")
def deepspeed():
    """DeepSpeed in a folder of its own: where it can be imported, transformers and accelerate behave differently."""

    def make(folder):
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder)]
        # no dependencies and no isolated build: torch is here already, and its default wheel is large
        subprocess.run([*pip, "--no-deps", "--no-build-isolation", *DEEPSPEED], check=True)

    return made_once(ROOT / ".venv-deepspeed", make)


def result(folder):
    """The losses of a run, those of its evaluations too, and its weights."""
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    losses = [entry[key] for entry in log for key in ("loss", "eval_loss", "eval_off_loss") if key in entry]
    return losses, RetroForCausalLM.from_pretrained(folder).state_dict()


def arguments_of(world, tokenizer_folder, folder, **changes):
    settings = {"config_overrides": OVERRIDES, "neighbor_shuffle": 0, "save_strategy": "steps", "save_steps": 3}
    settings |= {"eval_strategy": "steps", "eval_steps": 3, **knowledge_base(world), **changes}
    return flags(world, tokenizer_folder, folder, **settings)


@pytest.fixture(scope="module")
def truth(world, tokenizer_folder, tmp_path_factory):
    """The result of a run in one process."""
    folder = tmp_path_factory.mktemp("one")
    process = Forked(folder / "log", train_hf.main, arguments_of(world, tokenizer_folder, folder / "run"))
    assert process.wait() == 0, process.output[-3000:]
    return result(folder / "run")


@pytest.mark.parametrize("name", ["fsdp", "zero2", "zero3"])
def test_spread_weights_train_evaluate_and_go_on_as_one_process(
    world, tokenizer_folder, truth, tmp_path, name, request, monkeypatch
):
    if name != "fsdp":
        paths = [str(request.getfixturevalue("deepspeed")), os.environ.get("PYTHONPATH", "")]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    configuration = ROOT / "examples" / "accelerate" / f"{name}_8_gpus.yaml"
    spread = [*ACCELERATE[:3], "--config_file", str(configuration), "--num_processes", "2", "--mixed_precision", "no"]
    spread += ["--main_process_port", "0", "--module", "tests.support.cpus_as_accelerators"]
    changes = {"use_cpu": None, "per_device_train_batch_size": 2}
    two = arguments_of(world, tokenizer_folder, tmp_path / "two", **changes)
    changes["resume_from_checkpoint"] = tmp_path / "two" / "checkpoint-3"
    again = arguments_of(world, tokenizer_folder, tmp_path / "again", **changes)
    ran = subprocess.run([*spread, json.dumps([two, again])], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]

    losses, weights = truth
    assert result(tmp_path / "two")[0] == pytest.approx(losses, abs=1e-4) and len(losses) == 10
    losses_again, ended = result(tmp_path / "again")
    assert losses_again == pytest.approx(losses, abs=1e-4)
    assert ended.keys() == weights.keys()
    assert all(torch.allclose(ended[name], weight, atol=2e-3) for name, weight in weights.items())
