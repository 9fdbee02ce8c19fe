"""The normal family: Thurstone's model of comparative judgment, with a variance for every answer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .base import Difference, Family, register_family


@register_family
class Normal(Family):
    r"""
    Normal rewards, R ~ N(μ, σ²), for which the probability of a preference is exact:

        P(a ≻ b) = Φ((μ_a − μ_b) / √(σ_a² + σ_b²)).

    Source: L. L. Thurstone, *A law of comparative judgment*, 1927.
    """

    name = "normal"
    formula = "Φ((μa − μb) / √(σa² + σb²))"
    summary = "exact; Thurstone's model with a scale for every answer"
    reading = "The location is the mean and the median of a normal distribution, and the scale its standard deviation."
    unit_scale = 2 / math.sqrt(math.pi)

    def difference_scale(self, scale_a: Tensor, scale_b: Tensor) -> Tensor:
        return torch.hypot(scale_a, scale_b)

    def scale_of_sum(self, scales: Tensor, correlation: Tensor) -> Tensor:
        return torch.einsum("...a,ab,...b->...", scales, correlation, scales).sqrt()

    def log_mean_prob_positive(self, difference: Difference, error: Tensor) -> Tensor:
        # A normal error of the location adds its variance.
        scale = self.difference_scale(difference.scale_a, difference.scale_b)
        return self.log_cdf(difference.location / torch.hypot(scale, error))

    def log_cdf(self, z: Tensor, shape: Tensor | None = None) -> Tensor:
        # Below 0: Φ(z) = ½ erfcx(-z/√2) exp(-z²/2), whose logarithm never underflows. Above: 1 - Φ(-z) by log1p.
        # `log_ndtr` has the same value, but its float32 gradient is wrong by a factor at z = -1e4 (torch 2.13).
        # Each branch sees only arguments of its own side, so that the unused one has a finite gradient as well.
        lower, upper = z.clamp_max(0), z.clamp_min(0)
        log_lower = torch.log(torch.special.erfcx(-lower / math.sqrt(2)) / 2) - lower.square() / 2
        log_upper = torch.log1p(-torch.special.erfc(upper / math.sqrt(2)) / 2)
        return torch.where(z < 0, log_lower, log_upper)

    def quantile(self, q: Tensor, shape: Tensor | None = None) -> Tensor:
        return torch.special.ndtri(q)

    def cumulant(self, t: Tensor, shape: Tensor | None = None) -> Tensor:
        return t.square() / 2
