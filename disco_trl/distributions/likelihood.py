"""
The likelihood of what people say: votes, ties, strengths, soft labels and ratings, all from the same random rewards.

The reward of an answer is R = μ + τη + σε: the location μ, people's disagreement σε, which is drawn anew for each
judgement, and the model's own error τη with η ~ N(0, 1), which all judgements about the answer share. With
Δ = μ_a − μ_b, a margin m, a tie band of half-width δ and the label noise ν,

    P(a wins)      = (1 − ν) P(R_a − R_b > m + δ) + ν P(R_a − R_b < m − δ)      (P(b wins) with the two exchanged)
    P(tie)         = P(m − δ < R_a − R_b < m + δ)
    P(a by k)      = P(m + c_k < R_a − R_b < m + c_(k+1))      with boundaries δ = c_1 < c_2 < ... < c_(L+1) = ∞
    P(rating ≤ k)  = P(R ≤ t_k)      with ordered thresholds t_1 < t_2 < ...

The error η is integrated out for all judgements of a pair, or of an answer, together. Hence votes of one pair agree
with each other more than those of different pairs do, which is what distinguishes the model's error from people's
disagreement.

Strengths say how much better an answer is. A preference that is often strong, in either direction, comes from wide
rewards, and one that is weak from narrow ones; a vote cannot tell them apart. Label noise exchanges "a by k" and "b by
k". Summed over k, the probabilities are those of the votes.

Sources: ties, P. V. Rao, L. L. Kupper, 1967; strengths, A. Agresti, 1992, here with a scale for each answer; ratings,
P. McCullagh, 1980, the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .judgements import Judgements
from .numerics import to_float64
from .quadrature import log_marginal
from .ratings import rating_log_likelihood
from .reward_distribution import RewardDistribution


@dataclass(frozen=True)
class Responses:
    """
    How people answer, given their rewards.

    Args:
        tie_width (`torch.Tensor` of shape `()`, *optional*):
            δ, the half-width of the tie band, in reward units. If `None`, there are no ties.
        label_noise (`torch.Tensor` of shape `()`, *optional*):
            ν, the probability below ½ that a vote says the opposite of what was meant. If `None`, there is none.
        thresholds (`torch.Tensor` of shape `(L - 1,)`, *optional*):
            Thresholds between L ratings, ascending, in reward units. If `None`, there are no ratings.
        strength_boundaries (`torch.Tensor` of shape `(L - 1,)`, *optional*):
            Boundaries c_2 to c_L between L strengths of a preference, ascending, above the tie width, in reward units.
            If `None`, preferences have no strengths.
    """

    tie_width: Tensor | None = None
    label_noise: Tensor | None = None
    thresholds: Tensor | None = None
    strength_boundaries: Tensor | None = None


def log_likelihood(
    chosen: RewardDistribution,
    rejected: RewardDistribution,
    judgements: Judgements,
    responses: Responses | None = None,
) -> Tensor:
    """
    Evaluates the log-likelihood of all that is said about P pairs.

    The comparisons of a pair and the ratings of either side are taken to be independent of each other (a composite
    likelihood).

    Args:
        chosen, rejected ([`RewardDistribution`] of shape `(P,)`):
            Rewards of one family. Their `location_error`, if any, is shared by the judgements about an answer.
        judgements ([`Judgements`]):
            What was said.
        responses ([`Responses`], *optional*):
            How people answer; needed where there are ties, ratings or label noise.

    Returns:
        `torch.Tensor` of shape `(P,)`: In nats, in float64 (on the CPU where the device has no such type), and not yet
        multiplied by the weights.

    Raises:
        `ValueError`: If there are ties, ratings or strengths, but no tie width, thresholds or boundaries, or if the
            families differ.
    """
    chosen, rejected = chosen.map(to_float64), rejected.map(to_float64)
    judgements = Judgements(**_all_in_float64(judgements))
    responses = Responses(**_all_in_float64(responses or Responses()))
    total = _comparisons(chosen, rejected, judgements, responses)
    if judgements.rating_counts is not None:
        if responses.thresholds is None:
            raise ValueError("there are ratings, but no thresholds to read them by")
        sides = RewardDistribution.cat([chosen, rejected])
        rated = rating_log_likelihood(sides, judgements.rating_counts, responses.thresholds)
        total = total + rated[: len(total)] + rated[len(total) :]
    return total


def split_log_likelihood(
    chosen: RewardDistribution,
    rejected: RewardDistribution,
    judgements: Judgements,
    responses: Responses | None = None,
) -> Tensor:
    """
    Evaluates [`log_likelihood`] with a gradient in which the locations and everything else do not act on each other.

    The location has the gradient of the likelihood in which strengths are read as votes, given the scales, the
    boundaries and whatever else is learned. All of these have the gradient of the whole likelihood, given the
    locations. The two are estimating equations, and not the gradient of one function; each has mean zero at the truth.
    An error of a location then cannot pass for disagreement among people while the location is still being learned,
    and what a strength says about the scale does not move the location.

    Args:
        chosen, rejected, judgements, responses:
            As in [`log_likelihood`].

    Returns:
        `torch.Tensor` of shape `(P,)`: As in [`log_likelihood`].
    """
    if judgements.strength_counts is None:
        return log_likelihood(chosen, rejected, judgements, responses)  # Both are parts of the gradient of this one.
    responses = responses or Responses()
    given = Responses(**{name: value if value is None else value.detach() for name, value in vars(responses).items()})
    rest = [name for name in ("scale", "shape", "location_error") if getattr(chosen, name) is not None]
    of_location = log_likelihood(
        _detached(chosen, *rest), _detached(rejected, *rest), judgements.without_strengths(), given
    )
    of_rest = log_likelihood(_detached(chosen, "location"), _detached(rejected, "location"), judgements, responses)
    return of_rest + of_location - of_location.detach()


def _detached(rewards: RewardDistribution, *names: str) -> RewardDistribution:
    return rewards.replace(**{name: getattr(rewards, name).detach() for name in names})


def _all_in_float64(record: Judgements | Responses) -> dict[str, Any]:
    return {name: None if value is None else to_float64(value) for name, value in vars(record).items()}


def _comparisons(
    chosen: RewardDistribution, rejected: RewardDistribution, judgements: Judgements, responses: Responses
) -> Tensor:
    wins, losses, ties, strengths = judgements.wins, judgements.losses, judgements.ties, judgements.strength_counts
    # (An accelerator is not asked, as the host would wait for it: the data collator has refused such rows.)
    if responses.tie_width is None and ties.device.type == "cpu" and bool((ties > 0).any()):
        raise ValueError("there are ties, but no tie width to read them by")
    no_band = torch.zeros_like(judgements.margin)
    band = no_band if responses.tie_width is None else responses.tie_width * judgements.tie_allowed
    beyond_margin = chosen - rejected - judgements.margin
    boundaries: list[Tensor] = []
    if strengths is not None:
        if responses.strength_boundaries is None:
            raise ValueError("there are strengths of preference, but no boundaries to read them by")
        boundaries = list(responses.strength_boundaries)
        won, lost = strengths.unflatten(-1, (2, -1)).unbind(dim=-2)
        wins, losses = wins - won.sum(dim=-1), losses - lost.sum(dim=-1)

    def noisy(win: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
        """What is said, from what is meant: log-probabilities of two judgements that label noise exchanges."""
        if responses.label_noise is None:
            return win, loss
        kept, swapped = torch.log1p(-responses.label_noise), responses.label_noise.log()
        return torch.logaddexp(kept + win, swapped + loss), torch.logaddexp(kept + loss, swapped + win)

    def given(error: Tensor) -> Tensor:
        """From an error `(..., P)` of the difference of the locations to the log-likelihood, of the same shape."""
        difference = beyond_margin + error
        win, loss = noisy(*difference.log_probs_of_signs(band))
        total = wins * win + losses * loss
        if responses.tie_width is not None:
            # Of rows without a tie the band may have no width, whose log-probability of −∞ turns gradients into NaN,
            # also where it is multiplied by no ties.
            tie_band = torch.where(ties > 0, band, torch.ones_like(band))
            total = total + ties * difference.log_prob_within(tie_band)
        if strengths is not None:
            bounds = [band, *boundaries]
            for k, (counts_won, counts_lost) in enumerate(zip(won.unbind(-1), lost.unbind(-1), strict=True)):
                by_k = [
                    side.log_prob_between(bounds[k], bounds[k + 1])
                    if k + 1 < len(bounds)
                    else side.log_prob_exceeds(bounds[k])
                    for side in (difference, -difference)
                ]
                win_by_k, loss_by_k = noisy(*by_k)
                total = total + counts_won * win_by_k + counts_lost * loss_by_k
        return total

    error = chosen.error_of_difference(rejected)
    if error is None:
        return given(no_band)
    edges = [band, *(boundary.expand_as(band) for boundary in boundaries)]
    bends = torch.stack([side * edge - beyond_margin.location for edge in edges for side in (-1, 1)])
    width = chosen.kind.difference_scale(chosen.scale, rejected.scale)
    return log_marginal(given, error, bends, width)
