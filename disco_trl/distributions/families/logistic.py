"""The logistic family: Bradley–Terry's link, with a scale for every answer."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .base import Family, register_family


@register_family
class Logistic(Family):
    """
    Bradley–Terry's link with a scale for every answer:

        P(a ≻ b) = sigmoid((μ_a − μ_b) / √(σ_a² + σ_b²)).

    If every scale is 1/√2 this is Bradley–Terry, and the loss is that of [`~trl.RewardTrainer`].

    It is a link and not the law of a difference: no distribution adds logistic scales in quadrature. Quantiles and
    samples of one reward come from the logistic distribution with location μ and scale σ, because with its variance
    π²σ²/3 the variances of two rewards add up to that of the link.

    Source: R. A. Bradley, M. E. Terry, *Rank analysis of incomplete block designs*, 1952.
    """

    name = "logistic"
    formula = "sigmoid((μa − μb) / √(σa² + σb²))"
    summary = "Bradley–Terry's link with a scale for every answer"
    reading = (
        "The location is the mean and the median. The formula is a link, which no two independent rewards have "
        "exactly; quantiles and draws of one reward are those of the logistic distribution of the same variance."
    )
    unit_scale = 1 / math.sqrt(2)
    is_link = True
    infinite_cumulant = "E[e^(-R/β)] exists only for scales below beta={beta}"

    def difference_scale(self, scale_a: Tensor, scale_b: Tensor) -> Tensor:
        return torch.hypot(scale_a, scale_b)

    def log_cdf(self, z: Tensor, shape: Tensor | None = None) -> Tensor:
        return logsigmoid(z)

    def quantile(self, q: Tensor, shape: Tensor | None = None) -> Tensor:
        return torch.logit(q)

    def cumulant(self, t: Tensor, shape: Tensor | None = None) -> Tensor:
        # E[e^(tε)] = Γ(1 + t) Γ(1 - t) = πt / sin(πt) for |t| < 1, and sinc(t) is its inverse, also at 0.
        return torch.where(t.abs() < 1, -torch.log(torch.sinc(t)), math.inf)
