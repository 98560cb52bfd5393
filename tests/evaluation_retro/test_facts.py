"""Made-up facts are asked as a user would, and the answers follow the knowledge base at once."""

import json

import numpy as np
import pytest
import torch

from evaluation_retro import cli, facts, opening
from evaluation_retro.fact_answers import Prompts, ask, is_exact_match, normalized, ranks
from evaluation_retro.fact_base import CHANGED, DELETED, REVISED, TOLD, UNTOUCHED, FactBase, roles_of
from evaluation_retro.fact_questions import Asker, questions_of, revised_questions
from evaluation_retro.facts import FactsSettings
from evaluation_retro.made_up_facts import make_up_facts
from evaluation_retro.opening import ModelSettings, open_model
from evaluation_retro.statistics import Score
from modeling_retro.retrieval_points import aligned_first_point
from retrieval import read_documents

from ..support.evaluated import save_reader
from ..support.small_models import train_tokenizer

FACTS = make_up_facts(100, seed=0)
ASKED = 4
SIZES = {"cca_layers": [], "chunk_size": 64, "neighbor_length": 128, "n_positions": 512}


@pytest.fixture(scope="module")
def fact_tokenizer():
    """A tokenizer of these documents, so that a question is no longer than a chunk."""
    return train_tokenizer([fact.document().text for fact in FACTS], 2000)


@pytest.fixture
def reader(world, config, fact_tokenizer):
    folder = world / "fact_reader"
    sizes = SIZES | {"vocab_size": len(fact_tokenizer)}
    return folder if folder.exists() else save_reader(folder, config, fact_tokenizer, **sizes)


@pytest.fixture
def opened(reader):
    return open_model(ModelSettings(model=str(reader), device="cpu"), needs_neighbors=False)


@pytest.fixture
def base(world, opened, tmp_path):
    settings = ModelSettings(model="", search="bm25")
    texts = list(read_documents(str(world / "train")))
    config = opened.model.config
    made = FactBase(settings, tmp_path, opened.tokenizer, config, texts, FACTS, roles_of(len(FACTS), 0))
    opened.model.set_retriever(made.retriever)
    yield made
    made.close()


@pytest.fixture
def asker(opened, base):
    return Asker(opened.model, opened.tokenizer, FACTS, batch_size=5)


@pytest.mark.parametrize(
    ("written", "answer", "right"),
    [
        (" Vrosa, a city of 12 houses.", "Vrosa", True),
        (" the vrosa.\nVrosa", "Vrosa", True),
        ("\n Vrosa", "Vrosa", True),
        (" Vrosathex", "Vrosa", False),
        (" near Vrosa", "Vrosa", False),
        (" 12,345 people", "12345", True),
        (" 12.345 people", "12345", False),
        (" 123456", "12345", False),
        (" Dekem\nLadewe", "Dekem Ladewe", False),
        ("", "Vrosa", False),
    ],
)
def test_exact_match_is_of_whole_words_in_the_first_line(written, answer, right):
    assert is_exact_match(written, answer) == right


def test_normalized_text_has_no_case_punctuation_and_articles():
    assert normalized('  "The GV-8,63", an answer.\nMore.') == "gv 8 63 answer"
    assert normalized("1,234,567 of them") == "1234567 of them"


def test_ranks_count_the_candidates_that_are_as_likely():
    assert ranks(np.array([[-1.0, -2.0, -3.0], [-2.0, -2.0, -1.0], [-9.0, -1.0, -1.0]])).tolist() == [1, 3, 3]


@torch.no_grad()
def by_full_forwards(model, prompt, candidates, arguments):
    """Return log-likelihoods from one forward of prompt and candidate for each candidate."""
    config, scores = model.config, []
    first = torch.tensor([aligned_first_point(len(prompt), config.chunk_size, config.retrieval_stride)])
    for candidate in candidates:
        ids = torch.tensor([[*prompt, *candidate]])
        logits = model(ids, first_point=first, **arguments).logits[0, len(prompt) - 1 : -1]
        scores.append(logits.log_softmax(-1)[torch.arange(len(candidate)), candidate].sum().item())
    return scores


@pytest.mark.parametrize("arguments", [{}, {"use_retrieval": False}])
def test_candidates_are_as_likely_as_in_full_forwards(opened, base, asker, arguments):
    questions = questions_of(FACTS[:2])[:3]
    prompts = Prompts.encode(
        opened.tokenizer, [its.prompt for its in questions], [its.candidates[:3] for its in questions]
    )
    assert len({len(tokens) for tokens in prompts.tokens}) > 1  # padding is needed
    written, scores = ask(opened.model, prompts, 8, asker.begin, arguments)
    for row, prompt in enumerate(prompts.tokens):
        expected = by_full_forwards(opened.model, prompt, prompts.candidates[row], arguments)
        np.testing.assert_allclose(scores[row], expected, atol=1e-4)
        alone = opened.model.generate(
            torch.tensor([prompt]), max_new_tokens=8, do_sample=False, pad_token_id=0, **arguments
        )
        assert written[row][: len(alone[0]) - len(prompt)] == alone[0, len(prompt) :].tolist()


