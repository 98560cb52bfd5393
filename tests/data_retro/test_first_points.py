"""The collator follows any retrieval grid, and excludes exactly the documents still to come."""

import json
import random
import subprocess
import sys
from collections import Counter

import pytest
import torch

from data_retro.collator import RetroDataCollator
from data_retro.first_points import FirstPoints
from data_retro.packing import PackedStream, pack, packed_dataset
from modeling_retro import RetroForCausalLM
from retrieval import BulkTokenizer, Document

from ..support.training_world import CHUNK

END = 0
GRIDS = [(first, stride) for stride in (1, 3, 8) for first in (1, 2, 7, 8, 9, 15) if first < CHUNK + stride]


def sequences(seed, count=12, block_size=44):
    """Return packed sequences and, for each of their tokens, its document."""
    dice = random.Random(seed)
    documents = [
        (f"d{dice.randrange(9)}", [dice.randrange(1, 50) for _ in range(dice.choice([1, 2, 3, 7, 8, 20]))])
        for _ in range(count * 5)
    ]
    owners = [doc_id for doc_id, ids in documents for _ in [*ids, END]]
    rows = list(pack(documents, block_size, CHUNK, END))[:count]
    return rows, [
        owners[number * block_size : number * block_size + len(row["input_ids"])] for number, row in enumerate(rows)
    ]


def points_one_by_one(length, first_point, stride):
    return [end for end in range(1, length + 1) if end >= first_point and (end - first_point) % stride == 0]


@pytest.mark.parametrize(("first_point", "stride"), GRIDS)
def test_queries_end_at_the_points_and_exclude_exactly_what_is_still_to_come(retriever, first_point, stride):
    rows, owners = sequences(seed=first_point * 10 + stride)
    batch = RetroDataCollator(retriever, stride)([row | {"first_point": first_point} for row in rows])
    assert batch["first_point"].tolist() == [first_point] * len(rows)
    ((queries, excluded),) = retriever.calls
    expected = [
        (row["input_ids"][max(end - CHUNK, 0) : end], set(owner[max(end - CHUNK, 0) :]))
        for row, owner in zip(rows, owners, strict=True)
        for end in points_one_by_one(len(row["input_ids"]), first_point, stride)
    ]
    assert queries == [query for query, _ in expected]
    assert [set(documents) for documents in excluded] == [documents for _, documents in expected]


@pytest.mark.parametrize(("first_point", "stride"), GRIDS)
def test_slots_follow_the_points(retriever, first_point, stride):
    lengths = (44, 9, first_point, first_point - 1)
    rows = [{"input_ids": [*range(n)], "doc_ids": [[]] * 6, "first_point": first_point} for n in lengths if n]
    batch = RetroDataCollator(retriever, stride)(rows)
    for row, sequence in enumerate(rows):
        points = points_one_by_one(len(sequence["input_ids"]), first_point, stride)
        assert batch["neighbor_attention_mask"][row].any(-1).any(-1).tolist() == [
            slot < len(points) for slot in range(batch["neighbor_ids"].shape[1])
        ]
        for slot, end in enumerate(points):
            found = retriever.retrieve([sequence["input_ids"][max(end - CHUNK, 0) : end]])
            assert torch.equal(batch["neighbor_ids"][row, slot], found.ids[0])


@pytest.mark.parametrize(("first_point", "stride"), GRIDS)
def test_without_the_ends_whole_chunks_are_excluded_and_never_too_little(retriever, first_point, stride):
    rows, owners = sequences(seed=first_point)
    old = [{"input_ids": row["input_ids"], "doc_ids": row["doc_ids"], "first_point": first_point} for row in rows]
    RetroDataCollator(retriever, stride)(old)
    ((_, excluded),) = retriever.calls
    starts = [
        (owner, max(end - CHUNK, 0))
        for row, owner in zip(rows, owners, strict=True)
        for end in points_one_by_one(len(row["input_ids"]), first_point, stride)
    ]
    for documents, (owner, start) in zip(excluded, starts, strict=True):
        assert set(documents) == set(owner[start // CHUNK * CHUNK :]) >= set(owner[start:])


def test_on_the_papers_grid_the_ends_change_nothing(retriever):
    rows, _ = sequences(seed=1)
    collate = RetroDataCollator(retriever)
    old = collate([{"input_ids": row["input_ids"], "doc_ids": row["doc_ids"]} for row in rows])
    new = collate(rows)
    assert retriever.calls[0] == retriever.calls[1] and "first_point" not in new
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    same = collate([row | {"first_point": CHUNK} for row in rows])
    assert same.pop("first_point").tolist() == [CHUNK] * len(rows)
    assert all(torch.equal(old[name], same[name]) for name in old)


def test_the_leakage_filter_gets_what_follows_the_point(retriever):
    seen = {}

    class Filtering(type(retriever)):
        max_leakage = 0.125

        def retrieve(self, chunks, exclude_doc_ids=None, continuations=None):
            seen.update(continuations=continuations)
            return super().retrieve(chunks, exclude_doc_ids)

    row = {"input_ids": [*range(20)], "doc_ids": [[]] * 3, "first_point": 3}
    RetroDataCollator(Filtering(retriever.vocab_size))([row])
    assert seen["continuations"] == [[*range(3, 11)], [*range(11, 19)], [19]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"first_point": 0}], "first_point 0. Give a number from 1 to .* \\(15\\)"),
        ([{"first_point": 16}], "first_point 16. Give a number from 1 to .* \\(15\\)"),
        ([{"first_point": 3}, {}], "1 of 2 sequences in a batch have a first_point"),
        ([{"first_point": 3, "doc_ids": [["a"]]}], "2 chunks has doc_ids for 1"),
        ([{"doc_ends": [[8]]}], r"chunks of \[1, 1\] documents and doc_ends for \[1\]"),
    ],
)
def test_a_wrong_grid_is_refused(retriever, rows, message):
    row = {"input_ids": [*range(16)], "doc_ids": [["a"], ["a"]]}
    with pytest.raises(ValueError, match=message):
        RetroDataCollator(retriever)([row | changes for changes in rows])


