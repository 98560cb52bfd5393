"""Any first point and stride: every way of computing a row gives the slow reference's logits."""

import functools

import pytest
import torch
from transformers import StaticCache

from modeling_retro import RetroCache, RetroConfig
from modeling_retro.library import CACHE
from modeling_retro.retrieval_points import RetrievalPoints, aligned_first_point, retrieval_points

from ..support.by_hand import (
    PROMPTS,
    Grid,
    HashRetriever,
    greedy_by_hand,
    left_padded,
    next_token_logits,
    retrieving_model,
    true_log_probs,
)
from ..support.retro_models import CHUNK, random_tokens, small_model

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
LENGTH = 4 * CHUNK + 3
GRIDS = [
    Grid(CHUNK, CHUNK),
    Grid(1, CHUNK),
    Grid(CHUNK - 1, CHUNK),
    Grid(2 * CHUNK - 1, CHUNK),
    Grid(CHUNK, 2),
    Grid(CHUNK + 1, 3),
    Grid(2, 3),
    Grid(3, 1),
]
GREEDY = {"max_new_tokens": 2 * CHUNK + 1, "do_sample": False}


def ids(grid):
    return f"first {grid.first}, stride {grid.stride}"


@pytest.fixture(params=GRIDS, ids=ids)
def grid(request):
    return request.param


@pytest.fixture
def model():
    return retrieving_model()


@functools.cache
def reference_log_probs(grid, seed=1):
    """Return the slow reference's log-probabilities (T, V) of a row of random tokens."""
    return true_log_probs(retrieving_model(), random_tokens(LENGTH, seed), grid)


@functools.cache
def written_by_hand(prompt, stride):
    """Return the prompt and its greedy continuation, with a point at the prompt's end."""
    return greedy_by_hand(retrieving_model(), prompt, GREEDY["max_new_tokens"], Grid.aligned_to(prompt, stride))


def in_calls(model, rows, grids, ends, cache=None):
    """Run left-padded rows in calls that end at the given columns; return logits and cache."""
    batch, logits, start = left_padded(rows), [], 0
    points = {"first_point": torch.tensor([grid.first for grid in grids]), "retrieval_stride": grids[0].stride}
    for end in ends:
        output = model(
            batch["input_ids"][:, start:end],
            attention_mask=batch["attention_mask"][:, :end],
            cache=cache,
            use_cache=True,
            **points,
        )
        cache, start, points = output[CACHE], end, {}
        logits.append(output.logits)
    return torch.cat(logits, dim=1), cache


