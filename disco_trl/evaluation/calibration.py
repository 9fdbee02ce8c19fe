"""Calibration of forecasts: the reliability curve, the error, its interval, and what chance alone shows.

The error of forecasts is that of the true probabilities in B bins: √(Σ_b w_b δ_b²), where w_b is the share of people
in bin b, and δ_b the mean over people of the true probability less the forecast. The true probability of a comparison
is the share of all people who would prefer the first answer, and the comparisons of a bin are a sample of those that
there could be. Bins have equal mass: 15 of them, or fewer where fewer than ten comparisons would be in each.

What is observed is d_b = δ_b + chance, so that the plain error, Σ_b w_b |d_b|, is above 0 for perfect forecasts too.
With V, the covariance of chance, E[Σ_b w_b d_b²] = Σ_b w_b δ_b² + Σ_b w_b V_bb, and the last term is subtracted (A.
Kumar et al., 2019, arXiv 1909.10155). The interval consists of the errors for which the observed Σ_b w_b d_b² is
neither among the smallest nor among the largest 2.5 % that chance would show.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

from .clusters import cell_sums, clustered_covariance
from .forecasts import Forecasts, weighted_mean


BINS = 15
FEWEST = 10
"""Comparisons that each bin should have."""
DRAWS = 200


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


@dataclass(frozen=True)
class _Binned:
    """Comparisons of which people were asked, each in a random orientation and in a bin.

    Attributes:
        predicted (`np.ndarray` of shape `(N,)`):
            Probability that the first answer is preferred.
        observed (`np.ndarray` of shape `(N,)`):
            Share of people who preferred it.
        weight (`np.ndarray` of shape `(N,)`):
            Number of people.
        groups (`np.ndarray` of shape `(N,)` or `(N, 2)`):
            What comparisons share.
        bin (`np.ndarray` of shape `(N,)`):
            Number of the bin.
        count (`np.ndarray` of shape `(B,)`):
            Number of people in each bin, none of which is empty.
    """

    predicted: np.ndarray
    observed: np.ndarray
    weight: np.ndarray
    groups: np.ndarray
    bin: np.ndarray
    count: np.ndarray

    def mean(self, values: np.ndarray) -> np.ndarray:
        """Means over people of values of shape `(N,)`, of shape `(B,)`."""
        return np.bincount(self.bin, self.weight * values, len(self.count)) / self.count


def _binned(forecasts: Forecasts, bins: int | None, seed: int) -> _Binned:
    # In most datasets the chosen answer is always the first, so that P(first ≻ second) has nothing to be calibrated
    # against. A fixed seed gives all models on the same data the same orientations, so that their errors can be
    # compared.
    flipped = np.random.default_rng(seed).random(len(forecasts)) < 0.5
    predicted = np.where(flipped, np.exp(forecasts.log_prob_reverse), forecasts.prob)
    observed = np.where(flipped, 1 - forecasts.target, forecasts.target)
    counts = forecasts.weight > 0
    predicted, observed, weight, groups = (
        column[counts] for column in (predicted, observed, forecasts.weight, forecasts.groups)
    )
    bins = max(1, min(BINS, len(weight) // FEWEST) if bins is None else min(bins, len(weight)))
    # Bins have equal mass rather than equal width: forecasts crowd in the middle or at the ends, and bins of equal
    # width would be nearly empty elsewhere. A comparison belongs to the bin that holds the middle of its mass, so that
    # the votes of one comparison are never split.
    order = np.argsort(predicted, kind="stable")
    middle = (np.cumsum(weight[order]) - weight[order] / 2) / weight.sum()
    number = np.empty(len(order), dtype=int)
    number[order] = np.minimum((middle * bins).astype(int), bins - 1)
    # One comparison with many votes can span several bins and leave all but one of them empty.
    filled, number = np.unique(number, return_inverse=True)
    return _Binned(predicted, observed, weight, groups, number, np.bincount(number, weight, len(filled)))


def reliability_curve(forecasts: Forecasts, bins: int | None = None, seed: int = 0) -> ReliabilityCurve:
    """Predicted against observed frequency. Each comparison is given a random orientation first.

    Args:
        forecasts ([`~disco_trl.evaluation.forecasts.Forecasts`]):
            Forecasts to evaluate.
        bins (`int`, *optional*, defaults to `None`):
            Number of bins of equal mass. If `None`, 15, or fewer so that each holds ten comparisons.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the random orientations.

    Returns:
        [`ReliabilityCurve`]: The curve, in ascending order of the predicted probability.
    """
    binned = _binned(forecasts, bins, seed)
    return ReliabilityCurve(binned.mean(binned.predicted), binned.mean(binned.observed), binned.count)


def expected_calibration_error(forecasts: Forecasts, bins: int | None = None, seed: int = 0) -> float:
    """Expected calibration error (ECE): the mean over people of |observed − predicted| in their bin of the
    [`reliability_curve`].

    It is above 0 by chance alone, and has no interval for this reason: [`expected_calibration_error_by_chance`] tells
    how far, and [`calibration_error`] is free of it.

    Args:
        forecasts ([`~disco_trl.evaluation.forecasts.Forecasts`]):
            Forecasts to evaluate.
        bins (`int`, *optional*, defaults to `None`):
            Number of bins, see [`reliability_curve`].
        seed (`int`, *optional*, defaults to `0`):
            Seed of the random orientations.

    Returns:
        `float`: Calibration error from 0 to 1.
    """
    binned = _binned(forecasts, bins, seed)
    return weighted_mean(np.abs(binned.mean(binned.observed - binned.predicted)), binned.count)


def expected_calibration_error_by_chance(forecasts: Forecasts, bins: int | None = None, seed: int = 0) -> float:
    """Expected calibration error that these forecasts would show on average if they were the true probabilities:
    everybody's choice is drawn from the forecast, 200 times.

    Args:
        forecasts ([`~disco_trl.evaluation.forecasts.Forecasts`]):
            Forecasts to evaluate.
        bins (`int`, *optional*, defaults to `None`):
            Number of bins, see [`reliability_curve`].
        seed (`int`, *optional*, defaults to `0`):
            Seed of the random orientations and of the choices.

    Returns:
        `float`: Calibration error from 0 to 1, about 0.3 / √(N / bins) for one person a comparison and forecasts that
        are not sharp: 0.007 for 30,000 votes, 0.08 for 200.
    """
    binned = _binned(forecasts, bins, seed)
    if not np.isfinite(binned.predicted).all():
        return math.nan
    generator = np.random.default_rng(seed)
    people = np.maximum(np.rint(binned.weight), 1).astype(int)
    prob = np.minimum(binned.predicted, 1.0)
    errors = [
        weighted_mean(np.abs(binned.mean(generator.binomial(people, prob) / people - prob)), binned.count)
        for _ in range(DRAWS)
    ]
    return float(np.mean(errors))


def calibration_error(forecasts: Forecasts, bins: int | None = None, seed: int = 0) -> float:
    """Root mean square over people of observed − predicted in their bin, with the contribution of chance removed (A.
    Kumar et al., 2019, arXiv 1909.10155).

    Args:
        forecasts ([`~disco_trl.evaluation.forecasts.Forecasts`]):
            Forecasts to evaluate. Comparisons of the same group are not taken for independent.
        bins (`int`, *optional*, defaults to `None`):
            Number of bins, see [`reliability_curve`].
        seed (`int`, *optional*, defaults to `0`):
            Seed of the random orientations.

    Returns:
        `float`: Calibration error from 0 to 1; 0 if chance explains all of the difference; `nan` without comparisons.
    """
    squared, chance, _ = _squared_error(_binned(forecasts, bins, seed))
    return math.sqrt(max(squared - chance.sum(), 0.0)) if math.isfinite(squared) else math.nan


def calibration_error_interval(
    forecasts: Forecasts, bins: int | None = None, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Interval of the [`calibration_error`], which always contains it.

    The squared error is Σ_b w_b d_b² with d ~ N(δ, V). Its mean and its variance, λ + tr(WV) and 2 tr((WV)²) + 4 λ κ
    for λ = Σ_b w_b δ_b² and κ = δ'WVWδ / λ, are those of a scaled noncentral chi-squared variable, whose quantiles are
    inverted for λ. κ is taken from d, for which it is the right one without chance and, on average, with chance alone.

    Simulated with 200 to 3,000 comparisons of perfect, mildly and badly calibrated forecasts of three degrees of
    sharpness, with single votes, several votes, soft labels, shared prompts and shared answers, it contains the error
    of the true probabilities in 89 to 100 % of the data sets. If fewer than about thirty answers make up all
    comparisons, it may be fewer (83 % was seen).

    Args:
        forecasts ([`~disco_trl.evaluation.forecasts.Forecasts`]):
            Forecasts to evaluate. Comparisons of the same group are not taken for independent.
        bins (`int`, *optional*, defaults to `None`):
            Number of bins, see [`reliability_curve`].
        seed (`int`, *optional*, defaults to `0`):
            Seed of the random orientations.
        level (`float`, *optional*, defaults to `0.95`):
            Level of the interval.

    Returns:
        `tuple[float, float]`: Lower and upper end, not below 0; `nan` without comparisons.
    """
    squared, chance, observed = _squared_error(_binned(forecasts, bins, seed))
    if not math.isfinite(squared):
        return math.nan, math.nan
    mean, variance = chance.sum(), 2 * (chance**2).sum()
    if mean <= 1e-9 * squared:  # Every forecast is about 0 or 1, and all of a bin are right or all are wrong.
        return math.sqrt(squared), math.sqrt(squared)
    kappa = chance @ observed**2 / squared if squared > 0 else variance / (2 * mean)

    def share_below(error: float) -> float:
        """Probability of a squared error below the observed one, given the true one."""
        scale = (variance + 4 * error * kappa) / (2 * mean + 4 * error)
        if error == 0:
            return float(stats.chi2.cdf(squared / scale, mean / scale))
        return float(stats.ncx2.cdf(squared / scale, mean / scale, error / scale))

    def error_of(share: float) -> float:
        if share_below(0.0) <= share:
            return 0.0
        high = squared + mean
        while share_below(high) > share:
            high *= 2
        return float(optimize.brentq(lambda error: share_below(error) - share, 0.0, high, xtol=1e-12))

    low, high = (math.sqrt(error_of((1 + side * level) / 2)) for side in (1, -1))
    return low, high


