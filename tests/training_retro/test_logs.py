"""The log, TensorBoard and Weights & Biases show a run's numbers."""

import pytest

from ..support.runs import flags, knowledge_base, train


def test_the_log_has_retrieval_and_speed(world, tokenizer_folder, tmp_path):
    trainer = train(
        flags(world, tokenizer_folder, tmp_path, device_peak_tflops=0.1, **knowledge_base(world)), tmp_path / "c"
    )
    first = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert 0 < first["chunks_with_neighbors"] <= 1 and -1 <= first["mean_similarity"] <= 1
    assert first["tokens_per_second"] > 0 and 0 <= first["retrieval_wait"] <= 1
    assert 0 < first["model_flops_utilization"] < 1
    sizes = [parameter.numel() for parameter in trainer.model.parameters()]
    assert (first["parameters_trained"], first["parameters_frozen"]) == (sum(sizes), 0)


# What a run shows beyond Trainer's own numbers.
TRAINING = {"tokens_per_second", "retrieval_wait", "chunks_with_neighbors", "mean_similarity", "parameters_frozen"}
EVALUATION = {"bits_per_byte", "off_bits_per_byte", "shuffled_bits_per_byte", "copy_baseline_bits_per_byte"}


@pytest.mark.parametrize("where", ["tensorboard", "wandb"])
def test_reports_show_the_numbers_of_the_log(world, tokenizer_folder, tmp_path, where, monkeypatch):
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