SPLITS = {
    "one forward": lambda n: [n],
    "prefill, then token by token": lambda n: [n // 2, *range(n // 2 + 1, n + 1)],
    "token by token": lambda n: list(range(1, n + 1)),
    "pieces": lambda n: [2, 3, CHUNK, CHUNK + 1, 2 * CHUNK + 3, n],
}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("split", SPLITS)
@torch.no_grad()
def test_every_split_into_calls_agrees_with_the_slow_reference(grid, split, implementation):
    model = retrieving_model(attn_implementation=implementation)
    logits, _ = in_calls(model, [random_tokens(LENGTH, seed=1)], [grid], SPLITS[split](LENGTH))
    torch.testing.assert_close(logits[0].log_softmax(-1), reference_log_probs(grid), **TOLERANCE)


@pytest.mark.parametrize(
    "changes", [{"cca_layers": []}, {"copy_head": False, "cca_match": False}, {"encoder_cca_layers": [0, 1]}]
)
@torch.no_grad()
def test_other_readers_agree_with_the_slow_reference(grid, changes):
    model, tokens = retrieving_model(**changes), random_tokens(LENGTH, seed=2)
    logits, _ = in_calls(model, [tokens], [grid], [LENGTH])
    torch.testing.assert_close(logits[0].log_softmax(-1), true_log_probs(model, tokens, grid), **TOLERANCE)


@pytest.mark.parametrize("split", SPLITS)
@torch.no_grad()
def test_left_padded_rows_with_first_points_of_their_own_give_the_logits_they_give_alone(model, split):
    rows = [random_tokens(length, seed=length) for length in (LENGTH, LENGTH - 1, 2 * CHUNK, CHUNK - 1, 1)]
    grids = [Grid(first, 3) for first in (1, 6, 4, 3, 2)]
    logits, _ = in_calls(model, rows, grids, SPLITS[split](LENGTH))
    for number, (row, grid) in enumerate(zip(rows, grids, strict=True)):
        alone, _ = in_calls(model, [row], [grid], [len(row)])
        torch.testing.assert_close(logits[number, LENGTH - len(row) :], alone[0], **TOLERANCE)


@torch.no_grad()
def test_the_default_is_the_papers_grid_to_the_bit(model):
    tokens = torch.tensor([random_tokens(LENGTH, seed=3)])
    assert torch.equal(model(tokens).logits, model(tokens, **Grid().arguments()).logits)
    model.config.retrieval_stride = 2
    strided = model(tokens).logits
    assert torch.equal(strided, model(tokens, **Grid(CHUNK, 2).arguments()).logits)
    assert not torch.allclose(strided, model(tokens, retrieval_stride=CHUNK).logits)


@torch.no_grad()
def test_padding_within_a_row_is_ignored(model, grid):
    tokens = random_tokens(LENGTH, seed=1)
    real = torch.ones(LENGTH + 6, dtype=torch.long)
    real[[0, 3, 4, 9, 12, 20]] = 0
    columns = torch.zeros(1, len(real), dtype=torch.long)
    columns[0, real.bool()] = torch.tensor(tokens)
    logits = model(columns, attention_mask=real[None], **grid.arguments()).logits[0, real.bool()]
    torch.testing.assert_close(logits, in_calls(model, [tokens], [grid], [LENGTH])[0][0], **TOLERANCE)


@torch.no_grad()
def test_packed_texts_count_from_their_own_start(model, grid):
    texts = [random_tokens(length, seed=length) for length in (CHUNK - 1, 2 * CHUNK + 1, 1, CHUNK, 2 * CHUNK - 1)]
    position_ids = torch.tensor([[place for text in texts for place in range(len(text))]])
    packed = {"position_ids": position_ids, "use_cache": False}
    logits = model(torch.tensor([sum(texts, [])]), **packed, **grid.arguments()).logits[0]
    alone = [in_calls(model, [text], [grid], [len(text)])[0][0] for text in texts]
    torch.testing.assert_close(logits, torch.cat(alone), **TOLERANCE)
    assert model.retriever.calls[0] == list(dict.fromkeys(query for text in texts for query in grid.queries(text)))


@torch.no_grad()
def test_a_cache_follows_its_rows(model):
    rows = [random_tokens(LENGTH, seed=1), random_tokens(LENGTH - 1, seed=2)]
    grids = [Grid(2, 3), Grid(5, 3)]
    _, cache = in_calls(model, rows, grids, [LENGTH])
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.crop(-2)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3, 2]))
    more = random_tokens(CHUNK + 1, seed=3)
    mask = torch.tensor([[0] * (LENGTH - len(row)) + [1] * (len(row) + CHUNK - 1) for row in (rows[1], *[rows[0]] * 2)])
    logits = model(torch.tensor([more] * 3), attention_mask=mask, cache=cache).logits[:, -1]
    for number, own in zip([1, 0, 0], logits, strict=True):
        expected = next_token_logits(model, rows[number][:-2] + more, grids[number])
        torch.testing.assert_close(own, expected, **TOLERANCE)


