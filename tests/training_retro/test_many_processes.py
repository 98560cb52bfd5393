"""A run in two processes has the losses of one: plain, with FSDP, and with DeepSpeed.

FSDP and DeepSpeed spread weights over accelerators; `cpus_as_accelerators` puts CPUs in their
place.
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
from ..support.processes import ACCELERATE, Forked, ranks
from ..support.runs import OVERRIDES, flags, knowledge_base

ROOT = Path(train_hf.__file__).parent
PLAIN = OVERRIDES.replace("embd_pdrop: 0.0", "embd_pdrop: 0.0, attn_pdrop: 0.0, resid_pdrop: 0.0")
COPYING = PLAIN.replace("embd_pdrop: 0.0", "copy_head: true, cca_match: true, embd_pdrop: 0.0")
DEEPSPEED = ("deepspeed", "einops", "hjson", "msgpack", "ninja", "nvidia-ml-py", "py-cpuinfo")


@pytest.fixture(scope="module")
def deepspeed():
    """Return a folder with DeepSpeed. It is apart: transformers behaves differently with it."""

    def make(folder):
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder)]
        # No dependencies and no isolated build: torch is installed already, and its default wheel
        # is large.
        subprocess.run([*pip, "--no-deps", "--no-build-isolation", *DEEPSPEED], check=True)

    return made_once(ROOT / ".venv-deepspeed", make)


def result(folder):
    """Return the losses of a run and of its evaluations, and its weights."""
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    losses = [entry[key] for entry in log for key in ("loss", "eval_loss", "eval_off_loss") if key in entry]
    return losses, RetroForCausalLM.from_pretrained(folder).state_dict()


def arguments_of(world, tokenizer_folder, folder, **changes):
    settings = {"config_overrides": COPYING, "neighbor_shuffle": 0, "save_strategy": "steps", "save_steps": 3}
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
def test_spread_weights_train_evaluate_and_resume_as_one_process(
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


def test_two_processes_have_the_losses_of_one(world, tokenizer_folder, tmp_path):
    def settings(name, size):
        changes = {"per_device_train_batch_size": size, "config_overrides": PLAIN, **knowledge_base(world)}
        return flags(world, tokenizer_folder, tmp_path / name, **changes)

    def results(name):
        state = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        evaluation = json.loads((tmp_path / name / "eval_results.json").read_text())
        return [entry["loss"] for entry in state if "loss" in entry], evaluation

    alone = Forked(tmp_path / "log", train_hf.main, settings("one", 4))
    command = [*ACCELERATE, train_hf.__file__, *settings("two", 2)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert alone.wait() == 0, alone.output[-3000:]
    (one, one_eval), (two, two_eval) = results("one"), results("two")
    assert one == pytest.approx(two, abs=1e-4) and len(one) == 6
    for name in ("eval_loss", "eval_off_loss", "eval_bits_per_byte"):
        assert one_eval[name] == pytest.approx(two_eval[name], abs=1e-4)


def test_a_rank_that_fails_ends_with_its_message(world, tokenizer_folder, tmp_path):
    arguments = flags(world, tokenizer_folder, tmp_path / "run", block_size=65, **knowledge_base(world))
    for process in ranks(tmp_path, 2, train_hf.main, arguments):
        assert process.wait() != 0 and "block_size is 65; it must be from 8" in process.output
