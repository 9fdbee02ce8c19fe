"""Two camps: a reward that is a mixture of two normals, for answers that some people like and others dislike.

A scale alone says how far people are apart, and a mixture whether they fall into two groups. Everything has a closed
form but the quantile, and the tensors are those of `disco_trl.distributions.families`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .families import LOG_2, Family, Normal


NORMAL = Normal()
# In a mixture that a model predicts: the smaller camp's least share, and the least share of variance within camps.
MIN_CAMP = 0.01
MIN_WITHIN = 0.01
MAX_POLARIZATION = math.sqrt(1 - MIN_WITHIN)


class NormalMixture(Family):
    """Two camps: R ~ w N(μ + σa₁, σ²(1 - ρ²)) + (1 - w) N(μ + σa₂, σ²(1 - ρ²)), with mean μ and variance σ².

    The shape parameters are the weight 0 < w < 1 of the camp that likes the answer better, and the polarization
    0 ≤ ρ < 1: a share ρ² of the variance lies between the camps, the rest within them. Hence a₁ = ρ √((1 - w) / w) and
    a₂ = -ρ √(w / (1 - w)). With ρ = 0 there is one camp and R is normal. Two answers' camps are drawn independently,
    so P(a ≻ b) is a mean of four normal terms; K. Pearson, 1894, for the mixture itself.
    """

    name = "mixture"
    shape_names = ("weight", "polarization")
    # With w = ½ and ρ = MAX_POLARIZATION / 2, where `shape_from_raw` starts, P's slope at Δ = 0 is
    # (φ(0) + φ(ρ √2 / √(1 - ρ²))) / (2σ √2 √(1 - ρ²)) = (1 + e^(-ρ² / (1 - ρ²))) / (4σ √π √(1 - ρ²)).
    unit_scale = (1 + math.exp(-(MAX_POLARIZATION**2) / (4 - MAX_POLARIZATION**2))) / math.sqrt(
        math.pi * (1 - MAX_POLARIZATION**2 / 4)
    )

    def shape_from_raw(self, raw: Tensor) -> Tensor:
        """Weight and polarization ``[..., 2]``: w in (0.01, 0.99), ρ² below 0.99; at zeros w = ½ and ρ is about ½.

        It does not start at ρ = 0, because the likelihood is flat in ρ there.
        """
        weight, polarization = torch.sigmoid(raw).unbind(dim=-1)
        return torch.stack([MIN_CAMP + (1 - 2 * MIN_CAMP) * weight, MAX_POLARIZATION * polarization], dim=-1)

    def difference_scale(self, scale_a: Tensor, scale_b: Tensor) -> Tensor:
        return torch.hypot(scale_a, scale_b)

    def log_prob_exceeds(
        self,
        delta: Tensor,
        scale_a: Tensor,
        scale_b: Tensor,
        shape_a: Tensor | None = None,
        shape_b: Tensor | None = None,
    ) -> Tensor:
        return self.log_mean_prob_exceeds(delta, torch.zeros_like(delta), scale_a, scale_b, shape_a, shape_b)

    def log_mean_prob_exceeds(
        self,
        delta: Tensor,
        error: Tensor,
        scale_a: Tensor,
        scale_b: Tensor,
        shape_a: Tensor | None = None,
        shape_b: Tensor | None = None,
    ) -> Tensor:
        log_share_a, center_a, within_a = _camps(shape_a)
        log_share_b, center_b, within_b = _camps(shape_b)
        spread = torch.hypot(torch.hypot(scale_a * within_a, scale_b * within_b), error)
        # Camps of a along the last dimension but one, camps of b along the last.
        between = (scale_a[..., None] * center_a)[..., :, None] - (scale_b[..., None] * center_b)[..., None, :]
        z = ((delta[..., None, None] + between) / spread[..., None, None]).flatten(-2)
        log_share = (log_share_a[..., :, None] + log_share_b[..., None, :]).flatten(-2)
        return _log_mean_normal_cdf(z, log_share)

    def log_cdf(self, z: Tensor, shape: Tensor | None = None) -> Tensor:
        log_share, center, within = _camps(shape)
        return _log_mean_normal_cdf((z[..., None] - center) / within[..., None], log_share)

    def log_survival(self, z: Tensor, shape: Tensor | None = None) -> Tensor:
        log_share, center, within = _camps(shape)
        return _log_mean_normal_cdf((center - z[..., None]) / within[..., None], log_share)

    @torch.no_grad()
    def standard_quantile(self, q: Tensor, shape: Tensor | None = None) -> Tensor:
        log_share, center, within = _camps(shape)
        # Upside down above ½: a tail's probability is solved for, which keeps its digits.
        sign = torch.where(q < 0.5, 1.0, -1.0).to(q)
        tail, share, center = torch.minimum(q, 1 - q), log_share.exp(), center * sign[..., None]
        # The quantile lies between the two camps' own, so that bisection cannot fail.
        own = center + (within * torch.special.ndtri(tail))[..., None]
        low, high = own.amin(dim=-1), own.amax(dim=-1)
        width = (within * math.sqrt(2))[..., None]
        for _ in range(64):
            middle = (low + high) / 2
            below = (share * torch.special.erfc((center - middle[..., None]) / width)).sum(dim=-1) / 2
            low, high = torch.where(below < tail, middle, low), torch.where(below < tail, high, middle)
        return sign * (low + high) / 2

    def standard_draw(self, uniform: Tensor, shape: Tensor | None = None) -> Tensor:
        log_share, center, within = _camps(shape)
        upper, lower = log_share.exp().unbind(-1)
        # The number says which camp, and how far it lies inside that camp's share is uniform again.
        is_upper = uniform < upper
        rest = torch.where(is_upper, uniform / upper, (uniform - upper) / lower).clamp(2**-53, 1 - 2**-53)
        return torch.where(is_upper, center[..., 0], center[..., 1]) + within * torch.special.ndtri(rest)

    def standard_cumulant(self, t: Tensor, shape: Tensor | None = None) -> Tensor:
        log_share, center, within = _camps(shape)
        return torch.logsumexp(log_share + t[..., None] * center, dim=-1) + (t * within).square() / 2


def _camps(shape: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Of the two camps at μ = 0, σ = 1: log shares ``[..., 2]``, centers ``[..., 2]``, inner deviation ``[...]``."""
    if shape is None:
        raise ValueError("a 'mixture' reward has shape parameters (weight, polarization); pass them as shape [..., 2]")
    weight, polarization = shape.unbind(dim=-1)
    log_share = torch.stack([weight.log(), torch.log1p(-weight)], dim=-1)
    odds = (1 - weight) / weight
    center = polarization[..., None] * torch.stack([odds.sqrt(), -odds.rsqrt()], dim=-1)
    return log_share, center, ((1 - polarization) * (1 + polarization)).sqrt()


def _log_mean_normal_cdf(z: Tensor, log_share: Tensor) -> Tensor:
    """log Σ share · Φ(z) over the last dimension, with no cancellation where the sum is close to 1."""
    log_prob = torch.logsumexp(log_share + NORMAL.log_cdf(z), dim=-1)
    log_complement = torch.logsumexp(log_share + NORMAL.log_survival(z), dim=-1)
    return torch.where(log_prob < -LOG_2, log_prob, torch.log1p(-log_complement.clamp_max(-LOG_2 / 2).exp()))
