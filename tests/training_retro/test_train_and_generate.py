"""train_hf.py and generate_hf.py as their users run them, on a real Milvus Lite file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import generate_hf
import train_hf
import training_retro
from modeling_retro import RetroForCausalLM

from ..support.hub import Hub
from ..support.runs import OVERRIDES, flags, knowledge_base, losses, train
from ..support.training_world import CHUNK


def test_from_scratch_with_a_knowledge_base_learns_reports_and_saves(world, tokenizer_folder, tmp_path, capsys):
    arguments = flags(world, tokenizer_folder, tmp_path / "run", max_steps=20, **knowledge_base(world))
    train_hf.main(arguments)
    metrics = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    assert {"eval_bits_per_byte", "eval_off_bits_per_byte", "eval_shuffled_bits_per_byte"} <= set(metrics)
    assert "eval_gain_over_shuffled_stderr" in metrics
    model = RetroForCausalLM.from_pretrained(tmp_path / "run")
    assert model.config.collection_name == "texts" and model.config.embedding_model.endswith("/embedding")
    saved = (tmp_path / "run" / "config.json").read_text()
    assert "kb.db" not in saved and str(world) not in saved
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    seen = [entry["loss"] for entry in history if "loss" in entry]
    assert seen[-1] < seen[0] - 0.5


def test_no_token_is_written_and_matrices_alone_decay(world, tokenizer_folder, tmp_path):
    arguments = flags(world, tokenizer_folder, tmp_path / "run", hub_token="hf_secret", max_steps=1)
    trainer = train(arguments, tmp_path / "cache")
    trainer.save_model()
    assert trainer.args.hub_token == "hf_secret"
    assert not [file for file in (tmp_path / "run").rglob("*") if file.is_file() and b"hf_secret" in file.read_bytes()]
    decayed = trainer.get_decay_parameter_names(trainer.model)
    assert all((parameter.ndim > 1) == (name in decayed) for name, parameter in trainer.model.named_parameters())


def test_retrofit_changes_the_new_weights_and_no_others(world, tokenizer_folder, tokenizer, tmp_path):
    torch.manual_seed(0)
    eot = tokenizer.eos_token_id
    sizes = {"n_layer": 3, "n_embd": 32, "n_head": 2, "n_positions": 64, "bos_token_id": eot, "eos_token_id": eot}
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes))
    gpt2.save_pretrained(tmp_path / "gpt2")
    arguments = flags(
        world,
        tokenizer_folder,
        tmp_path / "run",
        model_name_or_path=tmp_path / "gpt2",
        config_overrides=f"{{chunk_size: {CHUNK}, cca_layers: [1]}}",
        freeze_backbone="true",
        **knowledge_base(world),
    )
    trainer = train(arguments, tmp_path / "cache")
    trained = trainer.model.state_dict()
    for name, weight in gpt2.state_dict().items():
        assert torch.equal(trained[name], weight), name
    assert trained["transformer.h.1.cca.c_proj.weight"].abs().max() > 0
    tokens = torch.randint(0, len(tokenizer), (2, 20))
    model = trainer.model.eval()
    assert torch.allclose(model(tokens, use_retrieval=False).logits, gpt2.eval()(tokens).logits, atol=1e-6)


def test_resumed_training_ends_as_if_it_had_never_stopped(world, tokenizer_folder, tmp_path):
    whole = train(flags(world, tokenizer_folder, tmp_path / "whole", **knowledge_base(world)), tmp_path / "c1")
    changes = {"save_strategy": "steps", "save_steps": 3, **knowledge_base(world)}
    train(flags(world, tokenizer_folder, tmp_path / "parts", **changes), tmp_path / "c2")
    checkpoint = tmp_path / "parts" / "checkpoint-3"
    resumed = train(
        flags(world, tokenizer_folder, tmp_path / "parts", resume_from_checkpoint=checkpoint, **changes),
        tmp_path / "c3",
    )
    assert losses(resumed)[-3:] == losses(whole)[-3:]
    for (name, a), (_, b) in zip(resumed.model.state_dict().items(), whole.model.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert RetroForCausalLM.from_pretrained(checkpoint).config.chunk_size == CHUNK


def test_a_yaml_file_says_the_same_as_flags(world, tokenizer_folder, tmp_path):
    arguments = flags(world, tokenizer_folder, tmp_path / "run")
    settings = dict(zip([name[2:] for name in arguments[::2]], arguments[1::2], strict=True))
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(settings))  # JSON is YAML
    assert [str(a) for a in training_retro.parse_arguments([str(file)])][:2] == [
        str(a) for a in training_retro.parse_arguments(arguments)
    ][:2]
    overridden = training_retro.parse_arguments([str(file), "--max_steps", "9"])
    assert overridden[2].max_steps == 9 and overridden[2].learning_rate == 5e-3


def test_the_example_configuration_is_read(tmp_path):
    example = Path(train_hf.__file__).parent / "examples" / "train_local.yaml"
    model, data, training = training_retro.parse_arguments([str(example), "--output_dir", str(tmp_path)])
    assert model.config_overrides["cca_layers"] == [2, 5] and data.train_data == ["texts/train"]
    assert training.learning_rate == 6e-4 and training.output_dir == str(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"no_such_setting": "1"}, "no_such_setting"),
        ({"train_data": "missing.txt"}, "missing.txt"),
        ({"block_size": 65}, "block_size is 65"),
        ({"knowledge_base": "missing.db"}, "missing.db"),
        ({"config_overrides": "{chunk_sise: 8}"}, "did you mean chunk_size"),
        ({"tokenizer_name": None}, "tokenizer_name"),
        ({"freeze_backbone": "true"}, "knowledge_base"),
    ],
)
def test_bad_settings_are_named_before_work_starts(
    world, tokenizer_folder, tmp_path, changes, message, capsys, monkeypatch
):
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda _: None)  # before the hub is asked again
    with pytest.raises(SystemExit) as exit_:
        train_hf.main(flags(world, tokenizer_folder, tmp_path / "run", **changes))
    assert message in f"{exit_.value} {capsys.readouterr().err}"


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


def test_generate_writes_samples_and_what_they_read(world, tokenizer_folder, tmp_path, capsys):
    train(flags(world, tokenizer_folder, tmp_path / "run"), tmp_path / "cache").save_model(tmp_path / "run")
    (tmp_path / "prompt.txt").write_text("the model reads its neighbors before it writes the next chunk of text")
    command = [generate_hf.__file__, "--model", str(tmp_path / "run"), "--num_samples", "2"]
    command += ["--prompt", f"FILE:{tmp_path / 'prompt.txt'}", "--max_new_tokens", "10", "--seed", "3"]
    base = [word for name, value in knowledge_base(world).items() for word in (f"--{name}", str(value))]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}

    program = subprocess.run([sys.executable, *command, *base], capture_output=True, text=True, env=env)
    assert program.returncode == 0, program.stderr
    assert program.stdout.count("=== sample") == 2 and ".txt, chunk " in program.stdout

    def run(*more):
        capsys.readouterr()
        generate_hf.main([*command[1:], *more])
        return capsys.readouterr().out

    assert run(*base) == program.stdout  # the same seed
    plain = run("--temperature", "0", "--num_samples", "1")
    assert "=== sample" in plain and "chunk" not in plain.split("chunk of text")[-1]
    with pytest.raises(SystemExit) as ended:
        run("--knowledge_base", "missing.db")
    assert ended.value.code == 2 and "missing.db" in capsys.readouterr().err


def test_training_pushes_a_model_that_opens_with_its_card(world, tokenizer_folder, tmp_path):
    arguments = flags(
        world,
        tokenizer_folder,
        tmp_path / "run",
        save_strategy="steps",
        save_steps=3,
        push_to_hub="true",
        hub_model_id="owner/reader",
        hub_token="hf_secret",
        **knowledge_base(world),
    )
    with Hub() as hub:
        ran = subprocess.run(
            [sys.executable, train_hf.__file__, *arguments],
            env=hub.environment(tmp_path / "hf"),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert ran.returncode == 0, ran.stderr[-2000:]
    files = hub.files["owner/reader"]
    assert {"config.json", "model.safetensors", "modeling_retro.py", "tokenizer.json", "README.md"} <= set(files)
    card = files["README.md"].decode()
    assert all(fact in card for fact in ("gain over shuffled", "bits per byte", "texts", "| chunks | "))
    for name, content in files.items():
        assert b"hf_secret" not in content and b"kb.db" not in content, name
    folder = tmp_path / "pulled"
    hub.write("owner/reader", folder)
    saved = RetroForCausalLM.from_pretrained(tmp_path / "run")
    pulled = RetroForCausalLM.from_pretrained(folder)
    assert all(map(torch.equal, saved.parameters(), pulled.parameters()))
