"""Generative benchmarks read local copies of their data, and ask as a base model can answer."""

import json

import pytest

from evaluation_retro.benchmarks import BenchmarkSettings, open_benchmarks, run_benchmarks
from evaluation_retro.generative_benchmarks import read_questions
from modeling_retro import RetroForCausalLM

ROWS = {
    "EleutherAI/lambada_openai": {
        "test": [{"text": "It was late. they went to see tom"}, {"text": "\"Go!\" she said, and he went home"}]
    },
    "rajpurkar/squad": {
        "validation": [
            {"title": "Normans", "context": "They spoke Norse.", "question": "What did they speak?",
             "answers": {"text": ["Norse", "Old Norse"], "answer_start": [11, 11]}},
            {"title": "Pharmacy", "context": "x", "question": "y", "answers": {"text": ["z"], "answer_start": [0]}},
        ]
    },
    "ucinlp/drop": {
        "train": [
            {"section_id": f"nfl_{n}", "passage": f"Passage {n}.", "question": f"How many {n}?",
             "answers_spans": {"spans": [str(n)], "types": ["number"]}}
            for n in range(3)
        ],
        "validation": [
            {"section_id": "nfl_649", "passage": "Two goals.", "question": "How many?",
             "answers_spans": {"spans": ["2", "1,000"], "types": ["number", "number"]}}
        ],
    },
    "mandarjoshi/trivia_qa/rc.nocontext": {
        split: [
            {"question": f"Who is {split} {n}?", "answer": {"value": f"Man {n}", "aliases": [f"Man {n}", f"Mr {n}"]}}
            for n in range(3)
        ]
        for split in ("train", "validation")
    },
}  # fmt: skip
OPTIONS = {
    "LAMBADA": {"n_shots": 1},
    "SQuAD": {"n_shots": 0, "tasks": ["Normans"]},
    "DROP": {"n_shots": 2, "tasks": ["nfl_649"]},
    "TriviaQA": {"n_shots": 2, "n_problems": 2},
}


@pytest.fixture(scope="session")
def written_data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for name, splits in ROWS.items():
        (root / name).mkdir(parents=True)
        for split, rows in splits.items():
            (root / name / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


@pytest.fixture
def questions(written_data):
    pytest.importorskip("deepeval")
    with open_benchmarks(BenchmarkSettings([*OPTIONS], OPTIONS, str(written_data))) as benchmarks:
        return {
            name: [its for task in benchmark.tasks or [None] for its in read_questions(name, benchmark, task)]
            for name, benchmark in benchmarks.items()
        }


def test_prompts_end_with_the_question_and_need_no_judge(questions):
    first, second = questions["LAMBADA"]
    assert first.answers == ["tom"] and second.answers == ["home"]
    assert first.prompt.endswith("Context: It was late.\nTarget Sentence: they went to see ____ \nTarget Word:")
    assert first.prompt.count("Target Word:") == 2
    (norse,) = questions["SQuAD"]
    assert norse.prompt == "Context: They spoke Norse.\nQuestion: What did they speak?\nAnswer:"
    assert norse.answers == ["Norse", "Old Norse"]
    (drop,) = questions["DROP"]
    assert drop.answers == ["2", "1,000"]
    assert drop.prompt == (
        "Answer the following question based on the passage.\n\nBelow are some examples:\n\n"
        "Passage: Passage 0.\nQuestion: How many 0?\nAnswer: 0\n\n"
        "Passage: Passage 1.\nQuestion: How many 1?\nAnswer: 1\n\n"
        "Passage: Two goals.\nQuestion: How many?\nAnswer: "
    )
    trivia = questions["TriviaQA"]
    assert [its.answers for its in trivia] == [["Man 0", "Man 0", "Mr 0"], ["Man 1", "Man 1", "Mr 1"]]
    assert trivia[1].prompt == (
        "Question: Who is train 0?\nAnswer: Man 0\n\nQuestion: Who is train 1?\nAnswer: Man 1\n\n"
        "Question: Who is validation 1?\nAnswer:"
    )


def test_training_runs_them_too(config, tokenizer, retriever, written_data):
    pytest.importorskip("deepeval")
    model = RetroForCausalLM(config, retriever=retriever)
    settings = BenchmarkSettings([*OPTIONS], OPTIONS, str(written_data))
    scores = run_benchmarks(model, tokenizer, settings)
    assert list(scores) == [f"{name}_{condition}" for condition in ("on", "off") for name in OPTIONS]
    assert all(0 <= score <= 1 for score in scores.values())


def test_other_data_are_refused(written_data, tmp_path):
    pytest.importorskip("deepeval")
    (tmp_path / "rajpurkar" / "squad").mkdir(parents=True)
    (tmp_path / "rajpurkar" / "squad" / "validation.jsonl").write_text('{"text": "no title"}')
    with (
        open_benchmarks(BenchmarkSettings(["SQuAD"], {"SQuAD": {"tasks": ["Normans"]}}, str(tmp_path))) as benchmarks,
        pytest.raises(ValueError, match="Benchmark SQuAD: its data lack what it reads .*title"),
    ):
        read_questions("SQuAD", benchmarks["SQuAD"], benchmarks["SQuAD"].tasks[0])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("EquityMedQA", {}, "EquityMedQA: it is not run here: a judge model"),
        ("HumanEval", {}, "runs the code"),
        ("TriviaQA", {"n_shots": -1}, "TriviaQA: n_shots is -1"),
        ("TriviaQA", {"tasks": ["a"]}, "TriviaQA: it has no tasks"),
        ("ARC", {"mode": "Hard"}, "ARC: .*'Hard'"),
        ("HellaSwag", {"mode": "Hard"}, "HellaSwag: it has no modes"),
        ("TruthfulQA", {"mode": "mc2"}, "TruthfulQA: mode mc2 wants lists"),
    ],
)
def test_what_cannot_run_is_refused(name, options, message):
    pytest.importorskip("deepeval")
    with pytest.raises(ValueError, match=message):
        BenchmarkSettings([name], {name: options}).build()
