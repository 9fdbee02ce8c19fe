"""`disco_trl/distributions/correlation.py`: worlds whose correlation is known, and the identity behind it."""

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from disco_trl.distributions.correlation import (
    LARGEST,
    RatedAnswers,
    _slope,
    correlations,
    estimate_correlation,
    products_of_ratings,
)


CORRELATION = torch.tensor([[1.0, 0.6, -0.3], [0.6, 1.0, 0.2], [-0.3, 0.2, 1.0]], dtype=torch.float64)
LEVEL_CORRELATION = torch.tensor([[1.0, 0.7, 0.2], [0.7, 1.0, 0.1], [0.2, 0.1, 1.0]], dtype=torch.float64)


def draw_world(seed, answers=2000, raters=5, levels=5, error=0.0, spread=0.4, correlation=CORRELATION):
    """Locations as a model predicts them, scales, its error, ratings and thresholds, of answers good and bad alike."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    count = len(correlation)
    level = 1.2 * normal(answers, count) @ torch.linalg.cholesky(LEVEL_CORRELATION[:count, :count]).mT
    scale = torch.exp(spread * normal(answers, count))
    reward = level[:, None] + scale[:, None] * (normal(answers, raters, count) @ torch.linalg.cholesky(correlation).mT)
    thresholds = torch.linspace(-1.5, 1.5, levels - 1, dtype=torch.float64)
    ratings = torch.searchsorted(thresholds, reward.contiguous())
    # The best prediction from a noisy observation of the level: shrunk to the mean, and off by `left`.
    kept = 1.2**2 / (1.2**2 + error**2)
    left = error * kept**0.5
    predicted = kept * (level + error * normal(answers, count))
    return predicted, scale, torch.full((count,), left), ratings, [thresholds] * count


def estimate(location, scale, error, ratings, thresholds):
    """From the ratings `(N, R, A)` of each person; -1 where there is none."""
    counts = [
        torch.stack([(ratings[..., a] == k).sum(dim=1) for k in range(len(of_a) + 1)], dim=1)
        for a, of_a in enumerate(thresholds)
    ]
    sums = products_of_ratings(ratings.double().where(ratings >= 0, torch.nan))
    return estimate_correlation(RatedAnswers(location, scale, error, counts, *sums, thresholds))


def off_diagonal(matrix: torch.Tensor) -> np.ndarray:
    return matrix[[1, 2, 2], [0, 0, 1]].numpy()


@pytest.mark.parametrize("error", [0.0, 1.0])
@pytest.mark.parametrize("levels", [5, 9])
def test_a_known_correlation_is_found(error, levels):
    found = np.stack([off_diagonal(estimate(*draw_world(s, levels=levels, error=error))[0]) for s in range(6)])
    off = found - off_diagonal(CORRELATION)
    assert np.abs(off).max() < 0.05
    assert np.abs(off.mean(axis=0)).max() < 0.02


def test_answers_that_are_good_in_both_do_not_correlate_people():
    independent = torch.eye(2, dtype=torch.float64)
    found = [estimate(*draw_world(s, error=1.0, correlation=independent))[0][0, 1] for s in range(6)]
    assert abs(np.mean(found)) < 0.015
    assert np.abs(found).max() < 0.05


def test_a_constant_scale_where_the_true_one_varies_costs_little():
    location, scale, error, ratings, thresholds = draw_world(0)
    constant = scale.log().mean(dim=0).exp().expand_as(scale)
    found, _ = estimate(location, constant, error, ratings, thresholds)
    np.testing.assert_allclose(off_diagonal(found), off_diagonal(CORRELATION), atol=0.08)


@pytest.mark.parametrize("factor", [0.5, 1.5])
def test_scales_that_are_off_by_a_factor_do_not_matter(factor):
    location, scale, error, ratings, thresholds = draw_world(0)
    wrong = scale * torch.tensor([factor, 1.0, 1 / factor], dtype=torch.float64)
    found, _ = estimate(location, wrong, error, ratings, thresholds)
    np.testing.assert_allclose(off_diagonal(found), off_diagonal(CORRELATION), atol=0.05)


def test_raters_who_skip_an_attribute():
    location, scale, error, ratings, thresholds = draw_world(0)
    generator = torch.Generator().manual_seed(1)
    ratings[torch.rand(ratings.shape, generator=generator) < 0.3] = -1
    found, support = estimate(location, scale, error, ratings, thresholds)
    np.testing.assert_allclose(off_diagonal(found), off_diagonal(CORRELATION), atol=0.06)
    both = (ratings[:, :, :2] >= 0).all(dim=-1).sum(dim=1)
    assert support[0, 1] == (both - 1).clamp_min(0).sum()


def test_attributes_that_nobody_rated_together():
    location, scale, error, ratings, thresholds = draw_world(0, answers=200)
    ratings[:, :3, 2] = -1
    ratings[:, 3:, :2] = -1
    found, support = estimate(location, scale, error, ratings, thresholds)
    assert found[2].tolist() == [0.0, 0.0, 1.0]
    assert support[2, :2].tolist() == [0, 0]
    assert found[0, 1] > 0.4


def test_one_rater_an_answer_says_nothing():
    location, scale, error, ratings, thresholds = draw_world(0, answers=200, raters=1)
    found, support = estimate(location, scale, error, ratings, thresholds)
    assert torch.equal(found, torch.eye(3, dtype=torch.float64))
    assert not support.any()


def test_equal_ratings_are_at_the_bound_and_the_matrix_is_positive_definite():
    location, scale, error, ratings, thresholds = draw_world(0, answers=300)
    ratings = ratings[:, :, :1].expand(-1, -1, 3)
    same = location[:, :1].expand(-1, 3), scale[:, :1].expand(-1, 3)
    found, _ = estimate(*same, error, ratings, thresholds)
    assert found[0, 1] > 0.9 * LARGEST
    assert torch.linalg.eigvalsh(found)[0] > 0.01


def test_products_by_hand():
    nan = torch.nan
    # Deviations (-1, 0, 1) and (1, -2, 1) of three people; a third attribute that two of them rated
    products, freedom = products_of_ratings(torch.tensor([[[1.0, 5, nan], [2, 2, 4], [3, 5, 1]]]))
    assert products[0].tolist() == [[2, 0, -1.5], [0, 6, -4.5], [-1.5, -4.5, 4.5]]
    assert freedom[0].tolist() == [[2, 2, 1], [2, 2, 1], [1, 1, 1]]


def test_the_slope_is_that_of_the_covariance_of_ratings():
    """Cov(X_a, X_b) = Σ_kl P(ε_a > z_ak, ε_b > z_bl) - P(ε_a > z_ak) P(ε_b > z_bl), whose slope is measured here."""
    z_a, z_b = torch.tensor([-1.0, 0.2, 0.9]).double(), torch.tensor([-0.4, 0.7]).double()

    def covariance(correlation: float) -> float:
        matrix = [[1.0, correlation], [correlation, 1.0]]
        joint = multivariate_normal(mean=[0, 0], cov=matrix)
        return sum(joint.cdf([-x, -y]) for x in z_a.tolist() for y in z_b.tolist())

    step = 1e-3
    for correlation in (-0.7, 0.0, 0.4):
        expected = (covariance(correlation + step) - covariance(correlation - step)) / (2 * step)
        found = _slope(correlation, z_a[None, :, None], z_b[None, :, None])
        assert found.tolist() == pytest.approx([expected], rel=1e-4)


def test_a_weight_counts_an_answer_as_often():
    location, scale, error, ratings, thresholds = draw_world(0, answers=150)
    times = torch.randint(0, 3, (150,), generator=torch.Generator().manual_seed(1))
    counts = [torch.nn.functional.one_hot(ratings[..., a], 5).sum(dim=1) for a in range(3)]
    sums = products_of_ratings(ratings.double())
    found = correlations(
        RatedAnswers(location, scale, error, counts, *sums, thresholds), torch.stack([times, torch.ones(150)])
    )
    for place, rows in enumerate((torch.arange(150).repeat_interleave(times), torch.arange(150))):
        sums = products_of_ratings(ratings[rows].double())
        of_rows = [count[rows] for count in counts]
        one = torch.ones(1, len(rows))
        again = RatedAnswers(location[rows], scale[rows], error, of_rows, *sums, thresholds)
        (expected,) = correlations(again, one)
        np.testing.assert_allclose(off_diagonal(found[place]), off_diagonal(expected), atol=1e-12)
