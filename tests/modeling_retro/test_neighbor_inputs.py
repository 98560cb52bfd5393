"""NeighborInputs checks its tensors, and gives missing neighbors the score 0."""

import pytest
import torch

from modeling_retro.neighbor_inputs import NeighborInputs

IDS = torch.arange(2 * 3 * 2 * 5).view(2, 3, 2, 5)


def test_by_default_all_neighbors_are_there_with_score_0():
    neighbors = NeighborInputs.from_arguments(IDS, None, None)
    assert neighbors.mask.all() and neighbors.mask.shape == IDS.shape
    assert torch.equal(neighbors.scores, torch.zeros(2, 3, 2))


def test_scores_of_missing_neighbors_are_0_and_others_stay():
    mask = torch.ones_like(IDS)  # integers, as attention masks often are
    mask[0, 1, 1] = mask[1, 2] = 0
    scores = torch.rand(2, 3, 2)
    expected = scores.clone()
    expected[0, 1, 1] = expected[1, 2] = expected[0, 0, 0] = 0
    scores[0, 1, 1] = torch.nan
    scores[0, 0, 0] = torch.nan  # of a neighbor that is there, from some other retriever
    neighbors = NeighborInputs(IDS, mask, scores)
    assert torch.equal(neighbors.scores, expected)
    assert neighbors.mask.dtype == torch.bool and torch.equal(neighbors.mask, mask.bool())
    again = NeighborInputs.from_arguments(*neighbors.as_arguments().values())
    assert torch.equal(again.scores, expected)


def test_slots_beyond_the_last_have_no_neighbors():
    neighbors = NeighborInputs.from_arguments(IDS, None, torch.rand(2, 3, 2))
    taken = neighbors.take_slots(torch.tensor([[2, 3], [0, 1]]))
    assert torch.equal(taken.ids[0, 0], IDS[0, 2]) and torch.equal(taken.ids[1], IDS[1, :2])
    assert taken.mask.flatten(2).any(-1).tolist() == [[True, False], [True, True]]
    assert torch.equal(taken.scores[1], neighbors.scores[1, :2]) and not taken.scores[0, 1].any()


@pytest.mark.parametrize(
    ("ids", "mask", "scores", "message"),
    [
        (IDS[0], None, None, r"neighbor_ids has shape \(3, 2, 5\)"),
        (IDS.float(), None, None, "neighbor_ids has type torch.float32"),
        (IDS, IDS[:, :2], None, r"neighbor_attention_mask has shape \(2, 2, 2, 5\)"),
        (IDS, None, torch.zeros(2, 3), r"neighbor_scores has shape \(2, 3\)"),
    ],
    ids=["shape", "type", "mask", "scores"],
)
def test_tensors_of_another_shape_or_type_are_refused(ids, mask, scores, message):
    with pytest.raises(ValueError, match=message):
        NeighborInputs.from_arguments(ids, mask, scores)
