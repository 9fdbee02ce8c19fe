"""How much votes reveal: exact fits of linear models in seconds, the error that no method can beat, and votes needed.

The model is the package's own, with given features in place of a language model's hidden states: location and log
scale are linear in the features of a text, the geometric mean of the scales is the family's unit (as in
`disco_trl.models.heads.ScaleHead`), and a location may have an error τ that all votes on a pair share. The likelihood
is the one that the trainer maximizes. With tens of features and tens of thousands of votes, its maximum can be found
to the last digit and its Fisher information written down. Both judge a setup before labels are paid for and a GPU is
rented: what fails here, where features and family are right, will not do better with a language model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.stats import spearmanr
from torch import Tensor

from ..distributions.judgements import Judgements
from ..distributions.likelihood import Responses, log_likelihood
from ..distributions.reward_distribution import RewardDistribution, get_family
from .judging import Votes, vote
from .population import Population


class _Basis:
    """
    The features' own coordinates: centred, uncorrelated, of variance 1, without directions in which nothing varies.

    In these coordinates the likelihood is well scaled, whatever the units of the features are.
    """

    def __init__(self, features: np.ndarray):
        self.mean = features.mean(axis=0)
        _, singular, directions = np.linalg.svd(features - self.mean, full_matrices=False)
        kept = singular > 1e-9 * singular.max(initial=0)
        if not kept.any():
            raise ValueError("the features are the same for every text, so that nothing can be inferred from them")
        self.axes = directions[kept].T * (math.sqrt(len(features)) / singular[kept])  # (D, r)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """From features `(N, D)` to coordinates `(N, r)`, with r the rank."""
        return (features - self.mean) @ self.axes


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
            δ, in reward units. If `None`, all votes were forced choices.
        nll (`float`):
            The mean of −log P of a vote, in nats.
    """

    location_weight: np.ndarray
    log_scale_weight: np.ndarray
    mean: np.ndarray
    unit_scale: float
    location_error: float | None
    tie_half_width: float | None
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
    features: ArrayLike, votes: Votes, family: str = "normal", *, with_location_error: bool = False
) -> LinearFit:
    """
    Fits the linear model under which the votes are most likely.

    Args:
        features (`ArrayLike` of shape `(N, D)`):
            Features of all texts.
        votes ([`Votes`]):
            Votes on pairs of texts. If people could call a pair a tie, the tie band is fitted too.
        family (`str`, *optional*, defaults to `"normal"`):
            A family without shape parameters.
        with_location_error (`bool`, *optional*, defaults to `False`):
            Whether to fit τ as well, the error of a location that the features do not explain. It takes several votes
            on a pair: with one, disagreement among people looks much the same.

    Returns:
        [`LinearFit`]: The maximum of the likelihood.

    Raises:
        `ValueError`: If nobody voted, or if the features are the same for every text.
        `RuntimeError`: If no maximum is found, because there are too few votes for so many features.
    """
    features = np.asarray(features, dtype=float)
    count = int(votes.wins.sum() + votes.losses.sum() + votes.ties.sum())
    if not count:
        raise ValueError("there are no votes to fit to")
    basis, unit = _Basis(features), get_family(family).unit_scale
    inputs = torch.tensor(basis(features))
    rank = inputs.shape[1]
    # τ and δ, where there are any, by their logarithms, which are free to be any number
    extras = torch.full((with_location_error + (not votes.forced),), math.log(unit / 2), dtype=torch.float64)
    parameters = torch.cat([torch.zeros(2 * rank, dtype=torch.float64), extras]).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [parameters], max_iter=1000, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        location, log_scale = inputs @ parameters[:rank], inputs @ parameters[rank : 2 * rank]
        error = parameters[2 * rank].exp() if with_location_error else None
        tie_width = None if votes.forced else parameters[-1].exp()
        pairs = torch.tensor(votes.pairs)
        log_probs = _log_probs(family, location[pairs], unit * log_scale.exp()[pairs], error, votes, tie_width)
        value = -log_probs.sum() / count
        value.backward()
        return value

    optimizer.step(loss)
    nll = loss().item()
    solution = parameters.detach().numpy()
    gradient = np.inf if parameters.grad is None else parameters.grad.abs().max().item()
    location_weight, log_scale_weight = basis.axes @ solution[:rank], basis.axes @ solution[rank : 2 * rank]
    # Where the features separate the votes, the maximum lies at infinity, on the way to which gradients vanish too.
    steepest = np.abs((features - basis.mean) @ log_scale_weight).max()
    if not gradient < 1e-5 or nll < 1e-6 or steepest > math.log(1e3):
        raise RuntimeError(
            f"no maximum was found for {count} votes and {rank} features (gradient {gradient:.1e}): that is too few "
            "votes; simulate more, or reduce the features, for instance to their leading principal components"
        )
    return LinearFit(
        location_weight=location_weight,
        log_scale_weight=log_scale_weight,
        mean=basis.mean,
        unit_scale=unit,
        location_error=math.exp(solution[2 * rank]) if with_location_error else None,
        tie_half_width=None if votes.forced else math.exp(solution[-1]),
        nll=nll,
    )


