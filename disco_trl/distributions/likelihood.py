"""
The likelihood of what people say: votes, ties, soft labels and ratings, all from the same random rewards.

The reward of an answer is R = μ + τη + σε: the location μ, people's disagreement σε, which is drawn anew for each
judgement, and the model's own error τη with η ~ N(0, 1), which all judgements about the answer share. With
Δ = μ_a − μ_b, a margin m, a tie band of half-width δ and the label noise ν,

    P(a wins)      = (1 − ν) P(R_a − R_b > m + δ) + ν P(R_a − R_b < m − δ)      (P(b wins) with the two exchanged)
    P(tie)         = P(m − δ < R_a − R_b < m + δ)
    P(rating ≤ k)  = P(R ≤ t_k)      with ordered thresholds t_1 < t_2 < ...

The error η is integrated out for all judgements of a pair, or of an answer, together. Hence votes of one pair agree
with each other more than those of different pairs do, which is what distinguishes the model's error from people's
disagreement.

Sources: ties, P. V. Rao, L. L. Kupper, 1967; ratings, P. McCullagh, 1980, here with a scale for each answer; adaptive
Gauss–Hermite quadrature, J. C. Naylor, A. F. M. Smith, 1982.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .judgements import Judgements
from .numerics import log_difference, to_float64
from .reward_distribution import RewardDistribution


QUADRATURE_NODES = 21
"""Nodes of the adaptive rule. Where the votes of a pair are mixed, fewer nodes reach 1e-6. Where they all go one way
and the error is several times the scales, the integrand is far from normal, and needs these."""
MODE_SEARCH_STEPS = 12
_SHORTER_STEPS = (1.0, 0.5, 0.25, 0.1, 0.03, 0.0)


@dataclass(frozen=True)
class Responses:
    """
    How people answer, given their rewards.

    Args:
        tie_width (`torch.Tensor` of shape `()`, *optional*):
            δ, the half-width of the tie band, in reward units. If `None`, there are no ties.
        label_noise (`torch.Tensor` of shape `()`, *optional*):
            ν, the probability below ½ that a vote says the opposite of what was meant. If `None`, there is none.
        thresholds (`torch.Tensor` of shape `(L - 1,)`, *optional*):
            Thresholds between L ratings, ascending, in reward units. If `None`, there are no ratings.
    """

    tie_width: Tensor | None = None
    label_noise: Tensor | None = None
    thresholds: Tensor | None = None


def log_likelihood(
    chosen: RewardDistribution,
    rejected: RewardDistribution,
    judgements: Judgements,
    responses: Responses | None = None,
) -> Tensor:
    """
    Evaluates the log-likelihood of all that is said about P pairs.

    The comparisons of a pair and the ratings of either side are taken to be independent of each other (a composite
    likelihood).

    Args:
        chosen, rejected ([`RewardDistribution`] of shape `(P,)`):
            Rewards of one family. Their `location_error`, if both have one, is shared by the judgements about an
            answer.
        judgements ([`Judgements`]):
            What was said.
        responses ([`Responses`], *optional*):
            How people answer; needed where there are ties, ratings or label noise.

    Returns:
        `torch.Tensor` of shape `(P,)`: In nats, in float64 (on the CPU where the device has no such type), and not yet
        multiplied by the weights.

    Raises:
        `ValueError`: If there are ties or ratings, but no tie width or thresholds, or if the families differ.
    """
    chosen, rejected = chosen.map(to_float64), rejected.map(to_float64)
    judgements = Judgements(**_all_in_float64(judgements))
    responses = Responses(**_all_in_float64(responses or Responses()))
    total = _comparisons(chosen, rejected, judgements, responses)
    if judgements.rating_counts is not None:
        if responses.thresholds is None:
            raise ValueError("there are ratings, but no thresholds to read them by")
        sides = RewardDistribution.cat([chosen, rejected])
        rated = _ratings(sides, judgements.rating_counts, responses.thresholds)
        total = total + rated[: len(total)] + rated[len(total) :]
    return total


def _all_in_float64(record: Judgements | Responses) -> dict[str, Any]:
    return {name: None if value is None else to_float64(value) for name, value in vars(record).items()}


def _comparisons(
    chosen: RewardDistribution, rejected: RewardDistribution, judgements: Judgements, responses: Responses
) -> Tensor:
    wins, losses, ties = judgements.wins, judgements.losses, judgements.ties
    has_ties = bool((ties > 0).any())
    if has_ties and responses.tie_width is None:
        raise ValueError("there are ties, but no tie width to read them by")
    no_band = torch.zeros_like(judgements.margin)
    band = no_band if responses.tie_width is None else responses.tie_width * judgements.tie_allowed
    beyond_margin = chosen - rejected - judgements.margin

    def given(error: Tensor) -> Tensor:
        """From an error `(..., P)` of the difference of the locations to the log-likelihood, of the same shape."""
        difference = beyond_margin + error
        win, loss = difference.log_prob_exceeds(band), (-difference).log_prob_exceeds(band)
        if responses.label_noise is not None:
            kept, swapped = torch.log1p(-responses.label_noise), responses.label_noise.log()
            win, loss = (
                torch.logaddexp(kept + win, swapped + loss),
                torch.logaddexp(kept + loss, swapped + win),
            )
        total = wins * win + losses * loss
        if has_ties:
            # Of rows without a tie the band may have no width, whose log-probability of −∞ turns gradients into NaN,
            # also where it is multiplied by no ties.
            tie_band = torch.where(ties > 0, band, torch.ones_like(band))
            total = total + ties * difference.log_prob_within(tie_band)
        return total

    if chosen.location_error is None or rejected.location_error is None:
        return given(no_band)
    return log_marginal(given, torch.hypot(chosen.location_error, rejected.location_error))


def _ratings(rewards: RewardDistribution, counts: Tensor, thresholds: Tensor) -> Tensor:
    """The log-likelihood `(B,)` of ratings with counts `(B, L)`, given thresholds `(L - 1,)`."""
    shape = None if rewards.shape is None else rewards.shape[..., None, :]

    def given(error: Tensor) -> Tensor:
        """From an error `(..., B)` of the locations to the log-likelihood, of the same shape."""
        z = (thresholds - (rewards.location + error)[..., None]) / rewards.scale[:, None]
        below, above = rewards.kind.log_cdf(z, shape), rewards.kind.log_survival(z, shape)
        # Between two thresholds: from the tail in which both probabilities are small.
        from_above = (z[..., 1:] + z[..., :-1]) > 0
        larger = torch.where(from_above, above[..., :-1], below[..., 1:])
        smaller = torch.where(from_above, above[..., 1:], below[..., :-1])
        between = log_difference(larger, smaller)
        return (counts * torch.cat([below[..., :1], between, above[..., -1:]], dim=-1)).sum(dim=-1)

    if rewards.location_error is None:
        return given(torch.zeros_like(rewards.location))
    return log_marginal(given, rewards.location_error)


# The model's own error


@lru_cache
def _hermite_rule(nodes: int) -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.hermite.hermgauss(nodes)


def log_marginal(log_likelihood: Callable[[Tensor], Tensor], spread: Tensor, nodes: int = QUADRATURE_NODES) -> Tensor:
    """
    Integrates a likelihood over a normal error, by Gauss–Hermite nodes about the mode of the integrand.

    Args:
        log_likelihood (`Callable[[torch.Tensor], torch.Tensor]`):
            From errors e of shape `(Q, P)` (or `(P,)`) to the log-likelihood of that shape, in float64. It has one
            mode in e.
        spread (`torch.Tensor` of shape `(P,)`):
            Standard deviations > 0 of the errors, in float64.
        nodes (`int`, *optional*, defaults to `21`):
            The number of nodes.

    Returns:
        `torch.Tensor` of shape `(P,)`: log ∫ N(e; 0, spread²) exp(log_likelihood(e)) de. It is differentiable in
        `spread` and in all that `log_likelihood` depends on. The places of the nodes count as constant, because they
        make no difference to the integral.
    """
    with torch.no_grad():
        mode, deviation = _find_mode(lambda u: log_likelihood(spread * u) - u.square() / 2, torch.zeros_like(spread))
    x, weight = (torch.as_tensor(array, dtype=spread.dtype, device=spread.device) for array in _hermite_rule(nodes))
    u = mode + math.sqrt(2) * deviation * x[:, None]
    terms = log_likelihood(spread * u) - u.square() / 2 + (x.square() + weight.log())[:, None]
    return torch.logsumexp(terms, dim=0) + deviation.log() - math.log(math.pi) / 2


def _find_mode(log_density: Callable[[Tensor], Tensor], mode: Tensor) -> tuple[Tensor, Tensor]:
    """Returns where a density is highest, and the standard deviation of a normal as curved as it is there: `(P,)`."""
    deviation = torch.ones_like(mode)
    for _ in range(MODE_SEARCH_STEPS):
        # Differences in place of derivatives: the nodes need not lie exactly, and nothing has to be differentiated
        # twice. The prior alone has curvature 1, and a density with one mode no less.
        step = 0.01 * deviation
        left, middle, right = log_density(mode + step * torch.tensor([[-1.0], [0.0], [1.0]]).to(mode))
        curvature = ((2 * middle - left - right) / step.square()).clamp_min(1.0)
        deviation = curvature.rsqrt()
        # Newton's step may overshoot where the density is far from normal, so shorter ones compete with it. A step of
        # 0 is among them: the density never falls.
        newton = (right - left) / (2 * step * curvature)
        candidates = mode + newton * torch.tensor(_SHORTER_STEPS).to(mode)[:, None]
        best = log_density(candidates).argmax(dim=0, keepdim=True)
        mode = candidates.gather(0, best)[0]
    return mode, deviation
