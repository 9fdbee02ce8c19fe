"""Evaluation of a model that knows several attributes: each of them, and how they go together.

What flows: what a model says about held-out answers for each attribute, and what people said about it → the figures
of each attribute, computed as those of the overall judgement are; the model's correlation of two attributes beside
that of the people who rated both; and a line for each attribute that only one of the two knows.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from ..distributions.correlation import RatedAnswers, correlations, match_scales, products_of_ratings
from ..distributions.families import Normal
from ..distributions.numerics import is_identity
from .agreement import FEWEST, with_raters
from .bootstrap import resamples
from .figures import Figure, figure_of
from .held_out import HeldOut
from .ratings import why_unread, with_ratings
from .scored import Scored


OF_COMPARISONS = ("accuracy", "nll", "calibration_error")
"""Metrics of comparisons in an attribute. All of them there are with `--attribute`."""


def of_attributes(scored: Scored, held_out: HeldOut, draws: int, seed: int) -> dict[str, dict[str, Figure]]:
    """The figures of each attribute that both the model and the data know.

    Args:
        scored ([`~disco_trl.evaluation.scored.Scored`]):
            What the model says.
        held_out ([`~disco_trl.evaluation.held_out.HeldOut`]):
            The data.
        draws (`int`):
            Number of resamples.
        seed (`int`):
            Seed of the resamples.

    Returns:
        `dict[str, dict[str, Figure]]`: By attribute and name of the figure: [`OF_COMPARISONS`] where somebody compared
        two answers in it, and those of people's ratings where somebody rated one.
    """
    return {
        name: _figures(scored.attributes[name], held_out.about(name), draws, seed)
        for name in held_out.attributes
        if name in scored.attributes
    }


def _figures(scored: Scored, held_out: HeldOut, draws: int, seed: int) -> dict[str, Figure]:
    figures = {}
    if held_out.weight.any():
        forecasts = held_out.forecasts(scored.rewards, scored.tie_width)
        counts = resamples(forecasts.groups, draws, seed)
        figures = {name: figure_of(name, forecasts, counts) for name in OF_COMPARISONS}
    of_ratings = with_ratings(scored, held_out, draws, seed)
    return figures | of_ratings | with_raters(scored.rewards, held_out, draws, seed)


def remarks_on(known: Collection[str], held_out: HeldOut) -> list[str]:
    """What is not evaluated, since only the data or only the model knows it, in words.

    Args:
        known (`Collection[str]`):
            Attributes that the model knows.
        held_out ([`~disco_trl.evaluation.held_out.HeldOut`]):
            The data.

    Returns:
        `list[str]`: A sentence for each attribute.
    """
    judged = held_out.attributes
    return [
        *(
            f"The data say something about {name!r}, which the model does not know."
            for name in judged
            if name not in known
        ),
        *(f"The model knows {name!r}, about which the data say nothing." for name in known if name not in judged),
    ]


def of_correlations(scored: Scored, held_out: HeldOut, draws: int, seed: int) -> dict[str, Figure]:
    """How people's opinions of two attributes go together: according to the model, and in the held-out data.

    Both are correlations within an answer: of how far people differ from others who rated the same answer. That of
    rewards is estimated as in training ([`~disco_trl.distributions.correlation.estimate_correlation`]), given the
    model's locations, scales and thresholds; that of the numbers that people gave is nearer to 0, since steps of a
    rating scale are coarse.

    Args:
        scored ([`~disco_trl.evaluation.scored.Scored`]):
            What the model says.
        held_out ([`~disco_trl.evaluation.held_out.HeldOut`]):
            The data.
        draws (`int`):
            Number of resamples, which are of items, and of answers that several items share.
        seed (`int`):
            Seed of the resamples.

    Returns:
        `dict[str, Figure]`: Three figures for each two attributes that both the model and the data know, and that
        people rated together often enough.
    """
    names = [name for name in scored.attributes if name in held_out.attributes]
    positions, ratings = held_out.ratings_by_rater(names)
    figures: dict[str, Figure] = {}
    if not len(positions):
        return figures
    counts = resamples(held_out.groups_of_sequences[positions], draws, seed)
    why = {name: _why_not_estimated(name, scored.attributes[name], held_out) for name in names}
    known = [name for name in names if why[name] is None]
    found = _of_rewards(scored, known, positions, ratings[:, :, [names.index(name) for name in known]], counts)
    for pair in combinations(range(len(names)), 2):
        # Of people who rated one of the two only, nothing is read.
        both = ratings[:, :, pair]
        both = np.where(np.isnan(both).any(axis=-1, keepdims=True), np.nan, both)
        sums, freedom = (of_pair.numpy() for of_pair in products_of_ratings(torch.from_numpy(both)))
        if freedom[:, 0, 1].sum() < FEWEST:
            continue
        first, second = (names[place] for place in pair)
        reason = why[first] or why[second]
        of_people = found[:, known.index(first), known.index(second)].tolist() if reason is None else []
        said = f"{first} and {second}"
        figures[f"{said}: model"] = _of_model(scored, first, second)
        figures[f"{said}: people"] = Figure.none(reason) if reason else Figure.of(of_people[0], of_people[1:])
        figures[f"{said}: people, ratings as numbers"] = _of_numbers(sums, counts)
    return figures


def _of_model(scored: Scored, first: str, second: str) -> Figure:
    assert scored.correlation is not None
    names = [*scored.attributes]
    value = scored.correlation[names.index(first), names.index(second)].item()
    is_learned = not is_identity(scored.correlation)
    return Figure(value, np.nan, np.nan) if is_learned else Figure.none("it takes the attributes for independent")


def _why_not_estimated(name: str, scored: Scored, held_out: HeldOut) -> str | None:
    """Why the correlation of people's rewards for an attribute with others cannot be estimated, if it cannot."""
    if not isinstance(scored.rewards.kind, Normal):
        return f"it is estimated for normal rewards, and these are {scored.rewards.family}"
    why = why_unread(scored, held_out.about(name))
    return why and f"{why} ({name})"


