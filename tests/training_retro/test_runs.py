"""Training runs as a team has them: read ahead, precomputed, streamed, stopped and resumed, in several processes."""

import json
import resource
import signal
import subprocess
import threading
import time
from types import SimpleNamespace

import pytest
import torch

import train_hf
import training_retro.trainer
from data_retro.packing import PackedStream

from ..support.processes import ACCELERATE, Forked, ranks
from ..support.runs import OVERRIDES, flags, knowledge_base, losses, train, yaml_flags
from ..support.training_world import CHUNK

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="fp16 needs a GPU")


def mixture(world):
    """Two weighted sources with shuffles, as only YAML can say it."""
    return [
        {"dataset": str(world / "train"), "weight": 2, "shuffle_buffer": 4, "seed": 1},
        {"dataset": str(world / "held_out"), "weight": 1},
    ]


def weights_of(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


class TestNeighborsAhead:
    def test_reading_ahead_changes_no_loss(self, world, tokenizer_folder, tmp_path):
        changes = {"neighbor_dropout": 0.3, "gradient_accumulation_steps": 2, **knowledge_base(world)}
        overrides = {"config_overrides": OVERRIDES.replace("embd_pdrop: 0.0", "embd_pdrop: 0.1")}
        runs = [
            train(
                flags(world, tokenizer_folder, tmp_path / "run", prefetch_batches=n, **overrides, **changes),
                tmp_path / f"{n}",
            )
            for n in (0, 3)
        ]
        assert losses(runs[0]) == losses(runs[1])

    def test_precomputed_neighbors_give_the_same_run_without_a_knowledge_base(self, world, tokenizer_folder, tmp_path):
        train_hf.main(
            flags(world, tokenizer_folder, tmp_path / "run", precompute_to=tmp_path / "stored", **knowledge_base(world))
        )
        given = {"train_data": None, "validation_data": None, "precomputed": tmp_path / "stored"}

        def batches(**changes):
            arguments = training_retro.parse_arguments(flags(world, tokenizer_folder, tmp_path / "run", **changes))
            trainer = training_retro.build_trainer(*arguments, tmp_path / "c")
            seen = [*trainer.get_train_dataloader(), *trainer.get_eval_dataloader()]
            if trainer.model.retriever is not None:
                trainer.model.retriever.close()
            return seen

        fetched, stored_batches = batches(**knowledge_base(world)), batches(**given)
        assert len(fetched) == len(stored_batches) > 20
        for one, other in zip(fetched, stored_batches, strict=True):
            assert one.keys() == other.keys()
            # Milvus computes a similarity with other instructions when it is asked for one chunk than for several
            torch.testing.assert_close(one.pop("neighbor_scores"), other.pop("neighbor_scores"), atol=1e-6, rtol=0)
            assert [name for name in one if not torch.equal(one[name], other[name])] == []
        stored = train(flags(world, tokenizer_folder, tmp_path / "run", **given), tmp_path / "c")
        while_training = train(
            flags(world, tokenizer_folder, tmp_path / "run", **knowledge_base(world)), tmp_path / "c2"
        )
        for one, other in zip(stored.state.log_history, while_training.state.log_history, strict=True):
            for name in ("chunks_with_neighbors", "mean_similarity"):
                assert one.get(name) == pytest.approx(other.get(name), abs=1e-5) and (name in one) == ("loss" in one)
        assert losses(stored)[-1] < losses(stored)[0] and stored.model.config.collection_name == "texts"
        row = stored.train_dataset[0]
        assert torch.tensor(row["neighbor_ids"]).shape == (len(row["input_ids"]) // CHUNK, 2, 2 * CHUNK)
        with pytest.raises(SystemExit, match="block_size 64, this run has 32"):
            train_hf.main(flags(world, tokenizer_folder, tmp_path / "run", block_size=32, **given))
        with pytest.raises(SystemExit, match="holds no precomputed neighbors"):
            train_hf.main(flags(world, tokenizer_folder, tmp_path / "run", **{**given, "precomputed": world}))

    def test_all_batches_of_the_next_update_are_made_meanwhile(self, world, tokenizer_folder, tmp_path):
        changes = {
            "gradient_accumulation_steps": 6,
            "prefetch_batches": 2,
            "per_device_train_batch_size": 1,
            "max_steps": 2,
        }
        arguments = flags(world, tokenizer_folder, tmp_path / "run", **changes, **knowledge_base(world))
        trainer = training_retro.build_trainer(*training_retro.parse_arguments(arguments), tmp_path)
        collate, step, made, computed = trainer.data_collator, trainer.training_step, [], []
        all_made = threading.Event()

        def training_step(*args, **kwargs):
            computed.append(1)
            if len(computed) == 1:  # the model is busy with the first update
                assert all_made.wait(600)
            return step(*args, **kwargs)

        def collated(features):
            made.append(1)
            if len(made) == 12:
                all_made.set()
            return collate(features)

        trainer.data_collator = collated
        trainer.training_step = training_step
        trainer.train()
        trainer.model.retriever.close()
        assert len(computed) == 12

    def test_a_search_that_fails_ends_the_run_with_its_cause(self, world, tokenizer_folder, tmp_path):
        trainer = training_retro.build_trainer(
            *training_retro.parse_arguments(flags(world, tokenizer_folder, tmp_path / "run", **knowledge_base(world))),
            tmp_path,
        )
        try:
            trainer.model.retriever._search = lambda queries: 1 / 0
            with pytest.raises(ZeroDivisionError):
                trainer.train()
            assert trainer._batches is None  # and nothing reads on
        finally:
            trainer.model.retriever.close()


class TestRegimes:
    def test_what_retro_adds_has_its_own_learning_rate(self, world, tokenizer_folder, tmp_path):
        trainer = train(
            flags(world, tokenizer_folder, tmp_path, max_steps=1, retro_learning_rate=0.25, **knowledge_base(world)),
            tmp_path,
        )
        rates = {
            name: (group["initial_lr"], group["weight_decay"])
            for group in trainer.optimizer.param_groups
            for name, parameter in trainer.model.named_parameters()
            if any(parameter is other for other in group["params"])
        }
        assert set(rates) == {name for name, _ in trainer.model.named_parameters()}
        for name, parameter in trainer.model.named_parameters():
            added = any(part in name for part in (".cca.", ".ln_cca.", ".encoder."))
            assert rates[name] == (0.25 if added else 5e-3, 0.1 if parameter.ndim > 1 else 0.0), name

    def test_adapters_train_with_what_is_new(self, world, tokenizer_folder, tmp_path):
        """New parts of RETRO end in zeros, through which adapters would get no gradient."""
        settings = {"lora": "{r: 2, target_modules: [c_attn, q_attn]}", **knowledge_base(world)}
        settings["config_overrides"] = OVERRIDES.replace("}", ", copy_head: true}")
        trainer = train(flags(world, tokenizer_folder, tmp_path / "run", **settings), tmp_path / "c")
        trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
        added = ("cca.", "encoder.", "copy_head.")
        assert all("lora_" in name or any(part in name for part in added) for name in trained)
        assert any(p.abs().max() > 0 for name, p in trainer.model.named_parameters() if "lora_B" in name)
        for end in ("copy_head.modules_to_save.default.gate_scale", "cca.modules_to_save.default.c_proj.weight"):
            assert any(name.endswith(end) and p.any() for name, p in trainer.model.named_parameters())
        trainer.save_model(tmp_path / "adapter")
        assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()

        # of a RETRO that has learned to read, adapters alone
        trainer.model.merge_and_unload().save_pretrained(tmp_path / "merged")
        settings |= {"model_name_or_path": tmp_path / "merged", "config_overrides": None}
        again = train(flags(world, tokenizer_folder, tmp_path / "again", **settings), tmp_path / "c2")
        assert all("lora_" in name for name, p in again.model.named_parameters() if p.requires_grad)

    def test_defaults_are_those_of_gpt2s_pretraining(self, world, tokenizer_folder, tmp_path):
        arguments = flags(world, tokenizer_folder, tmp_path, learning_rate=None, max_steps=200)
        _, _, training = training_retro.parse_arguments(arguments)
        assert (training.learning_rate, training.weight_decay, training.adam_beta2) == (6e-4, 0.1, 0.95)
        assert training.max_grad_norm == 1.0 and training.get_warmup_steps(200) == 2
        trainer = train(arguments, tmp_path / "c")
        rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
        assert max(rates) == 6e-4 and abs(rates[-1] - 6e-5) < 1e-6  # cosine to a tenth

    @pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=needs_gpu)])
    def test_half_precision_and_checkpointing(self, world, tokenizer_folder, tmp_path, precision):
        use_cpu = str(precision == "bf16").lower()
        changes = {precision: "true", "use_cpu": use_cpu, "gradient_checkpointing": "true", **knowledge_base(world)}
        trainer = train(flags(world, tokenizer_folder, tmp_path, **changes), tmp_path / "c")
        assert losses(trainer)[-1] < losses(trainer)[0]


