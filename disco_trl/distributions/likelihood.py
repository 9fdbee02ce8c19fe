"""
The likelihood of what people say: votes, ties, soft labels and ratings, all from the same random rewards.

The reward of an answer is ``R = μ + τη + σε``: location μ, people's disagreement σε (drawn anew for each judgement)
and the model's own error τη with η ~ N(0, 1), which all judgements about the answer share. With Δ = μ_a - μ_b, a
margin m, a tie band of half-width δ and the label noise ν,

    P(a wins)  = (1 - ν) P(R_a - R_b > m + δ) + ν P(R_a - R_b < m - δ)      (and P(b wins) with the two exchanged)
    P(tie)     = P(m - δ < R_a - R_b < m + δ)
    P(rating ≤ k) = P(R ≤ t_k)        with ordered thresholds t_1 < t_2 < ...

η is integrated out by adaptive Gauss–Hermite quadrature (J. C. Naylor, A. F. M. Smith, 1982), for all judgements of a
pair, or of an answer, together: so votes of one pair agree with each other more than those of different pairs do, and
that tells the model's error from people's disagreement. Ties: P. V. Rao, L. L. Kupper, 1967. Ratings: P. McCullagh,
1980, with a scale for each answer.

Everything here takes and returns tensors, and is worked out in float64.
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

from .families import to_float64
from .judgements import Judgements
from .reward_distribution import Family, RewardDistribution


QUADRATURE_NODES = 21
"""Of the adaptive rule. Where the votes of a pair are mixed 1e-6 is reached with fewer; where they all go one way, and
the error is several times the scales, the integrand is far from normal (`tests/test_likelihood.py`)."""
MODE_SEARCH_STEPS = 12
_SHORTER_STEPS = (1.0, 0.5, 0.25, 0.1, 0.03, 0.0)


@dataclass(frozen=True)
class Responses:
    """
    How people answer, given their rewards; scalars, or None where there is no such thing.

    Attributes:
        tie_width: δ, half-width of the tie band, in units of reward.
        label_noise: ν, the probability that a vote says the opposite of what was meant, below ½.
        thresholds: `[L - 1]`, between L ratings, ascending, in units of reward.
    """

    tie_width: Tensor | None = None
    label_noise: Tensor | None = None
    thresholds: Tensor | None = None


def log_likelihood(
    family: Family,
    chosen: RewardDistribution,
    rejected: RewardDistribution,
    judgements: Judgements,
    responses: Responses | None = None,
) -> Tensor:
    """
    The log-likelihood of all that is said about P pairs, in nats.

    Args:
        family: the family of both.
        chosen, rejected: `[P]` each; their `location_error` is shared by the judgements about an answer.
        judgements: what was said.
        responses: how people answer; needed where there are ties, ratings or label noise.

    Returns:
        Tensor `[P]`, float64 (on the CPU where the device has none), not yet weighted; the comparisons of a pair and
        the ratings of either side are taken for independent (a composite likelihood).

    Raises:
        ValueError: there are ties or ratings, but no tie width or thresholds.
    """

    def wide(tensor: Tensor) -> Tensor:
        return to_float64(tensor)[0]

    def all_wide(record: Any) -> dict[str, Any]:
        return {name: None if value is None else wide(value) for name, value in vars(record).items()}

    chosen, rejected = chosen.map(wide), rejected.map(wide)
    judgements = Judgements(**all_wide(judgements))
    responses = Responses(**all_wide(responses or Responses()))
    total = _comparisons(family, chosen, rejected, judgements, responses)
    if judgements.rating_counts is not None:
        if responses.thresholds is None:
            raise ValueError("there are ratings, but no thresholds to read them by")
        sides = RewardDistribution.cat([chosen, rejected])
        rated = _ratings(family, sides, judgements.rating_counts, responses.thresholds)
        total = total + rated[: len(total)] + rated[len(total) :]
    return total


def _comparisons(
    family: Family, a: RewardDistribution, b: RewardDistribution, judgements: Judgements, responses: Responses
) -> Tensor:
    wins, losses, ties, margin = judgements.wins, judgements.losses, judgements.ties, judgements.margin
    scale_a, scale_b, shape_a, shape_b = a.scale, b.scale, a.shape, b.shape
    band = torch.zeros_like(margin) if responses.tie_width is None else responses.tie_width * judgements.tie_allowed
    has_ties = bool((ties > 0).any())
    if has_ties and responses.tie_width is None:
        raise ValueError("there are ties, but no tie width to read them by")

    def given(error: Tensor) -> Tensor:
        # `error` `[..., P]` is added to the difference of the locations.
        delta = a.location - b.location - margin + error
        win = family.log_prob_exceeds(delta - band, scale_a, scale_b, shape_a, shape_b)
        loss = family.log_prob_exceeds(-delta - band, scale_b, scale_a, shape_b, shape_a)
        if responses.label_noise is not None:
            noise = responses.label_noise
            kept, swapped = torch.log1p(-noise), noise.log()
            win, loss = (
                torch.logaddexp(kept + win, swapped + loss),
                torch.logaddexp(kept + loss, swapped + win),
            )
        total = wins * win + losses * loss
        if has_ties:
            # From the side on which both probabilities are small, so that their difference does not cancel.
            from_b = delta > 0
            scales = torch.where(from_b, scale_b, scale_a), torch.where(from_b, scale_a, scale_b)
            shapes: tuple[Tensor | None, Tensor | None] = (None, None)
            if shape_a is not None and shape_b is not None:
                shapes = (
                    torch.where(from_b[..., None], shape_b, shape_a),
                    torch.where(from_b[..., None], shape_a, shape_b),
                )
            distance = torch.where(from_b, -delta, delta)
            # A row without a tie, whose band may be none, must not turn a gradient into NaN.
            width = torch.where(ties > 0, band, torch.ones_like(band))
            inner = family.log_prob_exceeds(distance + width, *scales, *shapes)
            outer = family.log_prob_exceeds(distance - width, *scales, *shapes)
            total = total + ties * log_difference(inner, outer)
        return total

    if a.location_error is None or b.location_error is None:
        return given(torch.zeros_like(margin))
    return log_marginal(given, torch.hypot(a.location_error, b.location_error))


def _ratings(family: Family, rewards: RewardDistribution, counts: Tensor, thresholds: Tensor) -> Tensor:
    shape = None if rewards.shape is None else rewards.shape[..., None, :]

    def given(error: Tensor) -> Tensor:
        z = (thresholds - (rewards.location + error)[..., None]) / rewards.scale[:, None]
        below, above = family.log_cdf(z, shape), family.log_survival(z, shape)
        # Between two thresholds: from the tail in which both probabilities are small.
        from_above = (z[..., 1:] + z[..., :-1]) > 0
        larger = torch.where(from_above, above[..., :-1], below[..., 1:])
        smaller = torch.where(from_above, above[..., 1:], below[..., :-1])
        between = log_difference(larger, smaller)
        return (counts * torch.cat([below[..., :1], between, above[..., -1:]], dim=-1)).sum(dim=-1)

    if rewards.location_error is None:
        return given(torch.zeros_like(rewards.location))
    return log_marginal(given, rewards.location_error)


def log_difference(larger: Tensor, smaller: Tensor) -> Tensor:
    """log(e^larger - e^smaller) for smaller < larger, elementwise, in float64."""
    # 2⁻⁵² apart they are equal as probabilities go; the logarithm and its gradient stay finite.
    gap = (larger - smaller).clamp_min(2**-52)
    # log(1 - e^-gap): by expm1 where the two are close, by log1p where they are not (M. Mächler, 2012).
    is_close = gap < math.log(2)
    close = torch.log(-torch.expm1(-torch.where(is_close, gap, 1.0)))
    apart = torch.log1p(-torch.exp(-torch.where(is_close, 1.0, gap)))
    return larger + torch.where(is_close, close, apart)


# The model's own error


@lru_cache
def _hermite_rule(nodes: int) -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.hermite.hermgauss(nodes)


def log_marginal(log_likelihood: Callable[[Tensor], Tensor], spread: Tensor, nodes: int = QUADRATURE_NODES) -> Tensor:
    """
    log ∫ N(e; 0, spread²) exp(log_likelihood(e)) de, by Gauss–Hermite nodes about the integrand's mode.

    Args:
        log_likelihood: from `e` `[Q, P]` (or `[P]`) to the same shape, in float64; with one mode.
        spread: `[P]`, positive, float64.
        nodes: of the rule.

    Returns:
        Tensor `[P]`. Differentiable in `spread` and in all that `log_likelihood` depends on: where the nodes lie is
        taken for constant, as it makes no difference to the integral.
    """
    with torch.no_grad():
        mode, deviation = _find_mode(lambda u: log_likelihood(spread * u) - u.square() / 2, torch.zeros_like(spread))
    x, weight = (torch.as_tensor(array, dtype=spread.dtype, device=spread.device) for array in _hermite_rule(nodes))
    u = mode + math.sqrt(2) * deviation * x[:, None]
    terms = log_likelihood(spread * u) - u.square() / 2 + (x.square() + weight.log())[:, None]
    return torch.logsumexp(terms, dim=0) + deviation.log() - math.log(math.pi) / 2


def _find_mode(log_density: Callable[[Tensor], Tensor], mode: Tensor) -> tuple[Tensor, Tensor]:
    """Where a density is highest, and the standard deviation of the normal one as curved there, both `[P]`."""
    deviation = torch.ones_like(mode)
    for _ in range(MODE_SEARCH_STEPS):
        # Differences in place of derivatives: the nodes need not lie exactly, and nothing has to be differentiated
        # twice. The prior alone has curvature 1, and a density with one mode no less.
        step = 0.01 * deviation
        left, middle, right = log_density(mode + step * torch.tensor([[-1.0], [0.0], [1.0]]).to(mode))
        curvature = ((2 * middle - left - right) / step.square()).clamp_min(1.0)
        deviation = curvature.rsqrt()
        newton = (right - left) / (2 * step * curvature)
        candidates = mode + newton * torch.tensor(_SHORTER_STEPS).to(mode)[:, None]
        best = log_density(candidates).argmax(dim=0, keepdim=True)
        mode = candidates.gather(0, best)[0]
    return mode, deviation
