"""DeepEval's benchmarks run on local data and agree with likelihoods computed token by token."""

import json
import socket

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from evaluation_retro.benchmarks import BenchmarkSettings, run_benchmarks
from evaluation_retro.multiple_choice import LikelihoodChoice, split_question
from modeling_retro import RetroForCausalLM
from retrieval import BulkTokenizer

from ..support.runs import flags, knowledge_base, train

QUESTION = (
    "The following are questions.\n\nA man sits. He\nA. stands up.\nB. flies to the moon.\nC. is 3.5 m tall\nD. no\n"
    "Answer:"
)


@pytest.fixture
def data(tmp_path):
    """Write a tiny copy of HellaSwag."""
    endings = [["sits", "runs away", "is a tree", "x"], ["of text", "neighbors", "the encoder reads", "a b"]]
    rows = [
        {"ctx": f"A chunk {i} is", "activity_label": "Sailing", "endings": endings[i % 2], "label": str(i % 4)}
        for i in range(6)
    ]
    for split in ("train", "validation"):
        (tmp_path / "Rowan" / "hellaswag").mkdir(parents=True, exist_ok=True)
        text = "\n".join(map(json.dumps, rows))
        (tmp_path / "Rowan" / "hellaswag" / f"{split}.jsonl").write_text(text)
    return tmp_path


@pytest.fixture
def model(config):
    torch.manual_seed(0)
    return RetroForCausalLM(config).eval()


def by_hand(model, tokenizer, context, answer):
    """Return the mean log-likelihood per byte, computed token by token."""
    tokens = [tokenizer.eos_token_id, *tokenizer(context).input_ids]
    continuation = tokenizer(answer).input_ids
    total = 0.0
    for token in continuation:
        window = torch.tensor([tokens[-model.config.n_positions :]])
        total += model(window, use_retrieval=False).logits[0, -1].log_softmax(-1)[token].item()
        tokens.append(token)
    return total / len(answer.encode())


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (
            QUESTION,
            (
                "The following are questions.\n\nA man sits. He",
                ["stands up.", "flies to the moon.", "is 3.5 m tall", "no"],
            ),
        ),
        ("Q: Who?\n1. me\n2. you\nA: ", ("Q: Who?", ["me", "you"])),
        ("Is it so?\nA:", ("Is it so?\nA:", [])),
        ("Is it so?\nB. no\nAnswer:", ("Is it so?\nB. no\nAnswer:", [])),
    ],
)
def test_a_prompt_is_split_before_its_answers(prompt, expected):
    question, options = split_question(prompt)
    assert (question, list(options.values())) == expected


@pytest.mark.parametrize("scoring", ["likelihood", "one_token"])
def test_the_most_likely_answer_is_chosen(model, tokenizer, scoring):
    from typing import Literal

    from pydantic import BaseModel

    class Choice(BaseModel):
        answer: Literal["A", "B", "C", "D"]

    choice = LikelihoodChoice(model, BulkTokenizer(tokenizer), scoring, 8, {"use_retrieval": False})
    question, options = split_question(QUESTION)
    for prompt in (QUESTION, "Another text of many more words than the model has positions. " * 5 + QUESTION):
        start = split_question(prompt)[0]
        if scoring == "likelihood":
            scores = {label: by_hand(model, tokenizer, start, f" {text}") for label, text in options.items()}
        else:
            scores = {label: by_hand(model, tokenizer, prompt, f" {label}") for label in options}
        (answer,) = choice.choose([prompt], [Choice])
        assert answer.answer == max(scores, key=scores.get)


@pytest.mark.parametrize("stride", [8, 3])
@pytest.mark.parametrize("scoring", ["likelihood", "one_token"])
def test_the_end_of_a_question_is_searched_for(config, tokenizer, retriever, scoring, stride):
    """The query ends at the question's end, even if it is shorter than a chunk."""
    config.retrieval_stride = stride
    torch.manual_seed(0)
    model = RetroForCausalLM(config, retriever=retriever).eval()
    choice = LikelihoodChoice(model, BulkTokenizer(tokenizer), scoring, 2, {})
    contexts = ["A", "A chunk", "A man sits down and", "The encoder reads each neighbor on its own and attends"]
    for context in contexts:
        retriever.calls.clear()
        choice.log_likelihoods([(context, " a b c d e f g"), (context, " x")])
        question = [tokenizer.eos_token_id, *tokenizer(context).input_ids]
        searched = [query for queries, _ in retriever.calls for query in queries]
        assert question[-config.chunk_size :] in searched
        answers = [tokenizer(answer).input_ids for answer in (" a b c d e f g", " x")]
        for query in searched:  # all others end a whole number of strides before or after
            texts = [question + answer for answer in answers]
            ends = [end for text in texts for end in range(1, len(text) + 1) if text[max(end - 8, 0) : end] == query]
            assert any((end - len(question)) % stride == 0 for end in ends)