@torch.no_grad()
def test_a_static_cache_can_be_reset_and_filled_with_other_points(model):
    cache = RetroCache(StaticCache(config=model.config, max_cache_len=LENGTH))
    tokens = random_tokens(LENGTH, seed=1)
    in_calls(model, [tokens[::-1]], [Grid(1, 2)], [CHUNK, LENGTH], cache)
    cache.reset()
    logits, _ = in_calls(model, [tokens], [Grid(3, 3)], [CHUNK, LENGTH], cache)
    torch.testing.assert_close(logits, in_calls(model, [tokens], [Grid(3, 3)], [LENGTH])[0], **TOLERANCE)


def test_no_neighbor_leaks_backwards(model, grid):
    """A point's neighbors reach exactly the tokens from the point's last one on, until the next."""
    tokens = random_tokens(LENGTH, seed=4)
    points = grid.points(tokens)
    found = HashRetriever().retrieve(grid.queries(tokens))
    given = {"neighbor_attention_mask": found.attention_mask[None], "neighbor_scores": found.scores[None]}
    given |= grid.arguments() | {"use_cache": False}
    with torch.no_grad():
        before = model(torch.tensor([tokens]), neighbor_ids=found.ids[None], **given).logits[0]
        for u, point in enumerate(points):
            changed = found.ids.clone()
            changed[u] = (changed[u] + 1) % model.config.vocab_size
            after = model(torch.tensor([tokens]), neighbor_ids=changed[None], **given).logits[0]
            differs = (after - before).abs().amax(-1) > 1e-7
            assert not differs[: point - 1].any()
            assert differs[point - 1 : point - 1 + grid.stride].all()


def test_gradients_agree_with_and_without_checkpointing(grid):
    gradients = []
    for checkpointing in (False, True):
        model = retrieving_model(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
        model.train()
        if checkpointing:
            # transformers 5.24 renamed it
            (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
        tokens = torch.tensor([random_tokens(LENGTH, seed=5)])
        model(tokens, labels=tokens, use_cache=False, **grid.arguments()).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*gradients)


def test_a_graph_of_a_training_step_holds_the_points(grid):
    torch.compiler.reset()  # graphs of other tests count towards the limit
    model, tokens = small_model(), random_tokens(LENGTH, seed=6)
    found = HashRetriever().retrieve(grid.queries(tokens))
    arguments = {"neighbor_ids": found.ids[None], "neighbor_attention_mask": found.attention_mask[None]}
    arguments |= {"input_ids": torch.tensor([tokens]), "use_cache": False} | grid.arguments()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**arguments).logits, model(**arguments).logits, **TOLERANCE)


