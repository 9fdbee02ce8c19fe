"""Figures that need more of people than one judgement of each comparison: shares of votes, strengths of preference,
ratings. Data that lack them do not have the figures.

What flows: the rewards of a model and held-out data → the comparisons or answers of which enough is known → figures by
name. `disco_trl.evaluation.evaluate` puts them beside the metrics that all data have.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from ..distributions.judgements import Judgements
from ..distributions.likelihood import Responses, log_likelihood
from ..distributions.reward_distribution import RewardDistribution
from .disagreement import RATERS, auroc, matched_auroc, rater_correlations, spreads_of_halves
from .figures import Figure, correlation_of
from .forecasts import Forecasts, weighted_mean
from .held_out import HeldOut
from .metrics import centrality, negative_log_likelihood


FEWEST = 10
"""Values that a figure needs: the interval of a correlation of fewer spans nearly everything."""
GROUPS = 10
"""Groups of answers in the picture of scales and raters."""
ROWS_AT_ONCE = 4096
CONSTANT_SCALE = "the scale is constant"

SHARES: dict[str, Callable[[Forecasts], float]] = {
    "cross_entropy": negative_log_likelihood,
    "entropy": lambda forecasts: weighted_mean(forecasts.entropy, forecasts.weight),
    "squared_error": lambda forecasts: weighted_mean((forecasts.prob - forecasts.target) ** 2, forecasts.weight),
}
"""Distances of forecasts from people's shares, and the floor of the first."""


def is_constant(scale: np.ndarray) -> bool:
    """Whether a model gives every answer the same scale, up to rounding."""
    return bool(np.ptp(scale) <= 1e-6 * np.max(scale))


def with_shares(forecasts: Forecasts, counts: np.ndarray, draws: int, seed: int) -> dict[str, Figure]:
    """Figures of comparisons of which the share of people is known: two or more votes, or a soft label.

    Args:
        forecasts ([`~disco_trl.evaluation.forecasts.Forecasts`]):
            Forecasts to evaluate.
        counts (`np.ndarray` of shape `(draws, N)`):
            Resamples of the forecasts, see [`~disco_trl.evaluation.bootstrap.resamples`].
        draws (`int`):
            Number of resamples for the rank correlation.
        seed (`int`):
            Seed of the resamples.

    Returns:
        `dict[str, Figure]`: Cross-entropy and squared error of the shares, the AUROC for divided pairs, and the rank
        correlation with the shares where people disagree. Empty if fewer than ten shares are known.
    """
    known = np.flatnonzero(~np.isnan(forecasts.minority) & (forecasts.weight > 0))
    if len(known) < FEWEST:
        return {}
    forecasts, counts = forecasts[known], counts[:, known]
    figures = {
        name: Figure.of(metric(forecasts), [metric(forecasts.times(count)) for count in counts])
        for name, metric in SHARES.items()
    }
    figures |= _divided_pairs(forecasts)
    soft = np.flatnonzero((forecasts.target > 0) & (forecasts.target < 1))
    if len(soft) >= FEWEST and np.ptp(forecasts.target[soft]) > 0:
        shares = forecasts.prob[soft], forecasts.target[soft]
        figures["probability, with people's share"] = correlation_of(*shares, draws, seed)
    return figures


def _divided_pairs(forecasts: Forecasts) -> dict[str, Figure]:
    divided, groups = forecasts.divided, forecasts.groups
    if min(divided.sum(), (~divided).sum()) < FEWEST:
        return {}
    # Rounded as the certainty is, so that a pair and its mirror image are equal.
    distance = np.round(np.abs(forecasts.margin), 9)
    doubt, width = -forecasts.certainty, forecasts.width
    figures = {
        "divided": Figure(*auroc(doubt, divided, groups)),
        "divided_by_scale": Figure(*auroc(width, divided, groups)),
        "divided_by_distance": Figure(*auroc(-distance, divided, groups)),
        "divided_matched": Figure(*matched_auroc(doubt, divided, distance, groups)),
        "divided_by_scale_matched": Figure(*matched_auroc(width, divided, distance, groups)),
    }
    if is_constant(width):
        figures |= {name: Figure.none(CONSTANT_SCALE) for name in figures if "scale" in name}
    return figures


