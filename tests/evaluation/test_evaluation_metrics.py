"""`disco_trl.evaluation.metrics`: metrics against arithmetic by hand."""

import itertools
import math

import numpy as np
import pytest
import torch

from disco_trl.distributions.reward_distribution import RewardDistribution
from disco_trl.evaluation.forecasts import Forecasts
from disco_trl.evaluation.metrics import (
    METRICS,
    accuracy,
    area_under_risk_coverage,
    auroc_of_errors,
    brier_score,
    centrality,
    mean_confidence,
    negative_log_likelihood,
    pair_metrics,
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


def test_a_tie_counts_half_where_one_was_on_offer():
    # Scales 0.6 and 0.8 make 1. With a band of ±0.5: P(D > 0.5) + (P(D > -0.5) - P(D > 0.5)) / 2, D ~ N(0.3, 1).
    def above(x):
        return 0.5 * math.erfc(x / math.sqrt(2))

    first = RewardDistribution(torch.tensor([0.3, 0.3]), torch.tensor([0.6, 0.6]), "normal")
    second = RewardDistribution(torch.zeros(2), torch.tensor([0.8, 0.8]), "normal")
    found = Forecasts.of(first, second, tie_width=torch.tensor([0.5, 0.0]))
    assert found.prob == pytest.approx([(above(0.2) + above(-0.8)) / 2, above(-0.3)])
    assert np.exp(found.log_prob_reverse) == pytest.approx(1 - found.prob)
    # An error of the location adds its variance, with a band as well.
    unsure = first.replace(location_error=torch.tensor([1.0, 1.0]))
    found = Forecasts.of(unsure, second, tie_width=torch.tensor([0.5, 0.0]))
    root = math.sqrt(2)
    assert found.prob == pytest.approx([(above(0.2 / root) + above(-0.8 / root)) / 2, above(-0.3 / root)])


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


def test_weights_are_repetitions():
    generator = np.random.default_rng(3)
    prob, target = generator.random(40), generator.integers(0, 11, 40) / 10
    counts = generator.integers(0, 4, 40)
    weighted = forecasts(prob, target, counts)
    repeated = forecasts(np.repeat(prob, counts), np.repeat(target, counts))
    for name, metric in METRICS.items():
        # Orientations are drawn by whole comparisons.
        if "calibration" not in name:
            assert metric(weighted) == pytest.approx(metric(repeated)), name


def test_risk_coverage():
    # By confidence: 0.9 right, 0.8 wrong, 0.7 right, 0.6 wrong
    given = forecasts([0.7, 0.9, 0.4, 0.2])
    coverage, risk = risk_coverage_curve(given)
    assert coverage.tolist() == [0, 0.25, 0.5, 0.75, 1.0]
    assert risk == pytest.approx([0, 0, 1 / 2, 1 / 3, 2 / 4])
    assert area_under_risk_coverage(given) == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)


def test_risk_coverage_does_not_depend_on_the_order_of_equal_confidences():
    # 0.9 right; then, at 0.8, one right and two wrong in each of three orders: the area is the mean over them.
    #   0, 0, 1/3, 2/4     0, 1/2, 1/3, 2/4     0, 1/2, 2/3, 2/4
    prob, said = np.array([0.9, 0.8, 0.2, 0.8]), np.array([1, 1, 1, 0])
    expected = (0 + (0 + 1 / 2 + 1 / 2) / 3 + (1 / 3 + 1 / 3 + 2 / 3) / 3 + 2 / 4) / 4
    curves = set()
    for order in itertools.permutations(range(4)):
        given = forecasts(prob[list(order)], said[list(order)])
        assert area_under_risk_coverage(given) == pytest.approx(expected, abs=1e-12)
        curves.add(str(risk_coverage_curve(given)))
    assert len(curves) == 1


def test_risk_coverage_of_constant_confidence_is_the_error_rate():
    given = forecasts(np.full(50, 0.7), np.arange(50) < 30, np.linspace(0.5, 3, 50))
    assert area_under_risk_coverage(given) == pytest.approx(1 - accuracy(given))
    assert math.isnan(area_under_risk_coverage(forecasts([])))


def test_auroc_of_errors():
    # wrong: 0.8 and 0.6; right: 0.9 and 0.7. The wrong one is the more doubtful in three of four pairs (not 0.8, 0.7).
    assert auroc_of_errors(forecasts([0.7, 0.9, 0.4, 0.2])) == pytest.approx(3 / 4)
    assert math.isnan(auroc_of_errors(forecasts([0.7, 0.9])))


def test_auroc_of_equal_confidences_is_half():
    # wrong: 0.8; right: 0.8, which counts half, and 0.9
    assert auroc_of_errors(forecasts([0.2, 0.8, 0.9])) == pytest.approx(3 / 4)
    # 3 of 4 people agree with 0.9 and 1 of 4 with 0.6: errors 1 and 3, hits 3 and 1
    #   3 · 3 with the hit the more confident, 1 · 3 and 3 · 1 with neither, 1 · 1 with the error
    assert auroc_of_errors(forecasts([0.9, 0.6], [3 / 4, 1 / 4], 4)) == pytest.approx((9 + 6 / 2) / 16)
    # Beyond what float64 tells from 1, the log-odds still tell
    first = RewardDistribution(torch.tensor([60.0, -50.0]), torch.ones(2), "normal")
    second = RewardDistribution(torch.zeros(2), torch.ones(2), "normal")
    assert auroc_of_errors(Forecasts.of(first, second)) == 1


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