class TestResume:
    """Runs of 12 steps that stop and go on, against one that does not stop, in one process and in two."""

    def run(self, world, tokenizer_folder, folder, streaming, processes=1, **changes):
        # A copy head reads similarities, whose last bits depend on what else is searched for: nothing is remembered.
        settings = {"neighbor_cache_size": 0} if streaming else {}
        settings |= {
            "max_steps": 12,
            "save_strategy": "steps",
            "save_steps": 1,
            "per_device_train_batch_size": 4 // processes,
        }
        settings |= {"lr_scheduler_type": "constant", "neighbor_dropout": 0.2, "gradient_accumulation_steps": 2}
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
    def test_stopped_and_resumed(self, world, tokenizer_folder, tmp_path, streaming, processes, sign):
        sizes = {"streaming": streaming, "processes": processes}
        whole, parts = tmp_path / "whole", tmp_path / "parts"
        self.end(self.run(world, tokenizer_folder, whole, **sizes, save_strategy="no"))
        stopped = self.run(world, tokenizer_folder, parts, **sizes, max_steps=10_000)  # it would go on for long
        while not (parts / "checkpoint-3" / "trainer_state.json").exists():
            assert all(process.is_alive() for process in stopped), stopped[0].output[-3000:]
            time.sleep(0.02)
        if sign == signal.SIGTERM:
            stopped[-1].send_signal(sign)  # one is asked, and all end
        else:  # all at once, as a machine goes
            for process in stopped:
                process.kill()
        for process in stopped:
            assert process.wait() == (0 if sign == signal.SIGTERM else -sign), process.output[-3000:]
        assert not (parts / "model.safetensors").exists()  # nor was anything made of half a training
        last = max(int(folder.name.rpartition("-")[2]) for folder in parts.glob("checkpoint-*"))
        for resumed_from in sorted({2, min(last, 8)}):  # within an epoch, and mostly across one
            again = tmp_path / f"again{resumed_from}"
            checkpoint = parts / f"checkpoint-{resumed_from}"
            self.end(
                self.run(world, tokenizer_folder, again, **sizes, resume_from_checkpoint=checkpoint, save_strategy="no")
            )
            state = json.loads((again / "trainer_state.json").read_text())
            assert state["global_step"] == 12
            assert self.losses(again)[resumed_from:] == self.losses(whole)[resumed_from:]
            weights = weights_of(whole)
            assert all(torch.equal(weights[name], weight) for name, weight in weights_of(again).items())


