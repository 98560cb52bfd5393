"""The lengths of drafts follow from the chances of their tokens and from their costs."""

import pytest
import torch

from modeling_retro.draft_lengths import DraftCosts, MatchStatistics

from ..support.retro_models import small_model

COSTS = DraftCosts(fixed=0.7, each=0.03)


def taught(statistics, proposed, written, times):
    for _ in range(times):
        statistics.learn(proposed, 2, written)
    return statistics


def test_drafts_end_where_they_are_wrong_and_begin_again():
    assert MatchStatistics().best_length(2, 48, COSTS) > 0
    statistics = taught(MatchStatistics(), [1], [2], times=6)
    assert statistics.best_length(2, 48, COSTS) == 0
    assert statistics.best_length(3, 48, COSTS) > 0  # longer matches have chances of their own
    assert taught(statistics, [1], [1], times=30).best_length(2, 48, COSTS) > 0


def test_a_draft_is_as_long_as_pays():
    always = taught(MatchStatistics(), [1] * 48, [1] * 48, times=20)
    assert always.best_length(2, 48, COSTS) == 48
    assert always.best_length(2, 5, COSTS) == 5
    assert always.best_length(2, 0, COSTS) == 0
    assert always.best_length(2, 48, DraftCosts(fixed=0.7, each=1.1)) == 0


@pytest.mark.parametrize("costs", [COSTS, DraftCosts(0.1, 0.025), DraftCosts(0.1, 0.3)])
def test_the_length_saves_most_in_a_simulation(costs):
    generator = torch.Generator().manual_seed(0)
    accepted = (torch.rand(20_000, 48, generator=generator) < 0.8).long().cumprod(1)
    saved = [accepted[:, :n].sum(1).float().mean().item() - costs.fixed - costs.each * n for n in range(1, 49)]
    statistics = MatchStatistics()
    for _ in range(60):  # four of five are right after a match of any length
        for length in range(2, 17):
            for written in (1, 1, 2, 1, 1):
                statistics.learn([1], length, [written])
    length = statistics.best_length(2, 48, costs)
    assert saved[length - 1] == pytest.approx(max(saved), abs=0.05)


def test_costs_depend_on_the_number_format():
    model = small_model()
    assert DraftCosts.of(model).fixed > DraftCosts.of(model.to(torch.bfloat16)).fixed