def with_grades(
    rewards: RewardDistribution, held_out: HeldOut, responses: Responses, counts: np.ndarray
) -> dict[str, Figure]:
    """Negative log-likelihoods of strengths of preference, and of their signs, according to what the model has learned
    of how people answer.

    Both are about the same judgements: those with a strength, and the ties. A sign is
    −, 0 or +, and 0 has the probability of a tie. (In the metric `nll`, a tie is half a vote for either answer, for
    models that know no ties.)

    Args:
        rewards ([`RewardDistribution`]):
            Rewards of `held_out.sequences`.
        held_out ([`~disco_trl.evaluation.held_out.HeldOut`]):
            The data.
        responses ([`~disco_trl.distributions.likelihood.Responses`]):
            How people answer, according to the model.
        counts (`np.ndarray` of shape `(draws, N)`):
            Resamples of the comparisons.

    Returns:
        `dict[str, Figure]`: `grade_nll` and `sign_nll` in nats. Empty if the data have no strengths.

    Raises:
        `ValueError`: If a strength is beyond those that the model knows.
    """
    number, grade, _ = held_out.grades.T
    if len(number) == 0:
        return {}
    boundaries = responses.strength_boundaries
    if boundaries is not None and (beyond := np.flatnonzero(np.abs(grade) > len(boundaries) + 1)).size:
        raise ValueError(
            f"item {held_out.item[number[beyond[0]]]}, column 'preference_strength': a strength of {grade[beyond[0]]} "
            f"is beyond the {len(boundaries) + 1} levels that the model knows; map the strengths to these, as in its "
            "training"
        )
    levels = {"grade_nll": None if boundaries is None else len(boundaries) + 1, "sign_nll": None}
    if (grade == 0).any() and responses.tie_width is None:
        figures = dict.fromkeys(levels, Figure.none("the model knows no ties"))
    else:
        figures = {name: _nll(rewards, held_out, responses, counts, number) for name, number in levels.items()}
    if boundaries is None:
        figures["grade_nll"] = Figure.none("the model knows no strengths of preference")
    return figures


def _nll(
    rewards: RewardDistribution, held_out: HeldOut, responses: Responses, counts: np.ndarray, levels: int | None
) -> Figure:
    """The mean −log P of a person's grade, or of its sign if there are no levels."""
    number, grade, people = held_out.grades.T
    losses = []
    # One judgement a row: the votes of a pair share the error of its locations, so that together they would be more
    # likely than one by one.
    for rows in np.split(np.arange(len(number)), range(ROWS_AT_ONCE, len(number), ROWS_AT_ONCE)):
        said = torch.from_numpy(grade[rows])
        wins, losing, ties = ((said > 0).double(), (said < 0).double(), (said == 0).double())
        strengths = None
        if levels is not None:
            # Wins of strength 1 to L, and after them losses.
            place = torch.nn.functional.one_hot((said.abs() - 1).clamp_min(0), levels)
            strengths = torch.cat([place * wins[:, None], place * losing[:, None]], dim=-1)
        judgements = Judgements(
            wins, losing, ties, torch.ones_like(wins), torch.zeros_like(wins), torch.ones_like(wins),
            strength_counts=strengths,
        )  # fmt: skip
        first, second = (rewards[torch.from_numpy(at[number[rows]])] for at in (held_out.first, held_out.second))
        losses.append(-log_likelihood(first, second, judgements, responses).cpu().numpy())
    loss = np.bincount(number, people * np.concatenate(losses), counts.shape[1])
    asked = np.bincount(number, people, counts.shape[1])
    with np.errstate(invalid="ignore"):  # a resample without any of them
        return Figure.of(float(loss.sum() / asked.sum()), ((counts @ loss) / (counts @ asked)).tolist())


