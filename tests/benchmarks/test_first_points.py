"""The benchmark of first points measures the same tokens after prompts of every length."""

import first_points
import numpy as np
from first_points import CONTINUATION, LONGEST_PROMPT, PROMPTS

from evaluation_retro import Evaluation


def test_the_same_tokens_follow_every_prompt():
    text = [*range(500, 756)]
    for length in PROMPTS:
        (row,) = first_points.after_prompt([{"input_ids": text}, {"input_ids": text[:90]}], length)
        assert row["first_point"] == length and len(row["labels"]) == len(row["input_ids"])
        predicted = [token for token in row["labels"] if token != -100]
        assert predicted == text[LONGEST_PROMPT : LONGEST_PROMPT + CONTINUATION] == row["input_ids"][length:]


def test_a_line_says_what_random_points_save():
    sizes = np.full((2, 2, 2), 10)
    measured = {
        grid: Evaluation(np.full((2, 3, 2), nats), sizes) for grid, nats in (("paper", np.log(2)), ("random", 0.0))
    }
    line = first_points.report("a seed", measured)
    assert line.split() == ["a", "seed", "0.1000", "0.1000", "0.0000", "+0.1000", "±", "0.0000"]
