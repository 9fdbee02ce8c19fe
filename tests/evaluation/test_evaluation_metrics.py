"""`disco_trl.evaluation.metrics`: metrics against arithmetic by hand."""

import math

import numpy as np
import pytest
import torch

from disco_trl.distributions.reward_distribution import RewardDistribution
from disco_trl.evaluation.metrics import (
    METRICS,
    Forecasts,
    accuracy,
    area_under_risk_coverage,
    auroc_of_errors,
    brier_score,
    calibration_error,
    centrality,
    debiased_calibration_error,
    mean_confidence,
    negative_log_likelihood,
    pair_metrics,
    reliability_curve,
    risk_coverage_curve,
    spearman,
)


def forecasts(prob, target=1.0, weight=1.0) -> Forecasts:
    return Forecasts.of_probabilities(prob, target, weight)


# Comparisons to figures


def test_of_rewards():
    first = RewardDistribution(torch.tensor([1.0, 30.0]), torch.tensor([0.6, 0.6]), "normal")
    second = RewardDistribution(torch.tensor([0.0, 0.0]), torch.tensor([0.8, 0.8]), "normal")
    found = Forecasts.of(first, second)
    assert found.prob == pytest.approx([0.5 * (1 + math.erf(1 / math.sqrt(2))), 1.0])
    # Φ(-30), of which 1 - P in float64 has nothing left
    assert found.log_prob_reverse[1] == pytest.approx(-454.3212, rel=1e-5)
    assert found.margin.tolist() == [1.0, 30.0]
    assert found.target.tolist() == found.weight.tolist() == [1.0, 1.0]


def test_accuracy_counts_equal_locations_as_half():
    # right, wrong, equal, right: (1 + 0 + 1/2 + 1) / 4
    assert accuracy(forecasts([0.8, 0.3, 0.5, 0.6])) == 0.625


def test_accuracy_is_per_person_and_without_ties():
    # 3 of 4 agree, 2 of 3 do not, two ties: (3 + 1) / 7
    assert accuracy(forecasts([0.8, 0.3, 0.9], [3 / 4, 2 / 3, 1 / 2], [4, 3, 2])) == pytest.approx(4 / 7)


def test_negative_log_likelihood_is_in_nats():
    # -(log 1/2 + log 1/4) / 2 = (log 2 + 2 log 2) / 2
    assert negative_log_likelihood(forecasts([0.5, 0.25])) == pytest.approx(1.5 * math.log(2))


def test_negative_log_likelihood_of_soft_labels_is_their_cross_entropy():
    expected = -(0.7 * math.log(0.6) + 0.3 * math.log(0.4))
    assert negative_log_likelihood(forecasts([0.6], 0.7)) == pytest.approx(expected)


def test_certainty_that_nobody_contradicts_costs_nothing():
    assert negative_log_likelihood(forecasts([1.0, 0.0], [1.0, 0.0])) == 0
    assert negative_log_likelihood(forecasts([1.0], 0.9)) == math.inf


def test_brier_score():
    # ((1 - 0.8)² + (1 - 0.4)²) / 2 = (0.04 + 0.36) / 2
    assert brier_score(forecasts([0.8, 0.4])) == pytest.approx(0.2)
    # 0.75 · 0.2² + 0.25 · 0.8²
    assert brier_score(forecasts([0.8], 0.75)) == pytest.approx(0.19)


def test_mean_confidence():
    assert mean_confidence(forecasts([0.8, 0.4], weight=[3, 1])) == pytest.approx((3 * 0.8 + 0.6) / 4)


def test_reliability_curve_turns_pairs_round_and_fills_bins_evenly():
    # NumPy's generator at seed 0 draws 0.64, 0.27, 0.04, 0.02: all pairs but the first turn round.
    #   predicted for the first side: 0.9 0.4 0.3 0.2     it won: yes no no no
    #   in two bins, sorted: (0.2, 0.3) none won, (0.4, 0.9) one won
    given = forecasts([0.9, 0.6, 0.7, 0.8])
    curve = reliability_curve(given, bins=2, seed=0)
    assert curve.predicted == pytest.approx([0.25, 0.65])
    assert curve.observed == pytest.approx([0.0, 0.5])
    assert curve.count.tolist() == [2, 2]
    # (2 · |0 - 0.25| + 2 · |0.5 - 0.65|) / 4
    assert calibration_error(given, bins=2, seed=0) == pytest.approx(0.2)
    # √((2 · 0.25² + 2 · (0.15² - 0.5 · 0.5 / 1)) / 4), and the sum is below 0
    assert debiased_calibration_error(given, bins=2, seed=0) == 0


