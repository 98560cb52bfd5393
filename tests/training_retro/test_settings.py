"""A run reads its settings from flags and YAML, and refuses wrong ones before it packs any text."""

import json
from pathlib import Path

import pytest
import yaml

import train_hf
import training_retro

from ..support.runs import OVERRIDES, flags, knowledge_base, yaml_flags
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
        ({"neighbor_dropout": 1.5}, "neighbor_dropout is 1.5. It is a share"),
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
        (
            {"benchmarks": "HellaSwag", "benchmark_data": "no/such/folder"},
            "The folder 'no/such/folder' does not exist|DeepEval",
        ),
        ({"benchmarks": "HellaSwag"}, "eval_strategy is 'no'"),
        ({"benchmarks": "HellaSwag", "benchmark_scoring": "guess"}, "one_token"),
        ({"eval_strategy": "steps", "eval_steps": 1, "validation_data": None}, "validation_data is empty"),
        ({"eval_only": True, "validation_data": None}, "eval_only measures a model on validation_data, which is empty"),
        ({"eval_only": True, "push_to_hub": True}, "only measures, but push_to_hub is set"),
        ({"train_data": None}, "train_data is empty"),
        ({"train_data": [{"dataset": "train", "initially_skip": 2}]}, "this text is packed once"),
        ({"remove_unused_columns": True}, "Leave it False"),
        ({"prefetch_batches": -1}, "prefetch_batches is -1"),
        ({"precompute_to": "new"}, "Give a knowledge_base"),
        ({"precomputed": "stored"}, "Both train_data and precomputed"),
        (
            {"streaming": True, "max_steps": 4, "precompute_to": "new", "knowledge_base": "kb.db"},
            "Use only one of them",
        ),
        ({"lora": {"r": 8}, "freeze_backbone": True, "knowledge_base": "kb.db"}, "lora and freeze_backbone both"),
        ({"device_peak_tflops": 0}, "device_peak_tflops is 0"),
        ({"knowledge_base": "kb.db", "per_device_eval_batch_size": 1}, "per_device_eval_batch_size is 1"),
        ({"no_such_setting": 1}, "no_such_setting"),
        ({"block_size": 65}, "block_size is 65"),
        ({"knowledge_base": "missing.db"}, "missing.db"),
        ({"config_overrides": "{chunk_sise: 8}"}, "did you mean chunk_size"),
        ({"tokenizer_name": None}, "tokenizer_name"),
        ({"freeze_backbone": True}, "Give one, or leave freeze_backbone out"),
    ],
)
def test_wrong_settings_are_refused_first(world, tokenizer_folder, tmp_path, settings, message, capsys, monkeypatch):
    """They are refused before anything is packed, which may take hours."""
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda _: None)  # before the Hub is asked again
    monkeypatch.setattr("training_retro.assembly.pack_streams", None)
    monkeypatch.chdir(world)
    (world / "rows.jsonl").write_text('{"text": "some text"}\n')
    given = dict.fromkeys(settings)
    arguments = flags(world, tokenizer_folder, tmp_path / "run", **given)
    with pytest.raises(SystemExit) as caught:
        train_hf.main(yaml_flags(tmp_path / "config.yaml", arguments, **settings))
    text = f"{caught.value} {capsys.readouterr().err}"
    assert any(part in text for part in message.split("|")), text


def test_numbers_that_yaml_reads_as_text_are_numbers(world, tokenizer_folder, tmp_path):
    (tmp_path / "config.yaml").write_text(
        "lr_scheduler_kwargs: {min_lr: 6e-5}\nadam_epsilon: 1e-9\nconfig_overrides: {layer_norm_epsilon: 1e-6}\n"
        f"train_data: [{{dataset: {world / 'train'}, weight: 1e-1}}]\n"
    )
    given = {"train_data": None, "config_overrides": None}
    arguments = [str(tmp_path / "config.yaml"), *flags(world, tokenizer_folder, tmp_path / "run", **given)]
    model, data, training = training_retro.parse_arguments(arguments)
    assert training.lr_scheduler_kwargs == {"min_lr": 6e-5} and training.adam_epsilon == 1e-9
    assert model.config_overrides == {"layer_norm_epsilon": 1e-6} and data.streams("train_data")[0].weight == 0.1


