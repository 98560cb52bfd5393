"""Drafts from neighbors: the same text as without them, in fewer forwards."""

import itertools
import random
from itertools import takewhile

import pytest
import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from modeling_retro.draft_lengths import MOST_MATCH
from modeling_retro.drafts import LEAST_MATCH, MOST_LENGTH, Passages
from modeling_retro.library import CACHE

from ..support.by_hand import PROMPTS, Grid, greedy_by_hand, next_token_logits, retrieving_model
from ..support.retro_models import CHUNK, VOCAB, random_tokens, small_model

STEPS = 3 * CHUNK + 2
DRAFTED = {"draft_from_neighbors": True, "do_sample": False}


def repeating(length, seed=1, period=5):
    """Return a prompt that repeats itself, so that drafts are made from it, too."""
    return (random_tokens(period, seed) * length)[:length]


class Forwards:
    """Counts the forwards of a model, and their tokens."""

    def __init__(self, model):
        self.tokens = []
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, args, kwargs):
        self.tokens.append(kwargs["input_ids"].shape[1])


@pytest.mark.parametrize("stride", [CHUNK, 3, 1])
@pytest.mark.parametrize("prompt", [*PROMPTS, repeating(2 * CHUNK + 1), repeating(3 * CHUNK)], ids=len)
def test_greedy_text_and_log_are_those_without_drafts(prompt, stride):
    model = retrieving_model()
    output = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=STEPS,
        retrieval_stride=stride,
        return_dict_in_generate=True,
        **DRAFTED,
    )
    grid = Grid.aligned_to(prompt, stride)
    written = greedy_by_hand(model, prompt, STEPS, grid)
    assert output.sequences[0].tolist() == written
    assert [chunk.end for chunk in output.retrieved[0]] == grid.points(written[:-1])
    searched = list(itertools.chain(*model.retriever.calls))
    assert set(searched) == set(grid.queries(written[:-1]))  # never for tokens that were only drafted


def test_the_paper_s_grid_and_padding_are_kept():
    model, prompt = retrieving_model(), repeating(2 * CHUNK + 1)
    written = greedy_by_hand(model, prompt, STEPS, Grid())
    plain = model.generate(torch.tensor([prompt]), max_new_tokens=STEPS, align_to_prompt=False, **DRAFTED)
    assert plain[0].tolist() == written
    padded = torch.tensor([[VOCAB - 1] * 3 + prompt])
    mask = (torch.arange(padded.shape[1]) >= 3).long()[None]
    settings = {"max_new_tokens": STEPS, "attention_mask": mask}
    assert torch.equal(
        model.generate(padded, **settings, **DRAFTED), model.generate(padded, do_sample=False, **settings)
    )


