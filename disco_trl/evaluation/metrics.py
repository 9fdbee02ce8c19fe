"""How good is a reward model on comparisons that it has not seen, and how honest is its error bar?

Every metric is a pure function of `Forecasts`: what a model said of each comparison and what people said, whichever
model it was and wherever the comparisons come from (`disco_trl.evaluation.evaluate` runs models over data). A plain
scalar reward model is read as Bradley–Terry, that is the logistic family with every scale at 1/√2, so that
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
    """
    Comparisons of two answers each, forecast by a model and judged by people. All arrays `[N]`, float64.

    Attributes:
        log_prob: log P(first ≻ second) in nats.
        log_prob_reverse: log P(second ≻ first); given, as 1 − P loses what is left of it near 1.
        margin: location of the first less that of the second.
        target: the share of people who preferred the first; 1 for a forced choice of it, 0.5 for a tie.
        weight: how many people were asked; with 0 a comparison counts nowhere.
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
        """Forecasts by the rewards of the first and the second answers, `[N]` each."""
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
        """Forecasts that are known as probabilities `[N]` that the first wins; the better side is the likelier one."""
        prob = np.asarray(prob, dtype=float)
        with np.errstate(divide="ignore"):
            columns = (np.log(prob), np.log1p(-prob), prob - 0.5, target, weight)
        return cls(*(np.broadcast_to(np.asarray(column, dtype=float), len(prob)) for column in columns))

    def __len__(self) -> int:
        return len(self.margin)

    def __getitem__(self, index: np.ndarray) -> Forecasts:
        return Forecasts(*(column[index] for column in vars(self).values()))

    def times(self, counts: np.ndarray) -> Forecasts:
        """The same with each comparison counted that often, `[N]`."""
        return Forecasts(self.log_prob, self.log_prob_reverse, self.margin, self.target, self.weight * counts)

    @property
    def prob(self) -> np.ndarray:
        """P(first ≻ second)."""
        return np.exp(self.log_prob)

    @property
    def confidence(self) -> np.ndarray:
        """Probability of the side that the model thinks likelier, 0.5 to 1."""
        return np.exp(np.maximum(self.log_prob, self.log_prob_reverse))

    @property
    def right(self) -> np.ndarray:
        """The share of people who agree with the sign of the margin; half of them where it is 0."""
        return 0.5 + np.sign(self.margin) * (self.target - 0.5)

    @property
    def nll(self) -> np.ndarray:
        """−log likelihood of a person's choice, in nats."""
        return -_mix(self.target, self.log_prob, self.log_prob_reverse)


