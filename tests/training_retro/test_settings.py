"""Settings and data that a run must take, or refuse with a clear word before it works: files, YAML, odd texts, examples."""

import json
import math
import shutil
from pathlib import Path

import datasets
import pytest
import torch

import train_hf
import training_retro

from ..support.runs import flags, knowledge_base, losses, train, yaml_flags
from ..support.training_world import CHUNK


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"train_data": [{"dataset": "train", "wieght": 1}]}, "did you mean weight"),
        ({"train_data": [{"dataset": "train", "weight": 0}]}, "sum to zero"),
        ({"train_data": [{"dataset": "rows.jsonl", "text_field": "body"}]}, "has no field 'body'; it has 'text'"),
        ({"precompute_to": "rows.jsonl"}, "rows.jsonl exists already"),
        ({"train_data": [7]}, "7 is neither a name nor a mapping"),
        ({"streaming": True, "max_steps": -1}, "streaming has no end: set max_steps"),
        ({"neighbor_dropout": 1.5}, "neighbor_dropout is a share"),
        ({"benchmarks": ["NoSuchBench"], "eval_strategy": "steps", "eval_steps": 1}, "NoSuchBench|DeepEval"),
        ({"lora": {"rr": 8}}, "rr"),
        ({"lora": {"target_modules": ["no_such"]}}, "no_such"),
        ({"validation_data": ["no/such/file.txt"]}, "Cannot load 'no/such/file.txt': no such file"),
        ({"train_data": ["train", {"dataset": "rows.jsonl", "text_field": "body"}]}, "has no field 'body'"),
        ({"train_data": "no/such/file.txt", "streaming": True}, "Cannot load 'no/such/file.txt': no such file"),
        (
            {"train_data": [{"dataset": "rows.jsonl", "filter": {"lang": "EN"}}]},
            "gives no document that passes its filter",
        ),
        ({"train_data": [{"dataset": "rows.jsonl", "filter": {"text": {">": 3}}}]}, "'some text' cannot be compared"),
        ({"train_data": [{"dataset": "rows.jsonl", "filter": "math:pi"}]}, "is no function, but 3.14"),
        ({"config_overrides": {"n_layer": "six"}}, "Field 'n_layer' expected int"),
        ({"streaming": True, "dataloader_num_workers": 2}, "dataloader_num_workers is 2: a stream"),
        ({"benchmarks": "HellaSwag", "benchmark_data": "no/such/folder"}, "no folder 'no/such/folder'|DeepEval"),
    ],
)
def test_bad_settings_are_named_first(world, tokenizer_folder, tmp_path, settings, message, capsys, monkeypatch):
    """Before anything is packed, which may take hours."""
    monkeypatch.setattr("training_retro.assembly.pack_streams", None)
    monkeypatch.chdir(world)
    (world / "rows.jsonl").write_text('{"text": "some text"}\n')
    given = dict.fromkeys(settings)
    arguments = flags(world, tokenizer_folder, tmp_path / "run", **given)
    with pytest.raises(SystemExit) as caught:
        train_hf.main(yaml_flags(tmp_path / "config.yaml", arguments, **settings))
    text = f"{caught.value} {capsys.readouterr().err}"
    assert any(part in text for part in message.split("|")), text


def test_what_yaml_reads_as_text_is_a_number(world, tokenizer_folder, tmp_path):
    (tmp_path / "config.yaml").write_text(
        "lr_scheduler_kwargs: {min_lr: 6e-5}\nadam_epsilon: 1e-9\nconfig_overrides: {layer_norm_epsilon: 1e-6}\n"
        f"train_data: [{{dataset: {world / 'train'}, weight: 1e-1}}]\n"
    )
    given = {"train_data": None, "config_overrides": None}
    arguments = [str(tmp_path / "config.yaml"), *flags(world, tokenizer_folder, tmp_path / "run", **given)]
    model, data, training = training_retro.parse_arguments(arguments)
    assert training.lr_scheduler_kwargs == {"min_lr": 6e-5} and training.adam_epsilon == 1e-9
    assert model.config_overrides == {"layer_norm_epsilon": 1e-6} and data.streams("train_data")[0].weight == 0.1


@pytest.mark.parametrize("streaming", [False, True])
def test_text_that_the_knowledge_base_has_under_other_ids_is_named(
    world, tokenizer_folder, tmp_path, streaming, caplog
):
    copy = tmp_path / "renamed"
    shutil.copytree(world / "train", copy)
    for folder, named in ((world / "train", False), (copy, True)):
        caplog.clear()
        changes = {"train_data": folder, "streaming": streaming, **knowledge_base(world)}
        arguments = training_retro.parse_arguments(flags(world, tokenizer_folder, tmp_path / "run", **changes))
        trainer = training_retro.build_trainer(*arguments, tmp_path / f"c{named}")
        trainer.model.retriever.close()
        assert ("the knowledge base has the text of" in caplog.text) == named
        assert ("'renamed/0.txt' in a document of another id, 'train/0.txt'" in caplog.text) == named


def test_batches_without_a_whole_chunk(world, tokenizer_folder, tmp_path):
    """Alone in a batch, in training and evaluation."""
    (tmp_path / "short.txt").write_text("ab")
    arguments = flags(
        world,
        tokenizer_folder,
        tmp_path / "run",
        train_data=tmp_path / "short.txt",
        validation_data=tmp_path / "short.txt",
        freeze_backbone="true",
        gradient_checkpointing="true",
        max_steps=2,
        **knowledge_base(world),
    )
    trainer = train(arguments, tmp_path / "c")
    assert {len(row["input_ids"]) < CHUNK for row in trainer.train_dataset} == {True}
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    with pytest.raises(SystemExit, match="block_size is 7; it must be from 8"):
        train_hf.main([*arguments, "--block_size", "7"])


def test_documents_shorter_than_a_chunk_and_blocks_with_a_partial_one(world, tokenizer_folder, tmp_path):
    (tmp_path / "short.jsonl").write_text("\n".join(json.dumps({"text": "ab"}) for _ in range(40)))
    trainer = train(
        flags(
            world,
            tokenizer_folder,
            tmp_path / "run",
            train_data=tmp_path / "short.jsonl",
            block_size=27,
            **knowledge_base(world),
        ),
        tmp_path / "c",
    )
    assert isinstance(trainer.train_dataset, datasets.Dataset) and len(trainer.train_dataset[0]["input_ids"]) == 27
    assert all(torch.isfinite(torch.tensor(losses(trainer))))


@pytest.mark.parametrize("name", ["ddp", "fsdp", "zero2", "zero3"])
def test_accelerate_configurations_are_read(name):
    from accelerate.commands.config.config_args import load_config_from_file

    file = Path(train_hf.__file__).parent / "examples" / "accelerate" / f"{name}_8_gpus.yaml"
    config = load_config_from_file(str(file))
    assert config.num_processes == 8 and config.mixed_precision == "bf16"
    if name == "fsdp":
        assert config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"] == "RetroBlock,RetroEncoderLayer"


@pytest.mark.parametrize("name", ["train_local", "train_openwebtext", "train_mixture"])
def test_example_configurations_are_read(name, tmp_path):
    example = Path(train_hf.__file__).parent / "examples" / f"{name}.yaml"
    arguments = [str(example), "--output_dir", str(tmp_path), "--bf16", "false"]  # here may be no GPU
    _, data, training = training_retro.parse_arguments(arguments)
    assert data.streams("train_data") and data.streams("validation_data") and training.save_total_limit == 2
