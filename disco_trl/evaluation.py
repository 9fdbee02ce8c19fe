"""How good is a reward model on pairs that it has not seen, and how honest is its error bar?

Every metric is a pure function of NumPy arrays, one number a pair or one a text, whichever model they come from
(`disco_trl.scoring` runs it). A plain scalar reward model is read as Bradley–Terry, that is the logistic family with
every scale at 1/√2, so that `RewardDistribution.log_prob_greater` serves both.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


# Pairs to figures


def accuracy(margin: ArrayLike) -> float:
    """Share of pairs whose chosen side has the higher reward, ties by half; `margin` `[N]` is chosen less rejected."""
    return float(np.mean((np.sign(np.asarray(margin, dtype=float)) + 1) / 2))


def negative_log_likelihood(log_prob: ArrayLike) -> float:
    """Mean of −log P(chosen ≻ rejected) in nats, from `log_prob` `[N]`. Without knowledge it is log 2 = 0.693."""
    return float(-np.mean(np.asarray(log_prob, dtype=float)))


def brier_score(prob: ArrayLike) -> float:
    """Mean squared error of P(chosen ≻ rejected), `prob` `[N]`, as a forecast. Without knowledge it is 0.25."""
    return float(np.mean((1 - np.asarray(prob, dtype=float)) ** 2))


@dataclass(frozen=True)
class ReliabilityCurve:
    """Pairs in bins of equal mass, by the probability that was predicted for them; each field is an array `[bins]`."""

    predicted: np.ndarray  # mean predicted probability that the first side wins
    observed: np.ndarray  # share of the bin in which it did
    count: np.ndarray  # pairs in the bin


def reliability_curve(prob: ArrayLike, bins: int = 15, seed: int = 0) -> ReliabilityCurve:
    """
    Predicted against observed frequency.

    The chosen side always wins, so that P(chosen ≻ rejected) has nothing to be calibrated against. Hence each pair
    gets a random orientation first.

    Args:
        prob: P(chosen ≻ rejected), `[N]`.
        bins: bins of equal mass; fewer than asked for if there are fewer pairs.
        seed: seed of the orientations.
    """
    prob = np.asarray(prob, dtype=float)
    flipped = np.random.default_rng(seed).random(len(prob)) < 0.5
    predicted = np.where(flipped, 1 - prob, prob)
    order = np.argsort(predicted, kind="stable")
    members = np.array_split(order, min(bins, len(prob)))
    return ReliabilityCurve(
        predicted=np.array([predicted[bin_].mean() for bin_ in members]),
        observed=np.array([(~flipped[bin_]).mean() for bin_ in members]),
        count=np.array([len(bin_) for bin_ in members]),
    )


def calibration_error(prob: ArrayLike, bins: int = 15, seed: int = 0) -> float:
    """
    Expected calibration error: the mean over pairs of |observed − predicted| in their bin of the `reliability_curve`.

    Perfect forecasts score above 0 as well, by chance: about 0.3/√(N / bins), which is 0.007 at 30,000 pairs.
    """
    curve = reliability_curve(prob, bins, seed)
    return float(np.average(np.abs(curve.observed - curve.predicted), weights=curve.count))


def pair_metrics(log_prob: ArrayLike, margin: ArrayLike) -> dict[str, float]:
    """
    The metrics of held-out pairs.

    Args:
        log_prob: log P(chosen ≻ rejected), `[N]`, in nats.
        margin: location of chosen minus location of rejected, `[N]`.
    """
    prob = np.exp(np.asarray(log_prob, dtype=float))
    return {
        "accuracy": accuracy(margin),
        "nll": negative_log_likelihood(log_prob),
        "brier": brier_score(prob),
        "calibration_error": calibration_error(prob),
    }


def paired_bootstrap(
    ours: ArrayLike, theirs: ArrayLike, draws: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """
    The mean difference of two models on the same pairs, and an interval for it.

    Args:
        ours, theirs: a figure of each pair, such as its negative log-likelihood, of one model and of the other: `[N]`,
            or `[seeds, N]` for runs that were made in pairs.
        draws: of the bootstrap. Each resamples the pairs, and the seeds if there are several.
        level: of the interval (percentile method; B. Efron, 1979).
        seed: of the draws.

    Returns:
        The mean of ours − theirs, and the lower and upper end of its interval.
    """
    difference = np.atleast_2d(np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float))
    runs, count = difference.shape
    rng = np.random.default_rng(seed)
    means = np.empty(draws)
    for draw in range(draws):
        weight = rng.multinomial(count, np.full(count, 1 / count))
        means[draw] = (difference[rng.integers(runs, size=runs)] @ weight).mean() / count
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(difference.mean()), float(low), float(high)


# Texts to figures, where people's own ratings of each text are known


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Spearman's rank correlation of `a` `[N]` and `b` `[N]`, ties at their mean rank; nan if either is constant."""
    ranks = []
    for values in (a, b):
        _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
        if len(counts) == 1:
            return math.nan
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[inverse])
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def centrality(location: ArrayLike) -> np.ndarray:
    """
    −|μ − median(μ)|, `[N]`: the baseline that any claim about learned scales must beat.

    People disagree least about extreme texts (and a bounded rating leaves them no room to), so that this alone, with
    no scale learned, ranks with their standard deviation.
    """
    location = np.asarray(location, dtype=float)
    return -np.abs(location - np.median(location))
