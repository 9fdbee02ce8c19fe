"""The mixture family: two camps, for answers that some people like and others dislike.

A scale alone says how far people are apart; a mixture also says whether they fall into two groups.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..numerics import LOG_2
from .base import Difference, Family, register_family
from .normal import Normal


NORMAL = Normal()
# Bounds on what a model can predict. A camp of nobody has no location to learn, and a camp of no width is a point,
# whose density is infinite.
MIN_CAMP = 0.01
MIN_WITHIN = 0.01
MAX_POLARIZATION = math.sqrt(1 - MIN_WITHIN)


@register_family
class NormalMixture(Family):
    """
    Rewards that are a mixture of two normals, with mean μ and variance σ²:

        R ~ w N(μ + σa₁, σ²(1 − ρ²)) + (1 − w) N(μ + σa₂, σ²(1 − ρ²)),   a₁ = ρ √((1 − w)/w),   a₂ = −ρ √(w/(1 − w)).

    The shape parameters are the `weight` 0 < w < 1 of the camp that likes the answer better, and the `polarization`
    0 ≤ ρ < 1: a share ρ² of the variance lies between the camps, the rest within them. With ρ = 0 there is one camp
    and R is normal. The camps of two answers are drawn independently, so P(a ≻ b) is a mean of four normal terms,
    exactly. Everything has a closed form but the quantile.

    Source: K. Pearson, *Contributions to the mathematical theory of evolution*, 1894.
    """

    name = "mixture"
    formula = "Σᵢⱼ wᵢ wⱼ Φ((mᵢ − mⱼ) / √(sᵢ² + sⱼ²)), over the camps i of a and j of b"
    summary = "exact; two camps of people, with two shape parameters for every answer"
    reading = (
        "The location is the mean and the scale the standard deviation of two camps of people together; "
        "`reward.shape` holds the share of the camp that likes the answer better, and the polarization, whose square "
        "is the share of the variance between the camps."
    )
    shape_names = ("weight", "polarization")
    # With w = ½ and ρ = MAX_POLARIZATION / 2, where `shape_from_raw` starts, P's slope at Δ = 0 is
    # (φ(0) + φ(ρ √2 / √(1 - ρ²))) / (2σ √2 √(1 - ρ²)) = (1 + e^(-ρ² / (1 - ρ²))) / (4σ √π √(1 - ρ²)).
    unit_scale = (1 + math.exp(-(MAX_POLARIZATION**2) / (4 - MAX_POLARIZATION**2))) / math.sqrt(
        math.pi * (1 - MAX_POLARIZATION**2 / 4)
    )

    def shape_from_raw(self, raw: Tensor) -> Tensor:
        """
        Maps what a network predicts to weight and polarization.

        Args:
            raw (`torch.Tensor`):
                Any real numbers, of shape `(..., 2)`. Training starts at zeros: w = ½ and ρ about ½. It does not start
                at ρ = 0, because the likelihood is flat in ρ there.

        Returns:
            `torch.Tensor` of shape `(..., 2)`: w in (0.01, 0.99), and ρ with ρ² < 0.99.
        """
        weight, polarization = torch.sigmoid(raw).unbind(dim=-1)
        return torch.stack([MIN_CAMP + (1 - 2 * MIN_CAMP) * weight, MAX_POLARIZATION * polarization], dim=-1)

    def difference_scale(self, scale_a: Tensor, scale_b: Tensor) -> Tensor:
        return torch.hypot(scale_a, scale_b)

    def log_prob_positive(self, difference: Difference) -> Tensor:
        return self.log_mean_prob_positive(difference, torch.zeros_like(difference.location))

    def log_mean_prob_positive(self, difference: Difference, error: Tensor) -> Tensor:
        log_share_a, center_a, within_a = _camps(difference.shape_a)
        log_share_b, center_b, within_b = _camps(difference.shape_b)
        spread = torch.hypot(torch.hypot(difference.scale_a * within_a, difference.scale_b * within_b), error)
        # Camps of a along the last dimension but one, camps of b along the last.
        centers_a = (difference.scale_a[..., None] * center_a)[..., :, None]
        centers_b = (difference.scale_b[..., None] * center_b)[..., None, :]
        between = centers_a - centers_b
        z = ((difference.location[..., None, None] + between) / spread[..., None, None]).flatten(-2)
        log_share = (log_share_a[..., :, None] + log_share_b[..., None, :]).flatten(-2)
        return _log_mean_normal_cdf(z, log_share)

    def log_cdf(self, z: Tensor, shape: Tensor | None = None) -> Tensor:
        log_share, center, within = _camps(shape)
        return _log_mean_normal_cdf((z[..., None] - center) / within[..., None], log_share)

    def log_survival(self, z: Tensor, shape: Tensor | None = None) -> Tensor:
        # The default, log_cdf(-z), is for symmetric families: of two unequal camps one would be on the wrong side.
        log_share, center, within = _camps(shape)
        return _log_mean_normal_cdf((center - z[..., None]) / within[..., None], log_share)

    @torch.no_grad()
    def quantile(self, q: Tensor, shape: Tensor | None = None) -> Tensor:
        log_share, center, within = _camps(shape)
        # Upside down above ½: a tail's probability is solved for, which keeps its digits.
        sign = torch.where(q < 0.5, 1.0, -1.0).to(q)
        tail, share, center = torch.minimum(q, 1 - q), log_share.exp(), center * sign[..., None]
        # The quantile lies between the two camps' own, so that bisection cannot fail.
        own = center + (within * torch.special.ndtri(tail))[..., None]
        low, high = own.amin(dim=-1), own.amax(dim=-1)
        width = (within * math.sqrt(2))[..., None]
        for _ in range(64):  # more bits than float64 has
            middle = (low + high) / 2
            below = (share * torch.special.erfc((center - middle[..., None]) / width)).sum(dim=-1) / 2
            low, high = torch.where(below < tail, middle, low), torch.where(below < tail, high, middle)
        return sign * (low + high) / 2

    def draw(self, uniform: Tensor, shape: Tensor | None = None) -> Tensor:
        # Much faster than bisection, and exact as well: the number says which camp, and how far it lies inside that
        # camp's share is uniform again.
        log_share, center, within = _camps(shape)
        upper, lower = log_share.exp().unbind(-1)
        is_upper = uniform < upper
        rest = torch.where(is_upper, uniform / upper, (uniform - upper) / lower).clamp(2**-53, 1 - 2**-53)
        return torch.where(is_upper, center[..., 0], center[..., 1]) + within * torch.special.ndtri(rest)

    def cumulant(self, t: Tensor, shape: Tensor | None = None) -> Tensor:
        log_share, center, within = _camps(shape)
        return torch.logsumexp(log_share + t[..., None] * center, dim=-1) + (t * within).square() / 2


def _camps(shape: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Returns log shares `(..., 2)`, centers `(..., 2)` and inner deviations `(...)` of both camps at μ = 0, σ = 1."""
    if shape is None:
        raise ValueError("a 'mixture' reward has shape parameters (weight, polarization); pass them as shape [..., 2]")
    weight, polarization = shape.unbind(dim=-1)
    log_share = torch.stack([weight.log(), torch.log1p(-weight)], dim=-1)
    odds = (1 - weight) / weight
    center = polarization[..., None] * torch.stack([odds.sqrt(), -odds.rsqrt()], dim=-1)
    return log_share, center, ((1 - polarization) * (1 + polarization)).sqrt()


def _log_mean_normal_cdf(z: Tensor, log_share: Tensor) -> Tensor:
    """Evaluates log Σ share · Φ(z) over the last dimension, with no cancellation where the sum is close to 1."""
    log_prob = torch.logsumexp(log_share + NORMAL.log_cdf(z), dim=-1)
    log_complement = torch.logsumexp(log_share + NORMAL.log_survival(z), dim=-1)
    return torch.where(log_prob < -LOG_2, log_prob, torch.log1p(-log_complement.clamp_max(-LOG_2 / 2).exp()))
