"""
The model's own error, from how people rate: what of the variance of a reward is not disagreement.

Where several people rate an answer, the share of the variance that their ratings have in common, about what the model
predicts, is the model's own error τ², and the rest is people's disagreement σ². Which of two answers people prefer
says next to nothing about this share, as both act alike in it.

What flows: predictions in advance, with ratings → the ratings of each answer, once → the most likely share, with
thresholds fitted along.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from ..distributions.ratings import rating_log_likelihood
from ..distributions.reward_distribution import Family, RewardDistribution
from ..models.reward_head import RewardHead
from ..models.scale_head import bounded_exp
from .head_fit import NothingToFit
from .predictions import Predictions, numbered
from .scale_fit import minimize


LARGEST_SHARE = 0.95
"""Largest share of the variance that may be the model's own error. Beyond it the scale hardly acts."""
MOST_ANSWERS = 1024
"""Number of latest answers whose ratings are read. Five ratings of each tell the share to 0.02."""
_ERRORS = torch.linspace(-6, 6, 49, dtype=torch.float64)[:, None]
"""Places at which the error of a location is tried, in units of its deviation. Sums over them are integrals as long as
the ratings of an answer leave its level uncertain by a tenth of that. (Integrals that are exact for any error, as in
`disco_trl.distributions.quadrature`, take seven times as long, and give the same share to nine digits.)"""


def share_of_ratings(
    head: RewardHead, family: Family, predictions: Predictions, log_scale: Tensor, factor: float, error_unit: float
) -> float:
    """
    Find the share of the model's own error that makes people's ratings most likely.

    The prior of the share is worth one answer or two, and symmetric: where no answer has two ratings, which then say
    nothing about it, it is in the middle.

    Args:
        head ([`~disco_trl.models.reward_head.RewardHead`]):
            Head that made the predictions, with thresholds. It is not changed.
        family ([`~disco_trl.distributions.families.Family`]):
            Family of its rewards.
        predictions ([`Predictions`]):
            Pairs as they were predicted in advance. An answer that recurs counts once, as it was predicted first, and
            the latest [`MOST_ANSWERS`] are read.
        log_scale (`torch.DoubleTensor` of shape `(P, 2)`):
            log(σ / unit) of both sides.
        factor (`float`):
            Factor of the locations.
        error_unit (`float`):
            Standard deviation of an error that is all of the variance, in reward units.

    Returns:
        `float`: The share, from 0 to [`LARGEST_SHARE`].

    Raises:
        [`NothingToFit`]: If the fit does not end at a number.
    """
    assert head.likelihood is not None
    likelihood = copy.deepcopy(head.likelihood).cpu().double().requires_grad_()
    counts = predictions.rating_counts.flatten(0, 1).double()
    number = numbered(predictions.answers).flatten()
    rated = (counts.sum(dim=1) > 0).nonzero()[:, 0]
    first = torch.full((int(number.max()) + 1,), len(number)).scatter_reduce(0, number[rated], rated, "amin")
    first = first[first < len(number)].sort().values[-MOST_ANSWERS:]
    counts = counts[first]
    location = factor * predictions.location.double().flatten()[first]
    scale = head.scale.unit_scale * bounded_exp(log_scale.flatten()[first])
    shape = None
    if family.shape_names:
        shape = family.shape_from_raw(predictions.raw_shape.double().flatten(0, 1)[first])
    weight = predictions.judgements.weight.double().repeat_interleave(2)[first]
    raw = torch.zeros((), dtype=torch.float64, requires_grad=True)
    counts = counts.repeat(len(_ERRORS), 1)  # for each error
    log_density = torch.log_softmax(-_ERRORS.square() / 2, dim=0)

    def objective() -> Tensor:
        part = raw.sigmoid()
        share = LARGEST_SHARE * part
        levels = location + share.sqrt() * error_unit * _ERRORS
        scales = (scale * (1 - share).sqrt()).expand_as(levels)
        shapes = None if shape is None else shape.repeat(len(_ERRORS), 1)
        rewards = RewardDistribution(levels.flatten(), scales.flatten(), family, shapes)
        given_levels = rating_log_likelihood(rewards, counts, likelihood.values()["thresholds"])
        log_probs = (given_levels.view_as(levels) + log_density).logsumexp(dim=0)
        prior = (thresholds - before).square().sum() / 2 - (part * (1 - part)).log()
        return prior - (weight * log_probs).sum()

    thresholds = likelihood.get_parameter("thresholds")
    before = thresholds.detach().clone()
    minimize(objective, [raw, thresholds])
    share = LARGEST_SHARE * raw.sigmoid().item()
    if not math.isfinite(share):
        raise NothingToFit("no share of the model's own error makes the ratings most likely; lower learning_rate")
    return share