def test_a_yaml_file_gives_the_same_settings_as_flags(world, tokenizer_folder, tmp_path):
    arguments = flags(world, tokenizer_folder, tmp_path / "run")
    settings = dict(zip([name[2:] for name in arguments[::2]], arguments[1::2], strict=True))
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(settings))  # JSON is YAML
    assert [str(a) for a in training_retro.parse_arguments([str(file)])][:2] == [
        str(a) for a in training_retro.parse_arguments(arguments)
    ][:2]
    overridden = training_retro.parse_arguments([str(file), "--max_steps", "9"])
    assert overridden[2].max_steps == 9 and overridden[2].learning_rate == 5e-3


def test_a_knowledge_base_of_another_chunk_size_is_refused(world, tokenizer_folder, tmp_path):
    arguments = flags(
        world,
        tokenizer_folder,
        tmp_path / "run",
        config_overrides=OVERRIDES.replace(f"chunk_size: {CHUNK}", "chunk_size: 4, neighbor_length: 16"),
        **knowledge_base(world),
    )
    with pytest.raises(SystemExit, match=f"chunk_size is 4 in the model and {CHUNK}"):
        train_hf.main(arguments)


@pytest.mark.parametrize("name", ["ddp", "fsdp", "zero2", "zero3"])
def test_an_accelerate_configuration_is_read(name):
    from accelerate.commands.config.config_args import load_config_from_file

    file = Path(train_hf.__file__).parent / "examples" / "accelerate" / f"{name}_8_gpus.yaml"
    config = load_config_from_file(str(file))
    assert config.num_processes == 8 and config.mixed_precision == "bf16"
    if name == "fsdp":
        assert config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"] == "RetroBlock,RetroEncoderLayer"


@pytest.mark.parametrize("name", ["train_local", "train_openwebtext", "train_mixture"])
def test_an_example_configuration_is_read(name, tmp_path):
    example = Path(train_hf.__file__).parent / "examples" / f"{name}.yaml"
    arguments = [str(example), "--output_dir", str(tmp_path), "--bf16", "false"]  # there may be no GPU here
    model, data, training = training_retro.parse_arguments(arguments)
    if name == "train_local":
        assert model.config_overrides["cca_layers"] == [2, 5] and data.train_data == ["texts/train"]
        assert training.learning_rate == 6e-4
    assert training.output_dir == str(tmp_path)
    assert data.streams("train_data") and data.streams("validation_data") and training.save_total_limit == 2


TWINS = Path(train_hf.__file__).parent / "examples" / "twins"
KNOWLEDGE_BASE = {"knowledge_base", "collection_name"}
START = {"model_name_or_path", "tokenizer_name", "config_overrides"}
RATES = {"learning_rate", "lr_scheduler_kwargs", "warmup_steps"}


@pytest.mark.parametrize(
    "one, other, must_differ",
    [
        ("on_from_scratch", "off_from_scratch", KNOWLEDGE_BASE),
        ("on_from_gpt2", "off_from_gpt2", KNOWLEDGE_BASE),
        ("on_from_scratch", "on_from_gpt2", START | RATES),
        ("off_from_scratch", "off_from_gpt2", START | RATES),
    ],
)
def test_twins_differ_only_in_what_must_differ(one, other, must_differ):
    settings = [yaml.safe_load((TWINS / f"retro_{name}.yaml").read_text()) for name in (one, other)]
    names = {name for name in settings[0] | settings[1] if settings[0].get(name) != settings[1].get(name)}
    assert names == must_differ | {"output_dir"}


@pytest.mark.parametrize("file", sorted(TWINS.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_twin_is_read(file, tmp_path):
    arguments = [str(file), "--output_dir", str(tmp_path), "--bf16", "false"]  # there may be no GPU here
    model, data, training = training_retro.parse_arguments(arguments)
    assert data.has_neighbors == ("_on_" in file.stem)
    assert (model.model_name_or_path == "gpt2") == file.stem.endswith("from_gpt2")
    assert yaml.safe_load(file.read_text())["output_dir"] == f"runs/{file.stem}"
    assert training.warmup_steps in (0, 2000) and training.lr_scheduler_kwargs["min_lr"] in (6e-5, 6e-6)
