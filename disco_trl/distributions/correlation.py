"""
The correlation of people's rewards for several attributes, from people who rate more than one attribute of an answer.

Two attributes of an answer may be rated alike for two reasons: the answer is good, or bad, in both; or whoever likes
it more than others do in one respect likes it more in the other as well. Only the second is a correlation of people,
and it shows in how raters of one answer differ from each other. [`estimate_correlation`] therefore looks at products
of deviations from the answer's own mean rating, in which no level of an answer enters.

For n raters the sum of these products has the mean (n − 1) Cov(X_a, X_b), where X are the rounded ratings. With
thresholds t, z_k = (t_k − m) / σ and the bivariate normal density φ₂,

    Cov(X_a, X_b) = ∫₀^ρ Σ_kl φ₂(z_ak, z_bl; r) dr,

because d/dρ of P(ε_a > x, ε_b > y) is φ₂(x, y; ρ) (R. L. Plackett, 1954). The right-hand side increases with ρ, so
that one number has to be matched to what is observed: the polychoric correlation (U. Olsson, 1979), within answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .numerics import to_float64
from .ratings import rating_log_likelihood
from .reward_distribution import RewardDistribution


LARGEST = 0.95
"""Largest correlation that is found, and the negative of the smallest. Beyond, two attributes are one."""
LEAST_EIGENVALUE = 0.02
"""Smallest eigenvalue of a correlation matrix that is put together from pairs of attributes."""
_STEPS = 19
_DRAWS = 4
_GRID = torch.linspace(-4, 4, 65, dtype=torch.float64)
_MOST_AT_ONCE = 2048


def estimate_correlation(
    location: Tensor, scale: Tensor, location_error: Tensor, ratings: Tensor, thresholds: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """
    Estimates the correlation matrix of people's rewards for A attributes.

    Args:
        location (`torch.Tensor` of shape `(N, A)`):
            Locations that a model predicts for N answers, in reward units.
        scale (`torch.Tensor` of shape `(N, A)`):
            Scales, in reward units. The rewards are normal.
        location_error (`torch.Tensor` of shape `(A,)`):
            Standard deviation ≥ 0 of the model's error in each attribute, in reward units.
        ratings (`torch.LongTensor` of shape `(N, R, A)`):
            Which rating, from 0, each of up to R people gave to each attribute of an answer; −1 where there is none.
        thresholds (`Sequence[torch.Tensor]`):
            Thresholds of each attribute, `(L_a − 1,)`, ascending, in reward units.

    Returns:
        `tuple` of `torch.DoubleTensor` of shape `(A, A)` and `torch.LongTensor` of shape `(A, A)`: The correlation
            matrix, which is positive definite, and how many deviations each entry was estimated from (for n raters of
            an answer n − 1). Where that is 0, the correlation is 0.
    """
    location, scale = to_float64(location), to_float64(scale)
    count = location.shape[1]
    correlation, support = torch.eye(count, dtype=torch.float64), torch.zeros(count, count, dtype=torch.long)
    levels = [
        _draw_levels(
            location[:, a], scale[:, a], location_error[a].item(), ratings[:, :, a], to_float64(thresholds[a])
        )
        for a in range(count)
    ]
    for a in range(count):
        for b in range(a):
            both = (ratings[:, :, [a, b]] >= 0).all(dim=-1)
            freedom = (both.sum(dim=1) - 1).clamp_min(0)
            used = freedom > 0
            support[a, b] = support[b, a] = int(freedom.sum())
            if not used.any():
                continue
            deviations = [_deviations(ratings[used, :, side].double(), both[used]) for side in (a, b)]
            observed = (deviations[0] * deviations[1]).sum().item()
            z = [(thresholds[k][:, None] - levels[k][:, None, used]) / scale[used, k] for k in (a, b)]
            correlation[a, b] = correlation[b, a] = _match(observed, z[0], z[1], freedom[used].double())
    return _positive_definite(correlation), support


def _deviations(values: Tensor, is_there: Tensor) -> Tensor:
    """Deviations `(N, R)` from the mean over the raters of each answer, 0 for raters who are not there."""
    mean = (values * is_there).sum(dim=1, keepdim=True) / is_there.sum(dim=1, keepdim=True)
    return (values - mean) * is_there


def _draw_levels(location: Tensor, scale: Tensor, error: float, ratings: Tensor, thresholds: Tensor) -> Tensor:
    """
    Draws levels `(D, N)` of answers from their posterior, given the model's prediction and the answer's ratings.

    The covariance of ratings depends on the level where the scale of ratings ends, in a curve. A mean over such draws
    is one over the levels that the answers may have, where that of a single best guess would be off.
    """
    if not error > 0:
        return location.expand(_DRAWS, -1)
    generator = torch.Generator().manual_seed(0)
    at = location + error * _GRID[:, None]  # [G, N]
    counts = torch.stack([(ratings == k).sum(dim=1) for k in range(len(thresholds) + 1)], dim=1).double()
    log_posterior = torch.stack(
        [rating_log_likelihood(RewardDistribution(level, scale, "normal"), counts, thresholds) for level in at]
    )
    share = torch.softmax(log_posterior - _GRID[:, None].square() / 2, dim=0).cumsum(dim=0)
    uniform = torch.rand(_DRAWS, len(location), dtype=torch.float64, generator=generator)
    places = (share < uniform[:, None]).sum(dim=1).clamp_max(len(_GRID) - 1)  # [D, N]
    return at.gather(0, places)


def _match(observed: float, z_a: Tensor, z_b: Tensor, freedom: Tensor) -> float:
    """The correlation at which the expected sum of products is the observed one, for z `(D, L - 1, N)`."""
    edges = torch.linspace(0, LARGEST, _STEPS + 1, dtype=torch.float64)
    middles = (edges[1:] + edges[:-1]) / 2
    sign = math.copysign(1.0, observed)
    total, target = 0.0, abs(observed)
    for middle, width in zip(middles.tolist(), edges.diff().tolist(), strict=True):
        slope = _slope(sign * middle, z_a, z_b, freedom)
        if total + slope * width >= target:
            return sign * (middle - width / 2 + (target - total) / slope)
        total += slope * width
    return sign * LARGEST


def _slope(correlation: float, z_a: Tensor, z_b: Tensor, freedom: Tensor) -> float:
    """Σ freedom · Σ_kl φ₂(z_ak, z_bl; r), as a mean over the draws of the levels."""
    rest = 1 - correlation**2
    total = 0.0
    for start in range(0, z_a.shape[-1], _MOST_AT_ONCE):
        part = slice(start, start + _MOST_AT_ONCE)
        a, b = z_a[..., part].unsqueeze(2), z_b[..., part].unsqueeze(1)
        density = torch.exp(-(a * a - 2 * correlation * a * b + b * b) / (2 * rest)) / (2 * math.pi * rest**0.5)
        total += (density.sum(dim=(1, 2)).mean(dim=0) * freedom[part]).sum().item()
    return total


def _positive_definite(correlation: Tensor) -> Tensor:
    """Shrink what is off the diagonal as little as needed: pairs of attributes know nothing of a third one."""
    least = torch.linalg.eigvalsh(correlation)[0].item()
    if least >= LEAST_EIGENVALUE:
        return correlation
    share = (1 - LEAST_EIGENVALUE) / (1 - least)
    identity = torch.eye(len(correlation)).to(correlation)
    return identity + share * (correlation - identity)
