"""`disco_trl.evaluation`: metrics against arithmetic by hand."""

import math

import numpy as np
import pytest

from disco_trl.evaluation import (
    accuracy,
    brier_score,
    calibration_error,
    centrality,
    negative_log_likelihood,
    pair_metrics,
    reliability_curve,
    spearman,
)


# Pairs to figures


def test_accuracy_counts_ties_as_half():
    # right, wrong, tie, right: (1 + 0 + 1/2 + 1) / 4
    assert accuracy([1.0, -2.0, 0.0, 0.5]) == 0.625


def test_negative_log_likelihood_is_in_nats():
    # -(log 1/2 + log 1/4) / 2 = (log 2 + 2 log 2) / 2
    assert negative_log_likelihood(np.log([0.5, 0.25])) == pytest.approx(1.5 * math.log(2))


def test_brier_score():
    # ((1 - 0.8)² + (1 - 0.4)²) / 2 = (0.04 + 0.36) / 2
    assert brier_score([0.8, 0.4]) == pytest.approx(0.2)


def test_reliability_curve_turns_pairs_round_and_fills_bins_evenly():
    # NumPy's generator at seed 0 draws 0.64, 0.27, 0.04, 0.02: all pairs but the first turn round.
    #   predicted for the first side: 0.9 0.4 0.3 0.2     it won: yes no no no
    #   in two bins, sorted: (0.2, 0.3) none won, (0.4, 0.9) one won
    curve = reliability_curve([0.9, 0.6, 0.7, 0.8], bins=2, seed=0)
    assert curve.predicted == pytest.approx([0.25, 0.65])
    assert curve.observed == pytest.approx([0.0, 0.5])
    assert curve.count.tolist() == [2, 2]
    # (2 · |0 - 0.25| + 2 · |0.5 - 0.65|) / 4
    assert calibration_error([0.9, 0.6, 0.7, 0.8], bins=2, seed=0) == pytest.approx(0.2)


def test_reliability_curve_of_fewer_pairs_than_bins():
    assert reliability_curve([0.9, 0.6], bins=15).count.tolist() == [1, 1]


def votes(sharpness: float, n: int = 30_000) -> np.ndarray:
    """P(chosen ≻ rejected) as forecast by sigmoid(sharpness · Δ) where the truth is sigmoid(Δ) and Δ ~ N(0, 2²)."""
    generator = np.random.default_rng(1)
    margin = generator.normal(scale=2, size=n)
    first_wins = generator.random(n) < 1 / (1 + np.exp(-margin))
    return 1 / (1 + np.exp(-sharpness * np.where(first_wins, margin, -margin)))


def test_calibrated_forecasts_have_almost_no_calibration_error():
    # What remains is chance: the mean of |share - probability| in bins of 2,000 pairs is about 0.007.
    assert calibration_error(votes(sharpness=1)) < 0.012


def test_calibration_error_of_overconfident_forecasts_is_that_of_the_formula():
    # E |sigmoid(3Δ) - sigmoid(Δ)| for Δ ~ N(0, 2²), integrated on a fine grid; both sides of 0 lie in different bins.
    margin = np.linspace(-14, 14, 100_001)
    density = np.exp(-(margin**2) / 8)
    gap = np.abs(1 / (1 + np.exp(-3 * margin)) - 1 / (1 + np.exp(-margin)))
    expected = (gap * density).sum() / density.sum()
    assert expected > 0.1
    assert calibration_error(votes(sharpness=3)) == pytest.approx(expected, abs=0.01)


def test_pair_metrics():
    metrics = pair_metrics(np.log([0.8, 0.4]), [1.0, -0.5])
    assert metrics["accuracy"] == 0.5
    assert metrics["nll"] == pytest.approx(-(math.log(0.8) + math.log(0.4)) / 2)
    assert metrics["brier"] == pytest.approx(0.2)
    assert metrics["calibration_error"] == calibration_error([0.8, 0.4])


# Texts to figures


def test_spearman():
    # Σd² = 0 + 1 + 1 + 0 = 2: 1 - 6 · 2 / (4 · (16 - 1))
    assert spearman([1, 2, 3, 4], [10, 30, 20, 40]) == pytest.approx(0.8)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)


def test_spearman_gives_ties_their_mean_rank():
    # ranks 1 2.5 2.5 4 and 1 2 3 4, less their mean 2.5: (2.25 + 2.25) / √(4.5 · 5)
    assert spearman([0, 7, 7, 9], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(22.5))


def test_spearman_of_a_constant_is_nan():
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))


def test_centrality():
    # the median is 1
    assert centrality([0.0, 1.0, 5.0]).tolist() == [-1.0, 0.0, -4.0]