def with_raters(rewards: RewardDistribution, held_out: HeldOut, draws: int, seed: int) -> dict[str, Figure]:
    """Rank correlations with the mean and the standard deviation of people's ratings of each answer.

    Args:
        rewards ([`RewardDistribution`]):
            Rewards of `held_out.sequences`.
        held_out ([`~disco_trl.evaluation.held_out.HeldOut`]):
            The data.
        draws (`int`):
            Number of resamples, which are of answers.
        seed (`int`):
            Seed of the resamples.

    Returns:
        `dict[str, Figure]`: Correlations, as they are and corrected for the raters' reliability, each with that of
        [`~disco_trl.evaluation.metrics.centrality`] beside it. Empty if fewer than ten answers have ratings.
    """
    ratings = held_out.ratings()
    figures = {}
    if len(ratings) >= FEWEST:
        location = rewards.location.numpy()[list(ratings)]
        means = np.array([values.mean() for values in ratings.values()])
        figures["location, with people's mean rating"] = correlation_of(location, means, draws, seed)
    positions, deviations = deviations_of(held_out)
    if len(positions) < FEWEST:
        return figures
    location, scale = (values.numpy()[positions] for values in (rewards.location, rewards.scale))
    # Always reported beside the scale: extremity alone correlates with the standard deviation of bounded ratings.
    scores = {
        "scale, with people's standard deviation": None if is_constant(scale) else scale,
        "−|location − median|, with people's standard deviation": centrality(location),
    }
    for name, score in scores.items():
        none = Figure.none(CONSTANT_SCALE)
        figures[name] = none if score is None else correlation_of(score, deviations, draws, seed)
    # Ratings of four raters or more, by position among the answers that have a standard deviation.
    enough = [place for place, position in enumerate(positions) if len(ratings[position]) >= RATERS]
    if len(enough) < FEWEST:
        corrected = dict.fromkeys(scores, Figure.none(f"it takes {FEWEST} answers with {RATERS} raters or more"))
    else:
        spreads = spreads_of_halves([ratings[positions[place]] for place in enough], seed=seed)
        known = np.stack([score[enough] for score in scores.values() if score is not None])
        found, agreement = _corrected(known, spreads, draws, seed)
        figures["people's standard deviation, in two halves of them"] = agreement
        corrected = {
            name: Figure.none(CONSTANT_SCALE) if score is None else found.pop(0) for name, score in scores.items()
        }
    return figures | {f"{name}, corrected": figure for name, figure in corrected.items()}


def deviations_of(held_out: HeldOut) -> tuple[list[int], np.ndarray]:
    """The positions of the answers with two ratings or more, and the standard deviation of these, of shape `(N,)`."""
    several = {position: values for position, values in held_out.ratings().items() if len(values) > 1}
    return list(several), np.array([values.std(ddof=1) for values in several.values()])


def _corrected(scores: np.ndarray, spreads: np.ndarray, draws: int, seed: int) -> tuple[list[Figure], Figure]:
    """Corrected correlations of scores `(M, N)`, and the agreement of the halves, with the bootstrap over answers. The
    correction is estimated anew in each resample, so that the intervals include its error."""
    correlations, agreement = rater_correlations(scores, spreads)
    generator = np.random.default_rng(seed)
    count = scores.shape[1]
    drawn = [
        rater_correlations(scores[:, index], spreads[:, :, index])
        for index in (generator.integers(count, size=count) for _ in range(draws))
    ]
    of_halves = Figure.of(agreement, [one for _, one in drawn])
    if agreement <= 0:
        return [Figure.none("the raters do not agree on it at all")] * len(scores), of_halves
    figures = []
    for value, values in zip(correlations, np.transpose([one for one, _ in drawn]), strict=True):
        figure = Figure.of(float(value), values.tolist())
        if math.isnan(figure.low) and not math.isnan(value):
            figure = replace(figure, note="without an interval: the raters hardly agree on it")
        figures.append(figure)
    return figures, of_halves


def spread_by_scale(rewards: RewardDistribution, held_out: HeldOut) -> dict[str, list[float]]:
    """The standard deviation of people's ratings, in groups of answers by the scale that the model predicts.

    Args:
        rewards ([`RewardDistribution`]):
            Rewards of `held_out.sequences`.
        held_out ([`~disco_trl.evaluation.held_out.HeldOut`]):
            The data.

    Returns:
        `dict[str, list[float]]`: For each of ten groups of the same size, the one with the smallest scales first:
        `scale`, their mean in units of the reward; `deviation`, the mean standard deviation, in units of the ratings;
        `error`, the standard error of that; and `baseline`, the mean standard deviation in groups by
        [`~disco_trl.evaluation.metrics.centrality`] instead. Empty if the scale is constant, or fewer than 50 answers
        have two ratings or more.
    """
    positions, deviations = deviations_of(held_out)
    location, scale = (values.double().numpy()[positions] for values in (rewards.location, rewards.scale))
    if len(positions) < 5 * GROUPS or is_constant(scale):
        return {}
    groups = np.array_split(np.argsort(scale, kind="stable"), GROUPS)
    central = np.array_split(np.argsort(centrality(location), kind="stable"), GROUPS)
    return {
        "scale": [float(scale[of].mean()) for of in groups],
        "deviation": [float(deviations[of].mean()) for of in groups],
        "error": [float(deviations[of].std(ddof=1) / math.sqrt(len(of))) for of in groups],
        "baseline": [float(deviations[of].mean()) for of in central],
    }