def _of_numbers(sums: np.ndarray, counts: np.ndarray) -> Figure:
    """Pearson's correlation of deviations from the mean rating of an answer, from their products `(N, 2, 2)`."""

    def pearson(summed: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):  # where all people of all answers agree on an attribute
            return summed[..., 0, 1] / np.sqrt(summed[..., 0, 0] * summed[..., 1, 1])

    drawn = pearson(np.tensordot(counts, sums, axes=1))
    return Figure.of(float(pearson(sums.sum(axis=0))), drawn.tolist())


def _of_rewards(
    scored: Scored, names: list[str], positions: np.ndarray, ratings: np.ndarray, counts: np.ndarray
) -> Tensor:
    """The correlations `(draws + 1, A, A)` of rewards at which such ratings `(N, R, A)` are expected: on the data, and
    on each resample `(draws, N)`."""
    if not names:
        return torch.zeros(len(counts) + 1, 0, 0)
    levels, tables = np.full(ratings.shape, np.nan), []
    known = [scored.attributes[name] for name in names]
    for place, of_name in enumerate(known):
        for level, value in enumerate(of_name.rating_values):
            levels[..., place][ratings[..., place] == value] = level
        of_each_level = [(levels[..., place] == level).sum(axis=1) for level in range(len(of_name.rating_values))]
        tables.append(torch.from_numpy(np.stack(of_each_level, axis=1)))
    rated = RatedAnswers.of_attributes(
        [of_name.rewards[torch.from_numpy(positions)] for of_name in known],
        tables,
        [of_name.responses.thresholds for of_name in known],
        *products_of_ratings(torch.from_numpy(levels)),
    )
    weights = torch.from_numpy(np.vstack([np.ones(len(positions), dtype=counts.dtype), counts]))
    return correlations(match_scales(rated), weights)
