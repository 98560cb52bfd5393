"""Written answers are the first lines of greedy continuations, and are scored as SQuAD's are."""

import pytest
import torch

from evaluation_retro.written_answers import ANSWER_TOKENS, AnswerWriter, exact_match, f1
from modeling_retro import RetroForCausalLM
from retrieval import BulkTokenizer

PROMPTS = ["A", "A chunk is", "The encoder reads each neighbor on its own: ", "Q: who?\nA:"]


@pytest.fixture
def model(config, retriever):
    config.copy_head = True
    torch.manual_seed(0)
    model = RetroForCausalLM(config, retriever=retriever).eval()
    for parameter in model.parameters():  # closed gates would hide the neighbors
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def by_hand(model, tokenizer, prompt, first_line):
    """Continue one prompt token by token, with a retrieval point at its end."""
    prompt = [tokenizer.eos_token_id, *tokenizer(prompt.rstrip()).input_ids]
    tokens, size = prompt, model.config.chunk_size
    first = len(prompt) if len(prompt) < size else size + (len(prompt) - size) % size
    for _ in range(ANSWER_TOKENS):
        logits = model(torch.tensor([tokens]), first_point=torch.tensor([first])).logits[0, -1]
        tokens = [*tokens, int(logits.argmax())]
        text = tokenizer.decode(tokens[len(prompt) :], skip_special_tokens=True)
        if tokens[-1] == tokenizer.eos_token_id or "\n" in text:
            break
    return text.partition("\n")[0].strip() if first_line else text


@pytest.mark.parametrize("batch_size", [1, 4])
def test_answers_are_first_lines_of_greedy_continuations(model, tokenizer, retriever, batch_size):
    written = AnswerWriter(model, BulkTokenizer(tokenizer), batch_size, {}).write(PROMPTS)
    assert written == [by_hand(model, tokenizer, prompt, first_line=True) for prompt in PROMPTS]
    searched = [query for queries, _ in retriever.calls for query in queries]
    for prompt in PROMPTS:
        question = [tokenizer.eos_token_id, *tokenizer(prompt.rstrip()).input_ids]
        assert question[-model.config.chunk_size :] in searched


def test_a_line_end_stops_an_answer(model, tokenizer, monkeypatch):
    newline = tokenizer("\n").input_ids[0]
    bias = torch.zeros(len(tokenizer))
    bias[newline] = 1e4
    head = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda states: head(states) + bias)
    writer = AnswerWriter(model, BulkTokenizer(tokenizer), 4, {"use_retrieval": False})
    lengths = []
    generate = model.generate
    monkeypatch.setattr(
        model, "generate", lambda **named: lengths.append((out := generate(**named)).shape[1]) or out, raising=False
    )
    assert writer.write(["A chunk"]) == [""]
    assert lengths == [len(tokenizer("A chunk").input_ids) + 2]  # end-of-text before it, and the line end


def test_a_long_prompt_loses_its_beginning(model, tokenizer):
    writer = AnswerWriter(model, BulkTokenizer(tokenizer), 1, {})
    end = "the encoder reads. " * 60
    assert writer.write(["Other words. " + end]) == writer.write(["At last, the " + end])


@pytest.mark.parametrize(
    ("written", "answers", "exact", "overlap"),
    [
        ("The Survivor Foundation.", ["survivor foundation", "x"], 1, 1),
        ("in 1,000 years", ["1000"], 0, 0.5),
        ("Rome", ["Oslo", "the city of Rome"], 0, 0.5),  # 2 · 1 / (1 + 3)
        ("", ["Oslo"], 0, 0),
        ("", ["the"], 0, 0),
        ("The", ["the"], 1, 1),
        ("a a b", ["b b"], 0, 2 / 3),
    ],
)
def test_answers_are_scored_as_by_hand(written, answers, exact, overlap):
    assert (exact_match(written, answers), f1(written, answers)) == (exact, pytest.approx(overlap))
