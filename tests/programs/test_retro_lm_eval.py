"""lm-eval's model `retro` agrees with the slow reference, and its command line reads documents."""

import json
import sys
from functools import partial

import lm_eval.tasks
import pytest
import torch
from lm_eval.api.instance import Instance
from transformers import GPT2Config, GPT2LMHeadModel

from evaluation_retro import lm_eval_cli
from evaluation_retro.lm_eval_model import RetroLM
from retrieval import BulkTokenizer, Document, Embedder, KnowledgeBaseError, MilvusRetriever, MilvusStore, ingest

from ..support.by_hand import Grid, HashRetriever, greedy_by_hand, retrieving_model, true_log_probs
from ..support.retro_models import CHUNK, random_tokens
from ..support.small_models import save_static_embedding, train_tokenizer

CONTEXTS = [random_tokens(length, seed=length) for length in (1, 2, CHUNK, CHUNK + 1, 2 * CHUNK + 3, 30)]
CONTINUATIONS = [random_tokens(length, seed=90 + length) for length in (1, 2, CHUNK + 1, 9, 1, 3)]
TASK = """
task: local_questions
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def requests(kind, arguments):
    return [Instance(kind, {}, texts, number) for number, texts in enumerate(arguments)]


@pytest.fixture(params=[1, 4])
def opened(request, saved):
    """A model with a retriever that records its calls, at batch size 1 and 4."""
    retriever = HashRetriever()
    return RetroLM(saved, retriever=retriever, device="cpu", batch_size=request.param), retriever


def queries(retriever):
    return {query for call in retriever.calls for query in call}


@pytest.fixture(scope="module")
def true_scores():
    """Return by the slow reference the score of each continuation, with its context's points."""
    model, scores = retrieving_model(), []
    for context, continuation in zip(CONTEXTS, CONTINUATIONS, strict=True):
        log_probs = true_log_probs(model, context + continuation, Grid.aligned_to(context))
        scores.append(float(log_probs[range(len(context) - 1, len(context + continuation) - 1), continuation].sum()))
    return scores


def test_scores_have_a_point_at_the_end_of_each_context(opened, tokenizer, true_scores):
    model, retriever = opened
    texts = [*zip(*(tokenizer.batch_decode(part) for part in (CONTEXTS, CONTINUATIONS)), strict=True)]
    found = model.loglikelihood(requests("loglikelihood", texts), disable_tqdm=True)
    torch.testing.assert_close([score for score, _ in found], true_scores, atol=1e-4, rtol=1e-5)
    assert {tuple(context[-CHUNK:]) for context in CONTEXTS} <= queries(retriever)


def test_a_greedy_continuation_is_recognized(opened, tokenizer):
    model, _ = opened
    context = CONTEXTS[3]
    (greedy,) = greedy_by_hand(retrieving_model(), context, 1)[len(context) :]
    texts = [(tokenizer.decode(context), tokenizer.decode(token)) for token in (greedy, (greedy + 1) % 60)]
    answers = model.loglikelihood(requests("loglikelihood", texts), disable_tqdm=True)
    assert [is_greedy for _, is_greedy in answers] == [True, False]


def test_generation_has_a_point_at_the_end_of_each_context(opened, tokenizer):
    model, retriever = opened
    settings = {"until": [], "max_gen_toks": 5}
    texts = [(tokenizer.decode(context), settings) for context in CONTEXTS]
    found = model.generate_until(requests("generate_until", texts), disable_tqdm=True)
    eos = tokenizer.eos_token_id
    for context, text in zip(CONTEXTS, found, strict=True):
        tokens = greedy_by_hand(retrieving_model(), context, 5)[len(context) :]
        assert text == tokenizer.decode(tokens[: tokens.index(eos)] if eos in tokens else tokens)
    assert {tuple(context[-CHUNK:]) for context in CONTEXTS} <= queries(retriever)


def test_rolling_texts_have_the_papers_points(opened, tokenizer):
    model, retriever = opened
    texts = [random_tokens(length, seed=length) for length in (3, 11, 30)]
    arguments = [(text,) for text in tokenizer.batch_decode(texts)]
    found = model.loglikelihood_rolling(requests("loglikelihood_rolling", arguments), disable_tqdm=True)
    searched = queries(retriever)
    alone = model.loglikelihood(requests("loglikelihood", [("", text) for (text,) in arguments]), disable_tqdm=True)
    torch.testing.assert_close([score for score, _ in alone], found)
    prefixed = [[tokenizer.eos_token_id, *text] for text in texts]
    for tokens, score in zip(prefixed, found, strict=True):
        log_probs = true_log_probs(retrieving_model(), tokens, Grid())
        assert score == pytest.approx(float(log_probs[range(len(tokens) - 1), tokens[1:]].sum()), abs=1e-3)
    assert searched == {query for tokens in prefixed for query in Grid().queries(tokens[:-1])}


