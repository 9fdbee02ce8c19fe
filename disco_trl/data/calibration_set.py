"""
Training pairs that are set aside: a model that is to be calibrated after several passes has to be shown pairs that it
has not learned from.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Dataset
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from .columns import PREPARED
from .records import key_of, read_answers


SHARE = 0.1
LEAST_ROWS = 128
MOST_ROWS = 1024
"""Share of the rows of a dataset that is set aside, and the smallest and the largest number."""


def split_calibration_set(dataset: Dataset, seed: int) -> tuple[Dataset, Dataset | None]:
    """
    Set rows aside whose answers occur in no other row.

    Rows that share answers, such as the pairs of several answers to one prompt, stay together.

    Args:
        dataset ([`~datasets.Dataset`]):
            Prepared dataset.
        seed (`int`):
            Seed of the choice.

    Returns:
        `tuple[Dataset, Dataset]`: The rows to train on, and those that are set aside: a tenth, up to 1,024. If fewer
            than 128 can be, the first is the dataset, and the second `None`.
    """
    most = min(int(SHARE * len(dataset)), MOST_ROWS)
    if most < LEAST_ROWS:
        return dataset, None
    keys = dataset.map(
        lambda row: {"keys": list(map(key_of, read_answers(row, PREPARED).answers))},
        remove_columns=dataset.column_names,
        desc="Looking for pairs to calibrate by",
    )
    group = _groups(keys.to_dict()["keys"])
    sizes = np.bincount(group)
    order = np.random.default_rng(seed).permutation(len(sizes))
    chosen, count = np.zeros(len(sizes), dtype=bool), 0
    for number in order:
        if count + sizes[number] <= most:
            chosen[number], count = True, count + sizes[number]
    if count < LEAST_ROWS:
        return dataset, None
    aside = chosen[group]
    return dataset.select(np.flatnonzero(~aside)), dataset.select(np.flatnonzero(aside))


def _groups(keys: list[list[int]]) -> np.ndarray:
    """Number of the group of each row. Two rows are in one if they share an answer, or if others connect them."""
    rows = np.repeat(np.arange(len(keys)), [len(of_row) for of_row in keys])
    _, answers = np.unique(np.concatenate([np.array(of_row, dtype=np.int64) for of_row in keys]), return_inverse=True)
    count = len(keys) + int(answers.max()) + 1
    edges: Any = coo_array((np.ones(len(rows), dtype=bool), (rows, len(keys) + answers)), shape=(count, count))
    _, group = connected_components(edges, directed=False)
    return np.unique(group[: len(keys)], return_inverse=True)[1]