def _squared_error(binned: _Binned) -> tuple[float, np.ndarray, np.ndarray]:
    """Σ_b w_b d_b², the eigenvalues of √W V √W, and √W d in the basis of its eigenvectors, both of shape `(B,)`."""
    predicted, weight, number, count = binned.predicted, binned.weight, binned.bin, binned.count
    if len(count) == 0 or not np.isfinite(predicted).all():
        return math.nan, np.zeros(0), np.zeros(0)
    difference = binned.mean(binned.observed - predicted)
    residuals = np.zeros((len(number), len(count)))
    shares = residuals.copy()
    each = np.arange(len(number)), number
    shares[each] = weight / count[number]
    residuals[each] = shares[each] * (binned.observed - predicted - difference[number])
    covariance = clustered_covariance(residuals, binned.groups)
    # Around its own mean, a bin of m independent comparisons varies by 1 − 1 / m of their variance; in general, it is
    # 1 − h. What is missing is filled in with what the forecasts say, so that a bin in which everybody agreed does not
    # pass for one without chance. A weight below 1 is part of one person's judgement.
    missing = (cell_sums(shares, binned.groups) ** 2).sum(axis=0)
    implied = binned.mean(np.minimum(weight, 1.0) * predicted * (1 - predicted)) / count
    covariance[np.diag_indices(len(count))] += missing * implied
    root = np.sqrt(count / count.sum())
    chance, axes = np.linalg.eigh(root[:, None] * covariance * root)
    observed = axes.T @ (root * difference)
    # With shared answers, the estimate of a covariance need not be positive.
    return float(observed @ observed), np.maximum(chance, 0.0), observed
