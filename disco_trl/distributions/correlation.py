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

Scales that are too small by a factor would make the correlation too large, as they leave less to disagree about. Each
attribute's scales are therefore multiplied by the factor at which the ratings of an answer vary as much as observed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor

from .numerics import to_float64
from .ratings import rating_log_likelihood
from .reward_distribution import RewardDistribution


LARGEST = 0.95
"""Largest correlation that is found, and the negative of the smallest. Beyond, two attributes are one."""
LEAST_EIGENVALUE = 0.02
"""Smallest eigenvalue of a correlation matrix that is put together from pairs of attributes."""
MOST_OFF = 8.0
"""Largest factor by which scales are found to be too small or too large."""
ERRORS = (0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
"""Errors of the locations that are tried, in units of the family."""
_STEPS = 19
_ROUNDS = 2
_DRAWS = 4
_GRID = torch.linspace(-4, 4, 65, dtype=torch.float64)
_MOST_AT_ONCE = 2048


@dataclass(frozen=True)
class RatedAnswers:
    """
    Ratings of N answers in A attributes, and what a model says about the answers.

    Args:
        location (`torch.DoubleTensor` of shape `(N, A)`):
            Locations that the model predicts, in reward units.
        scale (`torch.DoubleTensor` of shape `(N, A)`):
            Scales, in reward units. The rewards are normal.
        location_error (`torch.Tensor` of shape `(A,)`):
            Standard deviation ≥ 0 of the model's error in each attribute, in reward units.
        counts (`Sequence[torch.Tensor]`):
            How many people gave each of the L_a ratings to an answer, `(N, L_a)` for each attribute.
        products, freedom (`torch.DoubleTensor` of shape `(N, A, A)`):
            What [`products_of_ratings`] makes of the ratings, numbered from 0.
        thresholds (`Sequence[torch.Tensor]`):
            Thresholds of each attribute, `(L_a − 1,)`, ascending, in reward units.
    """

    location: Tensor
    scale: Tensor
    location_error: Tensor
    counts: Sequence[Tensor]
    products: Tensor
    freedom: Tensor
    thresholds: Sequence[Tensor]

    @classmethod
    def of_attributes(
        cls,
        rewards: Sequence[RewardDistribution],
        counts: Sequence[Tensor],
        thresholds: Sequence[Tensor | None],
        products: Tensor,
        freedom: Tensor,
    ) -> RatedAnswers:
        """
        Puts attributes together, with the error of a model's locations at which the ratings of each are most likely.

        Args:
            rewards (`Sequence[RewardDistribution]`):
                Normal rewards of shape `(N,)` for each of A attributes, at least one.
            counts, products, freedom:
                As in [`RatedAnswers`].
            thresholds (`Sequence[torch.Tensor]`):
                As in [`RatedAnswers`]; `None` for an attribute that nobody has rated.

        Returns:
            [`RatedAnswers`]: All of them, in float64.
        """
        given = [torch.zeros(0) if of_one is None else of_one for of_one in thresholds]
        columns = zip(rewards, counts, given, strict=True)
        return cls(
            torch.stack([to_float64(of_one.location) for of_one in rewards], dim=1),
            torch.stack([to_float64(of_one.scale) for of_one in rewards], dim=1),
            torch.tensor([_fit_error(*column) if len(column[2]) else 0.0 for column in columns]),
            counts,
            to_float64(products),
            to_float64(freedom),
            given,
        )

    def levels(self, a: int) -> Tensor:
        """Draws `(D, N)` of the levels of the answers in an attribute, see [`_draw_levels`]."""
        error, counts = self.location_error[a].item(), to_float64(self.counts[a])
        return _draw_levels(self.location[:, a], self.scale[:, a], error, counts, to_float64(self.thresholds[a]))


def estimate_correlation(rated: RatedAnswers) -> tuple[Tensor, Tensor]:
    """
    Estimates the correlation matrix of people's rewards for A attributes.

    Args:
        rated ([`RatedAnswers`]):
            Ratings, and what a model says about the answers.

    Returns:
        `tuple` of `torch.DoubleTensor` of shape `(A, A)` and `torch.LongTensor` of shape `(A, A)`: The correlation
            matrix, which is positive definite, and how many deviations each entry was estimated from (for n raters of
            an answer n − 1). Where that is 0, the correlation is 0.
    """
    one = torch.ones(1, len(rated.location), dtype=torch.float64)
    found = correlations(match_scales(rated), one)
    return _positive_definite(found[0]), rated.freedom.sum(dim=0).round().long().fill_diagonal_(0)


def match_scales(rated: RatedAnswers) -> RatedAnswers:
    """
    Multiplies the scales of each attribute by the factor at which the ratings of an answer vary as much as observed.

    Args:
        rated ([`RatedAnswers`]):
            As in [`estimate_correlation`].

    Returns:
        [`RatedAnswers`]: The same with other scales.
    """
    rated = replace(rated, scale=rated.scale.clone())
    for a, thresholds in enumerate(rated.thresholds):
        said = rated.products[:, a, a], rated.freedom[:, a, a]
        # The levels depend on the scales, and these on the levels.
        for _ in range(_ROUNDS):
            rated.scale[:, a] *= _match_variance(*said, to_float64(thresholds), rated.levels(a), rated.scale[:, a])
    return rated


def correlations(rated: RatedAnswers, weights: Tensor) -> Tensor:
    """
    Estimates the correlation of each two attributes, for several weightings of the answers, such as the resamples of
    a bootstrap.

    Args:
        rated ([`RatedAnswers`]):
            Ratings, with scales as [`match_scales`] returns them.
        weights (`torch.Tensor` of shape `(W, N)`):
            Weights ≥ 0 of the answers.

    Returns:
        `torch.DoubleTensor` of shape `(W, A, A)`: The correlations, 0 where there is nothing to estimate them from.
            Each is estimated for itself, so that together they need not be a correlation matrix.
    """
    count = rated.location.shape[1]
    found = torch.eye(count, dtype=torch.float64).repeat(len(weights), 1, 1)
    distances = [to_float64(rated.thresholds[a])[:, None] - rated.levels(a)[:, None] for a in range(count)]
    for a in range(count):
        for b in range(a):
            used = rated.freedom[:, a, b] > 0
            if not used.any():
                continue
            z = [distances[k][..., used] / rated.scale[used, k] for k in (a, b)]
            said = rated.products[used, a, b], rated.freedom[used, a, b]
            found[:, a, b] = found[:, b, a] = _match(*said, z[0], z[1], to_float64(weights[:, used]))
    return found


def _fit_error(rewards: RewardDistribution, counts: Tensor, thresholds: Tensor) -> float:
    """The one of [`ERRORS`], in reward units, at which the ratings are most likely."""
    location, scale, counts, thresholds = map(to_float64, (rewards.location, rewards.scale, counts, thresholds))

    def log_likelihood(error: float) -> float:
        errors = torch.full_like(location, error) if error else None
        rewards = RewardDistribution(location, scale, "normal", location_error=errors)
        return rating_log_likelihood(rewards, counts, thresholds).sum().item()

    return max((error * rewards.kind.unit_scale for error in ERRORS), key=log_likelihood)


def products_of_ratings(ratings: Tensor) -> tuple[Tensor, Tensor]:
    """
    Sums the products of the deviations of ratings from their means, for each two attributes of an answer.

    Args:
        ratings (`torch.Tensor` of shape `(N, R, A)`):
            Ratings of up to R people in each attribute of an answer; `nan` where there is none.

    Returns:
        `tuple` of two `torch.Tensor` of shape `(N, A, A)`: The sums over the people who rated both, and the number of
            these people less one (0 if there are none).
    """
    is_there = ~ratings.isnan()
    both = (is_there[..., :, None] & is_there[..., None, :]).to(ratings)  # [N, R, A, A]
    values = ratings.nan_to_num()
    people = both.sum(dim=1).clamp_min(1)
    first = torch.einsum("nra,nrab->nab", values, both)
    second = torch.einsum("nrb,nrab->nab", values, both)
    products = torch.einsum("nra,nrb,nrab->nab", values, values, both) - first * second / people
    return products, (both.sum(dim=1) - 1).clamp_min(0)


def _draw_levels(location: Tensor, scale: Tensor, error: float, counts: Tensor, thresholds: Tensor) -> Tensor:
    """
    Draws levels `(D, N)` of answers from their posterior, given the model's prediction and the answer's ratings.

    The covariance of ratings depends on the level where the scale of ratings ends, in a curve. A mean over such draws
    is one over the levels that the answers may have, where that of a single best guess would be off.
    """
    if not error > 0:
        return location.expand(_DRAWS, -1)
    generator = torch.Generator().manual_seed(0)
    at = location + error * _GRID[:, None]  # [G, N]
    log_posterior = torch.stack(
        [rating_log_likelihood(RewardDistribution(level, scale, "normal"), counts, thresholds) for level in at]
    )
    share = torch.softmax(log_posterior - _GRID[:, None].square() / 2, dim=0).cumsum(dim=0)
    uniform = torch.rand(_DRAWS, len(location), dtype=torch.float64, generator=generator)
    places = (share < uniform[:, None]).sum(dim=1).clamp_max(len(_GRID) - 1)  # [D, N]
    return at.gather(0, places)


def _match_variance(products: Tensor, freedom: Tensor, thresholds: Tensor, levels: Tensor, scale: Tensor) -> float:
    """The factor on the scales at which the expected sum of squares of the ratings is the observed one."""
    used = freedom > 0
    if not used.any():
        return 1.0
    observed = products[used].sum().item()
    distances, odd = thresholds[:, None] - levels[:, None, used], 2 * torch.arange(len(thresholds)) + 1

    def excess(log_factor: float) -> float:
        # A rating is the number of thresholds below the reward: E[X] = Σ_k P_k and E[X²] = Σ_k (2k + 1) P_k.
        above = torch.special.ndtr(-distances / (scale[used] * math.exp(log_factor)))  # [D, L - 1, N]
        variance = (odd[:, None] * above).sum(dim=1) - above.sum(dim=1).square()
        return (variance.mean(dim=0) * freedom[used]).sum().item() - observed

    end = math.log(MOST_OFF)
    if excess(-end) >= 0:
        return 1 / MOST_OFF
    return MOST_OFF if excess(end) <= 0 else math.exp(brentq(excess, -end, end, xtol=1e-4))


def _match(products: Tensor, freedom: Tensor, z_a: Tensor, z_b: Tensor, weights: Tensor) -> Tensor:
    """The correlations `(W,)` at which the expected sums of products are those that are observed, for z `(D, L - 1,
    N)`."""
    edges = torch.linspace(-LARGEST, LARGEST, 2 * _STEPS + 1, dtype=torch.float64)
    middles = ((edges[1:] + edges[:-1]) / 2).tolist()
    rises = edges.diff()[:, None] * torch.stack([_slope(middle, z_a, z_b) for middle in middles])  # [2 S, N]
    below = -rises[:_STEPS].flip(0).cumsum(dim=0).flip(0)
    expected = torch.cat([below, torch.zeros_like(rises[:1]), rises[_STEPS:].cumsum(dim=0)])
    sums = (weights * freedom) @ expected.mT  # [W, 2 S + 1]
    found = [
        np.interp(observed, of_edges, edges.numpy())
        for observed, of_edges in zip((weights @ products).tolist(), sums.numpy(), strict=True)
    ]
    return torch.tensor(found, dtype=torch.float64)


def _slope(correlation: float, z_a: Tensor, z_b: Tensor) -> Tensor:
    """Σ_kl φ₂(z_ak, z_bl; r) of each answer, `(N,)`, as a mean over the draws of the levels."""
    rest = 1 - correlation**2
    slopes = []
    for start in range(0, z_a.shape[-1], _MOST_AT_ONCE):
        part = slice(start, start + _MOST_AT_ONCE)
        a, b = z_a[..., part].unsqueeze(2), z_b[..., part].unsqueeze(1)
        density = torch.exp(-(a * a - 2 * correlation * a * b + b * b) / (2 * rest)) / (2 * math.pi * rest**0.5)
        slopes.append(density.sum(dim=(1, 2)).mean(dim=0))
    return torch.cat(slopes)


def _positive_definite(correlation: Tensor) -> Tensor:
    """Shrink what is off the diagonal as little as needed: pairs of attributes know nothing of a third one."""
    least = torch.linalg.eigvalsh(correlation)[0].item()
    if least >= LEAST_EIGENVALUE:
        return correlation
    share = (1 - LEAST_EIGENVALUE) / (1 - least)
    identity = torch.eye(len(correlation)).to(correlation)
    return identity + share * (correlation - identity)