class TestNeighborsThatKnow:
    """A fresh model ignores its neighbors, so these can hold exactly what it will write."""

    STEPS = 20

    @pytest.fixture
    def model(self):
        torch.manual_seed(0)
        model = small_model(cca_layers=[], chunk_size=32, neighbor_length=64, num_neighbors=1)
        with torch.no_grad():
            model.copy_head.gate_scale.zero_()
        model.generation_config.pad_token_id = VOCAB - 1
        return model

    @pytest.fixture
    def prompt(self):
        return torch.tensor([random_tokens(6, seed=3)])

    @pytest.fixture
    def given(self, model, prompt):
        expected = model.generate(prompt, max_new_tokens=self.STEPS, do_sample=False, use_retrieval=False)
        ids = torch.nn.functional.pad(expected, (0, 64 - expected.shape[1]))[None, None]
        mask = torch.arange(64) < expected.shape[1]
        return {
            "neighbor_ids": ids,
            "neighbor_attention_mask": mask.expand(ids.shape),
            "first_point": torch.tensor([6]),
            "retrieval_stride": 32,
        }, expected

    def test_fewer_forwards_write_the_same(self, model, prompt, given):
        given, expected = given
        forwards = Forwards(model)
        assert torch.equal(model.generate(prompt, max_new_tokens=self.STEPS, **given, **DRAFTED), expected)
        assert len(forwards.tokens) <= 4 and max(forwards.tokens[1:]) > 8  # drafts grow

    def test_wrong_neighbors_soon_cost_nothing(self, model, prompt, given):
        given, expected = given
        ids = given["neighbor_ids"]
        given["neighbor_ids"] = torch.where(torch.arange(64) % 3 == 2, (ids + 1) % VOCAB, ids)  # every third is wrong
        forwards = Forwards(model)
        assert torch.equal(model.generate(prompt, max_new_tokens=self.STEPS, **given, **DRAFTED), expected)
        assert len(forwards.tokens) <= self.STEPS

    @pytest.mark.parametrize("length", range(1, 20, 3))
    def test_it_stops_at_any_token(self, model, prompt, given, length):
        class Long(StoppingCriteria):
            def __call__(self, input_ids, scores, **kwargs):
                return torch.tensor([input_ids.shape[1] >= 6 + length])

        given, expected = given
        settings = {"max_new_tokens": self.STEPS, "stopping_criteria": StoppingCriteriaList([Long()])}
        assert torch.equal(model.generate(prompt, **settings, **given, **DRAFTED), expected[:, : 6 + length])

    def test_a_configuration_is_used_and_stays_as_it_is(self, model, prompt, given):
        given, expected = given
        config, forwards = (
            GenerationConfig(max_new_tokens=self.STEPS, do_sample=False, pad_token_id=VOCAB - 1),
            Forwards(model),
        )
        before = config.to_dict()
        assert torch.equal(model.generate(prompt, config, draft_from_neighbors=True, **given), expected)
        assert len(forwards.tokens) <= 4 and config.to_dict() == before

    def test_a_text_ends_where_it_would_without_drafts(self, model, prompt, given):
        given, expected = given
        stop = expected[0, 6 + 9].item()
        length = expected[0, 6:].tolist().index(stop) + 1

        class Stop(StoppingCriteria):
            def __call__(self, input_ids, scores, **kwargs):
                return input_ids[:, -1] == stop

        for settings in ({"stopping_criteria": StoppingCriteriaList([Stop()])}, {"eos_token_id": stop}):
            output = model.generate(prompt, max_new_tokens=self.STEPS, **settings, **given, **DRAFTED)
            assert torch.equal(output, expected[:, : 6 + length])
        output = model.generate(prompt, max_new_tokens=7, **given, **DRAFTED)
        assert torch.equal(output, expected[:, : 6 + 7])

    def test_a_streamer_gets_every_token_once(self, model, prompt, given):
        given, expected = given
        got = []

        class Streamer:
            def put(self, tokens):
                got.extend(tokens.flatten().tolist())

            def end(self):
                got.append("end")

        model.generate(prompt, max_new_tokens=self.STEPS, streamer=Streamer(), **given, **DRAFTED)
        assert got == [*expected[0].tolist(), "end"]

    def test_the_cache_can_be_handed_back(self, model, prompt, given):
        given, expected = given
        output = model.generate(prompt, max_new_tokens=9, return_dict_in_generate=True, **given, **DRAFTED)
        more = model.generate(
            output.sequences, cache=output[CACHE], max_new_tokens=4, use_retrieval=True, do_sample=False
        )
        assert torch.equal(more, expected[:, : 6 + 13])


def test_samples_have_the_model_s_distribution():
    model, prompt = retrieving_model(), repeating(2 * CHUNK + 1)
    grid, top, samples = Grid.aligned_to(prompt), 2, 120

    def likely(tokens):
        with torch.no_grad():
            logits, ids = next_token_logits(model, tokens, grid).topk(top)
        return list(zip(ids.tolist(), logits.softmax(-1).tolist(), strict=True))

    expected = {(first, second): p * q for first, p in likely(prompt) for second, q in likely([*prompt, first])}
    torch.manual_seed(0)
    counts = dict.fromkeys(expected, 0)
    for _ in range(samples):
        written = model.generate(
            torch.tensor([prompt]), max_new_tokens=2, do_sample=True, top_k=top, draft_from_neighbors=True
        )
        counts[tuple(written[0, len(prompt) :].tolist())] += 1
    chi_square = sum((counts[pair] - samples * p) ** 2 / (samples * p) for pair, p in expected.items())
    assert chi_square < 16.3  # 3 degrees of freedom: exceeded once in a thousand


