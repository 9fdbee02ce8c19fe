"""Variances of means over comparisons that share prompts or answers, and of means over seeds as well, in closed
form.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats


def clustered_covariance(scores: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Covariance of sums of scores whose expectation is 0, where scores that have a group in common may be dependent.

    It is the sandwich estimate: products of the sums by group are added up, and with two groups a comparison, the
    products of comparisons that have both in common, which are in two such sums, are subtracted once (A. C. Cameron,
    J. Gelbach and D. Miller, 2011; for pairs of answers, P. Aronow, C. Samii and V. Assenova, 2015). The bootstrap
    that draws answers ([`~disco_trl.evaluation.bootstrap.resamples`]) overstates the variance of what is independent
    in each comparison up to three times.

    Args:
        scores (`np.ndarray` of shape `(N, B)`):
            Contribution of each comparison to `B` sums.
        groups (`np.ndarray` of shape `(N,)` or `(N, 2)`):
            Identifiers of what each comparison, or each of its two sides, shares with others.

    Returns:
        `np.ndarray` of shape `(B, B)`: Covariance of the sums. With two groups a comparison, it may have negative
        eigenvalues.
    """
    sides = _numbered(groups)
    has_two = sides[:, 0] != sides[:, 1]
    by_group = np.zeros((sides.max(initial=-1) + 1, scores.shape[1]))
    np.add.at(by_group, sides[:, 0], scores)
    np.add.at(by_group, sides[has_two, 1], scores[has_two])
    by_pair = cell_sums(scores[has_two], sides[has_two])
    return by_group.T @ by_group - by_pair.T @ by_pair


def cell_sums(scores: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Sums of scores over the comparisons that have all their groups in common.

    Args:
        scores (`np.ndarray` of shape `(N, B)`):
            Scores of each comparison.
        groups (`np.ndarray` of shape `(N,)` or `(N, 2)`):
            Identifiers of what each comparison, or each of its two sides, shares with others.

    Returns:
        `np.ndarray` of shape `(cells, B)`: The sums, in no particular order.
    """
    sides = np.sort(_numbered(groups), axis=1)
    different, cell = np.unique(sides, axis=0, return_inverse=True)
    sums = np.zeros((len(different), scores.shape[1]))
    np.add.at(sums, cell.reshape(-1), scores)
    return sums


def paired_difference(
    ours: ArrayLike,
    theirs: ArrayLike,
    weight: ArrayLike = 1.0,
    groups: np.ndarray | None = None,
    level: float = 0.95,
) -> tuple[float, float, float]:
    """Mean difference of two models on the same comparisons, with an interval.

    Differences of the same comparison are free of what both models have in common, its difficulty, so that much
    smaller differences can be detected than by comparing two separate intervals.

    With S seeds, half the width of the interval is √(t² V_seeds + z² V_items): V_seeds is the variance of the seeds'
    means over S, with the quantile t of Student's distribution of S − 1 degrees of freedom, and V_items, with z, that
    of the mean over comparisons. In simulations with 2 to 5 seeds it covers 95 % where either dominates, and 96 to
    99.7 % where both matter, as what seeds and comparisons share is counted twice. (A bootstrap over seeds covers 78 %
    and 86 % for 2 and 3 seeds that dominate.) With one seed, the interval describes these two training runs only.

    Args:
        ours (array-like of shape `(N,)` or `(seeds, N)`):
            Figure of each comparison by the first model, such as its negative log-likelihood.
        theirs (array-like of the same shape):
            The same by the second model. Row `i` of both is a run with the same seed.
        weight (`float` or array-like of shape `(N,)`, *optional*, defaults to `1.0`):
            Weight of each comparison in the mean.
        groups (`np.ndarray` of shape `(N,)` or `(N, 2)`, *optional*, defaults to `None`):
            What comparisons share, see [`clustered_covariance`]. If `None`, they are independent.
        level (`float`, *optional*, defaults to `0.95`):
            Level of the interval.

    Returns:
        `tuple[float, float, float]`: Mean of `ours - theirs`, and the lower and upper end of its interval: `nan`
        without comparisons, and infinite if there is one group.
    """
    difference = np.atleast_2d(np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float))
    runs, count = difference.shape
    share = np.broadcast_to(np.asarray(weight, dtype=float), count)
    counts = share > 0
    if not counts.any():
        return math.nan, math.nan, math.nan
    groups = (np.arange(count) if groups is None else groups)[counts]
    difference, share = difference[:, counts], share[counts] / share.sum()
    means = difference @ share
    mean = float(means.mean())
    square = half_width(share * (difference.mean(axis=0) - mean), groups, level) ** 2
    if runs > 1:
        square += _square_of_half(float(means.var(ddof=1)) / runs, runs - 1, level)
    return mean, mean - math.sqrt(square), mean + math.sqrt(square)


def half_width(scores: np.ndarray, groups: np.ndarray, level: float = 0.95) -> float:
    """Half the width of Student's interval for a sum of scores, with a degree of freedom for each group but one.

    Args:
        scores (`np.ndarray` of shape `(N,)`):
            Contribution of each comparison, less its expectation.
        groups (`np.ndarray` of shape `(N,)` or `(N, 2)`):
            What comparisons share, see [`clustered_covariance`].
        level (`float`, *optional*, defaults to `0.95`):
            Level of the interval.

    Returns:
        `float`: Half the width; infinite if there is one group.
    """
    # With shared answers, the estimate may be negative.
    variance = max(float(clustered_covariance(scores[:, None], groups)[0, 0]), 0.0)
    others = len(np.unique(groups)) - 1
    return math.sqrt(_square_of_half(variance * (1 + 1 / max(others, 1)), others, level))


def _square_of_half(variance: float, degrees: int, level: float) -> float:
    """Square of half the width of Student's interval; infinite without degrees of freedom."""
    return variance * float(stats.t.ppf((1 + level) / 2, degrees)) ** 2 if degrees > 0 else math.inf


def _numbered(groups: np.ndarray) -> np.ndarray:
    """Groups from 0, two for each comparison, which are equal if it has one."""
    _, number = np.unique(groups, return_inverse=True)
    return number.reshape(groups.shape if groups.ndim == 2 else (-1, 1))[:, [0, -1]]
