"""
Integrals over the error of a location: log ∫ N(e; 0, τ²) exp(log-likelihood(e)) de, for any family.

The integrand has a bend wherever the error takes the two rewards, or a reward and a threshold, to the same place. With
τ much larger than the scales it is a step there, and with Cauchy's heavy tails it has a mode at the bend and another
one at 0. A rule about one mode misses the other, so the line is cut around all of these places, and finer the nearer
it comes to one of them. What lies between two cuts is smooth, and a few Gauss–Legendre nodes suffice.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


REACH = 12.0
"""How far the cuts around 0 and around the mode go, in units of τ. Beyond it a normal density is below 1e-31."""
_BEND_REACH = 2.0
"""The same around bends. Farther away, nothing changes faster than the normal density does."""
_RATIO = 2.0
_NODES = 7
_NEGLIGIBLE = 30.0
"""Pieces whose integral is smaller than the largest by this many nats are left out."""
_FARTHEST = 1e8
_MODE_SEARCH_STEPS = 8
_SHORTER_STEPS = (1.0, 0.5, 0.25, 0.1, 0.03, 0.0)


def log_marginal(log_likelihood: Callable[[Tensor], Tensor], spread: Tensor, bends: Tensor, width: Tensor) -> Tensor:
    """
    Integrates a likelihood over a normal error.

    It is exact to 1e-8 nats for families that bend on one scale, for errors of up to 100 times that scale and up to
    10,000 votes.

    Args:
        log_likelihood (`Callable[[torch.Tensor], torch.Tensor]`):
            From errors e of shape `(Q, P)` to the log-likelihood of that shape, in float64.
        spread (`torch.Tensor` of shape `(P,)`):
            Standard deviations τ > 0 of the errors, in float64.
        bends (`torch.Tensor` of shape `(C, P)`):
            Errors about which the log-likelihood bends.
        width (`torch.Tensor` of shape `(P,)`):
            Scale > 0 on which it bends.

    Returns:
        `torch.Tensor` of shape `(P,)`: The logarithm of the integral. It is differentiable in `spread` and in all that
        `log_likelihood` depends on. The places of the nodes count as constant, because they make no difference to the
        integral.
    """
    with torch.no_grad():
        # In units of τ from here on. An error of nearly 0 has all bends out of reach.
        unit = spread.clamp_min(1e-300)
        origin = torch.zeros_like(spread)[None]
        bent = _cuts(
            (bends / unit).clamp(-_FARTHEST, _FARTHEST),
            nearest=_smallest(width / unit, _BEND_REACH),
            reach=_BEND_REACH,
        )

        def log_density(u: Tensor) -> Tensor:
            return log_likelihood(spread * u) - u.square() / 2

        cuts = torch.cat([bent, _cuts(origin, nearest=1.0, reach=REACH)]).sort(dim=0).values
        tries = torch.cat([cuts, (cuts[1:] + cuts[:-1]) / 2])
        start = tries.gather(0, log_density(tries).argmax(dim=0, keepdim=True))[0]
        mode, deviation = _find_mode(log_density, start)
        # Many judgements make a peak that is narrower than the scales, and lies anywhere.
        peaked = _cuts(mode[None], nearest=_smallest(deviation, 1.0), reach=REACH)
        cuts = torch.cat([cuts, peaked]).sort(dim=0).values
        starts, lengths = _heaviest(cuts, log_density(cuts))
        unit_nodes, unit_weights = (tensor.to(cuts)[:, None] for tensor in unit_rule())
        nodes = (starts[:, None] + lengths[:, None] * unit_nodes).flatten(0, 1)
        log_weights = (lengths[:, None] * unit_weights).flatten(0, 1).log()
    terms = log_likelihood(spread * nodes) - nodes.square() / 2 + log_weights
    return torch.logsumexp(terms, dim=0) - math.log(2 * math.pi) / 2


def _smallest(values: Tensor, most: float) -> float:
    # A nan is left to the caller: the integral of its row is one.
    return values.nan_to_num(most).min().clamp(1 / _FARTHEST, most).item() if values.numel() else most


def _cuts(places: Tensor, nearest: float, reach: float) -> Tensor:
    """
    Cuts the line at places and on both sides of each, at distances that grow by a constant ratio.

    Args:
        places (`torch.Tensor` of shape `(C, P)`):
            Where the integrand bends or peaks.
        nearest (`float`):
            How near the nearest of the other cuts has to be.
        reach (`float`):
            How far the farthest is.

    Returns:
        `torch.Tensor` of shape `(D, P)`: The cuts, in no order.
    """
    levels = 1 + math.ceil(math.log(reach / nearest, _RATIO))
    steps = reach * torch.tensor([_RATIO**-level for level in range(levels)]).to(places)
    offsets = torch.cat([-steps, steps.new_zeros(1), steps])
    return (places[:, None] + offsets[:, None]).flatten(0, 1)


def _heaviest(cuts: Tensor, log_density: Tensor) -> tuple[Tensor, Tensor]:
    """Starts and lengths `(S, P)` of the pieces between sorted cuts `(D, P)`, without the negligible ones."""
    lengths = cuts.diff(dim=0)
    weights = torch.maximum(log_density[1:], log_density[:-1]) + lengths.log()
    count = (weights > weights.amax(dim=0) - _NEGLIGIBLE).sum(dim=0)
    kept = weights.topk(max(1, int(count.max())) if count.numel() else 0, dim=0).indices
    return cuts[:-1].gather(0, kept), lengths.gather(0, kept)


@functools.cache
def unit_rule() -> tuple[Tensor, Tensor]:
    """The nodes and weights `(7,)` of the Gauss–Legendre rule for the interval from 0 to 1, in float64."""
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    return torch.from_numpy((nodes + 1) / 2), torch.from_numpy(weights / 2)


def _find_mode(log_density: Callable[[Tensor], Tensor], mode: Tensor) -> tuple[Tensor, Tensor]:
    """Climbs to a mode from a start `(P,)`; also returns the deviation of a normal as curved as the density there."""
    deviation = torch.ones_like(mode)
    for _ in range(_MODE_SEARCH_STEPS):
        # Differences in place of derivatives: the nodes need not lie exactly, and nothing has to be differentiated
        # twice.
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
