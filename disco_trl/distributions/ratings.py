"""
The likelihood of ratings: of an answer's location, and of its scale apart from the location.

The reward of an answer is cut by ordered thresholds t_1 < ... < t_(L−1) into L ratings (P. McCullagh, 1980). Each
person's reward is m + σε about a level m that all ratings of the answer share, so that

    P(ratings of an answer | m) = Π P(t_(k−1) < m + σε < t_k)^(number of ratings k)

[`rating_log_likelihood`] takes the level from the model, m = μ + τη, and is the likelihood of what the model predicts.
An error of μ beyond τ looks like disagreement to it, because the ratings lie far from where they are expected. It
therefore teaches locations, thresholds and τ, and the scale only of answers with one rating, about which nothing else
is known.

[`spread_log_likelihood`] asks how far the ratings of an answer lie from each other, whatever their level is. It is a
restricted likelihood (H. D. Patterson, R. Thompson, 1971) of ordinal data: without rounding it would be that of the
sum of squares about the answer's mean, with r − 1 degrees of freedom. No error of μ enters.

A model that is trained by both, each for its own parameters, solves two estimating equations. They are not the
gradient of one function, so that a line search takes one of them at a time.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from scipy.interpolate import CubicSpline
from torch import Tensor

from .families import Family, Normal
from .numerics import log_difference, to_float64
from .quadrature import log_marginal, unit_rule
from .reward_distribution import RewardDistribution


_NORMAL = Normal()
_MOST_AT_ONCE = 1024
"""Number of answers whose levels are integrated out together, at some hundred nodes times L ratings each."""
_TABLE_REACH = math.log(30)
"""How far a [`SpreadTable`] reaches, in the log of the scale over the mean distance of two thresholds."""
_TABLE_STEP = 0.1
"""The distance of its knots, in the log of the scale."""


def rating_log_likelihood(rewards: RewardDistribution, counts: Tensor, thresholds: Tensor) -> Tensor:
    """
    Evaluates the log-likelihood of the ratings of answers, at the levels that the model predicts.

    Args:
        rewards ([`RewardDistribution`] of shape `(B,)`):
            Rewards in float64. The error of a location is shared by the ratings of the answer, and integrated out.
        counts (`torch.Tensor` of shape `(B, L)`):
            How many people gave each of L ratings.
        thresholds (`torch.Tensor` of shape `(L - 1,)`):
            Thresholds between the ratings, ascending, in reward units.

    Returns:
        `torch.Tensor` of shape `(B,)`: In nats, in float64; 0 for an answer without ratings.
    """
    given = _given_level(rewards, counts, thresholds)
    if rewards.location_error is None:
        return given(rewards.location)
    return log_marginal(
        lambda error: given(rewards.location + error),
        rewards.location_error,
        thresholds[:, None] - rewards.location,
        rewards.scale,
    )


def has_spread(counts: Tensor) -> Tensor:
    """
    Tells which answers' ratings say something about their scale apart from their location.

    Args:
        counts (`torch.Tensor` of shape `(B, L)`):
            How many people gave each of L ratings.

    Returns:
        `torch.BoolTensor` of shape `(B,)`: Whether there are two ratings or more. With L = 2, a level and a scale
        have only their ratio in the likelihood, so that no answer's ratings say anything.
    """
    return (counts.sum(dim=-1) >= 2) & (counts.shape[-1] > 2)


def spread_log_likelihood(rewards: RewardDistribution, counts: Tensor, thresholds: Tensor) -> Tensor:
    """
    Evaluates the log-likelihood of the spread of an answer's ratings about the answer's own level.

    The level is integrated out under a prior that is the same for all answers and does not depend on the model: it is
    uniform from one step below the lowest threshold to one step above the highest, where a step is the mean distance
    of two thresholds. The ratings at both ends thus stand for as long an interval of levels as the others do. The
    prior has to be finite, because the likelihood of an answer whose ratings all lie at one end does not fall as its
    level moves beyond. Multiplying scales and thresholds by one number changes nothing, and neither does adding one to
    the thresholds.

    The thresholds count as known: rewards are not uniformly distributed, so thresholds fitted to this term would make
    all ratings equally frequent. [`rating_log_likelihood`] teaches them.

    Args:
        rewards ([`RewardDistribution`] of shape `(B,)`):
            Rewards, of which the scale and the shape parameters are used.
        counts (`torch.Tensor` of shape `(B, L)`):
            How many people gave each of L ratings.
        thresholds (`torch.Tensor` of shape `(L - 1,)`):
            Thresholds between the ratings, ascending, in reward units.

    Returns:
        `torch.Tensor` of shape `(B,)`: In nats, in float64 (on the CPU where the device has no such type), and not
        yet multiplied by weights; 0 where [`has_spread`] says that there is none. It is differentiable in scale and
        shape.

    Example:

    ```python
    >>> import torch
    >>> from disco_trl import RewardDistribution
    >>> from disco_trl.distributions.ratings import spread_log_likelihood
    >>> # Three people agree about one answer and are divided about the other.
    >>> counts, thresholds = torch.tensor([[0, 0, 3, 0, 0], [1, 0, 1, 0, 1]]), torch.tensor([-1.5, -0.5, 0.5, 1.5])
    >>> for scale in (0.5, 2.0):
    ...     rewards = RewardDistribution(torch.zeros(2), torch.full((2,), scale), "normal")
    ...     spread_log_likelihood(rewards, counts, thresholds)
    tensor([ -2.9126, -15.4531], dtype=torch.float64)
    tensor([-5.4404, -5.1018], dtype=torch.float64)

    ```
    """
    thresholds, counts = to_float64(thresholds.detach()), to_float64(counts)
    scale = to_float64(rewards.scale)
    shape = None if rewards.shape is None else to_float64(rewards.shape)
    result = torch.zeros_like(scale)
    rated = has_spread(counts).nonzero()[:, 0]
    parts = [
        _spread(rewards.kind, scale[rows], None if shape is None else shape[rows], counts[rows], thresholds)
        for rows in rated.split(_MOST_AT_ONCE)
    ]
    return result.index_put((rated,), torch.cat(parts)) if len(rated) else result


class SpreadTable:
    """
    Tabulates [`spread_log_likelihood`] of given ratings, for a fit of the scale that evaluates it many times.

    An integral for each answer and each evaluation takes minutes where there are thousands of answers. The level has
    the same prior for all of them, so that here the integrals are computed once, on a grid of scales, for each
    distinct set of ratings, and a cubic spline is laid through them. Its error, relative to the log-likelihood, is
    below 1e-5. Scales beyond 30 steps, or below a 30th of a step, count as those.

    Args:
        kind ([`Family`]):
            Family of the rewards.
        shape (`torch.Tensor` of shape `(B, S)`, *optional*):
            Shape parameters of families that have them.
        counts (`torch.Tensor` of shape `(B, L)`):
            How many people gave each of L ratings.
        thresholds (`torch.Tensor` of shape `(L - 1,)`):
            Thresholds between the ratings, ascending, in reward units.
    """

    def __init__(self, kind: Family, shape: Tensor | None, counts: Tensor, thresholds: Tensor) -> None:
        thresholds, counts = to_float64(thresholds.detach()), to_float64(counts)
        self.rows = has_spread(counts).nonzero()[:, 0]
        if not len(self.rows):
            return
        known = counts if shape is None else torch.cat([counts, to_float64(shape.detach())], dim=-1)
        distinct, self._place = known[self.rows].unique(dim=0, return_inverse=True)
        counts, shape = distinct[:, : counts.shape[-1]], None if shape is None else distinct[:, counts.shape[-1] :]
        step = _LevelPrior(thresholds).step
        knots = torch.arange(-_TABLE_REACH, _TABLE_REACH + _TABLE_STEP, _TABLE_STEP, dtype=torch.float64)
        self._first = knots[0].item() + step.log().item()
        most = 512 if shape is None else 8
        shapes: Sequence[Tensor | None] = (
            [None] * math.ceil(len(counts) / most) if shape is None else shape.split(most)
        )
        values = [
            torch.cat(
                [
                    _spread_at(kind, step * knot.exp(), part, of_part, thresholds)
                    for of_part, part in zip(counts.split(most), shapes, strict=True)
                ]
            )
            for knot in knots
        ]
        spline = CubicSpline(knots.numpy(), torch.stack(values).cpu().numpy())
        self._coefficients = torch.from_numpy(spline.c).to(counts)  # [4, knots - 1, distinct], the cubic one first

    def select(self, keep: Tensor) -> SpreadTable:
        """The table of some of the answers, given by a boolean tensor of shape `(B,)`."""
        part = copy.copy(self)
        kept = keep[self.rows]
        # Where those that are kept stand among each other
        part.rows = (keep.cumsum(dim=0) - 1)[self.rows[kept]]
        if len(self.rows):
            part._place = self._place[kept]
        return part

    def __call__(self, scale: Tensor) -> Tensor:
        """
        Evaluates the log-likelihood.

        Args:
            scale (`torch.Tensor` of shape `(B,)`):
                Scales, in reward units and in float64.

        Returns:
            `torch.Tensor` of shape `(B,)`: In nats, not yet multiplied by weights, and differentiable; 0 where
            [`has_spread`] says that there is none.
        """
        result = torch.zeros_like(scale)
        if not len(self.rows):
            return result
        _, intervals, _ = self._coefficients.shape
        place = ((scale[self.rows].log() - self._first) / _TABLE_STEP).clamp(0, intervals)
        interval = place.detach().long().clamp_max(intervals - 1)
        beyond = (place - interval) * _TABLE_STEP
        value = torch.zeros_like(beyond)
        for power in self._coefficients[:, interval, self._place]:
            value = value * beyond + power
        return result.index_put((self.rows,), value)


@dataclass(frozen=True)
class _LevelPrior:
    """The prior of the level of an answer that is rated on a scale with thresholds `(L - 1,)`."""

    thresholds: Tensor

    @property
    def step(self) -> Tensor:
        """The mean distance of two thresholds."""
        return (self.thresholds[-1] - self.thresholds[0]) / (len(self.thresholds) - 1)

    @property
    def ends(self) -> Tensor:
        """Where it ends, `(2,)`: one step beyond the thresholds."""
        return self.thresholds[[0, -1]] + self.step * torch.tensor([-1, 1]).to(self.step)

    @property
    def blur(self) -> Tensor:
        """The standard deviation of a normal that softens both ends, as a density with a step is hard to integrate."""
        return self.step / 4

    def log_density(self, level: Tensor) -> Tensor:
        """From levels of any shape to log-densities of that shape."""
        z = (self.ends - level[..., None]) / self.blur
        return _log_intervals(_NORMAL, z, None)[..., 1] - self.ends.diff().log()


def _spread(kind: Family, scale: Tensor, shape: Tensor | None, counts: Tensor, thresholds: Tensor) -> Tensor:
    """[`spread_log_likelihood`] of answers that have a spread."""
    prior = _LevelPrior(thresholds)
    low, high = prior.ends
    # A normal that is wider than the prior in both tails, so that the ratio of the two is bounded.
    middle, width = (low + high) / 2, (high - low).expand(len(scale))
    given = _given_level(RewardDistribution(torch.zeros_like(scale), scale, kind, shape), counts, thresholds)

    def given_and_prior(error: Tensor) -> Tensor:
        """The log-likelihood, times the density of the level over the normal one that is integrated with."""
        log_normal = -(error / width).square() / 2 - width.log() - math.log(2 * math.pi) / 2
        return given(middle + error) + prior.log_density(middle + error) - log_normal

    bends = (torch.cat([thresholds, prior.ends]) - middle)[:, None].expand(-1, len(scale))
    return log_marginal(given_and_prior, width, bends, torch.minimum(scale, prior.blur))


def _spread_at(kind: Family, scale: Tensor, shape: Tensor | None, counts: Tensor, thresholds: Tensor) -> Tensor:
    """[`_spread`] of answers that all have one scale, `()`: the nodes are the same for all."""
    prior = _LevelPrior(thresholds)
    nodes, weights = (tensor.to(counts) for tensor in unit_rule())
    low, high = prior.ends + 4 * prior.blur * torch.tensor([-1, 1]).to(counts)
    pieces = math.ceil((high - low) / torch.minimum(scale, 2 * prior.blur))
    length = (high - low) / pieces
    level = (low + length * (torch.arange(pieces).to(counts)[:, None] + nodes)).flatten()
    log_weight = (length * weights).log().repeat(pieces) + prior.log_density(level)
    z = (thresholds - level[:, None]) / scale
    log_probs = _log_intervals(kind, z, None if shape is None else shape[:, None, None])  # ([B,] Q, L)
    given = counts @ log_probs.mT if shape is None else torch.einsum("bl,bql->bq", counts, log_probs)
    return torch.logsumexp(given + log_weight, dim=-1)


def _given_level(rewards: RewardDistribution, counts: Tensor, thresholds: Tensor) -> Callable[[Tensor], Tensor]:
    """The function from levels `(..., B)` to the log-likelihood of the ratings, of the same shape."""
    shape = None if rewards.shape is None else rewards.shape[..., None, :]

    def given(level: Tensor) -> Tensor:
        z = (thresholds - level[..., None]) / rewards.scale[:, None]
        return (counts * _log_intervals(rewards.kind, z, shape)).sum(dim=-1)

    return given


def _log_intervals(kind: Family, z: Tensor, shape: Tensor | None) -> Tensor:
    """Log-probabilities `(..., L)` of the intervals between ascending ends z `(..., L - 1)`, and beyond them."""
    below, above = kind.log_cdf(z, shape), kind.log_survival(z, shape)
    # Between two ends: from the tail in which both probabilities are small.
    from_above = (z[..., 1:] + z[..., :-1]) > 0
    larger = torch.where(from_above, above[..., :-1], below[..., 1:])
    smaller = torch.where(from_above, above[..., 1:], below[..., :-1])
    return torch.cat([below[..., :1], log_difference(larger, smaller), above[..., -1:]], dim=-1)
