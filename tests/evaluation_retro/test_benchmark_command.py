"""`retro-eval benchmarks` scores each task on and off, and goes on after a break."""

import json

import numpy as np
import pytest
import torch
from scipy import stats

from evaluation_retro import benchmark_command, cli
from evaluation_retro.benchmarks import BenchmarkSettings, run_benchmarks
from evaluation_retro.opening import open_model
from evaluation_retro.statistics import Score
from modeling_retro import RetroForCausalLM

pytest.importorskip("deepeval")
TASKS = ["Sailing", "Surfing"]
OPTIONS = {"HellaSwag": {"n_shots": 0, "tasks": TASKS}, "TriviaQA": {"n_shots": 1}}


@pytest.fixture(scope="module")
def local_data(tmp_path_factory):
    """Write tiny copies of HellaSwag and TriviaQA."""
    root = tmp_path_factory.mktemp("data")
    endings = [["sits", "runs away", "is a tree", "x"], ["of text", "neighbors", "the encoder reads", "a b"]]
    rows = [
        {"ctx": f"A chunk {i} is", "activity_label": TASKS[i % 2], "endings": endings[i % 2], "label": str(i % 4)}
        for i in range(9)
    ]
    facts = [{"question": f"Who is {n}?", "answer": {"value": f"Man {n}", "aliases": []}} for n in range(5)]
    for name, lines in (("Rowan/hellaswag", rows), ("mandarjoshi/trivia_qa", facts)):
        (root / name).mkdir(parents=True)
        for split in ("train", "validation"):
            (root / name / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (root / "mandarjoshi/trivia_qa/rc.nocontext").mkdir()
    for split in ("train", "validation"):
        file = root / "mandarjoshi/trivia_qa" / f"{split}.jsonl"
        file.rename(file.parent / "rc.nocontext" / file.name)
    return root


@pytest.fixture
def saved(config, tokenizer, tmp_path):
    torch.manual_seed(0)
    config.copy_head = True
    model = RetroForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def command(saved, local_data, output, world=None, options=OPTIONS):
    settings = {
        "model": saved,
        "benchmark_options": json.dumps(options),
        "benchmark_data": local_data,
        "batch_size": 2,
        "output_dir": output,
    }
    if world is not None:
        settings |= {"knowledge_base": world / "kb.db", "collection_name": "texts"}
        settings |= {"embedding_model": world / "embedding"}
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return ["benchmarks", "--benchmarks", *options, *words]


def settings_of(arguments):
    (settings,) = cli.parse_settings((benchmark_command.SETTINGS,), "test", arguments[1:], lambda _: None)
    return settings


def test_scores_are_those_of_training(saved, local_data, world, tmp_path):
    arguments = command(saved, local_data, tmp_path / "out", world)
    cli.main(arguments)
    numbers = json.loads((tmp_path / "out" / "benchmarks.json").read_text())
    answers = [json.loads(line) for line in (tmp_path / "out" / "benchmarks_answers.jsonl").read_text().splitlines()]
    opened = open_model(settings_of(arguments))
    expected = run_benchmarks(
        opened.model,
        opened.tokenizer.hf_tokenizer,
        BenchmarkSettings([*OPTIONS], OPTIONS, str(local_data), batch_size=2),
    )
    opened.close()
    for condition in ("on", "off"):
        assert numbers["HellaSwag"]["all tasks"]["accuracy"][condition]["value"] == expected[f"HellaSwag_{condition}"]
        exact = numbers["TriviaQA"]["all"]["exact match"][condition]
        assert (exact["value"], exact["questions"]) == (expected[f"TriviaQA_{condition}"], 5)
        for task, number in zip(TASKS, (5, 4), strict=True):
            own = [its for its in answers if (its["task"], its["condition"]) == (task, condition)]
            score = numbers["HellaSwag"][task]["accuracy"][condition]
            assert len(own) == score["questions"] == number
            assert score["value"] == np.mean([its["prediction"] == its["answers"][0] for its in own])
    predictions = {
        condition: [its["prediction"] for its in answers if its["condition"] == condition]
        for condition in ("on", "off")
    }
    assert predictions["on"] != predictions["off"]
    assert "| Sailing | accuracy | 5 |" in (tmp_path / "out" / "benchmarks.md").read_text()


def test_a_broken_run_goes_on_and_tasks_can_be_added(saved, local_data, tmp_path, monkeypatch, capsys):
    one = {"HellaSwag": {"n_shots": 0, "tasks": TASKS[:1]}}
    cli.main(command(saved, local_data, tmp_path / "out", options=one))
    asked = []
    choose = benchmark_command.Answerer.choose

    def recording(self, benchmark, task):
        asked.append(task.value)
        if len(asked) == 1:
            raise KeyboardInterrupt
        return choose(self, benchmark, task)

    monkeypatch.setattr(benchmark_command.Answerer, "choose", recording)
    with pytest.raises(SystemExit) as stopped:
        cli.main(command(saved, local_data, tmp_path / "out"))
    assert stopped.value.code == cli.INTERRUPTED
    cli.main(command(saved, local_data, tmp_path / "out"))
    assert asked == [TASKS[1]] * 2  # the first task was there
    writes = []
    monkeypatch.setattr(benchmark_command.Answerer, "write", lambda *arguments: writes.append(arguments))
    cli.main(command(saved, local_data, tmp_path / "out"))
    assert asked == [TASKS[1]] * 2 and not writes
    with pytest.raises(SystemExit, match="another measurement"):
        cli.main([*command(saved, local_data, tmp_path / "out"), "--benchmark_scoring", "one_token"])


def test_settings_come_from_a_file(saved, local_data, tmp_path):
    words = command(saved, local_data, tmp_path / "out", options={"TriviaQA": {"n_shots": 0}})[3:]
    named = dict(zip((word.removeprefix("--") for word in words[::2]), words[1::2], strict=True))
    (tmp_path / "settings.yaml").write_text(json.dumps(named | {"benchmarks": "TriviaQA"}))  # JSON is YAML
    cli.main(["benchmarks", str(tmp_path / "settings.yaml"), "--output_dir", str(tmp_path / "other")])
    assert "| all | exact match | 5 |" in (tmp_path / "other" / "benchmarks.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"HellaSwag": {"n_shots": 0, "tasks": ["Archery"]}}, "no questions"),
        ({"GSM8K": {}}, "GSM8K: it is not run here"),
    ],
)
def test_bad_input_ends_with_a_sentence(saved, local_data, tmp_path, options, message):
    with pytest.raises(SystemExit, match=message):
        cli.main(command(saved, local_data, tmp_path / "out", options=options))


