"""Runs that are stopped, killed or out of disk continue exactly from their last checkpoint."""

import json
import resource
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

import train_hf
import training_retro
from modeling_retro import RetroForCausalLM

from ..support.processes import Forked, ranks
from ..support.runs import OVERRIDES, flags, knowledge_base, train, yaml_flags
from ..support.training_world import CHUNK


def mixture(world):
    """Return two weighted sources, one of them shuffled; only YAML can express them."""
    return [
        {"dataset": str(world / "train"), "weight": 2, "shuffle_buffer": 4, "seed": 1},
        {"dataset": str(world / "held_out"), "weight": 1},
    ]


class TestResume:
    """A run of 12 steps that is stopped and resumed equals one that never stops."""

    def run(self, world, tokenizer_folder, folder, streaming, processes=1, **changes):
        # A copy head reads similarities. Their last bits depend on what else is searched for, so no
        # search is cached.
        settings = {"neighbor_cache_size": 0} if streaming else {}
        settings |= {
            "max_steps": 12,
            "save_strategy": "steps",
            "save_steps": 1,
            "per_device_train_batch_size": 4 // processes,
        }
        settings |= {"lr_scheduler_type": "constant", "neighbor_dropout": 0.2, "gradient_accumulation_steps": 2}
        settings |= {"random_first_point": "true"}
        settings |= {"streaming": str(streaming).lower(), "train_data": None, **knowledge_base(world), **changes}
        overrides = OVERRIDES.replace(
            "embd_pdrop: 0.0", f"embd_pdrop: 0.1, copy_head: {str(streaming).lower()}, cca_match: true"
        )
        arguments = flags(world, tokenizer_folder, folder, config_overrides=overrides, validation_data=None, **settings)
        arguments = yaml_flags(folder.with_suffix(".yaml"), arguments, train_data=mixture(world))
        logs = folder.with_name(f"{folder.name}-logs")
        logs.mkdir(exist_ok=True)
        if processes == 1:
            return [Forked(logs / "log", train_hf.main, arguments)]
        return ranks(logs, processes, train_hf.main, arguments)

    def end(self, processes):
        for process in processes:
            assert process.wait() == 0, process.output[-3000:]

    def losses(self, folder):
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        return [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in history if "loss" in entry]

    @pytest.mark.parametrize(
        "streaming, processes, sign",
        [
            (True, 1, signal.SIGTERM),
            (False, 1, signal.SIGKILL),
            (True, 2, signal.SIGKILL),
            (False, 2, signal.SIGTERM),
        ],
    )
    def test_a_stopped_run_resumes_exactly(self, world, tokenizer_folder, tmp_path, streaming, processes, sign):
        sizes = {"streaming": streaming, "processes": processes}
        whole, parts = tmp_path / "whole", tmp_path / "parts"
        self.end(self.run(world, tokenizer_folder, whole, **sizes, save_strategy="no"))
        stopped = self.run(world, tokenizer_folder, parts, **sizes, max_steps=10_000)  # more steps than it will make
        while not (parts / "checkpoint-3" / "trainer_state.json").exists():
            assert all(process.is_alive() for process in stopped), stopped[0].output[-3000:]
            time.sleep(0.02)
        if sign == signal.SIGTERM:
            stopped[-1].send_signal(sign)  # one process gets the signal, and all end
        else:  # all at once, as when a machine fails
            for process in stopped:
                process.kill()
        for process in stopped:
            assert process.wait() == (0 if sign == signal.SIGTERM else -sign), process.output[-3000:]
        assert not (parts / "model.safetensors").exists()  # no final model of a stopped run
        last = max(int(folder.name.rpartition("-")[2]) for folder in parts.glob("checkpoint-*"))
        for resumed_from in sorted({2, min(last, 8)}):  # within an epoch, and mostly across two
            again = tmp_path / f"again{resumed_from}"
            checkpoint = parts / f"checkpoint-{resumed_from}"
            assert RetroForCausalLM.from_pretrained(checkpoint).config.chunk_size == CHUNK
            self.end(
                self.run(world, tokenizer_folder, again, **sizes, resume_from_checkpoint=checkpoint, save_strategy="no")
            )
            state = json.loads((again / "trainer_state.json").read_text())
            assert state["global_step"] == 12
            assert self.losses(again)[resumed_from:] == self.losses(whole)[resumed_from:]
            weights = load_file(whole / "model.safetensors")
            assert all(
                torch.equal(weights[name], weight) for name, weight in load_file(again / "model.safetensors").items()
            )


def test_a_full_disk_leaves_the_last_checkpoint_whole(world, tokenizer_folder, tmp_path, monkeypatch):
    arguments = flags(world, tokenizer_folder, tmp_path / "run", save_strategy="steps", save_steps=2)
    trainer = training_retro.build_trainer(*training_retro.parse_arguments(arguments), tmp_path / "c")
    saved = trainer._save_optimizer_and_scheduler

    def full(folder):
        if folder.endswith("-4"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, unlimited))  # bytes of a file
        saved(folder)

    _, unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", full)
    try:
        with pytest.raises(
            OSError, match="Could not write the checkpoint .*checkpoint-4 .*earlier checkpoints are complete"
        ) as caught:
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, unlimited))
    assert isinstance(caught.value.__cause__, RuntimeError)  # torch's error, which does not mention disks
    assert [folder.name for folder in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    monkeypatch.undo()
    resumed = train([*arguments, "--resume_from_checkpoint", "true"], tmp_path / "c2")
    assert resumed.state.global_step == 6


def test_a_half_written_checkpoint_is_skipped(world, tokenizer_folder, tmp_path, capsys):
    arguments = flags(world, tokenizer_folder, tmp_path / "run", save_strategy="steps", save_steps=2, max_steps=4)
    train(arguments, tmp_path / "c")
    (tmp_path / "run" / "checkpoint-9").mkdir()
    (tmp_path / "run" / "checkpoint-9" / "model.safetensors").write_bytes(b"half")
    (tmp_path / "run" / "checkpoint-10").mkdir()
    (tmp_path / "run" / "checkpoint-10" / "trainer_state.json").write_text('{"global_step": 10, "log_his')
    _, _, training = training_retro.parse_arguments([*arguments, "--resume_from_checkpoint", "true"])
    assert training.resume_from_checkpoint.endswith("checkpoint-4")
    with pytest.raises(SystemExit):
        training_retro.parse_arguments([*arguments, "--resume_from_checkpoint", "true", "--eval_only", "true"])
    assert "name its folder in model_name_or_path" in capsys.readouterr().err