class TestGenerate:
    @pytest.mark.parametrize(
        ("stride", "mode"),
        [
            (CHUNK, {}),
            (1, {}),
            (3, {}),
            (3, {"use_cache": False}),
            (3, {"prefill_chunk_size": 5}),
            (3, {"cache_implementation": "static"}),
        ],
    )
    def test_the_prompts_end_is_a_point_in_every_mode(self, model, stride, mode):
        output = model.generate(
            **left_padded(PROMPTS), **GREEDY, **mode, retrieval_stride=stride, return_dict_in_generate=True
        )
        for number, prompt in enumerate(PROMPTS):
            grid, written = Grid.aligned_to(prompt, stride), written_by_hand(tuple(prompt), stride)
            assert output.sequences[number].tolist()[-len(written) :] == written
            read = output.retrieved[number]
            assert [chunk.end for chunk in read] == grid.points(written[:-1])
            assert len(prompt) in [chunk.end for chunk in read]
            expected = HashRetriever().retrieve(grid.queries(written[:-1]))
            assert [chunk.doc_ids for chunk in read] == expected.doc_ids

    def test_beams_with_a_cache_are_beams_without(self, model):
        settings = {"num_beams": 3, "retrieval_stride": 3, "return_dict_in_generate": True, **GREEDY}
        outputs = [model.generate(**left_padded(PROMPTS), **settings, use_cache=cache) for cache in (True, False)]
        assert torch.equal(outputs[0].sequences, outputs[1].sequences)
        assert outputs[0].retrieved == outputs[1].retrieved

    def test_a_short_prompt_is_searched_before_the_first_token(self, model):
        model.generate(torch.tensor([PROMPTS[1]]), max_new_tokens=1, do_sample=False)
        assert model.retriever.calls == [[tuple(PROMPTS[1])]] and len(PROMPTS[1]) < CHUNK

    def test_without_alignment_points_are_the_ends_of_chunks(self, model):
        output = model.generate(**left_padded(PROMPTS), **GREEDY, align_to_prompt=False, return_dict_in_generate=True)
        for number, prompt in enumerate(PROMPTS):
            written = greedy_by_hand(model, prompt, GREEDY["max_new_tokens"], Grid())
            assert output.sequences[number].tolist()[-len(written) :] == written
            assert [chunk.end for chunk in output.retrieved[number]] == Grid().points(written[:-1])

    def test_given_neighbors_mean_the_papers_grid_unless_a_first_point_is_given(self, model):
        prompt = random_tokens(2 * CHUNK + 1, seed=8)
        for grid, arguments in ((Grid(), {}), (Grid(3, 2), Grid(3, 2).arguments())):
            found = HashRetriever().retrieve(grid.queries(prompt))
            given = {"neighbor_ids": found.ids[None], "neighbor_attention_mask": found.attention_mask[None]}
            given |= {"neighbor_scores": found.scores[None]} | arguments
            written = model.generate(torch.tensor([prompt]), max_new_tokens=1, do_sample=False, **given)
            assert written[0].tolist() == greedy_by_hand(model, prompt, 1, grid)
        assert model.retriever.calls == []

    def test_a_first_point_replaces_the_prompts_end(self, model):
        prompts = PROMPTS[:2]
        output = model.generate(
            **left_padded(prompts),
            **GREEDY,
            first_point=torch.tensor([2, 3]),
            num_return_sequences=2,
            num_beams=2,
            return_dict_in_generate=True,
        )
        for number, read in enumerate(output.retrieved):
            assert read[0].end == [2, 3][number // 2]

    def test_the_points_of_several_prompts_stay_in_the_cache(self, model):
        cache, tokens, ends = None, [], []
        grid = Grid.aligned_to(PROMPTS[1])
        for turn, prompt in enumerate((PROMPTS[1], PROMPTS[0], random_tokens(1, seed=1), random_tokens(3, seed=2))):
            tokens = tokens + prompt
            ends.append(len(tokens))
            output = model.generate(
                torch.tensor([tokens]),
                max_new_tokens=3,
                do_sample=False,
                return_dict_in_generate=True,
                **({} if cache is None else {CACHE: cache}),
            )
            grid = Grid(grid.first, ends=tuple(ends))
            assert output.sequences[0].tolist() == greedy_by_hand(model, tokens, 3, grid), turn
            cache, tokens = output[CACHE], output.sequences[0].tolist()
            assert {chunk.end for chunk in output.retrieved[0]} <= set(grid.points(tokens))
            assert ends[-1] in [chunk.end for chunk in output.retrieved[0]]

    def test_rows_of_a_batch_are_asked_again_with_their_cache(self, model):
        batch = left_padded(PROMPTS)
        first = model.generate(**batch, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        again = torch.cat([first.sequences, torch.tensor([[5, 6]] * len(PROMPTS))], dim=1)
        mask = torch.cat([batch["attention_mask"], torch.ones(len(PROMPTS), 5, dtype=torch.long)], dim=1)
        output = model.generate(again, attention_mask=mask, max_new_tokens=5, do_sample=False, **{CACHE: first[CACHE]})
        for number, prompt in enumerate(PROMPTS):
            row = again[number].tolist()[-len(prompt) - 5 :]
            grid = Grid(Grid.aligned_to(prompt).first, ends=(len(row),))
            assert output[number].tolist()[-len(row) - 5 :] == greedy_by_hand(model, row, 5, grid)


class TestBadInput:
    tokens = torch.tensor([random_tokens(2 * CHUNK, seed=1)])

    @pytest.mark.parametrize("stride", [0, CHUNK + 1, -1])
    def test_a_stride_out_of_range(self, stride):
        for call in (small_model(), retrieving_model().generate):
            with pytest.raises(ValueError, match=f"retrieval_stride is {stride}.*from 1 to chunk_size"):
                call(self.tokens, retrieval_stride=stride)
        with pytest.raises(Exception, match=f"retrieval_stride is {stride}"):
            RetroConfig(chunk_size=CHUNK, retrieval_stride=stride)

    @pytest.mark.parametrize(
        ("first_point", "complaint"),
        [
            (torch.tensor([0]), r"\[0\].*from 1 to 7"),
            (torch.tensor([2 * CHUNK]), r"\[8\].*from 1 to 7"),
            (torch.tensor([1, 2]), r"shape \(2,\)"),
            (torch.tensor([[1]]), r"shape \(1, 1\)"),
            (torch.tensor([1.0]), "float32"),
            ([1], r"\[1\]. Give a tensor"),
        ],
    )
    def test_a_first_point_of_another_shape_or_range(self, first_point, complaint):
        for call in (small_model(), retrieving_model().generate):
            with pytest.raises(ValueError, match=f"first_point.*{complaint}"):
                call(self.tokens, first_point=first_point)

    def test_a_cache_with_other_points(self):
        model = retrieving_model()
        cache = model(self.tokens, **Grid(2, 3).arguments())[CACHE]
        with pytest.raises(ValueError, match=r"first_point is \[3\].*filled with \[2\]"):
            model(self.tokens, cache=cache, first_point=torch.tensor([3]))
        with pytest.raises(ValueError, match="retrieval_stride is 4.*stride 3"):
            model(self.tokens, cache=cache, retrieval_stride=4)
        same = model(self.tokens, cache=cache, **Grid(2, 3).arguments()).logits
        whole = model(self.tokens.repeat(1, 2), **Grid(2, 3).arguments()).logits[:, 2 * CHUNK :]
        torch.testing.assert_close(same, whole, **TOLERANCE)


@pytest.mark.parametrize("length", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK + 2])
@pytest.mark.parametrize("stride", [1, 3, CHUNK])
def test_an_aligned_first_point_is_as_defined(length, stride):
    first = aligned_first_point(length, CHUNK, stride)
    assert 1 <= first < CHUNK + stride
    if length:
        assert length in retrieval_points(length, first, stride)
        assert first >= min(length, CHUNK)  # no query is needlessly short


def test_a_saved_stride_follows_the_chunk_size_unless_it_was_set(tmp_path):
    RetroConfig(chunk_size=8).save_pretrained(tmp_path)
    assert RetroConfig.from_pretrained(tmp_path).retrieval_stride == 8
    assert RetroConfig.from_pretrained(tmp_path, chunk_size=4).retrieval_stride == 4
    RetroConfig(chunk_size=8, retrieval_stride=2).save_pretrained(tmp_path)
    assert RetroConfig.from_pretrained(tmp_path, chunk_size=4).retrieval_stride == 2


@pytest.mark.parametrize("stride", [1, 3, CHUNK])
@pytest.mark.parametrize("firsts", [None, [2, CHUNK]])
def test_a_pause_is_where_no_row_reaches_a_point(stride, firsts):
    first = None if firsts is None else torch.tensor(firsts).unsqueeze(1)
    points = RetrievalPoints(CHUNK, stride, first)
    lengths, columns = [3, CHUNK + 2], CHUNK + 2

    def reached(now):
        masks = ([False] * (columns - length) + [True] * (now - columns + length) for length in lengths)
        return [len(points.of_row(row, mask)) for row, mask in enumerate(masks)]

    for now in range(columns, columns + 3 * CHUNK):
        pause = points.pause([columns - length for length in lengths], now)
        assert pause.start == now
        assert all(reached(other) == reached(now) for other in pause)
        assert reached(pause.stop) != reached(now)
