"""Texts packed into one row, recognized by their positions, give the logits they give alone."""

import pytest
import torch

from ..support.by_hand import Grid, HashRetriever, retrieving_model
from ..support.retro_models import CHUNK, random_tokens

LENGTHS = [[CHUNK - 1, 2 * CHUNK + 1, CHUNK, 1, 3 * CHUNK - 1], [7 * CHUNK]]
TEXTS = [[random_tokens(length, seed=length) for length in row] for row in LENGTHS]
PACKED = {
    "input_ids": torch.tensor([sum(row, []) for row in TEXTS]),
    "position_ids": torch.tensor([[place for length in row for place in range(length)] for row in LENGTHS]),
    "use_cache": False,
}


@pytest.fixture(params=["eager", "sdpa"])
def model(request):
    return retrieving_model(attn_implementation=request.param)


@torch.no_grad()
def assert_each_as_if_alone(model, logits):
    for row, texts in zip(logits, TEXTS, strict=True):
        alone = [model(torch.tensor([text]), use_cache=False).logits[0] for text in texts]
        torch.testing.assert_close(row, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_each_text_attends_to_the_neighbors_of_its_own_chunks(model):
    with torch.no_grad():
        logits = model(**PACKED).logits
    assert model.retriever.calls == [[chunk for row in TEXTS for text in row for chunk in Grid().queries(text)]]
    assert_each_as_if_alone(model, logits)


@torch.no_grad()
def test_given_neighbors_are_in_the_order_of_the_rows_chunks(model):
    chunks = [[chunk for text in row for chunk in Grid().queries(text)] for row in TEXTS]
    ids = torch.zeros(2, max(map(len, chunks)), model.config.num_neighbors, model.config.neighbor_length).long()
    mask, scores = torch.zeros_like(ids, dtype=torch.bool), torch.zeros(ids.shape[:3])
    for row, given in enumerate(chunks):
        found = HashRetriever().retrieve(torch.tensor(given))
        ids[row, : len(given)], mask[row, : len(given)] = found.ids, found.attention_mask
        scores[row, : len(given)] = found.scores
    neighbors = {"neighbor_ids": ids, "neighbor_attention_mask": mask, "neighbor_scores": scores}
    logits = model(**PACKED, **neighbors).logits
    assert model.retriever.calls == []
    assert_each_as_if_alone(model, logits)

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = compiled(**PACKED, **neighbors).logits
    torch.testing.assert_close(found, logits, atol=1e-5, rtol=1e-5)
