"""EleutherAI's lm-eval on local data, from Python and from its command line."""

import json
import os
import sys
from subprocess import run

import lm_eval
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM

from ..support.by_hand import HashRetriever, retrieving_model
from ..support.retro_models import CHUNK, random_tokens

TASK = """
task: local_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def documents(tokenizer):
    """Choices of one and of many tokens, contexts from less than a chunk to several."""
    rows = []
    for row in range(6):
        context, short, long = (random_tokens(n, seed=n + row) for n in (2 + 3 * row, 1 + row % 2, 2 * CHUNK))
        rows.append(
            {"context": tokenizer.decode(context), "choices": tokenizer.batch_decode([short, long]), "gold": row % 2}
        )
    return rows


@pytest.fixture(scope="module")
def tasks(documents, tmp_path_factory):
    """A folder that defines the task."""
    root = tmp_path_factory.mktemp("tasks")
    data = root / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, documents)))
    (root / "tasks").mkdir()
    (root / "tasks" / "local.yaml").write_text(TASK.format(data=data))
    return root / "tasks"


@torch.no_grad()
def by_hand(documents, tokenizer, use_retrieval):
    """Return the log-likelihood of each choice, from one forward of its context and itself."""
    model = retrieving_model()
    scores = []
    for document in documents:
        context = tokenizer.encode(document["context"])
        scores.append([])
        for choice in map(tokenizer.encode, document["choices"]):
            logits = model(torch.tensor([context + choice[:-1]]), use_retrieval=use_retrieval).logits[0]
            log_probs = logits[len(context) - 1 :].log_softmax(-1)
            scores[-1].append(log_probs[range(len(choice)), choice].sum().item())
    return torch.tensor(scores)


def scores(samples):
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    return torch.tensor([[float(answer[0]) for answer in sample["filtered_resps"]] for sample in samples])


def evaluate(tasks, **model):
    results = lm_eval.simple_evaluate(
        **model,
        tasks=["local_choices"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        batch_size=3,
        device="cpu",
        bootstrap_iters=0,
    )
    return scores(results["samples"]["local_choices"])


def test_a_model_by_its_path_scores_with_a_retriever_and_without(saved, tasks, documents, tokenizer):
    retriever = HashRetriever()
    on = evaluate(tasks, model="hf", model_args={"pretrained": saved, "retriever": retriever})
    torch.testing.assert_close(on, by_hand(documents, tokenizer, use_retrieval=True), atol=1e-4, rtol=1e-5)
    assert retriever.calls
    retriever.calls.clear()
    for model_args in ({"use_retrieval": False, "retriever": retriever}, {}):
        off = evaluate(tasks, model="hf", model_args={"pretrained": saved} | model_args)
        torch.testing.assert_close(off, by_hand(documents, tokenizer, use_retrieval=False), atol=1e-4, rtol=1e-5)
    assert retriever.calls == []
    assert (on - off).abs().max() > 0.1


def test_a_model_in_memory_scores_with_its_retriever(saved, tasks, documents, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(saved, retriever=HashRetriever())
    found = evaluate(tasks, model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4))
    torch.testing.assert_close(found, by_hand(documents, tokenizer, use_retrieval=True), atol=1e-4, rtol=1e-5)


def test_the_command_line_opens_a_saved_model(saved, tasks, documents, tokenizer, tmp_path):
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf"]
    command += ["--model_args", f"pretrained={saved},trust_remote_code=True", "--tasks", "local_choices"]
    command += ["--include_path", str(tasks), "--device", "cpu", "--batch_size", "3"]
    command += ["--output_path", str(tmp_path / "out"), "--log_samples"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    ran = run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]
    (samples,) = (tmp_path / "out").rglob("samples_local_choices_*.jsonl")
    found = scores([json.loads(line) for line in samples.read_text().splitlines()])
    torch.testing.assert_close(found, by_hand(documents, tokenizer, use_retrieval=False), atol=1e-4, rtol=1e-5)