def test_no_benchmarks_are_refused(saved, capsys):
    with pytest.raises(SystemExit):
        cli.main(["benchmarks", "--model", str(saved)])
    assert "benchmarks is empty" in capsys.readouterr().err


def test_intervals_are_those_of_the_books():
    score = Score.of([1.0] * 8 + [0.0] * 2)  # Wilson's, by its formula
    z = stats.norm.ppf(0.975)
    middle, half = (0.8 + z * z / 20) / (1 + z * z / 10), z * np.sqrt(0.016 + z * z / 400) / (1 + z * z / 10)
    assert (score.low, score.high) == (pytest.approx(middle - half), pytest.approx(middle + half))
    rng = np.random.default_rng(1)
    on, off = rng.random(400), rng.random(400)
    gain = Score.difference(on, off)
    half = 1.96 * (on - off).std() / 20
    assert (gain.low, gain.high) == pytest.approx((gain.value - half, gain.value + half), abs=0.01)
    on, off = [1.0] * 300 + [0.0] * 200, [1.0] * 200 + [0.0] * 100 + [1.0] * 50 + [0.0] * 150
    gain = Score.difference(on, off)
    half = 1.96 * (np.array(on) - off).std() / 500**0.5
    assert (gain.low, gain.high) == pytest.approx((gain.value - half, gain.value + half), abs=0.002)
    same = Score.difference([1.0] * 10, [1.0] * 10)
    assert same.low == pytest.approx(-same.high) and 0.1 < same.high < 0.3
    assert np.isnan(Score.of([0.5]).low) and np.isnan(Score.difference([0.5], [0.0]).low)
