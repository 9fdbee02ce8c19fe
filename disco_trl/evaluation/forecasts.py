"""Forecasts of a model for comparisons, and what people said: what every metric is a function of."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ..distributions.reward_distribution import RewardDistribution


DIVIDED = 0.1
"""People are divided over two answers if more than this share of them prefer either one."""


@dataclass(frozen=True)
class Forecasts:
    """Forecasts of a model for comparisons of two answers, with people's judgements. All arrays but the groups are
    float64 of shape `(N,)`.

    Attributes:
        log_prob (`np.ndarray`):
            log P(first ≻ second) in nats. Where people could call a tie, and the model knows how often they do, it is
            the log of the expected share of the first answer, in which a tie counts half as it does in the target.
        log_prob_reverse (`np.ndarray`):
            The same of the second answer. It is stored because computing it as log(1 − P) loses all precision near P =
            1.
        margin (`np.ndarray`):
            Location of the first answer minus that of the second, in units of the reward.
        target (`np.ndarray`):
            Share of people who preferred the first answer: 1 for a forced choice of it, 0.5 for a tie.
        weight (`np.ndarray`):
            Number of people who were asked. A comparison of weight 0 is not counted by any metric.
        groups (`np.ndarray` of shape `(N,)` or `(N, 2)`):
            Identifiers of what each comparison, or each of its two sides, shares with others, such as a prompt or an
            answer. Comparisons that share none are independent.
        minority (`np.ndarray`):
            Share of people who preferred the less popular answer, from 0 to 0.5; `nan` where a single judgement leaves
            it open. With ties, it is smaller than both the target and its complement.
        width (`np.ndarray`):
            Scale of the difference of the two rewards, in units of the reward: people's disagreement according to the
            model. `nan` for a model that has no scales.
    """

    log_prob: np.ndarray
    log_prob_reverse: np.ndarray
    margin: np.ndarray
    target: np.ndarray
    weight: np.ndarray
    groups: np.ndarray
    minority: np.ndarray
    width: np.ndarray

    @classmethod
    def of(
        cls,
        first: RewardDistribution,
        second: RewardDistribution,
        target: ArrayLike = 1.0,
        weight: ArrayLike = 1.0,
        groups: np.ndarray | None = None,
        minority: ArrayLike = math.nan,
        tie_width: Tensor | None = None,
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
            groups (`np.ndarray` of shape `(N,)` or `(N, 2)`, *optional*, defaults to `None`):
                What comparisons share. If `None`, they are independent.
            minority (`float` or array-like of shape `(N,)`, *optional*, defaults to `nan`):
                Share of people who preferred the less popular answer.
            tie_width (`torch.Tensor` of shape `(N,)`, *optional*, defaults to `None`):
                Half-width of the band in which two rewards count as a tie, in units of the reward; 0 where people
                could not call a tie.

        Returns:
            [`Forecasts`]: `N` forecasts.
        """
        columns = (
            _log_share(first, second, tie_width),
            _log_share(second, first, tie_width),
            first.location - second.location,
            target,
            weight,
            minority,
            first.kind.difference_scale(first.scale, second.scale),
        )
        return cls._of_columns(columns, len(first), groups)

    @classmethod
    def of_probabilities(
        cls,
        prob: ArrayLike,
        target: ArrayLike = 1.0,
        weight: ArrayLike = 1.0,
        groups: np.ndarray | None = None,
        minority: ArrayLike = math.nan,
    ) -> Forecasts:
        """Forecasts from probabilities, for models that have no locations.

        Args:
            prob (array-like of shape `(N,)`):
                P(first ≻ second). The margin is the probability minus 0.5.
            target (`float` or array-like of shape `(N,)`, *optional*, defaults to `1.0`):
                Share of people who preferred the first answer.
            weight (`float` or array-like of shape `(N,)`, *optional*, defaults to `1.0`):
                Number of people who were asked.
            groups (`np.ndarray` of shape `(N,)` or `(N, 2)`, *optional*, defaults to `None`):
                What comparisons share. If `None`, they are independent.
            minority (`float` or array-like of shape `(N,)`, *optional*, defaults to `nan`):
                Share of people who preferred the less popular answer.

        Returns:
            [`Forecasts`]: `N` forecasts, without a width.
        """
        prob = np.asarray(prob, dtype=float)
        with np.errstate(divide="ignore"):  # A probability of 0 or 1 is a log-probability of −∞, and a valid forecast.
            columns = (np.log(prob), np.log1p(-prob), prob - 0.5, target, weight, minority, math.nan)
        return cls._of_columns(columns, len(prob), groups)

    @classmethod
    def _of_columns(cls, columns: Iterable[ArrayLike], count: int, groups: np.ndarray | None) -> Forecasts:
        log_prob, log_prob_reverse, margin, target, weight, minority, width = (
            np.broadcast_to(np.asarray(column, dtype=float), count) for column in columns
        )
        groups = np.arange(count) if groups is None else groups
        return cls(log_prob, log_prob_reverse, margin, target, weight, groups, minority, width)

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
        return replace(self, weight=self.weight * counts)

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
    def certainty(self) -> np.ndarray:
        """The confidence as log-odds, from 0 to ∞, of shape `(N,)`. It orders forecasts whose probabilities are both 1
        in float64, and is rounded so that a forecast and its mirror image are equal.
        """
        return np.round(np.abs(self.log_prob - self.log_prob_reverse), 9)

    @property
    def right(self) -> np.ndarray:
        """Share of people who agree with the sign of the margin, of shape `(N,)`. It is 0.5 where the margin is 0."""
        return 0.5 + np.sign(self.margin) * (self.target - 0.5)

    @property
    def decided(self) -> np.ndarray:
        """The weights without people's ties, which are neither right nor wrong, of shape `(N,)`."""
        return np.where(self.target == 0.5, 0.0, self.weight)

    @property
    def divided(self) -> np.ndarray:
        """Whether people are divided: more than a tenth of them prefer the first answer, and more than a tenth the
        second, of shape `(N,)`. It is false where the minority is unknown."""
        return self.minority > DIVIDED

    @property
    def nll(self) -> np.ndarray:
        """Negative log-likelihood of one person's choice in nats, of shape `(N,)`."""
        return -_mix(self.target, self.log_prob, self.log_prob_reverse)

    @property
    def squared_error(self) -> np.ndarray:
        """Mean squared error of the probability against one person's choice, of shape `(N,)`."""
        return _mix(self.target, (1 - self.prob) ** 2, self.prob**2)

    @property
    def entropy(self) -> np.ndarray:
        """Entropy of people's shares in nats, of shape `(N,)`. No forecast has a smaller [`Forecasts.nll`]."""
        with np.errstate(divide="ignore"):
            return -_mix(self.target, np.log(self.target), np.log1p(-self.target))


def _log_share(this: RewardDistribution, other: RewardDistribution, tie_width: Tensor | None) -> Tensor:
    """log of P(this ≻ other) + ½ P(tie), averaged over the errors of both locations."""
    if tie_width is None or not bool(tie_width.any()):
        return this.log_prob_greater(other)
    difference, error, width = this - other, this.error_of_difference(other), tie_width.to(torch.float64)
    # Half of the ties: half of what lies between the two edges of the band.
    beyond = [difference.log_prob_exceeds(edge, error=error) for edge in (width, -width)]
    return torch.logaddexp(*beyond) - math.log(2)


def _mix(share: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """share · one + (1 − share) · other, where 0 · −∞ is 0."""
    parts = (np.where(share > 0, one, 0.0), np.where(share < 1, other, 0.0))
    return share * parts[0] + (1 - share) * parts[1]


def weighted_mean(values: np.ndarray, weight: np.ndarray) -> float:
    """Mean of values by their weights; `nan` if these are all 0."""
    total = weight.sum()
    return float(values @ weight / total) if total > 0 else math.nan