def test_retrieval_off_is_what_hf_scores(saved, tokenizer):
    texts = [*zip(*(tokenizer.batch_decode(part) for part in (CONTEXTS, CONTINUATIONS)), strict=True)]
    texts += [(tokenizer.decode(random_tokens(90, seed=1)), texts[0][1])]  # longer than the model reads
    retro = RetroLM(saved, use_retrieval=False, device="cpu", batch_size=4)
    hf = lm_eval.api.registry.get_model("hf")(saved, device="cpu", batch_size=4)
    scores = [model.loglikelihood(requests("loglikelihood", texts), disable_tqdm=True) for model in (retro, hf)]
    torch.testing.assert_close(*([score for score, _ in found] for found in scores), atol=1e-4, rtol=1e-5)
    with pytest.raises(ValueError, match="more than the 64"):
        retro._loglikelihood_tokens([(None, [1], [2] * 65)])


def test_a_batch_size_is_found(saved, tokenizer, true_scores):
    model = RetroLM(saved, retriever=HashRetriever(), device="cpu", batch_size="auto", max_batch_size=3)
    texts = [*zip(*(tokenizer.batch_decode(part) for part in (CONTEXTS, CONTINUATIONS)), strict=True)]
    found = model.loglikelihood(requests("loglikelihood", texts), disable_tqdm=True)
    torch.testing.assert_close([score for score, _ in found], true_scores, atol=1e-4, rtol=1e-5)


@pytest.fixture(autouse=True)
def no_other_tasks(monkeypatch):
    """Leave out the thousands of tasks that come with lm-eval: listing them takes long."""
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(lm_eval.tasks.TaskManager, include_defaults=False))


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """A plain decoder, questions, and a knowledge base with their answers."""
    root = tmp_path_factory.mktemp("questions")
    names = ["Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hal"]
    towns = ["Oslo", "Rome", "Lima", "Kiel", "Bern", "Cork", "Nice", "York"]
    rows = [
        {"question": f"{name} lives in the town", "choices": [f" {town}", f" {towns[number - 1]}"], "gold": 0}
        for number, (name, town) in enumerate(zip(names, towns, strict=True))
    ]
    documents = {name: f"{name} lives in the town {town}." for name, town in zip(names, towns, strict=True)}
    (root / "tasks").mkdir()
    (root / "tasks" / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "tasks" / "local.yaml").write_text(TASK.format(data=root / "tasks" / "data.jsonl"))
    tokenizer = train_tokenizer([*documents.values()] * 3, 400)
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(root / "decoder")
    tokenizer.save_pretrained(root / "decoder")
    save_static_embedding(tokenizer, root / "embedding", dim=32, seed=0)
    store = MilvusStore(str(root / "kb.db"), "towns")
    embedder = Embedder(str(root / "embedding"), device="cpu")
    ingest([Document(*its) for its in documents.items()], store, BulkTokenizer(tokenizer), embedder, chunk_size=16)
    store.close()
    return root


def results_of(questions, output, monkeypatch, *model_args):
    """Run `retro-lm-eval` and return the accuracy."""
    arguments = ["--model", "retro", "--model_args", ",".join((f"pretrained={questions / 'decoder'}", *model_args))]
    arguments += ["--tasks", "local_questions", "--include_path", str(questions / "tasks"), "--device", "cpu"]
    arguments += ["--batch_size", "4", "--output_path", str(output), "--log_samples"]
    monkeypatch.setattr(sys, "argv", ["retro-lm-eval", *arguments])
    lm_eval_cli.main()
    (results,) = output.rglob("results_*.json")
    return json.loads(results.read_text())["results"]["local_questions"]["acc,none"]


def test_the_command_line_scores_with_a_knowledge_base_and_without(questions, tmp_path, monkeypatch):
    read, retrieve = [], MilvusRetriever.retrieve

    def recording(self, chunks, *arguments, **named):
        found = retrieve(self, chunks, *arguments, **named)
        for chunk, documents in zip(chunks, found.doc_ids, strict=True):
            read.append((self.tokenizer.decode_text([*map(int, chunk)]), documents[0]))
        return found

    monkeypatch.setattr(MilvusRetriever, "retrieve", recording)
    knowledge_base = [f"knowledge_base={questions / 'kb.db'}", "collection_name=towns"]
    knowledge_base += [f"embedding_model={questions / 'embedding'}", "reader=zero-shot", "chunk_size=16"]
    on = results_of(questions, tmp_path / "on", monkeypatch, *knowledge_base)
    for name in ("Ada", "Hal"):  # the question's end was searched for, and its document was read
        assert (f"{name} lives in the town", name) in read
    read.clear()
    off = results_of(questions, tmp_path / "off", monkeypatch, *knowledge_base, "use_retrieval=False")
    assert not read
    assert on == 1 and off < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "knowledge_base is not given"),
        ({"knowledge_base": "kb.db"}, "no weights that read neighbors"),
        ({"knowledge_base": "no/such/kb.db", "reader": "zero-shot"}, "no/such/kb.db"),
    ],
)
def test_bad_input_gets_a_sentence(questions, arguments, message):
    with pytest.raises((ValueError, KnowledgeBaseError), match=message):
        RetroLM(str(questions / "decoder"), device="cpu", **arguments)


def test_bad_input_ends_the_program_with_a_sentence(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["retro-lm-eval", "--model", "retro", "--tasks", "no_such_task"])
    with pytest.raises(SystemExit, match="^retro-lm-eval: .*no_such_task"):
        lm_eval_cli.main()


def test_a_missing_lm_eval_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    with pytest.raises(SystemExit, match="pip install lm-eval"):
        lm_eval_cli.main()
