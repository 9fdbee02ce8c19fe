"""Metrics of a reward model on held-out comparisons: accuracy, calibration and selective prediction.

Every metric is a pure function of [`~disco_trl.evaluation.forecasts.Forecasts`]: what a model predicted for each
comparison and what people said. It depends neither on the model nor on the source of the comparisons
(`disco_trl.evaluation.evaluate` runs models over data). A scalar reward model is read as Bradley–Terry, which is the
logistic family with every scale at 1/√2, so that `RewardDistribution.log_prob_greater` serves both.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from scipy.special import digamma

from .calibration import (
    calibration_error,
    calibration_error_interval,
    expected_calibration_error,
    expected_calibration_error_by_chance,
)
from .forecasts import Forecasts, weighted_mean


# Metrics of comparisons


def accuracy(forecasts: Forecasts) -> float:
    """Share of people who agree with the sign of the margin.

    Equal locations count half. People's ties are left out.

    Args:
        forecasts ([`Forecasts`]):
            Forecasts to evaluate.

    Returns:
        `float`: Accuracy from 0 to 1; `nan` without comparisons.
    """
    return weighted_mean(forecasts.right, forecasts.decided)


def negative_log_likelihood(forecasts: Forecasts) -> float:
    """Mean negative log-likelihood of a person's choice in nats. With soft labels it is the cross-entropy.

    Args:
        forecasts ([`Forecasts`]):
            Forecasts to evaluate.

    Returns:
        `float`: Negative log-likelihood. An uninformed forecast of 0.5 scores log 2 = 0.693.
    """
    return weighted_mean(forecasts.nll, forecasts.weight)


def brier_score(forecasts: Forecasts) -> float:
    """Mean squared error of the forecast probability against a person's choice.

    Args:
        forecasts ([`Forecasts`]):
            Forecasts to evaluate.

    Returns:
        `float`: Brier score. An uninformed forecast of 0.5 scores 0.25.
    """
    return weighted_mean(forecasts.squared_error, forecasts.weight)


def mean_confidence(forecasts: Forecasts) -> float:
    """Sharpness: the mean probability of the more likely answer.

    Args:
        forecasts ([`Forecasts`]):
            Forecasts to evaluate.

    Returns:
        `float`: Mean confidence from 0.5 to 1. A model whose confidence exceeds its accuracy is overconfident.
    """
    return weighted_mean(forecasts.confidence, forecasts.weight)


def risk_coverage_curve(forecasts: Forecasts) -> tuple[np.ndarray, np.ndarray]:
    """Error rate on the comparisons that the model is most confident of, as a function of how many are kept (R.
    El-Yaniv and Y. Wiener, 2010). People's ties are left out.

    Args:
        forecasts ([`Forecasts`]):
            Forecasts to evaluate.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: Coverage and risk, both of shape `(K + 1,)` for `K` different confidences.
        Coverage, from 0 to 1, is the share of people in the comparisons that are kept; risk is the share of these
        people who disagree with the model. Equally confident comparisons are kept together, so that the curve does
        not depend on their order. Both are empty without comparisons.
    """
    people, wrong = _by_confidence(forecasts, forecasts.decided)
    # Coverage counts people, so that a comparison with many votes covers more than one with a single vote.
    covered = np.cumsum(people)
    risk = np.cumsum(wrong) / covered
    # Until all of the most confident comparisons are kept, the risk is that among them.
    return np.insert(covered / covered[-1:], 0, [0.0] * len(risk[:1])), np.insert(risk, 0, risk[:1])


def _by_confidence(forecasts: Forecasts, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of people, and of those who disagree with the model, for each different confidence, highest first."""
    counts = weight > 0
    weight, right = weight[counts], forecasts.right[counts]
    different, place = np.unique(-forecasts.certainty[counts], return_inverse=True)
    return np.bincount(place, weight, len(different)), np.bincount(place, weight * (1 - right), len(different))


