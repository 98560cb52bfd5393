"""The benchmark of strides measures what the model says when it searches by itself."""

import first_points
import numpy as np
import pytest
import strides
import torch
import torch.nn.functional as F

from ..support.retro_models import small_model
from ..support.training_world import CHUNK, NEIGHBOR, ArithmeticRetriever

STRIDES = (None, CHUNK, 3, 1)
SEARCHES = {None: 0, CHUNK: 4 + 2, 3: 9 + 4, 1: 25 + 10}  # points in rows of 32 and 17 tokens
CHANGES = {"copy_head": {"cca_layers": []}, "both": {}}


@pytest.fixture
def models():
    sizes = {"chunk_size": CHUNK, "neighbor_length": NEIGHBOR}
    return {reader: small_model(**sizes, **changes) for reader, changes in CHANGES.items()}


@pytest.fixture
def retriever(models):
    return ArithmeticRetriever(models["both"].config.vocab_size)


@pytest.fixture
def rows():
    rng = torch.Generator().manual_seed(0)
    texts = [torch.randint(1, 60, (length,), generator=rng).tolist() for length in (32, 17)]
    return [{"input_ids": text, "doc_ids": [[]] * 4} for text in texts]


@torch.no_grad()
def test_sequences_are_read_as_by_a_model_that_searches(models, retriever, rows):
    measured = strides.read(models, rows, retriever, STRIDES)
    assert [*measured] == [(reader, stride) for reader in CHANGES for stride in STRIDES]
    for (reader, stride), side in measured.items():
        assert (side.searches, side.tokens, len(side.milliseconds)) == (SEARCHES[stride], 32 + 17, 1)
        model = models[reader]
        model.set_retriever(retriever if stride else None)
        model.config.retrieval_stride = stride or CHUNK
        for row, nats in zip(rows, side.nats, strict=True):
            tokens = torch.tensor([row["input_ids"]])
            expected = F.cross_entropy(model(tokens).logits[0, :-1], tokens[0, 1:], reduction="sum")
            assert nats == pytest.approx(float(expected), abs=1e-3)
    assert len({round(side.nats[0], 3) for side in measured.values()}) == len(measured)


def test_what_is_written_is_searched_for_at_each_stride(models, retriever):
    for model in models.values():
        model.set_retriever(retriever)
    prompts = [[*range(1, 9)], [*range(1, 14)]]
    measured = strides.write(models, prompts, STRIDES, new=6)
    for (_, stride), side in measured.items():
        points = {None: 0, CHUNK: 1 + 1, 3: 2 + 3, 1: 6 + 11}  # the first prompt's and the second's
        assert (side.searches, side.tokens, len(side.milliseconds)) == (points[stride], 12, 2)


def test_tables_compare_with_one_search_a_chunk():
    text_bytes = np.array([4, 8])
    sides = [strides.Measured([6.0, 9.0], 0, 10, [2.0]), strides.Measured([4.0, 8.0], 1, 10, [2.0, 3.0, 7.0])]
    measured = dict(zip([("both", None), ("both", first_points.CHUNK)], sides, strict=True))
    _, _, off, paper = strides.read_table(measured, text_bytes)
    assert f"| no search | 0.0000 | {15 / np.log(2) / 12:.4f} | {-3 / np.log(2) / 12:+.4f} ± " in off
    assert paper.endswith(f"| 64 | 0.1000 | {12 / np.log(2) / 12:.4f} |  | 3.000 (2.000 to 7.000) |")
    assert strides.write_table(measured)[-1].endswith("| 64 | 0.1000 | 3.0 (2.0 to 7.0) |")
