"""A zero-shot copy head is trained on features alone, and computes what a copy head computes."""

import json
import pydoc_data.topics

import numpy as np
import pytest
import torch
import zero_shot
from frozen_decoder import head_config
from small_decoders import (
    CONFIGURATIONS,
    VOCABULARIES,
    is_for_training,
    measured_documents,
    train_decoder,
    training_texts,
)
from transformers import AutoModelForCausalLM
from zero_shot import Cell

from modeling_retro.copy_head import CopyHead
from retrieval import Document


@pytest.fixture
def cell(bench, row):
    return Cell(zero_shot.PRETRAINED, "topics", bench, row)


def test_the_head_uses_neither_hidden_states_nor_scores(cell, tmp_path):
    head = zero_shot.fit_zero_shot([cell], {cell.name: cell.training()}, steps=5)
    line = zero_shot.measure(cell, head, steps=3)
    assert head.gate_scale > 0 and head.gate_features.any()
    numbers = json.loads(json.dumps(zero_shot.shipped(head)))
    assert numbers["similarity"] == [0.0] and numbers["gate_features"][head.config.match_length + 2 :] == [0.0, 0.0]

    whole = CopyHead(head_config(cell.bench.model, cell.bench.size.chunk_size, zero_shot.K))
    whole.init_weights()  # the hidden state's weights stay zero
    for name in zero_shot.SHIPPED:
        getattr(whole, name).data = torch.tensor(numbers[name])
    (alone, on, blind), (_, shuffled, blind_shuffled) = cell.held_out(whole, head)
    np.testing.assert_allclose([on, shuffled], [blind, blind_shuffled], rtol=1e-3)  # the numbers are rounded
    gain = (alone - on).sum() / torch.tensor(2.0).log().item() / cell.text_bytes().sum()
    assert line["gain"][0] == pytest.approx(gain, abs=1e-3)
    assert line["harm"] == pytest.approx(shuffled.sum() / alone.sum() - 1, abs=1e-3)

    *_, row, summary = zero_shot.table([line])
    assert row.count("|") == 8 and "of 1 cells" in summary


def test_a_stronger_decoder_predicts_targets_better_and_keeps_its_other_odds(cell):
    batch = zero_shot.blind(next(cell.bench.batches(cell.neighbors(), "training", zero_shot.K)))
    before, after = (one.logits.log_softmax(-1) for one in (batch, zero_shot.strengthen(batch, seed=0)))
    targets = batch.targets.unsqueeze(-1)
    known = (after.gather(-1, targets).exp() - before.gather(-1, targets).exp()) / (
        1 - before.gather(-1, targets).exp()
    )
    assert known.min() >= 0 and known.max() <= zero_shot.MOST_KNOWN and 0.4 < known.mean() < 0.6
    others = (before - after).scatter(-1, targets, 0.0)[..., :-1]
    rest = (before - after)[..., -1:]
    torch.testing.assert_close(others, rest.expand_as(others).scatter(-1, targets, 0.0), atol=1e-3, rtol=1e-3)


def test_most_training_chunks_read_wrong_neighbors(cell):
    ids = zero_shot.shuffle_share(cell.neighbors(), "training", zero_shot.SHUFFLED_SHARE)["training_ids"]
    changed = (ids != cell.neighbors()["training_ids"]).any((2, 3))
    assert 0.4 < changed.mean() < 0.9


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_small_decoders_are_trained_on_other_documents(name, tmp_path):
    documents = [Document(name, text) for name, text in sorted(pydoc_data.topics.topics.items())]
    texts, measured = training_texts(documents), measured_documents(lambda: documents)
    assert texts and measured and not any(is_for_training(document) for document in measured)
    assert not {document.text for document in measured} & set(texts)
    folder = train_decoder(name, texts, steps=2, folder=tmp_path / name)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.get_input_embeddings().num_embeddings == VOCABULARIES[name]
