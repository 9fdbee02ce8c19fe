"""
Judge routing: accuracy when the pairs that a reward model is least sure of are decided by a stronger judge.

A judge, such as a large language model or a person, is right more often than a reward model and costs more, so that it
is asked about some pairs only (Z. Xu et al., 2025, arXiv 2510.20369). How good an uncertainty is shows in the accuracy
against the share of pairs that are sent: its ends are the accuracies of the model and of the judge, and in between it
is above the straight line, which is sending at random, if the model is sent wrong where it is unsure.

What flows: forecasts, and the judge's answers → a doubt for each pair, by some rule → the curve → its area, with an
interval of the bootstrap over what pairs share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.integrate import trapezoid

from ..distributions.reward_distribution import RewardDistribution
from .bootstrap import resamples
from .evaluate import Figure
from .forecasts import Forecasts
from .held_out import HeldOut


RULES = ("error", "margin", "probability", "scale", "random")
"""Rules for the order in which pairs are sent; see [`doubts`]."""


def doubts(first: RewardDistribution, second: RewardDistribution) -> dict[str, np.ndarray]:
    """
    Doubts of a model about pairs, by rule. Pairs are sent to the judge in descending order.

    | rule | pairs that are sent first |
    | --- | --- |
    | `error` | largest error τ of the difference of the locations; only of models with a location error |
    | `margin` | smallest difference of the locations, as with a scalar reward model |
    | `probability` | P(first ≻ second) nearest ½ |
    | `scale` | largest scale of the difference, √(σ² + σ'²), where people disagree |
    | `random` | any: all pairs have the same doubt |

    Args:
        first, second ([`RewardDistribution`]):
            Rewards of the first and second answers, of shape `(N,)`.

    Returns:
        `dict[str, np.ndarray]`: Doubts of shape `(N,)`.
    """
    forecasts = Forecasts.of(first, second)
    found = {
        "margin": -np.abs(forecasts.margin),
        "probability": -forecasts.certainty,
        "scale": np.hypot(first.scale.double().numpy(), second.scale.double().numpy()),
        "random": np.zeros(len(forecasts)),
    }
    error = first.error_of_difference(second)
    if error is not None:
        found = {"error": error.numpy(), **found}
    # Equal doubts that differ by rounding would be an order.
    return {rule: np.round(doubt, 9) for rule, doubt in found.items()}


# Judges


def judge_of_people(held_out: HeldOut) -> np.ndarray:
    """
    Answers of a judge who decides as the majority of people.

    If both answers have people's ratings, that is the majority over all pairs of a rating of the first and one of the
    second; otherwise it is the majority of those who compared the two, so that the judge is the best that can be on
    these comparisons.

    Args:
        held_out ([`~disco_trl.evaluation.held_out.HeldOut`]):
            Held-out data.

    Returns:
        `np.ndarray` of shape `(N,)`: 1 where the judge prefers the first answer, 0 where the second, 0.5 if undecided.
    """
    answer = np.sign(held_out.target - 0.5)
    ratings = held_out.ratings()
    majority: dict[tuple[int, int], float] = {}
    for number, pair in enumerate(zip(held_out.first.tolist(), held_out.second.tolist(), strict=True)):
        if not ratings.keys() >= {*pair}:
            continue
        if pair not in majority:
            first, second = (ratings[side] for side in pair)
            majority[pair] = float(np.sign(np.sign(first[:, None] - second[None, :]).sum()))
        answer[number] = majority[pair]
    return 0.5 + answer / 2


def judge_of_rewards(rewards: RewardDistribution, held_out: HeldOut) -> np.ndarray:
    """
    Answers of another reward model.

    Args:
        rewards ([`RewardDistribution`]):
            Its rewards of `held_out.sequences`.
        held_out ([`~disco_trl.evaluation.held_out.HeldOut`]):
            Held-out data.

    Returns:
        `np.ndarray` of shape `(N,)`: 1 where it prefers the first answer, 0 where the second, 0.5 for equal rewards.
    """
    return 0.5 + np.sign(held_out.forecasts(rewards).margin) / 2


# The curve


def routing_curve(
    forecasts: Forecasts, judge: ArrayLike, doubt: ArrayLike, times: ArrayLike = 1
) -> tuple[np.ndarray, np.ndarray]:
    """
    Accuracy as a function of the share of pairs that the judge decides.

    People's ties are left out. A pair counts once in the share, however many people compared it, as it costs the judge
    one answer, and as many times as there are people in the accuracy. Pairs of equal doubt are sent in random order,
    and the accuracy is the mean over all orders, which is linear in the share.

    Args:
        forecasts ([`Forecasts`]):
            Forecasts of the model, and what people said.
        judge (array-like of shape `(N,)`):
            Probability or share, from 0 to 1, with which the judge prefers the first answer. It decides for the side
            above 0.5; 0.5 counts half.
        doubt (array-like of shape `(N,)`):
            Doubt of the model about each pair, in any unit. The largest is sent first.
        times (array-like of shape `(N,)`, *optional*, defaults to `1`):
            How often each pair occurs, such as in a resample of the bootstrap.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: Shares from 0 to 1, and accuracies, both of shape `(K + 1,)` for K different
            doubts. Between two points the curve is a straight line. Both are empty without comparisons.
    """
    curve = _Curve(forecasts, judge, doubt)
    return curve.points(np.broadcast_to(np.asarray(times, dtype=float), len(forecasts)))


class _Curve:
    """A routing curve that is sorted once, for any number of resamples."""

    def __init__(self, forecasts: Forecasts, judge: ArrayLike, doubt: ArrayLike):
        judged = 0.5 + np.sign(np.asarray(judge, dtype=float) - 0.5) * (forecasts.target - 0.5)
        different, self.place = np.unique(-np.asarray(doubt, dtype=float), return_inverse=True)
        self.blocks = len(different)
        self.weight = forecasts.decided
        self.counts = self.weight > 0
        self.right = forecasts.right
        self.gain = judged - self.right

    def points(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shares and accuracies."""
        people = self.weight * times
        sent = np.bincount(self.place, self.counts * times, self.blocks)
        gained = np.bincount(self.place, people * self.gain, self.blocks)
        if not people.sum() > 0:
            return np.array([]), np.array([])
        is_there = sent > 0
        share, gain = np.cumsum(sent[is_there]) / sent.sum(), np.cumsum(gained[is_there])
        accuracy = (people @ self.right + np.insert(gain, 0, 0.0)) / people.sum()
        return np.insert(share, 0, 0.0), accuracy

    def area(self, times: np.ndarray) -> float:
        share, accuracy = self.points(times)
        return float(trapezoid(accuracy, share)) if len(share) else math.nan


def area_under_routing(forecasts: Forecasts, judge: ArrayLike, doubt: ArrayLike) -> float:
    """
    Area under the [`routing_curve`]: the mean accuracy over all shares from 0 to 1.

    Args:
        forecasts, judge, doubt:
            As in [`routing_curve`].

    Returns:
        `float`: Area from 0 to 1; `nan` without comparisons. At random it is the mean of the accuracies of the model
            and of the judge.
    """
    return _Curve(forecasts, judge, doubt).area(np.ones(len(forecasts)))


def routing_figures(
    runs: Sequence[tuple[Forecasts, dict[str, np.ndarray]]],
    judge: ArrayLike,
    reference: str = "margin",
    draws: int = 300,
    seed: int = 0,
) -> dict[str, tuple[Figure, Figure]]:
    """
    Areas under the routing curves of several rules, with 95 % intervals.

    Args:
        runs (`Sequence[tuple[Forecasts, dict[str, np.ndarray]]]`):
            Forecasts of a model for N pairs, and its [`doubts`] by rule. If there are several, such as models that
            differ in the seed, the figures are means over them; the pairs must be the same.
        judge (array-like of shape `(N,)`):
            As in [`routing_curve`].
        reference (`str`, *optional*, defaults to `"margin"`):
            Rule that the others are compared with.
        draws (`int`, *optional*, defaults to `300`):
            Number of bootstrap resamples over the groups of the pairs.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the bootstrap.

    Returns:
        `dict[str, tuple[Figure, Figure]]`: The area by rule, and the area less that of the reference in the same
            resamples. The intervals do not include the randomness of training.
    """
    counts = resamples(runs[0][0].groups, draws, seed)
    times = [np.ones(counts.shape[1]), *counts]  # the pairs as they are, and the resamples
    areas = {}
    for rule in runs[0][1]:
        curves = [_Curve(forecasts, judge, of_rule[rule]) for forecasts, of_rule in runs]
        areas[rule] = np.array([np.mean([curve.area(of_draw) for curve in curves]) for of_draw in times])
    differences = {rule: of_rule - areas[reference] for rule, of_rule in areas.items()}
    return {
        rule: (Figure.of(areas[rule][0], list(areas[rule][1:])), Figure.of(gain[0], list(gain[1:])))
        for rule, gain in differences.items()
    }
