"""How much judgements reveal: exact fits of linear models in seconds, and the number of votes that are needed.

The model is the package's own, with given features in place of a language model's hidden states: location and log
scale are linear in the features of a text, the geometric mean of the scales is the family's unit (as in
`disco_trl.models.scale_head.ScaleHead`), and a location may have an error τ that all judgements on a pair, or on a
text, share. The likelihood is the one that the trainer maximizes. With tens of features and tens of thousands of
judgements, its maximum can be found to the last digit, and its Fisher information written down
(`disco_trl.simulation.information`). Both judge a setup before labels are paid for and a GPU is rented: what fails
here, where features and family are right, will not do better with a language model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.stats import spearmanr
from torch import Tensor

from ..distributions.reward_distribution import get_family
from .information import Basis, Precision, asymptotic_errors
from .judging import Votes, vote
from .population import Population
from .questions import Comparisons, Ratings, rewards_of


# Fit


@dataclass(frozen=True)
class LinearFit:
    """
    A linear reward model: μ = location_weight · (x − mean), log(σ / unit) = log_scale_weight · (x − mean).

    Args:
        location_weight, log_scale_weight (`numpy.ndarray` of shape `(D,)`):
            Weights of the features.
        mean (`numpy.ndarray` of shape `(D,)`):
            The mean of the features that the model was fitted on.
        unit_scale (`float`):
            The geometric mean of the scales.
        location_error (`float`, *optional*):
            τ, in reward units. If `None`, the model has no such error.
        tie_half_width (`float`, *optional*):
            δ, in reward units. If `None`, all comparisons were forced choices.
        boundaries (`numpy.ndarray` of shape `(L - 1,)`, *optional*):
            Those between strengths, in reward units. If `None`, nobody said how much better a text is.
        thresholds (`numpy.ndarray` of shape `(K - 1,)`, *optional*):
            Those between ratings, in reward units. If `None`, there are no ratings.
        nll (`float`):
            The mean of −log P of a judgement, in nats.
    """

    location_weight: np.ndarray
    log_scale_weight: np.ndarray
    mean: np.ndarray
    unit_scale: float
    location_error: float | None
    tie_half_width: float | None
    boundaries: np.ndarray | None
    thresholds: np.ndarray | None
    nll: float

    def predict(self, features: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """
        Predicts rewards.

        Args:
            features (`ArrayLike` of shape `(N, D)`):
                Features of texts, which need not be those of the fit.

        Returns:
            `tuple[numpy.ndarray, numpy.ndarray]`: Locations and scales, `(N,)` each, in reward units.
        """
        deviation = np.asarray(features, dtype=float) - self.mean
        return deviation @ self.location_weight, self.unit_scale * np.exp(deviation @ self.log_scale_weight)


def fit_linear(
    features: ArrayLike,
    votes: Votes | None,
    family: str = "normal",
    *,
    ratings: ArrayLike | None = None,
    with_location_error: bool = False,
    log_scale_std: float | None = None,
) -> LinearFit:
    """
    Fits the linear model under which the judgements are most likely.

    Args:
        features (`ArrayLike` of shape `(N, D)`):
            Features of all texts.
        votes ([`Votes`], *optional*):
            Comparisons of pairs of texts. If people could call a pair a tie, the tie band is fitted too, and if they
            said how much better a text is, the boundaries between strengths.
        family (`str`, *optional*, defaults to `"normal"`):
            A family without shape parameters.
        ratings (`ArrayLike` of shape `(N, R)`, *optional*):
            People's ratings of each text, as [`~disco_trl.simulation.judging.rate`] returns them; NaN where there is
            none. The thresholds between them are fitted too.
        with_location_error (`bool`, *optional*, defaults to `False`):
            Whether to fit τ as well, the error of a location that the features do not explain. It takes several
            judgements of a pair or a text: with one, disagreement among people looks much the same.
        log_scale_std (`float`, *optional*):
            By how much log σ is expected to differ between texts: a normal prior on its weights, which a few
            judgements need, and on log τ one of deviation 1 about half a unit. Without it, there is none.

    Returns:
        [`LinearFit`]: The maximum of the likelihood, or of the posterior.

    Raises:
        `ValueError`: If nobody judged, or if the features are the same for every text.
        `RuntimeError`: If no maximum is found, because there are too few judgements for so many features.
    """
    features = np.asarray(features, dtype=float)
    basis, unit = Basis(features), get_family(family).unit_scale
    inputs = torch.tensor(basis(features))
    rank = inputs.shape[1]
    given = [
        *([] if votes is None else [_given_votes(votes)]),
        *([] if ratings is None else [_given_ratings(ratings)]),
    ]
    count = int(sum(counts.sum() for _, counts in given))
    if not count:
        raise ValueError("there are no votes to fit to" if ratings is None else "there are no judgements to fit to")
    # What the answers depend on, by what makes it any number: logarithms of τ, of δ, and of gaps
    half = math.log(unit / 2)
    raw = {"location_error": torch.full((int(with_location_error),), half)}
    for question, _ in given:
        raw |= {name: torch.full((len(value),), half) for name, value in question.extras.items()}
    if "thresholds" in raw:
        raw["thresholds"][0] = -unit
    parameters = torch.cat([torch.zeros(2 * rank), *raw.values()]).double().requires_grad_()
    sizes = [len(value) for value in raw.values()]
    optimizer = torch.optim.LBFGS(
        [parameters], max_iter=1000, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def learned() -> dict[str, Tensor]:
        values = dict(zip(raw, parameters[2 * rank :].split(sizes), strict=True))
        found = {name: value.exp() for name, value in values.items()}
        if "thresholds" in found:
            first = values["thresholds"][:1]
            found["thresholds"] = torch.cat([first, first + found["thresholds"][1:].cumsum(dim=0)])
        if "boundaries" in found:
            found["boundaries"] = found.get("tie_width", torch.zeros(1)) + found["boundaries"].cumsum(dim=0)
        return found

    def likelihood() -> Tensor:
        """The mean of −log P."""
        location, scale = inputs @ parameters[:rank], unit * (inputs @ parameters[rank : 2 * rank]).exp()
        extras = learned()
        error = extras["location_error"][0] if with_location_error else None
        total = torch.zeros((), dtype=torch.float64)
        for question, counts in given:
            items = torch.tensor(question.items)
            rewards = rewards_of(location[items], scale[items], family, error)
            total = total - question.log_probs(rewards, counts, extras).sum()
        return total / count

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = likelihood()
        if log_scale_std is not None:
            penalty = rank * parameters[rank : 2 * rank].square().sum() / log_scale_std**2
            if with_location_error:
                penalty = penalty + (parameters[2 * rank] - half).square()
            value = value + penalty / 2 / count
        value.backward()
        return value

    optimizer.step(loss)
    value = loss().item()
    solution = parameters.detach().numpy()
    gradient = np.inf if parameters.grad is None else parameters.grad.abs().max().item()
    location_weight, log_scale_weight = basis.axes @ solution[:rank], basis.axes @ solution[rank : 2 * rank]
    # Where the features separate the votes, the maximum lies at infinity, on the way to which gradients vanish too.
    steepest = np.abs((features - basis.mean) @ log_scale_weight).max()
    if not gradient < 1e-5 or value < 1e-6 or steepest > math.log(1e3):
        raise RuntimeError(
            f"no maximum was found for {count} votes and {rank} features (gradient {gradient:.1e}): that is too few "
            "votes; simulate more, or reduce the features, for instance to their leading principal components"
        )
    with torch.no_grad():
        found = {name: value.numpy() for name, value in learned().items()}
        nll = likelihood().item()
    return LinearFit(
        location_weight=location_weight,
        log_scale_weight=log_scale_weight,
        mean=basis.mean,
        unit_scale=unit,
        location_error=float(found["location_error"][0]) if with_location_error else None,
        tie_half_width=float(found["tie_width"][0]) if "tie_width" in found else None,
        boundaries=found.get("boundaries"),
        thresholds=found.get("thresholds"),
        nll=nll,
    )


def _given_votes(votes: Votes) -> tuple[Comparisons | Ratings, Tensor]:
    """The question that the votes answer, with any boundaries, and counts of the answers."""
    strengths = np.stack([votes.wins, votes.losses], axis=1) if votes.strengths is None else votes.strengths
    levels = strengths.shape[1] // 2
    counts = strengths if votes.forced else np.column_stack([strengths, votes.ties])
    question = Comparisons(votes.pairs, boundaries=range(1, levels), tie_half_width=0.0 if votes.forced else 0.5)
    return question, torch.tensor(counts, dtype=torch.float64)


def _given_ratings(ratings: ArrayLike) -> tuple[Comparisons | Ratings, Tensor]:
    """The question that ratings `(N, R)` answer, with any thresholds, and counts of the answers."""
    table = np.asarray(ratings, dtype=float)
    texts = np.flatnonzero(~np.isnan(table).all(axis=1))
    values = np.unique(table[~np.isnan(table)])
    counts = (table[texts, :, None] == values).sum(axis=1)
    return Ratings(texts, 1, range(len(values) - 1)), torch.tensor(counts, dtype=torch.float64)


def measured_precision(population: Population, fit: LinearFit) -> Precision:
    """Compares a fit with the population's true locations and scales."""
    location, scale = fit.predict(population.features)
    return Precision(
        scale_error=float(np.std(np.log(scale / population.scale))),
        location_spearman=float(spearmanr(location, population.location).statistic),
        scale_spearman=float(spearmanr(scale, population.scale).statistic),
    )