def _log_probs(
    family: str,
    location: Tensor,
    scale: Tensor,
    location_error: Tensor | None,
    votes: Votes,
    tie_width: Tensor | None = None,
) -> Tensor:
    """Evaluates log P of the votes on each pair, `(P,)`, from locations and scales of both sides, `(P, 2)` each."""
    first, second = (
        RewardDistribution(
            location[:, side],
            scale[:, side],
            family,
            location_error=None if location_error is None else location_error.expand(len(location)),
        )
        for side in (0, 1)
    )
    zeros = torch.zeros(len(location), dtype=torch.float64)
    judgements = Judgements(
        wins=zeros + torch.tensor(votes.wins),
        losses=zeros + torch.tensor(votes.losses),
        ties=zeros + torch.tensor(votes.ties),
        tie_allowed=zeros if votes.forced else zeros + 1,
        margin=zeros,
        weight=zeros + 1,
    )
    return log_likelihood(first, second, judgements, Responses(tie_width=tie_width))


# What can be expected of a fit


@dataclass(frozen=True)
class Precision:
    """
    How far a fit is, or is expected to be, from the truth.

    Args:
        scale_error (`float`):
            Root mean square over texts of the error of log σ; 0.1 is about 10 % of σ. The unit of reward is not part
            of it: the geometric mean of all scales is taken to be right.
        location_spearman, scale_spearman (`float`):
            Rank correlations over texts between fit and truth.
    """

    scale_error: float
    location_spearman: float
    scale_spearman: float


def measured_precision(population: Population, fit: LinearFit) -> Precision:
    """Compares a fit with the population's true locations and scales."""
    location, scale = fit.predict(population.features)
    return Precision(
        scale_error=float(np.std(np.log(scale / population.scale))),
        location_spearman=float(spearmanr(location, population.location).statistic),
        scale_spearman=float(spearmanr(scale, population.scale).statistic),
    )


@dataclass(frozen=True)
class AsymptoticErrors:
    """
    The standard errors of an efficient fit: the Cramér–Rao bound, which maximum likelihood reaches with many votes.

    Args:
        location (`numpy.ndarray` of shape `(N,)`):
            Those of the locations, in the gauge in which the geometric mean of the scales is the family's unit.
        log_scale (`numpy.ndarray` of shape `(N,)`):
            Those of log σ.
        location_error (`float`, *optional*):
            That of τ, in the unit of the locations. If `None`, the features explain the locations in full.
        precision ([`Precision`]):
            What to expect of a fit overall.
    """

    location: np.ndarray
    log_scale: np.ndarray
    location_error: float | None
    precision: Precision


