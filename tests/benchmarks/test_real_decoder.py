"""The rows of the table of a real decoder say what the decoder and the heads would say."""

import in_context
import numpy as np
import pytest
import real_decoder
import torch
import torch.nn.functional as F
from in_context import window
from real_decoder import Measurement
from wrong_neighbors import shuffle_share

from .conftest import SIZE

CHUNK = SIZE.chunk_size


@pytest.fixture
def measurement(bench, row, monkeypatch):
    monkeypatch.setattr(in_context, "DTYPE", torch.float32)
    return Measurement(bench, row, steps=3)


def last_chunk(decoder, tokens):
    """The nats of the last chunk of one window, by the whole decoder."""
    with torch.no_grad():
        logits = decoder(torch.tensor([tokens])).logits[0, -CHUNK - 1 : -1]
    return float(F.cross_entropy(logits, torch.tensor(tokens[-CHUNK:]), reduction="sum"))


def test_rows_are_the_decoders_and_the_windows(measurement, decoder, tokenizer, monkeypatch):
    rows = measurement.rows(seeds=2, with_in_context=True)
    held_out, arrays = measurement.bench.split.held_out, measurement.bench.neighbors(measurement.row, 4)
    separator = tokenizer.encode_batch(["\n\n"])[0]
    for number, sequence in enumerate(held_out):
        alone = last_chunk(decoder, sequence.tolist())
        assert rows["decoder"][0][number] == pytest.approx(alone, abs=1e-3)
        ids, mask = arrays["held_out_ids"][number, -1], arrays["held_out_mask"][number, -1]
        read = [token for place in (3, 2, 1, 0) for token in [*ids[place][mask[place]].tolist(), *separator]]
        expected = last_chunk(decoder, read + sequence.tolist())
        assert rows["in-context, k = 4"][0][number] == pytest.approx(expected, abs=1e-3)
    assert {name for name, seeds in rows.items() if len(seeds) == 2} == {
        "RETRO, k = 2",
        "RETRO, k = 2, shuffled",
        "RETRO, k = 4",
        "RETRO, k = 4, shuffled",
        "in-context + RETRO, k = 4",
    }
    totals = [seeds[0].sum() for seeds in rows.values()]
    assert len({round(total, 6) for total in totals}) == len(totals) == 10

    lines = list(real_decoder.table("a corpus", rows, measurement.text_bytes(), measurement.computation()))
    assert len(lines) == len(rows) and {line.count("|") for line in lines} == {6}

    again = Measurement(measurement.bench, measurement.row, steps=3)
    monkeypatch.setattr(in_context, "window", None)  # no window is read again
    np.testing.assert_array_equal(again.in_context(4, 2)["in-context, k = 4"][0], rows["in-context, k = 4"][0])
    monkeypatch.setattr(measurement.bench, "batches", None)  # nothing is measured again
    assert again.rows(seeds=2, with_in_context=True).keys() == rows.keys()


def test_a_window_has_the_best_neighbor_last_and_no_padding():
    ids, mask = np.array([[1, 2], [3, 0], [0, 0]]), np.array([[True, True], [True, False], [False, False]])
    assert window(np.array([8, 9]), ids, mask, [7]) == [3, 7, 1, 2, 7, 8, 9]


def test_shuffled_chunks_read_another_sequences_neighbors():
    ids = np.broadcast_to(np.arange(5)[:, None, None, None], (5, 3, 2, 4))
    arrays = {"held_out_ids": ids, "held_out_mask": ids >= 0, "held_out_scores": ids[..., 0] / 10, "training_ids": ids}
    every = shuffle_share(arrays, "held_out", 1.0, seed=3)
    assert (every["held_out_ids"] != ids).all() and every["training_ids"] is ids
    np.testing.assert_array_equal(every["held_out_scores"], every["held_out_ids"][..., 0] / 10)
    some = shuffle_share(arrays, "held_out", 0.5, seed=3)["held_out_ids"] != ids
    assert 0 < some.mean() < 1 and (some.all((2, 3)) == some.any((2, 3))).all()
    assert (shuffle_share(arrays, "held_out", 0.0)["held_out_ids"] == ids).all()
