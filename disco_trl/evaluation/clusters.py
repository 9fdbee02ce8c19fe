"""Variances of means over comparisons that share prompts or answers, in closed form."""

from __future__ import annotations

import numpy as np


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


def _numbered(groups: np.ndarray) -> np.ndarray:
    """Groups from 0, two for each comparison, which are equal if it has one."""
    _, number = np.unique(groups, return_inverse=True)
    return number.reshape(groups.shape if groups.ndim == 2 else (-1, 1))[:, [0, -1]]