def asymptotic_errors(
    population: Population, pairs: np.ndarray, votes_per_pair: int = 1, seed: int = 0
) -> AsymptoticErrors:
    """
    Evaluates the errors that a linear fit to votes on these pairs is expected to make, from its Fisher information.

    What the features do not explain of the true locations counts as the model's own error τ, which is learned as well.
    The errors are sampling errors alone, of a model whose form is right. If it is not (the scales of [`camps`] and
    [`tastes`] are not log-linear in the features), a fit stays further from the truth, however many votes there are.

    Args:
        population ([`Population`]):
            The truth about N texts. The family of the model is that of the noise.
        pairs (`numpy.ndarray` of shape `(P, 2)`):
            Indices of texts.
        votes_per_pair (`int`, *optional*, defaults to `1`):
            The number of forced choices for each pair.
        seed (`int`, *optional*, defaults to `0`):
            Seed of 100 draws of the errors, from which rank correlations are computed.

    Returns:
        [`AsymptoticErrors`]: For every text and overall.

    Raises:
        `ValueError`: If the pairs do not determine the parameters at all.
    """
    pairs, basis, family = np.asarray(pairs), _Basis(population.features), population.noise_family
    inputs = basis(population.features)
    rank = inputs.shape[1]
    # The truth in the gauge of the fit, and what the features explain of it (the basis is orthogonal, of variance 1)
    unit = get_family(family).unit_scale / np.exp(np.log(population.scale).mean())
    location, scale = (population.location - population.location.mean()) * unit, population.scale * unit
    seen = inputs @ (inputs.T @ location) / len(location)
    unseen_std = float(np.std(location - seen))
    with_location_error = unseen_std > 1e-6 * float(np.std(location))

    # The sum over all outcomes, `wins` of k votes, of P times the outer product of the slopes of log P
    locations, scales = (torch.tensor(array)[pairs].requires_grad_() for array in (seen, scale))
    errors = [torch.full((len(pairs),), unseen_std, dtype=torch.float64, requires_grad=True)] * with_location_error
    count = 2 * rank + with_location_error
    information = torch.zeros(count, count, dtype=torch.float64)
    design = torch.tensor(inputs)[pairs]  # (P, 2, r)
    k = votes_per_pair if with_location_error else 1  # without a shared error, k votes are k times as informative
    for wins in range(k + 1):
        won, lost, tied = (np.full(len(pairs), number) for number in (wins, k - wins, 0))
        votes = Votes(pairs, won, lost, tied, forced=True)
        log_prob = _log_probs(family, locations, scales, errors[0] if errors else None, votes)
        by_location, by_scale, *by_error = torch.autograd.grad(log_prob.sum(), [locations, scales, *errors])
        slopes = torch.cat(
            [
                torch.einsum("ps,psr->pr", by_location, design),
                torch.einsum("ps,psr->pr", by_scale * scales.detach(), design),
                *(slope[:, None] for slope in by_error),
            ],
            dim=1,
        )
        weighted = torch.exp((math.log(math.comb(k, wins)) + log_prob.detach()) / 2)[:, None] * slopes
        information += weighted.T @ weighted
    information *= votes_per_pair / k

    eigenvalues, directions = np.linalg.eigh(information.numpy())
    if eigenvalues[0] <= 1e-9 * eigenvalues[-1]:
        raise ValueError(
            f"votes on these {len(pairs)} pairs do not determine {count} parameters, however many they are; take more "
            "pairs, or fewer features"
        )
    root = directions / np.sqrt(eigenvalues)  # root @ root.T is the covariance
    location_root, log_scale_root = inputs @ root[:rank], inputs @ root[rank : 2 * rank]
    draws = np.random.default_rng(seed).standard_normal((100, count))
    location_spearman = np.mean([spearmanr(seen + location_root @ draw, location).statistic for draw in draws])
    scale_spearman = np.mean([spearmanr(np.log(scale) + log_scale_root @ draw, scale).statistic for draw in draws])
    log_scale_error = np.linalg.norm(log_scale_root, axis=1)
    return AsymptoticErrors(
        location=np.linalg.norm(location_root, axis=1),
        log_scale=log_scale_error,
        location_error=float(np.linalg.norm(root[-1])) if with_location_error else None,
        precision=Precision(
            float(np.sqrt(np.mean(log_scale_error**2))), float(location_spearman), float(scale_spearman)
        ),
    )


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
    while (errors := asymptotic_errors(population, pairs, enough)).precision.scale_error > scale_error:
        if enough == most_votes_per_pair:
            raise ValueError(
                f"{enough} votes on each of {len(pairs)} pairs leave log σ an error of "
                f"{errors.precision.scale_error:.3f}, more than scale_error={scale_error}; take more pairs, or fewer "
                "features"
            )
        too_few, enough = enough, min(2 * enough, most_votes_per_pair)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        candidate = asymptotic_errors(population, pairs, middle)
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