def test_neighbors_of_a_short_question_change_its_score(config, tokenizer, retriever):
    config.copy_head = True
    torch.manual_seed(0)
    model = RetroForCausalLM(config, retriever=retriever).eval()
    for name, parameter in model.named_parameters():
        if "cca.c_proj" in name:
            torch.nn.init.normal_(parameter)
    pairs = [("A", " b")]
    on, off = (
        LikelihoodChoice(model, BulkTokenizer(tokenizer), "likelihood", 2, arguments).log_likelihoods(pairs)
        for arguments in ({}, {"use_retrieval": False})
    )
    assert on != off


def test_a_special_token_in_a_question_is_plain_text(model, tokenizer):
    choice = LikelihoodChoice(model, BulkTokenizer(tokenizer), "likelihood", 8, {"use_retrieval": False})
    question, answer = "<|endoftext|> is", " a token"
    (ids,) = BulkTokenizer(tokenizer).encode_batch([question])
    tokens, expected = [tokenizer.eos_token_id, *ids], 0.0
    for token in tokenizer(answer).input_ids:
        logits = model(torch.tensor([tokens]), use_retrieval=False).logits
        expected += logits[0, -1].log_softmax(-1)[token].item()
        tokens.append(token)
    assert choice.log_likelihoods([(question, answer)]) == [pytest.approx(expected, abs=1e-4)]


def test_a_special_token_is_plain_text_to_a_whole_word_tokenizer(model):
    """Such tokenizers find special tokens in their vocabulary even if told not to parse them."""
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2, "<end>": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = BulkTokenizer(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<end>"))
    choice = LikelihoodChoice(model, tokenizer, "likelihood", 8, {"use_retrieval": False})
    special, other = choice.log_likelihoods([("a <end>", " b"), ("a word", " b")])
    assert special == pytest.approx(other)


def test_a_tokenizer_without_an_end_of_text_token_is_refused(model):
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ValueError, match="Set its eos_token"):
        LikelihoodChoice(model, BulkTokenizer(words), "likelihood", 8, {})


def test_hellaswag_runs_with_and_without_neighbors_and_without_telemetry(
    world, tokenizer_folder, tmp_path, data, monkeypatch
):
    pytest.importorskip("deepeval")
    connect = socket.socket.connect
    asked = []

    def watched(self, address):
        asked.append(address)
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", watched)
    arguments = flags(
        world,
        tokenizer_folder,
        tmp_path / "run",
        benchmarks="HellaSwag",
        benchmark_options="{HellaSwag: {n_shots: 0, tasks: [Sailing], n_problems_per_task: 4}}",
        benchmark_data=data,
        eval_strategy="steps",
        eval_steps=3,
        **knowledge_base(world),
    )
    trainer = train(arguments, tmp_path / "c")
    scores = [entry for entry in trainer.state.log_history if "eval_HellaSwag_on" in entry]
    assert len(scores) == 2 and all(0 <= entry["eval_HellaSwag_off"] <= 1 for entry in scores)
    assert all(isinstance(a, str) or a[0] in ("127.0.0.1", "::1", "localhost") for a in asked), asked


def test_benchmarks_leave_random_states_alone(model, tokenizer, data):
    pytest.importorskip("deepeval")
    import random

    settings = BenchmarkSettings(["HellaSwag"], {"HellaSwag": {"n_shots": 0, "tasks": ["Sailing"]}}, str(data))
    random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), torch.get_rng_state()
    scores = run_benchmarks(model, tokenizer, settings)
    assert list(scores) == ["HellaSwag_off"]  # it has no retriever
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"names": ["NoSuch"]}, "no benchmark 'NoSuch'; it has .*HellaSwag"),
        ({"names": ["HellaSwag"], "options": {"HellaSwag": {"n_shots": 99}}}, "HellaSwag: .*n_shots"),
        ({"names": ["HellaSwag"], "options": {"MMLU": {}}}, r"options for \['MMLU'\]"),
        ({"names": ["GSM8K"], "options": {"GSM8K": {"tasks": ["algebra"]}}}, "GSM8K: it has no tasks"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    pytest.importorskip("deepeval")
    with pytest.raises(ValueError, match=message):
        BenchmarkSettings(**settings).build()


def test_an_unknown_scoring_is_refused():
    with pytest.raises(ValueError, match="likelihood or one_token, not 'guess'"):
        BenchmarkSettings(["HellaSwag"], scoring="guess")
