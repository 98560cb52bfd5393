"""The comparison of searches measures what the whole decoder and copy head would say."""

from dataclasses import replace

import frozen_decoder
import numpy as np
import pytest
import search_timing
import searches
import torch
import torch.nn.functional as F
from search_rows import REFERENCE
from searches import Bench
from splits import split_corpus, without_near_duplicates

from modeling_retro.attention_plan import plan_attention
from modeling_retro.chunk_grid import ChunkGrid
from modeling_retro.copy_head import find_candidates
from modeling_retro.matching import match_tokens
from modeling_retro.neighbor_inputs import NeighborInputs
from modeling_retro.retrieval_points import RetrievalPoints
from retrieval import Document

from ..support.small_models import save_cross_encoder
from .conftest import SIZE


def random_neighbors(vocab_size, missing):
    """Three chunks' neighbors for two sequences, one of them missing if asked for."""
    mask = torch.ones(2, 3, 2, 16, dtype=torch.bool)
    mask[0, 1, 1] = not missing
    return NeighborInputs(torch.randint(vocab_size, (2, 3, 2, 16)), mask, torch.rand(2, 3, 2))


@pytest.mark.parametrize("missing", [False, True])
@torch.no_grad()
def test_few_logits_give_the_likelihoods_of_the_whole_vocabulary(decoder, tmp_path, missing):
    torch.manual_seed(1)
    vocab_size = decoder.config.vocab_size
    tokens, neighbors = torch.randint(vocab_size, (2, 32)), random_neighbors(vocab_size, missing)
    neighbors.ids[:, :, 0] = tokens[:, 4:20].unsqueeze(1)  # something to copy
    config = frozen_decoder.head_config(decoder, 8, 2)
    head = frozen_decoder.CopyHead(config)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    torch.nn.init.ones_(head.gate_scale)

    read = frozen_decoder.read_sequences(decoder, tokens.numpy(), tmp_path / "states.npz")
    batch = frozen_decoder.prepare(decoder, config, read, neighbors)

    states, embed = decoder.model(tokens).last_hidden_state, decoder.get_input_embeddings()
    grid = ChunkGrid.build(RetrievalPoints.of(config, 2), tokens.shape, 0, None, None, tokens.device)
    plan = plan_attention(config, grid, states, neighbors, None)
    matches = match_tokens(config, grid, plan, embed(tokens), neighbors, embed, None)
    candidates = find_candidates(config, plan, matches, neighbors)
    whole = head(decoder(tokens).logits, states, candidates, slice(None))[:, :-1]
    expected = F.cross_entropy(whole.transpose(1, 2), tokens[:, 1:], reduction="none")
    torch.testing.assert_close(batch.nats(head, 0), expected, atol=1e-4, rtol=1e-4)
    alone = F.cross_entropy(decoder(tokens).logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    torch.testing.assert_close(batch.nats(None, 0), alone, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(expected, alone, atol=1e-2)


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
