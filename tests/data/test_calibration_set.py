"""Rows that are set aside share no answer with the others."""

import numpy as np
import pytest
from datasets import Dataset

from disco_trl.data.calibration_set import LEAST_ROWS, MOST_ROWS, split_calibration_set
from disco_trl.data.columns import RANKED_IDS


def answers_of(dataset: Dataset) -> set[tuple[int, ...]]:
    columns = [name for name in ("chosen_ids", "rejected_ids") if name in dataset.column_names]
    found = {tuple(row[name]) for row in dataset for name in columns}
    if RANKED_IDS in dataset.column_names:
        found |= {tuple(ids) for row in dataset for ids in row[RANKED_IDS] or []}
    return found


def pairs_of(answers: np.ndarray) -> Dataset:
    """Pairs `(N, 2)` of numbered answers, as token ids."""
    return Dataset.from_dict(
        {name: [[7, int(n)] for n in answers[:, side]] for side, name in enumerate(("chosen_ids", "rejected_ids"))}
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_pairs_of_one_prompt_stay_together(seed):
    # Four answers to each of 400 prompts, in all 6 pairs of them
    first = np.concatenate(
        [4 * prompt + np.array([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]) for prompt in range(400)]
    )
    dataset = pairs_of(first)
    train, aside = split_calibration_set(dataset, seed)
    assert len(train) + len(aside) == 2400 and len(aside) == 240
    assert not answers_of(train) & answers_of(aside)
    assert answers_of(train) | answers_of(aside) == answers_of(dataset)
    # In the order that they had
    kept = answers_of(train)
    assert [*train["chosen_ids"]] == [row for row in dataset["chosen_ids"] if tuple(row) in kept]
    again, other = split_calibration_set(dataset, seed)[1], split_calibration_set(dataset, seed + 1)[1]
    assert answers_of(again) == answers_of(aside) != answers_of(other)


def test_at_most_so_many_are_set_aside():
    dataset = pairs_of(np.arange(40 * MOST_ROWS).reshape(-1, 2))
    train, aside = split_calibration_set(dataset, seed=0)
    assert len(aside) == MOST_ROWS and len(train) == 19 * MOST_ROWS


def test_rankings_hold_their_answers():
    rows = [[[7, 3 * number + k] for k in range(3)] for number in range(1500)]
    pairs = {"chosen_ids": [row[0] for row in rows], "rejected_ids": [row[1] for row in rows]}
    # The third answer of a row is also the third of the one 750 rows further.
    for number in range(750):
        rows[number + 750][2] = rows[number][2]
    dataset = Dataset.from_dict({**pairs, RANKED_IDS: rows})
    train, aside = split_calibration_set(dataset, seed=0)
    assert len(aside) == 150 and not answers_of(train) & answers_of(aside)


@pytest.mark.parametrize(
    "answers",
    [
        np.arange(2 * (10 * LEAST_ROWS - 1)).reshape(-1, 2),  # too few
        np.stack([np.arange(3000), np.arange(1, 3001)], axis=1),  # each shares an answer with the next
        np.stack([np.zeros(3000, dtype=int), np.arange(1, 3001)], axis=1),  # one answer is in all
    ],
)
def test_without_enough_unconnected_rows_none_is_set_aside(answers):
    dataset = pairs_of(answers)
    train, aside = split_calibration_set(dataset, seed=0)
    assert aside is None and train is dataset