class TestRefusals:
    def test_one_row_at_a_time(self):
        model = retrieving_model()
        with pytest.raises(ValueError, match="one row at a time, but there are 2"):
            model.generate(torch.tensor([PROMPTS[0]] * 2), max_new_tokens=3, **DRAFTED)

    @pytest.mark.parametrize("other", [{"assistant_model": "itself"}, {"prompt_lookup_num_tokens": 3}])
    def test_one_kind_of_draft(self, other):
        model = retrieving_model()
        other = {name: model if value == "itself" else value for name, value in other.items()}
        with pytest.raises(ValueError, match=f"draft_from_neighbors and {next(iter(other))} both draft"):
            model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=3, **other, **DRAFTED)

    def test_beams_and_a_configuration_that_drafts(self):
        model, prompt = retrieving_model(), torch.tensor([PROMPTS[0]])
        with pytest.raises(ValueError, match="num_beams is 2, but draft_from_neighbors follows one text"):
            model.generate(prompt, max_new_tokens=3, num_beams=2, **DRAFTED)
        config = GenerationConfig(max_new_tokens=3, prompt_lookup_num_tokens=3)
        with pytest.raises(ValueError, match="prompt_lookup_num_tokens both draft"):
            model.generate(prompt, generation_config=config, draft_from_neighbors=True)

    @pytest.mark.parametrize("setting", [{"cache_implementation": "static"}, {"use_cache": False}])
    def test_caches_that_cannot_be_cropped(self, setting):
        with pytest.raises(ValueError, match="needs a dynamic cache"):
            retrieving_model().generate(torch.tensor([PROMPTS[0]]), max_new_tokens=3, **setting, **DRAFTED)


class TestPassages:
    @staticmethod
    def passages(text, *neighbors):
        passages = Passages()
        for neighbor in neighbors:
            passages.add(neighbor)
        passages.extend_text(text)
        return passages

    def test_the_longest_match_counts(self):
        neighbors = [1, 2, 9], [8, 7, 1, 2, 5, 6]
        assert self.passages([7, 1, 2], *neighbors).continuation() == ([5, 6], 3)
        assert self.passages([3, 1, 2], *reversed(neighbors)).continuation() == ([9], 2)
        assert self.passages([3, 2], *neighbors).continuation() == ([], 0)  # one token is no match
        assert self.passages([5, 6], *neighbors).continuation() == ([], 0)  # nothing follows
        assert self.passages([], *neighbors).continuation() == ([], 0)

    def test_a_match_at_a_passage_s_end_hides_no_other(self):
        assert self.passages([1, 2, 3], [1, 2, 3, 4], [1, 2, 3]).continuation() == ([4], 3)
        assert self.passages([1, 2, 3], [9, 2, 3, 4], [1, 2, 3]).continuation() == ([4], 2)

    def test_the_text_is_a_passage_that_grows(self):
        passages = self.passages([1, 2, 3, 1, 2], [1, 2, 4])
        assert passages.continuation() == ([3, 1, 2] * (MOST_LENGTH // 3), 2)  # of equals, the last
        passages.add([5, 1, 2, 6])
        assert passages.continuation() == ([6], 2)
        passages.extend_text([3])
        assert passages.continuation() == ([1, 2, 3] * (MOST_LENGTH // 3), 3)

    def test_matches_are_those_of_a_slow_search(self):
        generator = random.Random(0)
        for _ in range(200):
            text, *neighbors = ([generator.randrange(3) for _ in range(generator.randrange(25))] for _ in range(4))
            matches = [
                (matched_by_hand(text, passage[:place]), passage[place : place + MOST_LENGTH])
                for passage in neighbors
                for place in range(LEAST_MATCH, len(passage))
            ]
            for place in range(LEAST_MATCH, len(text)):
                circle = [text[place + step % (len(text) - place)] for step in range(MOST_LENGTH)]
                matches.append((matched_by_hand(text, text[:place]), circle))
            longest = max((length for length, _ in matches), default=0)
            following, matched = self.passages(text, *neighbors).continuation()
            if longest < LEAST_MATCH:
                assert (following, matched) == ([], 0)
            else:
                assert matched == longest and (matched, following) in matches


def matched_by_hand(text, before):
    """Return how many last tokens two lists share, at most MOST_MATCH."""
    pairs = zip(reversed(text), reversed(before), strict=False)
    return min(len(list(takewhile(lambda pair: pair[0] == pair[1], pairs))), MOST_MATCH)
