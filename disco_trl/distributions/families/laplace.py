"""The Laplace family: a peak at what most people say, and exponential tails beyond it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..numerics import LOG_2, log_prob_by_tail, negative_magnitude
from .base import Difference, Family, register_family


@register_family
class Laplace(Family):
    """
    Laplace rewards, with density e^(−|r − μ| / σ) / 2σ, for which the probability of a preference is exact.

    With b₁ ≥ b₂ the two scales and t = |μ_a − μ_b|, the less likely order has the probability

        (b₁² e^(−t/b₁) − b₂² e^(−t/b₂)) / (2 (b₁² − b₂²))  =  ½ e^(−t/b₁) (1 + φ(d) t b₂ / (b₁ (b₁ + b₂)))

    where d = t (1/b₂ − 1/b₁) and φ(d) = (1 − e^(−d)) / d. The form on the left is 0/0 at equal scales, where every
    training run begins; the one on the right has nothing to cancel there. The location is mean and median, and the
    variance is 2σ².

    Source: S. Kotz, T. Kozubowski, K. Podgórski, *The Laplace Distribution and Generalizations*, 2001.
    """

    name = "laplace"
    formula = "1 − (σa² e^(−Δ/σa) − σb² e^(−Δ/σb)) / 2(σa² − σb²), for Δ = μa − μb ≥ 0"
    summary = "exact; a peak at the location and exponential tails"
    reading = (
        "The location is the mean and the median of a Laplace distribution, and the scale its mean absolute deviation."
    )
    unit_scale = 1.0
    infinite_cumulant = "E[e^(-R/β)] exists only for scales below beta={beta}"

    def difference_scale(self, scale_a: Tensor, scale_b: Tensor) -> Tensor:
        return torch.hypot(scale_a, scale_b)

    def log_prob_positive(self, difference: Difference) -> Tensor:
        # At equal scales `maximum` and `minimum` pass half of the gradient to either side; the formula is symmetric
        # in b₁ and b₂ there, so that the halves add up to the right one.
        wide = torch.maximum(difference.scale_a, difference.scale_b)
        narrow = torch.minimum(difference.scale_a, difference.scale_b)
        t = -negative_magnitude(difference.location)
        d = t * (wide - narrow) / (wide * narrow)
        excess = _mean_decay(d) * t * narrow / (wide * (wide + narrow))
        return log_prob_by_tail(difference.location, torch.log1p(excess) - t / wide - LOG_2)

    def log_cdf(self, z: Tensor, shape: Tensor | None = None) -> Tensor:
        return log_prob_by_tail(z, negative_magnitude(z) - LOG_2)

    def quantile(self, q: Tensor, shape: Tensor | None = None) -> Tensor:
        return torch.where(q < 0.5, 1.0, -1.0) * torch.log(2 * torch.minimum(q, 1 - q))

    def cumulant(self, t: Tensor, shape: Tensor | None = None) -> Tensor:
        # E[e^(tε)] = 1 / (1 - t²) for |t| < 1.
        return torch.where(t.abs() < 1, -torch.log1p(-t.square()), math.inf)


def _mean_decay(d: Tensor) -> Tensor:
    """Evaluates (1 − e^(−d)) / d, the mean of e^(−x) over 0 ≤ x ≤ d, for d ≥ 0, with its gradient also near 0."""
    # The quotient's gradient cancels for small d, where ten terms of Σ (-d)^k / (k + 1)! are exact in float64.
    small, large = d.clamp_max(0.1), d.clamp_min(0.1)
    series = torch.ones_like(d)
    for k in range(10, 1, -1):
        series = 1 - small / k * series
    return torch.where(d < 0.1, series, -torch.expm1(-large) / large)