def _mix(share: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """share · one + (1 − share) · other, where 0 · −∞ is 0."""
    parts = (np.where(share > 0, one, 0.0), np.where(share < 1, other, 0.0))
    return share * parts[0] + (1 - share) * parts[1]


# Comparisons to figures


def accuracy(forecasts: Forecasts) -> float:
    """Share of people who agree with the sign of the margin. Equal locations count half; people's ties not at all."""
    return _mean(forecasts.right, np.where(forecasts.target == 0.5, 0.0, forecasts.weight))


def negative_log_likelihood(forecasts: Forecasts) -> float:
    """Mean −log P(what a person said) in nats; with soft labels, the cross-entropy. Knowing nothing, log 2 = 0.693."""
    return _mean(forecasts.nll, forecasts.weight)


def brier_score(forecasts: Forecasts) -> float:
    """Mean squared error of the forecast of a person's choice. Unknowing it is 0.25."""
    prob = forecasts.prob
    return _mean(_mix(forecasts.target, (1 - prob) ** 2, prob**2), forecasts.weight)


def mean_confidence(forecasts: Forecasts) -> float:
    """Sharpness: the mean probability of the likelier side. Above the accuracy, the model is sure of too much."""
    return _mean(forecasts.confidence, forecasts.weight)


def _mean(values: np.ndarray, weight: np.ndarray) -> float:
    total = weight.sum()
    return float(values @ weight / total) if total > 0 else math.nan


@dataclass(frozen=True)
class ReliabilityCurve:
    """Comparisons in bins of equal mass, by the probability that was forecast; each field is an array `[bins]`."""

    predicted: np.ndarray  # mean forecast probability that the first side wins
    observed: np.ndarray  # share of people in the bin for whom it did
    count: np.ndarray  # people in the bin


def reliability_curve(forecasts: Forecasts, bins: int = BINS, seed: int = 0) -> ReliabilityCurve:
    """
    Predicted against observed frequency.

    In most data the chosen side always wins, so that P(chosen ≻ rejected) has nothing to be calibrated against. Hence
    each comparison gets a random orientation first.

    Args:
        forecasts: the comparisons.
        bins: bins of equal mass; fewer than asked for if there are fewer comparisons.
        seed: seed of the orientations.
    """
    flipped = np.random.default_rng(seed).random(len(forecasts)) < 0.5
    predicted = np.where(flipped, np.exp(forecasts.log_prob_reverse), forecasts.prob)
    observed = np.where(flipped, 1 - forecasts.target, forecasts.target)
    order = np.argsort(predicted, kind="stable")
    order = order[forecasts.weight[order] > 0]
    # By the middle of each comparison's own mass, so that no mass is in two bins.
    weight = forecasts.weight[order]
    middle = (np.cumsum(weight) - weight / 2) / weight.sum()
    bins = min(bins, len(order))
    bin_ = np.minimum((middle * bins).astype(int), bins - 1)
    count = np.bincount(bin_, weight, bins)
    filled = count > 0  # a comparison of many people can fill several
    sums = [np.bincount(bin_, weight * column[order], bins)[filled] for column in (predicted, observed)]
    return ReliabilityCurve(sums[0] / count[filled], sums[1] / count[filled], count[filled])


def calibration_error(forecasts: Forecasts, bins: int = BINS, seed: int = 0) -> float:
    """
    Expected calibration error: the mean over people of |observed − predicted| in their bin of the `reliability_curve`.

    Perfect forecasts score above 0 as well, by chance: about 0.3/√(N / bins), which is 0.007 at 30,000 votes.
    """
    curve = reliability_curve(forecasts, bins, seed)
    return _mean(np.abs(curve.observed - curve.predicted), curve.count)


def debiased_calibration_error(forecasts: Forecasts, bins: int = BINS, seed: int = 0) -> float:
    """
    Root mean square of observed − predicted, less what chance alone would bring; 0 where chance explains all.

    The variance of each bin's share is estimated and taken off its squared difference (A. Kumar et al., 2019,
    arXiv 1909.10155).
    """
    curve = reliability_curve(forecasts, bins, seed)
    chance = curve.observed * (1 - curve.observed) / np.maximum(curve.count - 1, 1)
    return math.sqrt(max(_mean((curve.observed - curve.predicted) ** 2 - chance, curve.count), 0.0))


def risk_coverage_curve(forecasts: Forecasts) -> tuple[np.ndarray, np.ndarray]:
    """
    The error rate among the comparisons that the model is surest of, as more of them are taken.

    Returns:
        Coverage, ascending to 1, and risk, both `[N]`: the share of people in the surest comparisons, and the share of
        these people who disagree (R. El-Yaniv and Y. Wiener, 2010). People's ties are left out.
    """
    order = np.argsort(-forecasts.confidence, kind="stable")
    weight = np.where(forecasts.target == 0.5, 0.0, forecasts.weight)[order]
    order, weight = order[weight > 0], weight[weight > 0]
    covered = np.cumsum(weight)
    wrong = np.cumsum(weight * (1 - forecasts.right[order]))
    return covered / covered[-1:], wrong / covered


def area_under_risk_coverage(forecasts: Forecasts) -> float:
    """The mean risk over all coverages: small if the model is right, and knows when it is."""
    coverage, risk = risk_coverage_curve(forecasts)
    return float(risk @ np.diff(coverage, prepend=0.0)) if len(risk) else math.nan


def auroc_of_errors(forecasts: Forecasts) -> float:
    """
    How well doubt tells wrong forecasts from right ones: the probability that the model was less confident of a
    comparison that it had wrong than of one that it had right. 0.5 is chance; nan where all are right or all wrong.
    """
    weight = np.where((forecasts.target == 0.5) | (forecasts.margin == 0), 0.0, forecasts.weight)
    # Of people who were of two minds, some make it right and the others wrong.
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
    """All :data:`METRICS` of comparisons."""
    return {name: metric(forecasts) for name, metric in METRICS.items()}


# How far to trust the figures


def resamples(groups: np.ndarray, draws: int, seed: int = 0) -> np.ndarray:
    """
    How often each of N comparisons counts in each resample of the bootstrap (B. Efron, 1979), `[draws, N]`.

    Args:
        groups: `[N]`, what is drawn together: the number of each comparison's prompt, say. Or `[N, 2]`, one for each
            of its sides, where the same answers stand in many comparisons: a comparison of two groups then counts as
            often as both were drawn, the product (A. Owen's pigeonhole bootstrap, 2007).
        draws: resamples.
        seed: of the draws.
    """
    _, group = np.unique(groups, return_inverse=True)
    sides = group.reshape(len(groups), -1)
    count = group.max() + 1
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws).astype(np.int16)
    first, last = sides[:, 0], sides[:, -1]
    return np.where(first == last, drawn[:, first], drawn[:, first] * drawn[:, last])


def interval(values: ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """The middle `level` of bootstrap values (percentile method); nan if any of them is nan."""
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
    """
    The mean difference of two models on the same pairs, and an interval for it.

    Args:
        ours, theirs: a figure of each pair, such as its negative log-likelihood, of one model and of the other: `[N]`,
            or `[seeds, N]` for runs that were made in pairs.
        groups: of the pairs, as in `resamples`; without them each pair is drawn by itself.
        draws: of the bootstrap. Each resamples the groups, and the seeds if there are several.
        level: of the interval (percentile method; B. Efron, 1979).
        seed: of the draws.

    Returns:
        The mean of ours − theirs, and the lower and upper end of its interval.
    """
    difference = np.atleast_2d(np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float))
    runs, count = difference.shape
    generator = np.random.default_rng(seed)
    counts = resamples(np.arange(count) if groups is None else groups, draws, seed)
    means = [
        (difference[generator.integers(runs, size=runs)] @ weight).mean() / max(weight.sum(), 1) for weight in counts
    ]
    return float(difference.mean()), *interval(means, level)


# Texts to figures, where people's own ratings of each text are known


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Spearman's rank correlation of `a` `[N]` and `b` `[N]`, ties at their mean rank; nan if either is constant."""
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    return float(stats.spearmanr(a, b).statistic)


def centrality(location: ArrayLike) -> np.ndarray:
    """
    −|μ − median(μ)|, `[N]`: the baseline that any claim about learned scales must beat.

    People disagree least about extreme texts (and a bounded rating leaves them no room to), so that this alone, with
    no scale learned, ranks with their standard deviation.
    """
    location = np.asarray(location, dtype=float)
    return -np.abs(location - np.median(location))
