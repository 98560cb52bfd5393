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

from ..once import made_once
from ..two_processes import ACCELERATE
from .runs import OVERRIDES, flags, knowledge_base

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


@pytest.fixture
def run(world, tokenizer_folder, tmp_path):
    """Runs a command with the flags of a training; returns its losses, those of its evaluations too, and its weights."""

    def run(command, name, **changes):
        settings = {"config_overrides": OVERRIDES, "neighbor_shuffle": 0, "save_strategy": "steps", "save_steps": 3}
        settings |= {"eval_strategy": "steps", "eval_steps": 3, **knowledge_base(world), **changes}
        command = [*command, *flags(world, tokenizer_folder, tmp_path / name, **settings)]
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
        assert ran.returncode == 0, ran.stderr[-3000:]
        log = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        losses = [entry[key] for entry in log for key in ("loss", "eval_loss", "eval_off_loss") if key in entry]
        return losses, RetroForCausalLM.from_pretrained(tmp_path / name).state_dict()

    return run


@pytest.mark.parametrize("name", ["fsdp", "zero2", "zero3"])
def test_spread_weights_train_evaluate_and_go_on_as_one_process(run, tmp_path, name, request, monkeypatch):
    if name != "fsdp":
        paths = [str(request.getfixturevalue("deepspeed")), os.environ.get("PYTHONPATH", "")]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    configuration = ROOT / "examples" / "accelerate" / f"{name}_8_gpus.yaml"
    spread = [*ACCELERATE[:3], "--config_file", str(configuration), "--num_processes", "2", "--mixed_precision", "no"]
    spread += ["--main_process_port", "0", "--module", "tests.cpus_as_accelerators"]

    truth, weights = run([sys.executable, train_hf.__file__], "one")
    losses, _ = run(spread, "two", use_cpu=None, per_device_train_batch_size=2)
    assert losses == pytest.approx(truth, abs=1e-4) and len(truth) == 10
    checkpoint = tmp_path / "two" / "checkpoint-3"
    losses, ended = run(spread, "again", use_cpu=None, per_device_train_batch_size=2, resume_from_checkpoint=checkpoint)
    assert losses == pytest.approx(truth, abs=1e-4)
    assert ended.keys() == weights.keys()
    assert all(torch.allclose(ended[name], weight, atol=2e-3) for name, weight in weights.items())
