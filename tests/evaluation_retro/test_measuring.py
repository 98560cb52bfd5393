"""Windows, their neighbors and their nats equal what the model and the knowledge base say."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from evaluation_retro.found import find, kept_find
from evaluation_retro.kept import Kept
from evaluation_retro.measuring import WindowNats
from evaluation_retro.opening import ModelSettings, open_model
from evaluation_retro.windows import TextSettings, Windows, draw_windows
from retrieval import Document, MilvusRetriever

from ..support.evaluated import place_of
from ..support.training_world import CHUNK

WINDOW = 4 * CHUNK


@pytest.fixture
def windows(world, opened):
    settings = TextSettings(texts=[str(world / "held_out"), str(world / "train")], window=WINDOW, windows=5)
    return draw_windows(settings.documents(), opened.tokenizer, settings)


def with_neighbors(opened, k):
    retriever = opened.retriever
    return MilvusRetriever(retriever.store, retriever.tokenizer, retriever.embedder, num_neighbors=k)


def nats_of_the_model(model, tokens, **arguments):
    logits = model(tokens, **arguments).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").numpy()


def test_windows_are_pieces_of_documents_each_of_another_one(world, opened, windows):
    assert windows.tokens.shape == (5, WINDOW) and len(set(windows.doc_ids)) == 5
    for tokens, doc_id in zip(windows.tokens.tolist(), windows.doc_ids, strict=True):
        (whole,) = opened.tokenizer.encode_batch([(world / doc_id).read_text()])
        assert any(whole[start : start + WINDOW] == tokens for start in range(len(whole)))


def test_bytes_of_windows_are_those_of_their_text(opened, windows):
    expected = [len(opened.tokenizer.decode_bytes(row[CHUNK:])) for row in windows.tokens.tolist()]
    assert windows.text_bytes(opened.tokenizer, CHUNK).tolist() == expected


def test_text_shorter_than_a_window_is_refused_with_its_length(opened):
    settings = TextSettings(texts=["some"], window=WINDOW)
    with pytest.raises(ValueError, match="longest has 2 tokens"):
        draw_windows([Document("a", "e"), Document("b", "ee")], opened.tokenizer, settings)


@pytest.mark.parametrize("stride", [None, 3])
def test_neighbors_are_those_of_each_chunk_and_never_of_the_own_document(opened, windows, stride):
    found = find(opened.retriever, windows, stride)
    points = range(CHUNK, WINDOW, stride or CHUNK)
    assert found.ids.shape[:2] == (5, len(points))
    for row, (tokens, doc_id) in enumerate(zip(windows.tokens.tolist(), windows.doc_ids, strict=True)):
        for slot, point in enumerate(points):
            alone = opened.retriever.retrieve([tokens[point - CHUNK : point]], [[doc_id]])
            assert torch.equal(found.ids[row, slot], alone.ids[0])
            assert found.doc_ids[row, slot].tolist() == alone.doc_ids[0]
            assert doc_id not in alone.doc_ids[0]


def test_kept_neighbors_are_not_searched_for_again(opened, windows, tmp_path, monkeypatch):
    kept = Kept(tmp_path, {})
    found = kept_find(kept, "held_out", opened.retriever, windows)
    monkeypatch.setattr(opened.retriever, "retrieve", None)
    again = kept_find(kept, "held_out", opened.retriever, windows)
    for name, array in found.arrays().items():
        assert np.array_equal(array, again.arrays()[name]), name


def test_shuffled_neighbors_keep_their_documents(opened, windows):
    found = find(opened.retriever, windows)
    shuffled = found.shuffled(1)
    place = {found.ids[row, slot].numpy().tobytes(): (row, slot) for row in range(5) for slot in range(3)}
    for row in range(5):
        for slot in range(3):
            from_row, from_slot = place[shuffled.ids[row, slot].numpy().tobytes()]
            assert from_row != row
            assert shuffled.doc_ids[row, slot].tolist() == found.doc_ids[from_row, from_slot].tolist()


def test_one_window_has_no_other_one_to_take_neighbors_from(opened, windows):
    found = find(opened.retriever, windows).rows(slice(0, 1))
    with pytest.raises(ValueError, match="there is only one"):
        found.shuffled()


def test_windows_too_short_to_predict_after_a_chunk_are_refused(opened):
    with pytest.raises(ValueError, match="Set --window to 9 or more"):
        find(opened.retriever, Windows(torch.zeros(1, CHUNK, dtype=torch.long), ["a"]))


def test_a_knowledge_base_of_the_measured_documents_alone_has_no_neighbors(opened, windows):
    every = [row["doc_id"] for row in opened.retriever.store.scan(["doc_id"])]

    class Without:
        chunk_size, num_neighbors = CHUNK, 2

        def retrieve(self, chunks, exclude_doc_ids):
            return opened.retriever.retrieve(chunks, exclude_doc_ids=[every] * len(chunks))

    with pytest.raises(ValueError, match="No neighbors were found for any of 15 chunks"):
        find(Without(), windows)


@torch.no_grad()
@pytest.mark.parametrize("which", ["copier", "attender"])
@pytest.mark.parametrize(("k", "stride"), [(2, CHUNK), (3, 4)])
def test_nats_are_the_models_with_any_number_of_neighbors_and_stride(which, k, stride, world, request, tmp_path):
    opened = open_model(ModelSettings(model=str(request.getfixturevalue(which)), **place_of(world)))
    settings = TextSettings(texts=[str(world / "held_out")], window=WINDOW, windows=3)
    windows = draw_windows(settings.documents(), opened.tokenizer, settings)
    found = find(with_neighbors(opened, k), windows, stride)
    measured = WindowNats(opened.model, windows, Kept(tmp_path, {}), batch_size=2)
    off, on = measured.off(), measured.on("on", found)
    assert opened.model.config.num_neighbors == 2 and opened.model.config.retrieval_stride == CHUNK
    opened.model.config.num_neighbors = k
    arguments = found.inputs.as_arguments() | {"retrieval_stride": stride}
    np.testing.assert_allclose(on, nats_of_the_model(opened.model, windows.tokens, **arguments), atol=1e-4)
    np.testing.assert_allclose(off, nats_of_the_model(opened.model, windows.tokens, use_retrieval=False), atol=1e-4)
    assert np.abs(on - off).max() > 0.01
    opened.close()


def test_a_measurement_that_broke_off_goes_on_where_it_was(opened, tmp_path, monkeypatch):
    windows = Windows(torch.randint(0, 300, (20, WINDOW)), [str(row) for row in range(20)])
    expected = WindowNats(opened.model, windows, Kept(tmp_path / "whole", {})).off()
    forward, calls = opened.model.forward, []

    def broken(*args, **kwargs):
        calls.append(args)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    monkeypatch.setattr(opened.model, "forward", broken)
    measured = WindowNats(opened.model, windows, Kept(tmp_path / "broken", {}))
    with pytest.raises(KeyboardInterrupt):
        measured.off()
    before = len(list((tmp_path / "broken").glob("*states*.npz")))
    assert before >= 1
    calls.clear()
    calls.extend([None] * 100)  # no further break
    assert np.array_equal(measured.off(), expected)


def test_parts_of_another_measurement_are_refused_by_name(tmp_path):
    Kept(tmp_path, {"window": 32, "seed": 0})  # it keeps nothing, so the folder stays free
    kept = Kept(tmp_path, {"window": 64, "seed": 0})
    kept.arrays("squares", lambda: {"squares": np.arange(3) ** 2})
    Kept(tmp_path, {"window": 64, "seed": 0})
    with pytest.raises(ValueError, match=r"window was 64 and is 128.*Name another folder"):
        Kept(tmp_path, {"window": 128, "seed": 0})


def test_a_part_is_computed_once_and_no_half_of_it_is_kept(tmp_path):
    kept, asked = Kept(tmp_path, {}), []

    def compute(rows):
        asked.append(rows)
        if rows.start == 4 and asked.count(rows) == 1:
            raise OSError("broken")
        return {"squares": np.arange(rows.start, rows.stop) ** 2}

    with pytest.raises(OSError, match="broken"):
        kept.parts("numbers", 10, 4, compute)
    assert kept.parts("numbers", 10, 4, compute)["squares"].tolist() == [n**2 for n in range(10)]
    assert asked.count(range(0, 4)) == 1 and not list(tmp_path.glob("*.part"))