def test_in_context_the_neighbors_stand_before_the_question(opened, base, asker):
    (question,) = questions_of(FACTS)[:1]
    tokenizer = opened.tokenizer
    (tokens,) = tokenizer.encode_batch([question.prompt])
    found = base.retriever.retrieve([[asker.begin, *tokens][-64:]])
    texts = [ids[mask].tolist() for ids, mask in zip(found.ids[0], found.attention_mask[0], strict=True)]
    (newline,) = tokenizer.encode_batch(["\n"])
    candidates = tokenizer.encode_batch([f" {answer}" for answer in question.candidates])
    for k in (1, 2):
        context = [token for text in reversed(texts[:k]) for token in (*text, *newline)]
        expected = by_full_forwards(
            opened.model, [asker.begin, *context, *tokens], candidates, {"use_retrieval": False}
        )
        answers = asker.answers([question], "in-context", k)
        np.testing.assert_allclose(answers["log_likelihoods"][0], expected, atol=1e-4)
        assert answers["found"].tolist() == [question.doc_id in found.doc_ids[0][:k]]


def test_answers_follow_the_documents_at_the_next_question(base, asker):
    before, after = questions_of(FACTS), revised_questions(FACTS, base.roles)
    role = np.array([base.roles[question.fact] for question in before])
    own = np.array([question.wording == "own words" for question in before])

    def read(questions):
        prompts = Prompts.encode(asker.tokenizer, [its.prompt for its in questions], [() for _ in questions])
        return [" ".join(map(asker.tokenizer.decode, texts)) for _, texts in asker._neighbors(prompts, 0)]

    first = read(before)
    base.be(REVISED)
    second = read(after)
    base.be(TOLD)
    third = read(before)
    old, new = ([FACTS[its.fact].answer for its in before], [FACTS[its.fact].changed for its in before])
    for place in np.flatnonzero(own):
        assert old[place] in first[place] and old[place] in third[place]
        assert (new[place] in second[place]) == (role[place] == CHANGED)
        assert (old[place] in second[place]) == (role[place] == UNTOUCHED)
    assert {name: int((role[own] == name).sum()) for name in (CHANGED, DELETED, UNTOUCHED)} == {
        CHANGED: 50,
        DELETED: 25,
        UNTOUCHED: 25,
    }


def arguments(world, reader, folder, **changes):
    settings = {
        "model": reader,
        "texts": world / "train",
        "chunks": 20,
        "facts": 100,
        "asked": ASKED,
        "in_context": 1,
        "search": "bm25",
        "device": "cpu",
        "output_dir": folder,
    } | changes
    return ["facts", *(word for name, value in settings.items() for word in (f"--{name}", str(value)))]


def test_a_broken_off_run_goes_on_and_ends_with_the_same_numbers(world, reader, tmp_path, monkeypatch, capsys):
    cli.main(arguments(world, reader, tmp_path / "whole"))
    whole = json.loads((tmp_path / "whole" / "facts.json").read_text())
    assert whole["facts"] == 100 and whole["chunks"] > 120
    assert whole["before"]["own words"]["on"]["found"]["value"] == 1
    assert set(whole["before"]["own words"]) == {"on", "off", "in-context, k = 1"}
    text = (tmp_path / "whole" / "facts.md").read_text()
    assert "facts_answers.svg" in text and "facts_changes.svg" in text
    assert len((tmp_path / "whole" / "answers.jsonl").read_text().splitlines()) == 2 * ASKED

    monkeypatch.setattr(facts, "QUESTIONS_KEPT", 4)
    answers, left = Asker.answers, 0

    def breaking(self, *given):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return answers(self, *given)

    for finished in (3, 4):  # of 8 parts; then one is left, of the changed documents
        left = finished
        with monkeypatch.context() as patched, pytest.raises(SystemExit):
            patched.setattr(Asker, "answers", breaking)
            cli.main(arguments(world, reader, tmp_path / "parts"))
    cli.main(arguments(world, reader, tmp_path / "parts"))
    resumed = json.loads((tmp_path / "parts" / "facts.json").read_text())
    assert resumed == whole
    capsys.readouterr()

    with pytest.raises(SystemExit, match="weights was .* Name another folder"):  # trained on, under the same name
        monkeypatch.setattr(opening, "fingerprint", lambda model: "others")
        cli.main(arguments(world, reader, tmp_path / "parts"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunks": 9999}, "The texts have .* chunks of 64 tokens, but the facts are to stand among 9,999"),
        ({"facts": 20, "asked": 20}, "20 facts are too few"),
        ({"in_context": 3}, "in_context is \\[3\\], but the model reads 2 neighbors"),
    ],
)
def test_what_cannot_be_asked_is_refused(world, reader, tmp_path, changes, message, capsys):
    with pytest.raises(SystemExit, match=message):
        cli.main(arguments(world, reader, tmp_path / "refused", **changes))
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"knowledge_base": "mine.db"}, "a knowledge base of its own"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"asked": 200}, "asked is 200"),
        ({"training_seed": 0}, "training_seed is 0"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        FactsSettings(**{"model": "m", "texts": ["t"], "facts": 100, **changes})


def test_training_files_are_written_and_nothing_is_measured(world, reader, tmp_path, capsys):
    cli.main(arguments(world, reader, tmp_path / "none", write_training=tmp_path / "new"))
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["documents.jsonl", "questions.jsonl"]
    assert not (tmp_path / "none").exists()


def test_shares_have_intervals_over_questions():
    share = Score.of([1, 0, 1, 1] * 25)
    assert share.value == 0.75 and share.questions == 100
    assert 0.65 < share.low < 0.69 and 0.81 < share.high < 0.85
    assert np.isnan(Score.of([]).value)
