"""The collator puts each chunk's neighbors in its slot and excludes documents still to come."""

import numpy as np
import pytest
import torch

from data_retro.collator import RetroDataCollator
from modeling_retro import RetroForCausalLM

# With chunks of 8 tokens: three whole chunks and a partial one; one whole chunk; less than a chunk.
ROWS = [
    {"input_ids": list(range(28)), "doc_ids": [["a"], ["a", "b"], ["b"], ["c"]]},
    {"input_ids": list(range(100, 110)), "doc_ids": [["d"], ["d"]]},
    {"input_ids": [7, 8, 9], "doc_ids": [["e"]]},
]


def test_slots_hold_the_neighbors_of_their_chunks(retriever):
    batch = RetroDataCollator(retriever)(ROWS)
    assert batch["neighbor_ids"].shape == batch["neighbor_attention_mask"].shape == (3, 3, 2, 16)
    for row, slot in [(0, 0), (0, 1), (0, 2), (1, 0)]:
        chunk = batch["input_ids"][row, slot * 8 : slot * 8 + 8]
        own = retriever.retrieve(chunk[None])
        assert torch.equal(batch["neighbor_ids"][row, slot], own.ids[0])
        assert torch.equal(batch["neighbor_attention_mask"][row, slot], own.attention_mask[0])
    for row, slot in [(1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]:
        assert not batch["neighbor_attention_mask"][row, slot].any()


def test_one_search_excludes_for_each_chunk_its_documents_and_those_after_it(retriever):
    RetroDataCollator(retriever)(ROWS)
    ((chunks, excluded),) = retriever.calls
    assert chunks == [[*range(8)], [*range(8, 16)], [*range(16, 24)], [*range(100, 108)]]
    assert [set(documents) for documents in excluded] == [{"a", "b", "c"}, {"a", "b", "c"}, {"b", "c"}, {"d"}]


def test_padding_is_not_predicted(retriever):
    batch = RetroDataCollator(retriever)(ROWS)
    assert batch["attention_mask"].sum(1).tolist() == [28, 10, 3]
    assert torch.equal(batch["labels"] == -100, batch["attention_mask"] == 0)
    assert "attention_mask" not in RetroDataCollator(retriever)(ROWS[:1])


def test_without_a_retriever_the_batch_has_no_neighbors():
    assert set(RetroDataCollator()(ROWS[:1])) == {"input_ids", "labels"}


def test_a_batch_without_a_whole_chunk_searches_nothing_and_has_all_gradients(retriever, config):
    """Otherwise processes would disagree on which parameters have gradients."""
    batch = RetroDataCollator(retriever)(ROWS[2:])
    assert batch["neighbor_ids"].shape == (1, 1, 2, 16) and not retriever.calls
    assert not batch["neighbor_attention_mask"].any()
    config.copy_head = True
    model = RetroForCausalLM(config)
    loss = model(**batch).loss
    torch.testing.assert_close(loss, model(**batch | {"use_retrieval": False}).loss)
    loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_stored_neighbors_of_long_and_short_sequences_go_into_one_batch(retriever):
    collate = RetroDataCollator(retriever)
    stored = [
        row | {name: tensor.tolist() for name, tensor in found.items()}
        for row, found in zip(ROWS, collate.neighbors_of(ROWS), strict=True)
    ]
    for rows in (ROWS, ROWS[2:]):
        places = [ROWS.index(row) for row in rows]
        fetched, read = collate(rows), RetroDataCollator()([stored[place] for place in places])
        assert fetched.keys() == read.keys()
        assert [name for name in fetched if not torch.equal(fetched[name], read[name])] == []


@pytest.mark.parametrize("kind", [np.array, torch.tensor, tuple], ids=["numpy", "tensors", "tuples"])
def test_tokens_may_come_as_arrays_and_tensors(retriever, kind):
    collate = RetroDataCollator(retriever)
    expected = collate(ROWS)
    found = collate([row | {"input_ids": kind(row["input_ids"])} for row in ROWS])
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def test_given_labels_are_kept_and_given_padding_is_left_out(retriever):
    collate = RetroDataCollator(retriever)
    expected = collate(ROWS)
    padded = [
        {
            "input_ids": [0] * 3 + row["input_ids"] + [0] * 5,
            "attention_mask": [0] * 3 + [1] * len(row["input_ids"]) + [0] * 5,
            "labels": [-100] * 5 + row["input_ids"][2:] + [-100] * 5,
            "doc_ids": row["doc_ids"],
        }
        for row in ROWS
    ]
    found = collate(padded)
    expected["labels"][:, :2] = -100
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": list(range(8))}, "remove_unused_columns=False"),
        ({"input_ids": list(range(16)), "doc_ids": [["a"]]}, "2 chunks has doc_ids for 1"),
        ({"text": "a"}, r"no input_ids, only \['text'\]"),
        ({"input_ids": [1, 2], "doc_ids": [[]], "labels": [1]}, "2 tokens has 1 values in labels"),
        ({"input_ids": [1, 2], "doc_ids": [[]], "attention_mask": [1] * 3}, "2 tokens has 3 values in attention_mask"),
    ],
    ids=["no_doc_ids", "too_few_doc_ids", "no_tokens", "labels", "attention_mask"],
)
def test_an_incomplete_sequence_is_refused_with_what_to_do(retriever, row, message):
    with pytest.raises(ValueError, match=message):
        RetroDataCollator(retriever)([row])