def area_under_risk_coverage(forecasts: Forecasts) -> float:
    """Area under the risk–coverage curve: the mean risk as people are kept one by one.

    Equally confident people are kept in random order, and the area is the mean over all orders: after j of the m
    people of a confidence with e errors among them, following M people with E errors, the risk is on average (E + j e
    / m) / (M + j). Its sum over j = 1 … m is e + (E − M e / m) (ψ(M + m + 1) − ψ(M + 1)) with the digamma function ψ,
    which holds for weights that are not whole numbers too.

    Args:
        forecasts ([`Forecasts`]):
            Forecasts to evaluate.

    Returns:
        `float`: Area from 0 to 1. It is small if the model is accurate and its confidence separates errors from hits;
        `nan` without comparisons.
    """
    people, wrong = _by_confidence(forecasts, forecasts.decided)
    before, wrong_before = np.cumsum(people) - people, np.cumsum(wrong) - wrong
    harmonic = digamma(before + people + 1) - digamma(before + 1)
    total = people.sum()
    return float((wrong + (wrong_before - before * wrong / people) * harmonic).sum() / total) if total else math.nan


def auroc_of_errors(forecasts: Forecasts) -> float:
    """AUROC of doubt: the probability that the model is less confident on a comparison that it gets wrong than on one
    that it gets right, where equal confidence counts half. People's ties and equal locations are left out.

    Args:
        forecasts ([`Forecasts`]):
            Forecasts to evaluate.

    Returns:
        `float`: AUROC from 0 to 1, where 0.5 is chance; `nan` if all forecasts are right, or all are wrong.
    """
    people, wrong = _by_confidence(forecasts, np.where(forecasts.margin == 0, 0.0, forecasts.decided))
    right = people - wrong
    pairs = wrong.sum() * right.sum()
    if pairs == 0:
        return math.nan
    # Of pairs of an error and a hit, those with the more confident hit, and half of those with equal confidence.
    return float(wrong @ (np.cumsum(right) - right / 2) / pairs)


METRICS: dict[str, Callable[[Forecasts], float]] = {
    "accuracy": accuracy,
    "nll": negative_log_likelihood,
    "brier": brier_score,
    "calibration_error": calibration_error,
    "expected_calibration_error": expected_calibration_error,
    "expected_calibration_error_by_chance": expected_calibration_error_by_chance,
    "confidence": mean_confidence,
    "risk_coverage_area": area_under_risk_coverage,
    "auroc_of_errors": auroc_of_errors,
}

INTERVALS: dict[str, Callable[[Forecasts], tuple[float, float]] | None] = {
    "calibration_error": calibration_error_interval,
    "expected_calibration_error": None,
    "expected_calibration_error_by_chance": None,
}
"""Metrics for which the bootstrap is wrong, with their own 95 % interval, or None. Resampling adds chance to what
chance has added to the calibration error already, so that the values of resamples lie above the error itself."""


def pair_metrics(forecasts: Forecasts) -> dict[str, float]:
    """Computes all [`METRICS`].

    Args:
        forecasts ([`Forecasts`]):
            Forecasts to evaluate.

    Returns:
        `dict[str, float]`: Values by the name of the metric.
    """
    return {name: metric(forecasts) for name, metric in METRICS.items()}


# Rank correlations with people's ratings


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Spearman's rank correlation, with ties at their mean rank.

    Args:
        a (array-like of shape `(N,)`):
            First variable.
        b (array-like of shape `(N,)`):
            Second variable.

    Returns:
        `float`: Correlation from −1 to 1; `nan` if a variable is constant.
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if np.ptp(a) == 0 or np.ptp(b) == 0:  # SciPy returns NaN as well, with a warning each time.
        return math.nan
    return float(stats.spearmanr(a, b).statistic)


def centrality(location: ArrayLike) -> np.ndarray:
    """−|μ − median(μ)|: the baseline that any claim about learned scales has to beat.

    People disagree least about extreme texts, and a bounded rating scale leaves them little room to. This baseline,
    without any learned scale, therefore correlates with the standard deviation of their ratings.

    Args:
        location (array-like of shape `(N,)`):
            Locations of the rewards.

    Returns:
        `np.ndarray` of shape `(N,)`: The baseline, in units of the reward.
    """
    location = np.asarray(location, dtype=float)
    return -np.abs(location - np.median(location))
