"""Metrics of a reward model on held-out comparisons: accuracy, calibration and selective prediction, with bootstrap
intervals.

Every metric is a pure function of [`Forecasts`]: what a model predicted for each comparison and what people said. It
depends neither on the model nor on the source of the comparisons (`disco_trl.evaluation.evaluate` runs models over
data). A scalar reward model is read as Bradley–Terry, which is the logistic family with every scale at 1/√2, so that
`RewardDistribution.log_prob_greater` serves both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from sklearn.metrics import roc_auc_score

from ..distributions.reward_distribution import RewardDistribution


BINS = 15


@dataclass(frozen=True)
class Forecasts:
    """Forecasts of a model for comparisons of two answers, with people's judgements. All arrays are float64 of shape
    `(N,)`.

    Attributes:
        log_prob (`np.ndarray`):
            log P(first ≻ second) in nats.
        log_prob_reverse (`np.ndarray`):
            log P(second ≻ first) in nats. It is stored because computing it as log(1 − P) loses all precision near P =
            1.
        margin (`np.ndarray`):
            Location of the first answer minus that of the second, in units of the reward.
        target (`np.ndarray`):
            Share of people who preferred the first answer: 1 for a forced choice of it, 0.5 for a tie.
        weight (`np.ndarray`):
            Number of people who were asked. A comparison of weight 0 is not counted by any metric.
    """

    log_prob: np.ndarray
    log_prob_reverse: np.ndarray
    margin: np.ndarray
    target: np.ndarray
    weight: np.ndarray

    @classmethod
    def of(
        cls,
        first: RewardDistribution,
        second: RewardDistribution,
        target: ArrayLike = 1.0,
        weight: ArrayLike = 1.0,
    ) -> Forecasts:
        """Forecasts from the rewards of the first and second answers.

        Args:
            first ([`RewardDistribution`]):
                Rewards of the first answers, of shape `(N,)`.
            second ([`RewardDistribution`]):
                Rewards of the second answers, of shape `(N,)`.
            target (`float` or array-like of shape `(N,)`, *optional*, defaults to `1.0`):
                Share of people who preferred the first answer.
            weight (`float` or array-like of shape `(N,)`, *optional*, defaults to `1.0`):
                Number of people who were asked.

        Returns:
            [`Forecasts`]: `N` forecasts.
        """
        columns = (
            first.log_prob_greater(second),
            second.log_prob_greater(first),
            first.location - second.location,
            target,
            weight,
        )
        return cls(*(np.broadcast_to(np.asarray(column, dtype=float), len(first)) for column in columns))

    @classmethod
    def of_probabilities(cls, prob: ArrayLike, target: ArrayLike = 1.0, weight: ArrayLike = 1.0) -> Forecasts:
        """Forecasts from probabilities, for models that have no locations.

        Args:
            prob (array-like of shape `(N,)`):
                P(first ≻ second). The margin is the probability minus 0.5.
            target (`float` or array-like of shape `(N,)`, *optional*, defaults to `1.0`):
                Share of people who preferred the first answer.
            weight (`float` or array-like of shape `(N,)`, *optional*, defaults to `1.0`):
                Number of people who were asked.

        Returns:
            [`Forecasts`]: `N` forecasts.
        """
        prob = np.asarray(prob, dtype=float)
        with np.errstate(divide="ignore"):  # A probability of 0 or 1 is a log-probability of −∞, and a valid forecast.
            columns = (np.log(prob), np.log1p(-prob), prob - 0.5, target, weight)
        return cls(*(np.broadcast_to(np.asarray(column, dtype=float), len(prob)) for column in columns))

    def __len__(self) -> int:
        return len(self.margin)

    def __getitem__(self, index: np.ndarray) -> Forecasts:
        return Forecasts(*(column[index] for column in vars(self).values()))

    def times(self, counts: np.ndarray) -> Forecasts:
        """The same forecasts with multiplied weights, such as the counts of a bootstrap resample.

        Args:
            counts (`np.ndarray` of shape `(N,)`):
                Factor of each comparison's weight.

        Returns:
            [`Forecasts`]: `N` forecasts.
        """
        return Forecasts(self.log_prob, self.log_prob_reverse, self.margin, self.target, self.weight * counts)

    @property
    def prob(self) -> np.ndarray:
        """P(first ≻ second), of shape `(N,)`."""
        return np.exp(self.log_prob)

    @property
    def confidence(self) -> np.ndarray:
        """Probability of the answer that the model considers more likely to be preferred, from 0.5 to 1, of shape
        `(N,)`.
        """
        return np.exp(np.maximum(self.log_prob, self.log_prob_reverse))

    @property
    def right(self) -> np.ndarray:
        """Share of people who agree with the sign of the margin, of shape `(N,)`. It is 0.5 where the margin is 0."""
        return 0.5 + np.sign(self.margin) * (self.target - 0.5)

    @property
    def nll(self) -> np.ndarray:
        """Negative log-likelihood of one person's choice in nats, of shape `(N,)`."""
        return -_mix(self.target, self.log_prob, self.log_prob_reverse)


