"""`disco_trl.evaluation.clusters`: variances of means whose terms share something, against their known values."""

import numpy as np
import pytest

from disco_trl.evaluation.clusters import cell_sums, clustered_covariance


def test_of_independent_scores_it_is_the_sum_of_their_products():
    scores = np.array([[1.0, 0.0], [2.0, 1.0], [0.0, -1.0]])
    # [1 + 4, 2] and [2, 1 + 1]
    assert clustered_covariance(scores, np.arange(3)).tolist() == [[5, 2], [2, 2]]
    # The last two together: their sum is (2, 0), so that [1 + 4, 0] and [0, 0].
    assert clustered_covariance(scores, np.array([4, 7, 7])).tolist() == [[5, 0], [0, 0]]


def test_pairs_that_share_both_answers_are_counted_once():
    scores = np.array([[1.0], [2.0], [4.0]])
    groups = np.array([[0, 1], [1, 0], [1, 2]])
    # Products of every two that share an answer, both ways: 1 + 4 + 16 + 2 (1 · 2 + 1 · 4 + 2 · 4) = 49
    assert clustered_covariance(scores, groups).tolist() == [[49]]
    assert sorted(cell_sums(scores, groups).ravel()) == [3, 4]


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1 / 6000), (1.0, 4 / 400)])
def test_variance_of_a_mean_over_pairs_of_answers(share, expected):
    """
    400 answers in 6,000 pairs. A difference that is noise of each pair varies by 1 / 6,000 in the mean, three times
    less than the bootstrap over answers says; one that is a sum over the two answers, by 4 / 400.
    """
    found = []
    generator = np.random.default_rng(0)
    for _ in range(20):
        groups = generator.integers(400, size=(6000, 2))
        groups[:, 1] = np.where(groups[:, 0] == groups[:, 1], (groups[:, 0] + 1) % 400, groups[:, 1])
        values = (1 - share) * generator.normal(size=6000) + share * generator.normal(size=400)[groups].sum(axis=1)
        found.append(clustered_covariance((values - values.mean())[:, None] / 6000, groups)[0, 0])
    assert np.mean(found) == pytest.approx(expected, rel=0.1)
