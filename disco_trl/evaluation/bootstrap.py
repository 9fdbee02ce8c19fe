"""
Intervals for the figures of held-out data, by the bootstrap (B. Efron, 1979).

What is drawn are groups of comparisons, because comparisons of the same prompt, or with the same answer, are not
independent.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def resamples(groups: np.ndarray, draws: int, seed: int = 0) -> np.ndarray:
    """Counts of the comparisons in each resample of the bootstrap (B. Efron, 1979).

    Comparisons that share a prompt or an answer are not independent, so groups of them are drawn. If every side of a
    comparison has a group of its own, a comparison of two groups is counted as often as the product of their counts,
    because both have to be drawn (A. Owen's pigeonhole bootstrap, 2007).

    Args:
        groups (`np.ndarray` of shape `(N,)` or `(N, 2)`):
            Identifier of the group that is drawn together, such as the prompt, for each comparison or for each of its
            two sides. Two columns are for data in which the same answers occur in many comparisons.
        draws (`int`):
            Number of resamples.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the resamples.

    Returns:
        `np.ndarray` of shape `(draws, N)`: Counts, int16.
    """
    _, group = np.unique(groups, return_inverse=True)
    sides = group.reshape(len(groups), -1)
    count = group.max() + 1
    # Counts of groups drawn with replacement are multinomial. int16 keeps `draws` rows of N counts affordable.
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws).astype(np.int16)
    first, last = sides[:, 0], sides[:, -1]
    return np.where(first == last, drawn[:, first], drawn[:, first] * drawn[:, last])


def interval(values: ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of bootstrap values.

    Args:
        values (array-like):
            Values of the resamples.
        level (`float`, *optional*, defaults to `0.95`):
            Share of the values inside the interval.

    Returns:
        `tuple[float, float]`: Lower and upper end; `nan` if any value is `nan`.
    """
    # The percentile method needs no variance and stays within the range of bounded metrics. `np.quantile` propagates
    # NaN, so that a metric that is undefined in a resample gets no interval rather than one of the remaining values.
    low, high = np.quantile(np.asarray(values, dtype=float), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
