"""The comparison of searches splits by document, and measures each row once."""

from dataclasses import replace

import numpy as np
import pytest
import search_timing
import searches
import torch
import torch.nn.functional as F
from search_rows import REFERENCE
from searches import Bench
from splits import split_corpus, without_near_duplicates

from retrieval import Document

from ..support.small_models import save_cross_encoder
from .conftest import SIZE


def test_no_document_is_in_two_parts(documents, tokenizer):
    split = split_corpus(documents, tokenizer, SIZE)
    known = " ".join(document.text for document in split.knowledge)
    assert split.held_out.shape == (6, 32) and split.training.shape == (8, 32)
    assert {*split.training_documents} <= {document.id for document in split.knowledge}
    for ids in split.held_out:
        text = tokenizer.decode(ids[2:-2].tolist())
        assert text not in known and any(text in document.text for document in documents)


def test_documents_that_repeat_an_earlier_one_are_left_out():
    lines = [f"line {number} of a text that goes on" for number in range(10)]
    documents = [
        Document("a", "\n".join(lines)),
        Document("its copy", "\n".join(lines[:8] + ["a new line, which nothing else has"])),
        Document("half", "\n".join(lines[:5] + [f"another line {number} of other text" for number in range(5)])),
    ]
    assert [document.id for document in without_near_duplicates(documents)] == ["a", "half"]


def test_a_corpus_that_is_too_small_is_refused(documents, tokenizer):
    with pytest.raises(ValueError, match="too few"):
        split_corpus(documents[:5], tokenizer, SIZE)


@pytest.fixture
def rows(row, hf_tokenizer, tmp_path):
    reranked = replace(row, search="hybrid", reranker=str(save_cross_encoder(hf_tokenizer, tmp_path / "encoder")))
    changes = [{}, {"search": "bm25"}, {"search": "hybrid"}, {"search": "bm25", "zero_scores": True}]
    return [*(replace(row, **change) for change in changes), reranked]


def test_rows_are_measured_once_and_resumed(bench, rows, decoder, documents, tokenizer, monkeypatch):
    lines = list(searches.measure_gains(bench, rows, steps=3))
    assert [line["k"] for line in lines] == [k for k in searches.NEIGHBORS for _ in rows]
    assert rows[0].name == REFERENCE and "over_reference" not in lines[0] and "over_reference" in lines[1]
    assert len({line["bits"] for line in lines}) == len(lines)  # each row found or saw something else
    with torch.no_grad():
        tokens = torch.from_numpy(bench.split.held_out)
        nats = F.cross_entropy(decoder(tokens).logits[:, 7:-1].flatten(0, 1), tokens[:, 8:].flatten(), reduction="sum")
    text = [tokenizer.decode(ids[8:]) for ids in bench.split.held_out.tolist()]
    assert all(map(str.isascii, text))  # so that a character is a byte
    assert lines[0]["decoder"] == pytest.approx(float(nats) / np.log(2) / sum(map(len, text)), abs=1e-4)

    table = list(searches.gain_table(lines))
    assert len(table) == 3 + len(lines) and {line.count("|") for line in table} == {7}

    monkeypatch.setattr(searches, "hybrid_base", None)  # nothing is built or searched again
    monkeypatch.setattr(searches, "fetch", None)
    again = Bench(bench.folder, list, decoder, tokenizer, SIZE)
    assert list(searches.measure_gains(again, rows, steps=3)) == lines


def test_every_row_is_timed_in_every_round(bench, rows, tokenizer):
    timings = search_timing.time_rows(rows[:3], bench.split, tokenizer, 8, chunks=30, rounds=2)
    assert list(timings) == [row.name for row in rows[:3]]
    for measures in timings.values():
        assert all(len(values) == 2 and min(values) > 0 for values in measures.values())
    assert len(list(search_timing.cost_table(timings))) == 2 + 3


def test_training_sequences_do_not_read_their_own_documents(bench, row, tokenizer):
    arrays = bench.neighbors(row, 4)
    texts = {document.id: document.text for document in bench.split.knowledge}
    own = zip(bench.split.training_documents, arrays["training_ids"], arrays["training_mask"], strict=True)
    for document, neighbors, masks in own:
        others = " ".join(text for name, text in texts.items() if name != document)
        for ids, mask in zip(neighbors.reshape(-1, 16), masks.reshape(-1, 16), strict=True):
            assert tokenizer.decode(ids[mask].tolist()) in others
