"""Packing equals a slow reference, one token at a time, and a stream continues anywhere."""

import json
import random

import pytest

from data_retro.mixtures import DocumentStream, mix
from data_retro.packing import PackedStream, pack, packed_dataset
from retrieval import BulkTokenizer, Document

END = 0


def reference(documents, block_size, chunk_size):
    stream = [(token, doc_id) for doc_id, ids in documents if ids for token in [*ids, END]]
    for start in range(0, len(stream), block_size):
        row = stream[start : start + block_size]
        if len(row) == 1:
            continue
        placed = [(place + 1, doc_id) for place, (_, doc_id) in enumerate(row)]
        chunks = [placed[i : i + chunk_size] for i in range(0, len(row), chunk_size)]
        doc_ids = [list(dict.fromkeys(doc_id for _, doc_id in chunk)) for chunk in chunks]
        yield {
            "input_ids": [token for token, _ in row],
            "doc_ids": doc_ids,
            "doc_ends": [
                [max(end for end, doc_id in chunk if doc_id == one) for one in ids]
                for chunk, ids in zip(chunks, doc_ids, strict=True)
            ],
        }


@pytest.mark.parametrize("block_size, chunk_size", [(16, 4), (16, 16), (17, 4), (3, 4), (64, 8), (2, 1)])
def test_packing_equals_the_reference_on_random_documents(block_size, chunk_size):
    dice = random.Random(block_size * 100 + chunk_size)
    for _ in range(30):
        documents = [
            (f"doc {dice.randrange(6)}", [dice.randrange(1, 50) for _ in range(dice.choice([0, 1, 3, 4, 15, 40]))])
            for _ in range(dice.randrange(8))
        ]
        assert list(pack(documents, block_size, chunk_size, END)) == list(reference(documents, block_size, chunk_size))


def test_packing_reads_documents_only_as_far_as_needed():
    def endless():
        while True:
            yield "d", [1, 2, 3]

    assert next(pack(endless(), 8, 4, END))["input_ids"] == [1, 2, 3, END, 1, 2, 3, END]


def test_a_packed_dataset_holds_the_same_rows(tmp_path):
    documents = [('"quoted"\n', [1, 2, 3, 4, 5]), ("数学", [6] * 20)]
    dataset = packed_dataset(lambda: pack(documents, 8, 4, END), tmp_path)
    assert dataset.to_list() == list(pack(documents, 8, 4, END))


def test_changed_text_is_not_read_from_an_old_file(tmp_path):
    for token in (1, 2):
        dataset = packed_dataset(lambda token=token: pack([("d", [token] * 8)], 8, 4, END), tmp_path)
        assert dataset[0]["input_ids"] == [token] * 8


def test_no_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no text"):
        packed_dataset(lambda: pack([("empty", [])], 8, 4, END), tmp_path)


def rotated(epoch, folder):
    documents = [Document(f"d{i}", f"text {i} " * (i % 5)) for i in range(9)]
    return documents[epoch % 3 :] + documents[: epoch % 3]


def skipping_at_first(epoch, folder):
    (folder / "rows.jsonl").write_text("\n".join(json.dumps({"text": f"text {i} " * (i % 5)}) for i in range(9)))
    return mix([DocumentStream(str(folder / "rows.jsonl"), initially_skip=4, shuffle_buffer=3)], epoch)


@pytest.mark.parametrize("documents", [rotated, skipping_at_first])
def test_a_stream_continues_at_any_sequence(tokenizer, tmp_path, documents):
    def stream():
        return PackedStream(lambda epoch: documents(epoch, tmp_path), BulkTokenizer(tokenizer), 16, 8)

    whole = []
    for sequence in stream():
        whole.append(sequence)
        if len(whole) == 60:
            break
    for used in (0, 1, 7, 20, 41):
        first = stream()
        ahead = iter(first)
        for _ in range(used + 3):  # read further than was used
            next(ahead)
        state = json.loads(json.dumps(first.state_after(used)))
        second = stream()
        second.load_state(state)
        assert [sequence for sequence, _ in zip(second, range(10), strict=False)] == whole[used : used + 10]
