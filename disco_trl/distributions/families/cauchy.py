"""The Cauchy family: tails so heavy that one surprising vote costs next to nothing."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..numerics import is_identity, negative_magnitude
from .base import Family, register_family


@register_family
class Cauchy(Family):
    """
    Cauchy rewards, with density 1 / (πσ (1 + (r − μ)²/σ²)), for which the probability of a preference is exact:

        P(a ≻ b) = ½ + arctan((μ_a − μ_b) / (σ_a + σ_b)) / π.

    The difference of two Cauchy variables is one again, and their scales add up. The location is the median; a mean
    and a variance do not exist.
    """

    name = "cauchy"
    formula = "½ + arctan((μa − μb) / (σa + σb)) / π"
    summary = "exact; heavy tails, so that contradictory votes cost little"
    reading = (
        "A Cauchy distribution has no mean and no variance; its location is the median and its scale half the "
        "interquartile range."
    )
    unit_scale = 2 / math.pi
    infinite_cumulant = "its tails are so heavy that E[e^(-R/β)] does not exist, whatever beta is"

    def difference_scale(self, scale_a: Tensor, scale_b: Tensor) -> Tensor:
        return scale_a + scale_b

    def scale_of_sum(self, scales: Tensor, correlation: Tensor) -> Tensor:
        if not is_identity(correlation):
            raise ValueError(
                "Cauchy rewards have no correlation, and a weighted sum of them is Cauchy only if they are "
                "independent; use the normal family"
            )
        return scales.abs().sum(dim=-1)

    def log_cdf(self, z: Tensor, shape: Tensor | None = None) -> Tensor:
        # P = angle(-z, 1) / π below 0 and 1 - angle(z, 1) / π above: ½ + arctan(z) / π would cancel in either tail.
        tail = torch.atan2(torch.ones_like(z), -negative_magnitude(z)) / math.pi
        return torch.where(z < 0, tail.log(), torch.log1p(-tail))

    def quantile(self, q: Tensor, shape: Tensor | None = None) -> Tensor:
        # ∓cot of π times the nearer tail's probability, which keeps its accuracy where tan(π(q - ½)) meets its poles.
        return torch.where(q < 0.5, -1.0, 1.0) / torch.tan(math.pi * torch.minimum(q, 1 - q))

    def cumulant(self, t: Tensor, shape: Tensor | None = None) -> Tensor:
        return torch.full_like(t, math.inf)
