"""train_hf.py and generate_hf.py run as users run them, on a real Milvus Lite file."""

import copy
import dataclasses
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch

import generate_hf
import train_hf
from modeling_retro import RetroForCausalLM
from retrieval.parsing import make_parser
from training_retro.sampling import GenerateArguments, describe, likeliest_tokens, load, sample

from ..support.hub import Hub
from ..support.runs import flags, knowledge_base, train


def test_training_from_scratch_learns_reports_and_saves(world, tokenizer_folder, tmp_path, capsys):
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


def test_eval_only_measures_as_training_does_and_saves_no_model(world, tokenizer_folder, tmp_path, capsys):
    arguments = flags(world, tokenizer_folder, tmp_path / "run", **knowledge_base(world))
    train_hf.main(arguments)
    after_training = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    capsys.readouterr()
    changes = {"model_name_or_path": tmp_path / "run", "train_data": None, "max_steps": None, "eval_only": "true"}
    train_hf.main(flags(world, tokenizer_folder, tmp_path / "measured", **changes, **knowledge_base(world)))
    metrics = json.loads((tmp_path / "measured" / "eval_results.json").read_text())
    assert "eval_off_bits_per_byte" in capsys.readouterr().out
    conditions = ("eval_", "eval_off_", "eval_shuffled_")
    for name in [f"{condition}bits_per_byte" for condition in conditions]:
        assert metrics[name] == pytest.approx(after_training[name], rel=1e-6)
    assert {path.name for path in (tmp_path / "measured").iterdir()} == {"eval_results.json", "all_results.json"}


def test_eval_only_needs_a_precomputed_validation_part(world, tokenizer_folder, tmp_path):
    settings = {"validation_data": None, "precompute_to": tmp_path / "stored"}
    train_hf.main(flags(world, tokenizer_folder, tmp_path / "run", **settings, **knowledge_base(world)))
    settings = {"validation_data": None, "train_data": None, "precomputed": tmp_path / "stored", "eval_only": "true"}
    with pytest.raises(SystemExit, match="eval_only needs a validation part, which .*stored does not have"):
        train_hf.main(flags(world, tokenizer_folder, tmp_path / "run", **settings))


def test_no_token_is_written_and_only_matrices_decay(world, tokenizer_folder, tmp_path):
    arguments = flags(world, tokenizer_folder, tmp_path / "run", hub_token="hf_secret", max_steps=1)
    trainer = train(arguments, tmp_path / "cache")
    trainer.save_model()
    for twin in (trainer.args, copy.copy(trainer.args), copy.deepcopy(trainer.args)):
        assert twin.hub_token == "hf_secret"
    assert b"hf_secret" not in pickle.dumps(trainer.args)
    assert not [file for file in (tmp_path / "run").rglob("*") if file.is_file() and b"hf_secret" in file.read_bytes()]
    decayed = trainer.get_decay_parameter_names(trainer.model)
    assert all((parameter.ndim > 1) == (name in decayed) for name, parameter in trainer.model.named_parameters())


def test_generation_prints_samples_and_what_they_read(world, tokenizer_folder, tmp_path, capsys):
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
    greedy = [*base, "--temperature", "0", "--num_samples", "1"]
    assert run(*greedy, "--draft_from_neighbors", "true") == run(*greedy)
    with pytest.raises(SystemExit):
        run("--draft_from_neighbors", "true")
    assert "num_samples is 2, but draft_from_neighbors" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        run("--knowledge_base", "missing.db")
    assert ended.value.code == 2 and "missing.db" in capsys.readouterr().err


@pytest.fixture
def reader(world, tokenizer_folder, tmp_path):
    """The folder of a trained model, and the flags of a sample that reads the knowledge base."""
    train(flags(world, tokenizer_folder, tmp_path / "run", **knowledge_base(world)), tmp_path / "c").save_model()
    base = [word for name, value in knowledge_base(world).items() for word in (f"--{name}", str(value))]
    prompt = "the model reads its neighbors before it writes the next chunk"
    return tmp_path / "run", ["--prompt", prompt, "--max_new_tokens", "20", "--temperature", "0", *base]


@torch.no_grad()
def test_the_likeliest_tokens_are_those_of_one_forward(reader):
    folder, arguments = reader
    parser = make_parser(GenerateArguments, "generate_hf.py")
    arguments += ["--model", str(folder), "--show_likeliest", "5", "--device", "cpu"]
    (arguments,) = parser.parse_args_into_dataclasses(arguments)
    model, tokenizer = load(arguments)
    outputs = sample(model, tokenizer, arguments)
    (found,) = likeliest_tokens(model, outputs, 5)
    row, length = outputs.sequences[0].tolist(), outputs.sequences.shape[1]
    assert list(found) == list(range(length - 20, length))
    ends = [read.end for read in outputs.retrieved[0]]
    first_point = torch.tensor(ends[:1])
    assert sum(end in found for end in ends) >= 2
    for end in [end for end in ends if end in found]:
        assert found[end].read[0][0] == row[end]  # the likeliest token was taken
        for use_retrieval, tokens in ((True, found[end].read), (False, found[end].unread)):
            before = {"first_point": first_point, "use_retrieval": use_retrieval}
            best = model(outputs.sequences[:, :end], **before).logits[0, -1].softmax(-1).topk(5)
            assert [token for token, _ in tokens] == best.indices.tolist()
            torch.testing.assert_close(torch.tensor([share for _, share in tokens]), best.values, atol=1e-5, rtol=1e-4)
    shown = describe(row, outputs.retrieved[0], tokenizer, found)
    assert shown.count("next, with neighbors: ") == shown.count("next, without neighbors: ")
    assert shown.count("next, with neighbors: ") == sum(end in found for end in ends) + ((length - 20) not in ends)
    model.retriever.close()


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own calls
def test_a_compiled_model_and_other_formats_write(reader, capsys):
    folder, arguments = reader
    arguments += ["--model", str(folder), "--device", "cpu", "--max_new_tokens", "3"]
    generate_hf.main(arguments)
    plain = capsys.readouterr().out
    generate_hf.main([*arguments, "--compile", "true"])
    assert capsys.readouterr().out == plain
    torch._dynamo.reset()
    (bfloat,) = make_parser(GenerateArguments, "generate_hf.py").parse_args_into_dataclasses(
        ["--model", str(folder), "--dtype", "bfloat16"]
    )
    model, _ = load(bfloat)
    assert model.dtype == torch.bfloat16
    model.save_pretrained(folder)
    assert load(dataclasses.replace(bfloat, dtype="auto"))[0].dtype == torch.bfloat16
    assert load(dataclasses.replace(bfloat, dtype="float32"))[0].dtype == torch.float32
    generate_hf.main([*arguments, "--dtype", "bfloat16"])
    assert "=== sample" in capsys.readouterr().out


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
