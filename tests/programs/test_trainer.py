"""transformers' Trainer and its like treat a RETRO model as they treat GPT2LMHeadModel."""

import inspect
import logging

import pytest
import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, pipeline
from transformers.modelcard import TrainingSummary
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.generic import can_return_loss, find_labels

from data_retro.collator import RetroDataCollator
from modeling_retro import RetroForCausalLM

from ..support.by_hand import HashRetriever
from ..support.retro_models import CHUNK, VOCAB, random_tokens, small_model

NO_DROPOUT = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}


@pytest.fixture
def gpt2():
    sizes = {"vocab_size": VOCAB, "n_positions": 64, "n_embd": 16, "n_layer": 4, "n_head": 2}
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**sizes, **NO_DROPOUT, initializer_range=0.3, bos_token_id=0, eos_token_id=0))


@pytest.fixture
def retro(gpt2, tmp_path):
    gpt2.save_pretrained(tmp_path / "gpt2")
    return RetroForCausalLM.from_pretrained(tmp_path / "gpt2", chunk_size=CHUNK, cca_layers=[1, 3])


def trainer(model, folder, rows=None, collator=None, **settings):
    arguments = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    arguments = TrainingArguments(str(folder), **(arguments | settings))
    dataset = None if rows is None else Dataset.from_list(rows)
    return Trainer(model, arguments, train_dataset=dataset, data_collator=collator)


def rows_of(lengths):
    """Sequences that name a document for each chunk, as they are packed."""
    return [
        {"input_ids": random_tokens(length, seed=length), "doc_ids": [[f"doc{length}"]] * -(-length // CHUNK)}
        for length in lengths
    ]


def test_label_smoothing_shifts_the_labels(gpt2, retro, tmp_path):
    ids = torch.tensor([random_tokens(20, seed=1), random_tokens(20, seed=2)])
    log_probs = retro(ids).logits[:, :-1].log_softmax(-1)
    expected = -0.9 * log_probs.gather(-1, ids[:, 1:, None]).mean() - 0.1 * log_probs.mean()
    for model in (retro, gpt2):
        smoothing = trainer(model, tmp_path, label_smoothing_factor=0.1)
        loss = smoothing.compute_loss(model, {"input_ids": ids, "labels": ids.clone()})
        torch.testing.assert_close(loss, expected)


def test_accumulated_batches_are_weighted_by_their_predictions(retro, tmp_path):
    """The loss of an update is the mean over all its predictions, not over its batches.

    The library counts one token a row too many for GPT2LMHeadModel, whose class name does not say
    ForCausalLM.
    """
    rows = rows_of([24, 6, 9, 17])
    with torch.no_grad():
        losses = [
            retro(**batch).loss * (len(row["input_ids"]) - 1) for row in rows for batch in [RetroDataCollator()([row])]
        ]
    settings = {"max_steps": 1, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    run = trainer(retro, tmp_path, rows, RetroDataCollator(), **settings)
    run.train()
    expected = sum(losses).item() / sum(len(row["input_ids"]) - 1 for row in rows)
    assert run.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-5)


def test_what_libraries_derive_from_the_class_is_the_same_as_for_gpt2(gpt2, retro, tmp_path):
    told = []
    for model in (retro, gpt2):
        run = trainer(model, tmp_path)
        told.append(
            {
                "labels": run.label_names,
                "find_labels": find_labels(type(model)),
                "returns a loss": can_return_loss(type(model)),
                "takes num_items_in_batch": run.model_accepts_loss_kwargs,
                "loss function": model.loss_function,
                "main input": model.main_input_name,
                "prefix": model.base_model_prefix,
                "task of the model card": TrainingSummary.from_trainer(run).tasks,
                **{
                    name: value
                    for name, value in inspect.getmembers(type(model))
                    if name.startswith(("_supports_", "_can_compile", "_is_stateful", "supports_gradient"))
                    and isinstance(value, bool)
                },
            }
        )
    assert told[0] == told[1]
    assert told[0]["task of the model card"] == "text-generation"
    assert retro.loss_type == "ForCausalLM"
    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["retro"] == "RetroForCausalLM"  # lm-eval looks for the model type


def test_a_pipeline_does_not_call_the_model_unsupported(retro, tokenizer, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    pipeline("text-generation", model=retro, tokenizer=tokenizer)
    assert "not supported" not in caplog.text


@pytest.mark.parametrize(
    "settings",
    [{}, {"train_sampling_strategy": "group_by_length"}, {"remove_unused_columns": False}],
    ids=lambda settings: ",".join(settings) or "defaults",
)
def test_trainer_keeps_what_the_collator_needs(settings, tmp_path):
    retriever = HashRetriever()
    excluded = []
    retrieve = retriever.retrieve
    retriever.retrieve = lambda chunks, exclude_doc_ids=None: (
        excluded.extend(exclude_doc_ids) or retrieve(chunks, exclude_doc_ids)
    )
    rows = rows_of([24, 6, 9, 17])
    run = trainer(small_model(), tmp_path, rows, RetroDataCollator(retriever), max_steps=1, **settings)
    run.train()
    assert len(excluded) == sum(len(row["input_ids"]) // CHUNK for row in rows)
    assert set(excluded) == {frozenset(row["doc_ids"][0]) for row in rows}


def test_trainer_keeps_first_points_and_where_documents_end(tmp_path):
    retriever, calls = HashRetriever(), []
    retrieve = retriever.retrieve
    retriever.retrieve = lambda chunks, exclude_doc_ids=None: (
        calls.append(([*map(list, chunks)], exclude_doc_ids)) or retrieve(chunks, exclude_doc_ids)
    )
    tokens = random_tokens(2 * CHUNK, seed=0)
    row = {"input_ids": tokens, "first_point": CHUNK + 2}
    row |= {"doc_ids": [["a", "b"], ["b"]], "doc_ends": [[2, CHUNK], [2 * CHUNK]]}
    run = trainer(small_model(), tmp_path, [row], RetroDataCollator(retriever), max_steps=1)
    run.train()
    assert calls == [([tokens[2 : CHUNK + 2]], [{"b"}])]


def test_document_ids_that_reach_the_model_are_refused():
    with pytest.raises(ValueError, match="RetroDataCollator"):
        small_model()(input_ids=torch.tensor([[1, 2, 3]]), doc_ids=[[["a"]]])
