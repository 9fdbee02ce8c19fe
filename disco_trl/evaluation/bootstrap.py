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


def paired_bootstrap(
    ours: ArrayLike,
    theirs: ArrayLike,
    groups: np.ndarray | None = None,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Mean difference of two models on the same pairs, with a bootstrap interval.

    Resampling pairs rather than models removes what both models have in common, the difficulty of a pair, so that much
    smaller differences can be detected than by comparing two separate intervals.

    Args:
        ours (array-like of shape `(N,)` or `(seeds, N)`):
            Figure of each pair by the first model, such as its negative log-likelihood.
        theirs (array-like of the same shape):
            The same by the second model. Row `i` of both is a run with the same seed.
        groups (`np.ndarray`, *optional*, defaults to `None`):
            Groups of the pairs, see [`resamples`]. If `None`, each pair is drawn by itself.
        draws (`int`, *optional*, defaults to `2000`):
            Number of resamples. Each resamples the groups, and the seeds if there are several.
        level (`float`, *optional*, defaults to `0.95`):
            Level of the percentile interval.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the resamples.

    Returns:
        `tuple[float, float, float]`: Mean of `ours - theirs`, and the lower and upper end of its interval.
    """
    difference = np.atleast_2d(np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float))
    runs, count = difference.shape
    generator = np.random.default_rng(seed)
    counts = resamples(np.arange(count) if groups is None else groups, draws, seed)
    # Seeds are drawn as well as pairs: an interval over pairs alone describes these training runs, not the method.
    means = [
        (difference[generator.integers(runs, size=runs)] @ weight).mean() / max(weight.sum(), 1) for weight in counts
    ]
    return float(difference.mean()), *interval(means, level)