def test_reliability_curve_of_fewer_pairs_than_bins():
    assert reliability_curve(forecasts([0.9, 0.6]), bins=15).count.tolist() == [1, 1]


def test_reliability_curve_leaves_out_what_has_no_weight():
    curve = reliability_curve(forecasts([0.9, 0.6, 0.1], weight=[1, 1, 0]), bins=15)
    assert curve.count.sum() == 2


def test_weights_are_repetitions():
    generator = np.random.default_rng(3)
    prob, target = generator.random(40), generator.integers(0, 11, 40) / 10
    counts = generator.integers(0, 4, 40)
    weighted = forecasts(prob, target, counts)
    repeated = forecasts(np.repeat(prob, counts), np.repeat(target, counts))
    for name, metric in METRICS.items():
        # Orientations are drawn, and coverage is taken, by whole comparisons.
        if "calibration" not in name and name != "risk_coverage_area":
            assert metric(weighted) == pytest.approx(metric(repeated)), name


def votes(sharpness: float, n: int = 30_000) -> Forecasts:
    """P(chosen ≻ rejected) as forecast by sigmoid(sharpness · Δ) where the truth is sigmoid(Δ) and Δ ~ N(0, 2²)."""
    generator = np.random.default_rng(1)
    margin = generator.normal(scale=2, size=n)
    first_wins = generator.random(n) < 1 / (1 + np.exp(-margin))
    return forecasts(1 / (1 + np.exp(-sharpness * np.where(first_wins, margin, -margin))))


def test_calibrated_forecasts_have_almost_no_calibration_error():
    # What remains is chance: the mean of |share - probability| in bins of 2,000 pairs is about 0.007.
    assert 0.002 < calibration_error(votes(sharpness=1)) < 0.012
    assert debiased_calibration_error(votes(sharpness=1)) < 0.006


def test_calibration_error_of_overconfident_forecasts_is_that_of_the_formula():
    # E |sigmoid(3Δ) - sigmoid(Δ)| for Δ ~ N(0, 2²), integrated on a fine grid; both sides of 0 lie in different bins.
    margin = np.linspace(-14, 14, 100_001)
    density = np.exp(-(margin**2) / 8)
    gap = np.abs(1 / (1 + np.exp(-3 * margin)) - 1 / (1 + np.exp(-margin)))
    expected = (gap * density).sum() / density.sum()
    assert expected > 0.1
    assert calibration_error(votes(sharpness=3)) == pytest.approx(expected, abs=0.01)
    root_mean_square = math.sqrt((gap**2 * density).sum() / density.sum())
    assert debiased_calibration_error(votes(sharpness=3)) == pytest.approx(root_mean_square, abs=0.01)


def test_risk_coverage():
    # By confidence: 0.9 right, 0.8 wrong, 0.7 right, 0.6 wrong
    given = forecasts([0.7, 0.9, 0.4, 0.2])
    coverage, risk = risk_coverage_curve(given)
    assert coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert risk == pytest.approx([0, 1 / 2, 1 / 3, 2 / 4])
    assert area_under_risk_coverage(given) == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)


def test_auroc_of_errors():
    # wrong: 0.8 and 0.6; right: 0.9 and 0.7. The wrong one is the more doubtful in three of four pairs (not 0.8, 0.7).
    assert auroc_of_errors(forecasts([0.7, 0.9, 0.4, 0.2])) == pytest.approx(3 / 4)
    assert math.isnan(auroc_of_errors(forecasts([0.7, 0.9])))


def test_pair_metrics():
    metrics = pair_metrics(forecasts([0.8, 0.4]))
    assert metrics["accuracy"] == 0.5
    assert metrics["nll"] == pytest.approx(-(math.log(0.8) + math.log(0.4)) / 2)
    assert metrics["brier"] == pytest.approx(0.2)
    assert set(metrics) == set(METRICS)


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