@pytest.mark.parametrize("stride", [0, 9])
def test_a_stride_outside_its_range_is_refused(retriever, stride):
    with pytest.raises(ValueError, match=f"retrieval_stride is {stride}. Give a number from 1 to chunk_size \\(8\\)"):
        RetroDataCollator(retriever, stride)


@pytest.mark.parametrize("stride", [1, 3, 8])
def test_the_loss_of_a_batch_is_that_of_its_rows_whoever_fetches(retriever, config, stride):
    config.retrieval_stride, config.copy_head = stride, True
    torch.manual_seed(0)
    model = RetroForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "cca.c_proj" in name or "gate_scale" in name:
            torch.nn.init.ones_(parameter) if parameter.ndim < 2 else torch.nn.init.normal_(parameter)
    rows = [
        {"input_ids": [*range(5, 5 + length)], "doc_ids": [[]] * 6, "first_point": first_point}
        for length, first_point in ((44, 1), (30, 8), (17, min(15, 7 + stride)), (5, 6), (3, 2))
    ]
    batch = RetroDataCollator(retriever, stride)(rows)
    loss = model(**batch).loss
    model.set_retriever(retriever)
    alone = [
        model(
            input_ids=torch.tensor([row["input_ids"]]),
            labels=torch.tensor([row["input_ids"]]),
            first_point=torch.tensor([row["first_point"]]),
        ).loss
        for row in rows
    ]
    counts = torch.tensor([len(row["input_ids"]) - 1 for row in rows])
    torch.testing.assert_close(loss, (torch.stack(alone) * counts).sum() / counts.sum())
    del batch["first_point"]
    assert stride == 1 or not torch.allclose(loss, model(**batch).loss)


def test_all_first_points_are_equally_likely():
    draw = FirstPoints(seed=0, chunk_size=8, stride=3)
    counts = Counter(draw.of([number, 7]) for number in range(5000))
    assert sorted(counts) == [*range(1, 11)]
    assert all(400 < count < 600 for count in counts.values())  # 500 expected, 4.7 standard deviations


def test_a_first_point_follows_from_seed_and_tokens_in_every_process():
    tokens = [[number, 50_000, 3] for number in range(40)]
    ours = [FirstPoints(seed, 64, 16).of(row) for seed in (0, 1) for row in tokens]
    assert ours[:40] != ours[40:]
    program = (
        "import json, sys\nfrom data_retro.first_points import FirstPoints\n"
        "print([FirstPoints(seed, 64, 16).of(row) for seed in (0, 1) for row in json.loads(sys.argv[1])])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(tokens)], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == ours
    # stored with precomputed neighbors, so it must never change
    assert FirstPoints(0, 64, 64).of([1, 2, 3]) == 2


def test_packed_and_streamed_sequences_get_the_same_first_points_in_every_epoch(tokenizer, tmp_path):
    documents = [Document(f"d{i}", f"text {i} " * (i % 5)) for i in range(9)]
    draw = FirstPoints(3, 8, 8)
    stream = PackedStream(lambda epoch: documents, BulkTokenizer(tokenizer), 16, 8, draw)
    plain = PackedStream(lambda epoch: documents, BulkTokenizer(tokenizer), 16, 8)
    whole = [row for row, _ in zip(stream, range(30), strict=False)]
    assert [{**row, "first_point": draw.of(row["input_ids"])} for row, _ in zip(plain, whole, strict=False)] == whole
    again = PackedStream(lambda epoch: documents, BulkTokenizer(tokenizer), 16, 8, draw)
    again.load_state(stream.state_after(11))
    assert [row for row, _ in zip(again, range(19), strict=False)] == whole[11:]
    dataset = packed_dataset(lambda: iter(whole), tmp_path)
    assert dataset.to_list() == whole