def test_a_stream_goes_on_at_any_sequence(tokenizer):
    from retrieval import BulkTokenizer, Document

    documents = [Document(f"d{i}", f"text {i} " * (i % 5)) for i in range(9)]

    def stream():
        return PackedStream(
            lambda epoch: documents[epoch % 3 :] + documents[: epoch % 3], BulkTokenizer(tokenizer), 16, 8
        )

    whole = []
    for sequence in stream():
        whole.append(sequence)
        if len(whole) == 60:
            break
    for used in (0, 1, 7, 20, 41):
        first = stream()
        ahead = iter(first)
        for _ in range(used + 3):  # read further than was used
            next(ahead)
        state = json.loads(json.dumps(first.state_after(used)))
        second = stream()
        second.load_state(state)
        assert [sequence for sequence, _ in zip(second, range(10), strict=False)] == whole[used : used + 10]


class TestManyProcesses:
    def test_two_processes_have_the_losses_of_one(self, world, tokenizer_folder, tmp_path):
        plain = OVERRIDES.replace("embd_pdrop: 0.0", "embd_pdrop: 0.0, attn_pdrop: 0.0, resid_pdrop: 0.0")

        def settings(name, size):
            changes = {"per_device_train_batch_size": size, "config_overrides": plain, **knowledge_base(world)}
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

    def test_a_rank_that_fails_ends_with_its_message(self, world, tokenizer_folder, tmp_path):
        arguments = flags(world, tokenizer_folder, tmp_path / "run", block_size=65, **knowledge_base(world))
        for process in ranks(tmp_path, 2, train_hf.main, arguments):
            assert process.wait() != 0 and "block_size is 65; it must be from 8" in process.output


