"""Calls in one piece or many, padded, reordered and cropped, all give the same logits."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from modeling_retro import RetroCache
from modeling_retro.library import CACHE

from ..support.retro_models import CHUNK, RowNeighbors, neighbor_tensors, random_tokens, small_model

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
LENGTH = 5 * CHUNK + 2


def alone(model, tokens, neighbors):
    ids, mask = neighbor_tensors([neighbors], len(tokens) // CHUNK)
    return model(torch.tensor([tokens]), neighbor_ids=ids, neighbor_attention_mask=mask).logits[0]


def in_parts(model, rows, neighbors, padding, ends, cache=None):
    """Run left-padded rows in calls that end at the given columns, each with its neighbors."""
    columns = torch.tensor([[0] * pad + row for pad, row in zip(padding, rows, strict=True)])
    attention_mask = torch.tensor([[0] * pad + [1] * len(row) for pad, row in zip(padding, rows, strict=True)])
    logits, start = [], 0
    for end in ends:
        first = [max(0, start - pad) // CHUNK for pad in padding]
        slots = max(max(0, end - pad) // CHUNK - f for pad, f in zip(padding, first, strict=True))
        ids = mask = None
        if slots:
            complete = [
                {u: n for u, n in row.items() if (u + 1) * CHUNK <= end - pad}
                for row, pad in zip(neighbors, padding, strict=True)
            ]
            ids, mask = neighbor_tensors(complete, slots, first)
        output = model(
            columns[:, start:end],
            attention_mask=attention_mask[:, :end],
            cache=cache,
            neighbor_ids=ids,
            neighbor_attention_mask=mask,
            use_cache=True,
        )
        cache, start = output[CACHE], end
        logits.append(output.logits)
    return torch.cat(logits, dim=1), cache


SPLITS = {
    "prefill, then token by token": lambda n: [n // 2, *range(n // 2 + 1, n + 1)],
    "token by token": lambda n: list(range(1, n + 1)),
    "two halves": lambda n: [n // 2, n],
    "within one chunk": lambda n: [CHUNK + 1, CHUNK + 2, 2 * CHUNK - 1, n],
    "at a chunk's end": lambda n: [CHUNK, 2 * CHUNK, n],
    "one before and one after a chunk's end": lambda n: [CHUNK - 1, CHUNK + 1, 3 * CHUNK - 1, n],
    "three tokens a call": lambda n: [*range(3, n, 3), n],
}


@pytest.mark.parametrize("split", SPLITS)
@torch.no_grad()
def test_every_split_into_calls_gives_the_same_logits(model, split):
    tokens, neighbors = random_tokens(LENGTH, seed=1), RowNeighbors(5, seed=1, missing={1}).chunks
    logits, cache = in_parts(model, [tokens], [neighbors], [0], SPLITS[split](LENGTH))
    torch.testing.assert_close(logits[0], alone(model, tokens, neighbors), **TOLERANCE)
    assert isinstance(cache, RetroCache) and cache.get_seq_length() == LENGTH


@pytest.mark.parametrize("split", SPLITS)
@torch.no_grad()
def test_left_padded_rows_give_the_logits_they_give_alone(model, split):
    padding = [0, 1, CHUNK, 2 * CHUNK + 3, LENGTH - 1]
    rows = [random_tokens(LENGTH - pad, seed=pad) for pad in padding]
    neighbors = [RowNeighbors(len(row) // CHUNK, seed=len(row)).chunks for row in rows]
    logits, _ = in_parts(model, rows, neighbors, padding, SPLITS[split](LENGTH))
    for number, (row, pad) in enumerate(zip(rows, padding, strict=True)):
        torch.testing.assert_close(logits[number, pad:], alone(model, row, neighbors[number]), **TOLERANCE)


@torch.no_grad()
def test_right_padded_rows_give_the_logits_they_give_alone(model):
    rows = [random_tokens(length, seed=length) for length in (LENGTH, 2 * CHUNK, 2 * CHUNK - 1, 1)]
    neighbors = [RowNeighbors(5, seed=length).chunks for length in range(4)]  # slots past a row's chunks are ignored
    ids, mask = neighbor_tensors(neighbors, 5)
    padded = torch.tensor([row + [0] * (LENGTH - len(row)) for row in rows])
    attention_mask = torch.tensor([[1] * len(row) + [0] * (LENGTH - len(row)) for row in rows])
    logits = model(padded, attention_mask=attention_mask, neighbor_ids=ids, neighbor_attention_mask=mask).logits
    for number, row in enumerate(rows):
        torch.testing.assert_close(logits[number, : len(row)], alone(model, row, neighbors[number]), **TOLERANCE)


@torch.no_grad()
def test_padding_within_a_row_is_ignored(model):
    tokens, neighbors = random_tokens(3 * CHUNK + 1, seed=1), RowNeighbors(3, seed=1).chunks
    real = torch.ones(LENGTH, dtype=torch.long)
    real[[0, 3, 4, 9, 10, 11, 20, 21, 18]] = 0
    columns = torch.zeros(1, LENGTH, dtype=torch.long)
    columns[0, real.bool()] = torch.tensor(tokens)
    ids, mask = neighbor_tensors([neighbors], 3)
    kwargs = {"neighbor_ids": ids, "neighbor_attention_mask": mask}
    logits = model(columns, attention_mask=real[None], **kwargs).logits[0, real.bool()]
    torch.testing.assert_close(logits, alone(model, tokens, neighbors), **TOLERANCE)


@torch.no_grad()
def test_with_a_4d_mask_positions_locate_the_chunks(model):
    """With a prepared 4D mask, as of a static cache, positions tell where padding ends."""
    padding = [0, 3]
    rows = [random_tokens(LENGTH - pad, seed=pad) for pad in padding]
    neighbors = [RowNeighbors(len(row) // CHUNK, seed=len(row)).chunks for row in rows]
    ids, mask = neighbor_tensors(neighbors, 5)
    real = torch.tensor([[0] * pad + [1] * (LENGTH - pad) for pad in padding], dtype=torch.bool)
    allowed = torch.ones(LENGTH, LENGTH).tril().bool() & real[:, None, None, :] | torch.eye(LENGTH).bool()
    if model.config._attn_implementation == "eager":
        allowed = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
    logits = model(
        torch.tensor([[0] * pad + row for pad, row in zip(padding, rows, strict=True)]),
        attention_mask=allowed,
        position_ids=(real.long().cumsum(-1) - 1).clamp(min=0),
        neighbor_ids=ids,
        neighbor_attention_mask=mask,
    ).logits
    for number, (row, pad) in enumerate(zip(rows, padding, strict=True)):
        torch.testing.assert_close(logits[number, pad:], alone(model, row, neighbors[number]), **TOLERANCE)


@torch.no_grad()
def test_the_cache_reorders_repeats_and_selects_all_that_it_holds(model):
    padding = [0, 2]
    rows = [random_tokens(LENGTH - pad, seed=pad) for pad in padding]
    neighbors = [RowNeighbors(len(row) // CHUNK, seed=len(row)).chunks for row in rows]
    half = LENGTH // 2

    def rest(cache, order):
        """Run the second half of the rows in a new order, on a cache in that order."""
        columns = torch.tensor([[0] * padding[i] + rows[i] for i in order])
        attention_mask = torch.tensor([[0] * padding[i] + [1] * len(rows[i]) for i in order])
        first = [(half - padding[i]) // CHUNK for i in order]
        ids, mask = neighbor_tensors([neighbors[i] for i in order], 3, first)
        return model(
            columns[:, half:],
            attention_mask=attention_mask,
            cache=cache,
            neighbor_ids=ids,
            neighbor_attention_mask=mask,
        ).logits

    for change, order in (
        (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
        (lambda cache: cache.reorder_cache(torch.tensor([1, 1])), [1, 1]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    ):
        _, cache = in_parts(model, rows, neighbors, padding, [half])
        change(cache)
        logits = rest(cache, order)
        for place, i in enumerate(order):
            expected = alone(model, rows[i], neighbors[i])[half - padding[i] :]
            torch.testing.assert_close(logits[place], expected, **TOLERANCE)


@pytest.mark.parametrize("removed", [1, CHUNK - 1, CHUNK, 2 * CHUNK + 1, LENGTH])
@torch.no_grad()
def test_a_cropped_cache_continues_as_if_never_longer(model, removed):
    tokens, neighbors = random_tokens(LENGTH, seed=1), RowNeighbors(5, seed=1).chunks
    other, other_neighbors = random_tokens(LENGTH, seed=2), RowNeighbors(5, seed=2, missing={3}).chunks
    kept = LENGTH - removed
    _, cache = in_parts(model, [tokens], [neighbors], [0], [LENGTH])
    cache.crop(-removed)
    row = tokens[:kept] + other[kept:]
    row_neighbors = {u: (neighbors if (u + 1) * CHUNK <= kept else other_neighbors)[u] for u in range(5)}
    expected = alone(model, row, row_neighbors)
    ids, mask = neighbor_tensors([row_neighbors], LENGTH // CHUNK - kept // CHUNK, [kept // CHUNK])
    logits = model(torch.tensor([row[kept:]]), cache=cache, neighbor_ids=ids, neighbor_attention_mask=mask).logits[0]
    torch.testing.assert_close(logits, expected[kept:], **TOLERANCE)


@torch.no_grad()
def test_after_a_crop_a_chunk_without_neighbors_does_not_attend_to_old_ones(model):
    tokens, neighbors = random_tokens(LENGTH, seed=1), RowNeighbors(5, seed=1).chunks
    _, cache = in_parts(model, [tokens], [neighbors], [0], [LENGTH])
    cache.crop(-(LENGTH - CHUNK - 1))  # chunk 0 stays
    logits = model(torch.tensor([tokens[CHUNK + 1 :]]), cache=cache).logits[0]
    expected = alone(model, tokens, {0: neighbors[0]})
    torch.testing.assert_close(logits, expected[CHUNK + 1 :], **TOLERANCE)


@torch.no_grad()
def test_a_static_cache_can_be_reset_and_used_again(model):
    tokens, neighbors = random_tokens(LENGTH, seed=1), RowNeighbors(5, seed=1).chunks
    cache = RetroCache(StaticCache(config=model.config, max_cache_len=LENGTH))
    in_parts(model, [tokens[::-1]], [neighbors], [0], [LENGTH], cache)
    cache.reset()
    logits, _ = in_parts(model, [tokens], [neighbors], [0], [CHUNK + 1, CHUNK + 2, LENGTH], cache)
    torch.testing.assert_close(logits[0], alone(model, tokens, neighbors), **TOLERANCE)


@pytest.mark.parametrize("kind", ["lazy", "dynamic", "static"])
@torch.no_grad()
def test_a_decoders_cache_that_is_handed_in_goes_on_sharing_its_layers(kind):
    model, tokens = small_model(), torch.tensor([random_tokens(LENGTH, seed=1)])
    cache = {
        "lazy": DynamicCache,
        "dynamic": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=LENGTH),
    }[kind]()
    returned = model(tokens[:, :CHUNK], cache=cache, use_cache=True)[CACHE]
    assert isinstance(returned, RetroCache) and cache.get_seq_length() == CHUNK
    model(tokens[:, CHUNK:], cache=returned, use_cache=True)
    assert cache.get_seq_length() == returned.get_seq_length() == LENGTH
    assert all(map(torch.equal, (layer.keys for layer in cache.layers), (layer.keys for layer in returned.layers)))


def test_a_cache_without_retros_memory_is_refused():
    model, tokens = small_model(), torch.tensor([random_tokens(LENGTH, seed=1)])
    plain = model(tokens, cache=DynamicCache(config=model.config), use_retrieval=False)[CACHE]
    with pytest.raises(ValueError, match="holds 22 tokens.*has 0"):
        model(tokens[:, :1], cache=plain)
    model(tokens[:, :1], cache=plain, use_retrieval=False)


def test_an_attention_mask_must_cover_the_cache():
    model, tokens = small_model(), torch.tensor([random_tokens(LENGTH, seed=1)])
    cache = model(tokens)[CACHE]
    with pytest.raises(ValueError, match="covers 1 tokens.* 22 in the cache"):
        model(tokens[:, :1], cache=cache, attention_mask=torch.ones(1, 1))