def _mix(share: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """share · one + (1 − share) · other, where 0 · −∞ is 0."""
    parts = (np.where(share > 0, one, 0.0), np.where(share < 1, other, 0.0))
    return share * parts[0] + (1 - share) * parts[1]


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
    return _mean(forecasts.right, np.where(forecasts.target == 0.5, 0.0, forecasts.weight))


def negative_log_likelihood(forecasts: Forecasts) -> float:
    """Mean negative log-likelihood of a person's choice in nats. With soft labels it is the cross-entropy.

    Args:
        forecasts ([`Forecasts`]):
            Forecasts to evaluate.

    Returns:
        `float`: Negative log-likelihood. An uninformed forecast of 0.5 scores log 2 = 0.693.
    """
    return _mean(forecasts.nll, forecasts.weight)


def brier_score(forecasts: Forecasts) -> float:
    """Mean squared error of the forecast probability against a person's choice.

    Args:
        forecasts ([`Forecasts`]):
            Forecasts to evaluate.

    Returns:
        `float`: Brier score. An uninformed forecast of 0.5 scores 0.25.
    """
    prob = forecasts.prob
    return _mean(_mix(forecasts.target, (1 - prob) ** 2, prob**2), forecasts.weight)


def mean_confidence(forecasts: Forecasts) -> float:
    """Sharpness: the mean probability of the more likely answer.

    Args:
        forecasts ([`Forecasts`]):
            Forecasts to evaluate.

    Returns:
        `float`: Mean confidence from 0.5 to 1. A model whose confidence exceeds its accuracy is overconfident.
    """
    return _mean(forecasts.confidence, forecasts.weight)


def _mean(values: np.ndarray, weight: np.ndarray) -> float:
    total = weight.sum()
    return float(values @ weight / total) if total > 0 else math.nan


@dataclass(frozen=True)
class ReliabilityCurve:
    """Predicted and observed frequencies in bins of equal mass.

    Attributes:
        predicted (`np.ndarray` of shape `(bins,)`):
            Mean forecast probability that the first answer is preferred.
        observed (`np.ndarray` of shape `(bins,)`):
            Share of people in the bin who preferred it.
        count (`np.ndarray` of shape `(bins,)`):
            Number of people in the bin.
    """

    predicted: np.ndarray
    observed: np.ndarray
    count: np.ndarray


def reliability_curve(forecasts: Forecasts, bins: int = BINS, seed: int = 0) -> ReliabilityCurve:
    """Predicted against observed frequency.

    In most datasets the chosen answer is always the first, so that P(first ≻ second) has nothing to be calibrated
    against. Each comparison is therefore given a random orientation first.

    Args:
        forecasts ([`Forecasts`]):
            Forecasts to evaluate.
        bins (`int`, *optional*, defaults to `15`):
            Number of bins of equal mass. There are fewer if there are fewer comparisons.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the random orientations.

    Returns:
        [`ReliabilityCurve`]: The curve, in ascending order of the predicted probability.
    """
    # A fixed seed gives all models on the same data the same orientations, so that their errors can be compared.
    flipped = np.random.default_rng(seed).random(len(forecasts)) < 0.5
    predicted = np.where(flipped, np.exp(forecasts.log_prob_reverse), forecasts.prob)
    observed = np.where(flipped, 1 - forecasts.target, forecasts.target)
    order = np.argsort(predicted, kind="stable")
    order = order[forecasts.weight[order] > 0]
    # Bins have equal mass rather than equal width: forecasts crowd in the middle or at the ends, and bins of equal
    # width would be nearly empty elsewhere. A comparison belongs to the bin that holds the middle of its mass, so that
    # the votes of one comparison are never split.
    weight = forecasts.weight[order]
    middle = (np.cumsum(weight) - weight / 2) / weight.sum()
    bins = min(bins, len(order))
    bin_ = np.minimum((middle * bins).astype(int), bins - 1)
    count = np.bincount(bin_, weight, bins)
    filled = count > 0  # One comparison with many votes can span several bins and leave all but one of them empty.
    sums = [np.bincount(bin_, weight * column[order], bins)[filled] for column in (predicted, observed)]
    return ReliabilityCurve(sums[0] / count[filled], sums[1] / count[filled], count[filled])


def calibration_error(forecasts: Forecasts, bins: int = BINS, seed: int = 0) -> float:
    """Expected calibration error: the mean over people of |observed − predicted| in their bin of the
    [`reliability_curve`].

    By chance alone, perfect forecasts also score above 0: about 0.3 / √(N / bins), which is 0.007 for 30,000 votes.

    Args:
        forecasts ([`Forecasts`]):
            Forecasts to evaluate.
        bins (`int`, *optional*, defaults to `15`):
            Number of bins.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the random orientations.

    Returns:
        `float`: Calibration error from 0 to 1.
    """
    curve = reliability_curve(forecasts, bins, seed)
    return _mean(np.abs(curve.observed - curve.predicted), curve.count)


def debiased_calibration_error(forecasts: Forecasts, bins: int = BINS, seed: int = 0) -> float:
    """Root mean square of observed − predicted, with the contribution of chance removed.

    The variance of the observed share of each bin is estimated and subtracted from its squared difference (A. Kumar et
    al., 2019, arXiv 1909.10155).

    Args:
        forecasts ([`Forecasts`]):
            Forecasts to evaluate.
        bins (`int`, *optional*, defaults to `15`):
            Number of bins.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the random orientations.

    Returns:
        `float`: Calibration error from 0 to 1; 0 if chance explains all of the difference.
    """
    curve = reliability_curve(forecasts, bins, seed)
    # Unbiased estimate of a binomial share's variance. Its sum can exceed that of the squared differences, in which
    # case the root is clipped at 0.
    chance = curve.observed * (1 - curve.observed) / np.maximum(curve.count - 1, 1)
    return math.sqrt(max(_mean((curve.observed - curve.predicted) ** 2 - chance, curve.count), 0.0))


def risk_coverage_curve(forecasts: Forecasts) -> tuple[np.ndarray, np.ndarray]:
    """Error rate on the comparisons that the model is most confident of, as a function of how many are kept (R.
    El-Yaniv and Y. Wiener, 2010). People's ties are left out.

    Args:
        forecasts ([`Forecasts`]):
            Forecasts to evaluate.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: Coverage and risk, both of shape `(N,)`. Coverage, ascending to 1, is the
        share of people in the comparisons that are kept; risk is the share of these people who disagree with the
        model.
    """
    # A stable sort, so that the curve does not depend on the platform where forecasts are equally confident.
    order = np.argsort(-forecasts.confidence, kind="stable")
    weight = np.where(forecasts.target == 0.5, 0.0, forecasts.weight)[order]
    order, weight = order[weight > 0], weight[weight > 0]
    # Coverage counts people, so that a comparison with many votes covers more than one with a single vote.
    covered = np.cumsum(weight)
    wrong = np.cumsum(weight * (1 - forecasts.right[order]))
    return covered / covered[-1:], wrong / covered


def area_under_risk_coverage(forecasts: Forecasts) -> float:
    """Area under the risk–coverage curve: the mean risk over all coverages.

    Args:
        forecasts ([`Forecasts`]):
            Forecasts to evaluate.

    Returns:
        `float`: Area from 0 to 1. It is small if the model is accurate and its confidence separates errors from hits;
        `nan` without comparisons.
    """
    coverage, risk = risk_coverage_curve(forecasts)
    return float(risk @ np.diff(coverage, prepend=0.0)) if len(risk) else math.nan


def auroc_of_errors(forecasts: Forecasts) -> float:
    """AUROC of doubt: the probability that the model is less confident on a comparison that it gets wrong than on one
    that it gets right. People's ties and equal locations are left out.

    Args:
        forecasts ([`Forecasts`]):
            Forecasts to evaluate.

    Returns:
        `float`: AUROC from 0 to 1, where 0.5 is chance; `nan` if all forecasts are right, or all are wrong.
    """
    weight = np.where((forecasts.target == 0.5) | (forecasts.margin == 0), 0.0, forecasts.weight)
    # Each comparison is listed twice, as wrong and as right, weighted by the number of people for whom it is so.
    weights = np.concatenate([weight * (1 - forecasts.right), weight * forecasts.right])
    wrong = np.repeat([True, False], len(forecasts))
    counts = weights > 0
    if len(np.unique(wrong[counts])) < 2:
        return math.nan
    doubt = np.tile(1 - forecasts.confidence, 2)
    return float(roc_auc_score(wrong[counts], doubt[counts], sample_weight=weights[counts]))


METRICS: dict[str, Callable[[Forecasts], float]] = {
    "accuracy": accuracy,
    "nll": negative_log_likelihood,
    "brier": brier_score,
    "calibration_error": calibration_error,
    "debiased_calibration_error": debiased_calibration_error,
    "confidence": mean_confidence,
    "risk_coverage_area": area_under_risk_coverage,
    "auroc_of_errors": auroc_of_errors,
}


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