# Plans


@dataclass(frozen=True)
class Plan:
    """
    An answer to the question of how many votes are needed.

    Args:
        votes_per_pair (`int`):
            The smallest number with which σ is expected to be as accurate as required.
        votes (`int`):
            The number of votes on all pairs together.
        expected ([`Precision`]):
            What a fit to them should reach, by its asymptotic errors.
        simulated (`list[Precision]`):
            What fits to simulated votes have reached, one entry each.
    """

    votes_per_pair: int
    votes: int
    expected: Precision
    simulated: list[Precision]


def plan(
    population: Population,
    pairs: np.ndarray,
    scale_error: float = 0.1,
    *,
    most_votes_per_pair: int = 50,
    simulations: int = 1,
    seed: int = 0,
) -> Plan:
    """
    Finds how many votes on each pair it takes until σ is accurate to `scale_error`.

    Args:
        population ([`Population`]):
            People and texts like those that you expect.
        pairs (`numpy.ndarray` of shape `(P, 2)`):
            Indices of the texts in the pairs that would be voted on.
        scale_error (`float`, *optional*, defaults to `0.1`):
            The root mean square error of log σ that is good enough; 0.1 is about 10 % of σ.
        most_votes_per_pair (`int`, *optional*, defaults to `50`):
            Where to stop searching.
        simulations (`int`, *optional*, defaults to `1`):
            The number of fits to simulated votes that check the answer.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the simulated votes.

    Returns:
        [`Plan`]: The smallest number of votes, and what they reach.

    Raises:
        `ValueError`: If `most_votes_per_pair` are not enough; the message says what they reach.
        `RuntimeError`: If a simulated fit fails, because there are too few votes for so many features.
    """
    if most_votes_per_pair < 1:
        raise ValueError(f"most_votes_per_pair={most_votes_per_pair} must be at least 1")

    # Doubled until they are enough, then halved in between: each try is a Fisher information of all pairs.
    too_few, enough = 0, 1
    while (errors := asymptotic_errors(population, Comparisons(pairs, enough))).precision.scale_error > scale_error:
        if enough == most_votes_per_pair:
            raise ValueError(
                f"{enough} votes on each of {len(pairs)} pairs leave log σ an error of "
                f"{errors.precision.scale_error:.3f}, more than scale_error={scale_error}; take more pairs, or fewer "
                "features"
            )
        too_few, enough = enough, min(2 * enough, most_votes_per_pair)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        candidate = asymptotic_errors(population, Comparisons(pairs, middle))
        if candidate.precision.scale_error > scale_error:
            too_few = middle
        else:
            enough, errors = middle, candidate
    simulated = []
    for repeat in range(simulations):
        votes = vote(population, pairs, enough, seed=seed + repeat)
        fit = fit_linear(
            population.features,
            votes,
            population.noise_family,
            with_location_error=errors.location_error is not None,
        )
        simulated.append(measured_precision(population, fit))
    return Plan(enough, enough * len(pairs), errors.precision, simulated)