def test_a_disk_that_fills_leaves_the_last_checkpoint_whole(world, tokenizer_folder, tmp_path, monkeypatch):
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
        with pytest.raises(OSError, match="checkpoint-4 could not be written .*earlier ones are whole") as caught:
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, unlimited))
    assert isinstance(caught.value.__cause__, RuntimeError)  # torch's, which says nothing of disks
    assert [folder.name for folder in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    monkeypatch.undo()
    resumed = train([*arguments, "--resume_from_checkpoint", "true"], tmp_path / "c2")
    assert resumed.state.global_step == 6


def test_a_half_written_checkpoint_is_passed_over(world, tokenizer_folder, tmp_path):
    arguments = flags(world, tokenizer_folder, tmp_path / "run", save_strategy="steps", save_steps=2, max_steps=4)
    train(arguments, tmp_path / "c")
    (tmp_path / "run" / "checkpoint-9").mkdir()
    (tmp_path / "run" / "checkpoint-9" / "model.safetensors").write_bytes(b"half")
    (tmp_path / "run" / "checkpoint-10").mkdir()
    (tmp_path / "run" / "checkpoint-10" / "trainer_state.json").write_text('{"global_step": 10, "log_his')
    _, _, training = training_retro.parse_arguments([*arguments, "--resume_from_checkpoint", "true"])
    assert training.resume_from_checkpoint.endswith("checkpoint-4")


def test_the_log_tells_of_retrieval_and_speed(world, tokenizer_folder, tmp_path):
    trainer = train(
        flags(world, tokenizer_folder, tmp_path, device_peak_tflops=0.1, **knowledge_base(world)), tmp_path / "c"
    )
    first = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert 0 < first["chunks_with_neighbors"] <= 1 and -1 <= first["mean_similarity"] <= 1
    assert first["tokens_per_second"] > 0 and 0 <= first["retrieval_wait"] <= 1
    assert 0 < first["model_flops_utilization"] < 1
    sizes = [parameter.numel() for parameter in trainer.model.parameters()]
    assert (first["parameters_trained"], first["parameters_frozen"]) == (sum(sizes), 0)


# what a run shows, but for what Trainer shows of every run
TRAINING = {"tokens_per_second", "retrieval_wait", "chunks_with_neighbors", "mean_similarity", "parameters_frozen"}
EVALUATION = {"bits_per_byte", "off_bits_per_byte", "shuffled_bits_per_byte", "copy_baseline_bits_per_byte"}


@pytest.mark.parametrize("where", ["tensorboard", "wandb"])
def test_reports_hold_what_the_log_holds(world, tokenizer_folder, tmp_path, where, monkeypatch):
    for name, value in {"TENSORBOARD_LOGGING_DIR": tmp_path / "board", "WANDB_MODE": "offline"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    changes = {"report_to": where, "eval_strategy": "steps", "eval_steps": 3, "freeze_backbone": "true"}
    trainer = train(
        flags(world, tokenizer_folder, tmp_path / "run", **changes, **knowledge_base(world)), tmp_path / "c"
    )
    logs = trainer.state.log_history
    if where == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        board = EventAccumulator(str(next((tmp_path / "board").rglob("events.*")).parent)).Reload()
        shown = {tag: board.Scalars(tag)[-1].value for tag in board.Tags()["scalars"]}
    else:
        import wandb

        shown = dict(wandb.run.summary)
        wandb.finish()
    assert {f"train/{name}" for name in TRAINING} | {f"eval/{name}" for name in EVALUATION} <= shown.keys()
    for part, prefix, names in (("train", "", TRAINING), ("eval", "eval_", EVALUATION)):
        for name in names:
            truth = [entry[prefix + name] for entry in logs if prefix + name in entry][-1]
            assert shown[f"{part}/{name}"] == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize(("search", "step", "share"), [(3, 1, 0.75), (1, 3, 0.25)])
def test_a_retriever_that_is_too_slow_is_named(
    world, tokenizer_folder, tmp_path, caplog, monkeypatch, search, step, share
):
    """By a clock that only a batch's search and a training step move."""
    now = [0.0]
    for module in (training_retro.trainer, training_retro.progress):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def taking(seconds, call):
        def timed(*args, **kwargs):
            now[0] += seconds
            return call(*args, **kwargs)

        return timed

    settings = {"prefetch_batches": 0, **knowledge_base(world)}
    arguments = training_retro.parse_arguments(flags(world, tokenizer_folder, tmp_path, **settings))
    trainer = training_retro.build_trainer(*arguments, tmp_path / "c")
    trainer.data_collator = taking(search, trainer.data_collator)
    trainer.training_step = taking(step, trainer.training_step)
    with caplog.at_level("INFO"):
        trainer.train()
    trainer.model.retriever.close()
    assert trainer.state.log_history[3]["retrieval_wait"] == share
    assert ("Retrieval is the limit: 75 %" in caplog.text) == (share == 0.75)
