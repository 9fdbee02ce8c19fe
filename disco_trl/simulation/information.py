"""What judgements can teach: their Fisher information, and the errors that no method can beat.

The model is linear in the features of a text, as in `disco_trl.simulation.planning`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from scipy.special import logsumexp
from scipy.stats import rankdata

from ..distributions.reward_distribution import get_family
from .population import Population
from .questions import DRAWS, MOST_ENUMERATED, Comparisons, Ratings, all_answers, rewards_of


NODES = 21
"""Nodes of the integral over a shared error."""


class Basis:
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


@cache
def _normal_rule() -> tuple[np.ndarray, np.ndarray]:
    """
    Nodes and logarithms of weights of Gauss–Hermite quadrature about a standard normal.

    Here τ is about as large as the scales, and few people judge an item: there is no need for the cuts of
    `disco_trl.distributions.quadrature`, which an integral without such bounds takes.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
    return nodes, np.log(weights / weights.sum())


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
            What to expect of a fit overall. With a prior, this includes what the prior draws the estimate away from
            the truth.
    """

    location: np.ndarray
    log_scale: np.ndarray
    location_error: float | None
    precision: Precision


class Truth:
    """
    The truth about a population in the gauge of a fit, and what its features explain of it.

    Args:
        population ([`Population`]):
            The truth about N texts. The family of the model is that of the noise.
        asked (`Sequence[Comparisons | Ratings]`):
            Questions, of which the extras are used (tie width, boundaries, thresholds).

    Raises:
        `ValueError`: If questions differ in what they have to share, such as the width of the tie band.
    """

    def __init__(self, population: Population, asked: Sequence[Comparisons | Ratings]):
        self.family = population.noise_family
        self.inputs = Basis(population.features)(population.features)
        rank = self.inputs.shape[1]
        self.unit = get_family(self.family).unit_scale / np.exp(np.log(population.scale).mean())
        self.location = (population.location - population.location.mean()) * self.unit
        self.scale = population.scale * self.unit
        # (The basis is orthogonal, of variance 1.)
        self.seen = self.inputs @ (self.inputs.T @ self.location) / len(self.location)
        self.log_scale_weight = self.inputs.T @ np.log(self.scale) / len(self.location)
        unseen = float(np.std(self.location - self.seen))
        self.unseen_std = unseen if unseen > 1e-6 * float(np.std(self.location)) else None
        self.extras: dict[str, np.ndarray] = {}
        for question in asked:
            for name, value in question.extras.items():
                if len(known := self.extras.setdefault(name, value)) != len(value) or (known != value).any():
                    raise ValueError(f"questions with different {name}, {known} and {value}, have no one answer")
        sizes = {"location": rank, "scale": rank, "location_error": int(self.unseen_std is not None)}
        sizes |= {name: len(value) for name, value in self.extras.items()}
        ends = np.cumsum([*sizes.values()]).tolist()
        # Where the parameters are: weights of location and log scale, τ, and what the questions depend on
        self.at = {name: slice(end - size, end) for (name, size), end in zip(sizes.items(), ends, strict=True)}
        self.count = ends[-1]
        shift = {"thresholds": population.location.mean()}
        self.extras = {name: (value - shift.get(name, 0.0)) * self.unit for name, value in self.extras.items()}

    def information(self, question: Comparisons | Ratings, seed: int = 0) -> np.ndarray:
        """
        Evaluates the Fisher information in the answers to a question about all its items.

        That is the sum over items, and over all ways in which people may answer, of their probability times the outer
        product of the slopes of its logarithm. Of very many ways, random ones are averaged.

        Args:
            question ([`Comparisons`] or [`Ratings`]):
                What is asked.
            seed (`int`, *optional*, defaults to `0`):
                Seed of the random ways.

        Returns:
            `numpy.ndarray` of shape `(count, count)`: For the parameters in the order of `at`.
        """
        items = question.items
        count, sides = items.shape
        # Without a shared error, k people are k times as informative as one.
        people, nodes, log_weights = 1, np.zeros(1), np.zeros(1)
        if self.unseen_std is not None:
            people, (nodes, log_weights) = question.people, _normal_rule()
        # At each node of the shared error, an item of its own: Q * n in all. The errors of both sides of a pair are
        # one of the first, as only their difference counts.
        location = np.tile(self.seen[items], (len(nodes), 1, 1))
        shift = nodes * math.sqrt(sides)
        location[..., 0] += (shift * (self.unseen_std or 0.0))[:, None]
        leaves = [
            torch.tensor(array).flatten(0, 1) for array in (location, np.tile(self.scale[items], (len(nodes), 1, 1)))
        ]
        extras = {
            name: torch.tensor(self.extras[name])[:, None].repeat(1, len(nodes) * count) for name in question.extras
        }
        leaves = [leaf.requires_grad_() for leaf in (*leaves, *extras.values())]
        rewards = rewards_of(leaves[0], leaves[1], self.family, None)
        log_probs, slopes = [], []  # of each answer: (Q, n) and (Q, n, parameters)
        design = self.inputs[items]  # (n, S, r)
        for one in torch.eye(question.answers, dtype=torch.float64):
            log_prob = question.log_probs(rewards, one.expand(len(leaves[0]), -1), extras)
            found = torch.autograd.grad(log_prob.sum(), leaves)
            by_location, by_scale = (slope.numpy().reshape(len(nodes), count, sides) for slope in found[:2])
            slope = np.zeros((len(nodes), count, self.count))
            slope[..., self.at["location"]] = np.einsum("qns,nsr->qnr", by_location, design)
            slope[..., self.at["scale"]] = np.einsum("qns,nsr->qnr", by_scale * self.scale[items], design)
            if self.unseen_std is not None:
                slope[..., self.at["location_error"]] = by_location[..., :1] * shift[:, None, None]
            for name, of_extra in zip(extras, found[2:], strict=True):
                slope[..., self.at[name]] = of_extra.numpy().T.reshape(len(nodes), count, -1)
            log_probs.append(log_prob.detach().numpy().reshape(len(nodes), count))
            slopes.append(slope)
        table, gradient = np.stack(log_probs, axis=-1), np.stack(slopes, axis=2)  # (Q, n, C), (Q, n, C, parameters)

        information = np.zeros((self.count, self.count))
        for counts, log_orders in self._answers(table, log_weights, people, seed):
            terms = log_weights[:, None] + (table * counts).sum(axis=-1)
            log_prob = logsumexp(terms, axis=0)
            posterior = np.exp(terms - log_prob)  # of the error given the answers, (Q, n)
            slope = np.einsum(
                "qn,nc,qncp->np", posterior, np.broadcast_to(counts, table.shape[1:]), gradient, optimize=True
            )
            # Answers that were drawn come as often as they are probable.
            weight = np.full(count, 1 / DRAWS) if log_orders is None else np.exp(log_orders + log_prob)
            information += (weight[:, None] * slope).T @ slope
        return information * question.people / people

    @staticmethod
    def _answers(
        table: np.ndarray, log_weights: np.ndarray, people: int, seed: int
    ) -> Iterator[tuple[np.ndarray, float | None]]:
        """
        How many people give each answer: all that is possible, `(C,)`, with the logarithm of the number of orders, or
        where that is very much what is drawn for each item, `(n, C)`.
        """
        _, count, answers = table.shape
        if math.comb(people + answers - 1, people) <= MOST_ENUMERATED:
            yield from all_answers(people, answers)
            return
        rng = np.random.default_rng(seed)
        for _ in range(DRAWS):
            node = rng.choice(len(log_weights), count, p=np.exp(log_weights))
            probs = np.exp(table[node, np.arange(count)])
            yield rng.multinomial(people, probs / probs.sum(axis=1, keepdims=True)), None

    def errors(self, information: np.ndarray, log_scale_std: float | None = None, seed: int = 0) -> AsymptoticErrors:
        """
        Evaluates the errors of an efficient fit from the information in all answers, as in [`asymptotic_errors`].

        Raises:
            `ValueError`: If the answers do not determine the parameters at all.
        """
        rank = self.inputs.shape[1]
        prior = np.zeros(self.count)
        if log_scale_std is not None:
            prior[self.at["scale"]] = rank / log_scale_std**2
            if self.unseen_std is not None:
                prior[self.at["location_error"]] = self.unseen_std**-2
        eigenvalues, directions = np.linalg.eigh(information + np.diag(prior))
        if eigenvalues[0] <= 1e-9 * eigenvalues[-1]:
            raise ValueError(
                f"these judgements do not determine {self.count} parameters, however many they are; take more pairs, "
                "or fewer features"
            )
        root = directions / np.sqrt(eigenvalues)  # root @ root.T is the covariance of the truth given the answers
        bias = np.zeros(self.count)
        if log_scale_std is not None:
            covariance = root @ root.T
            bias[self.at["scale"]] = self.log_scale_weight
            bias = -covariance @ (prior * bias)
            # Of the estimate given the truth, which the prior draws nearer to zero and makes vary less
            eigenvalues, directions = np.linalg.eigh(covariance @ information @ covariance)
            root = directions * np.sqrt(eigenvalues.clip(0))
        draws = bias[:, None] + root @ np.random.default_rng(seed).standard_normal((self.count, 100))
        log_scale = np.log(self.scale)
        locations = self.seen[:, None] + self.inputs @ draws[self.at["location"]]
        log_scales = log_scale[:, None] + self.inputs @ draws[self.at["scale"]]
        spread = self.inputs @ root[self.at["scale"]]
        squared = (self.inputs @ bias[self.at["scale"]]) ** 2 + np.sum(spread**2, axis=1)
        return AsymptoticErrors(
            location=np.linalg.norm(self.inputs @ root[self.at["location"]], axis=1),
            log_scale=np.linalg.norm(spread, axis=1),
            location_error=float(np.linalg.norm(root[self.at["location_error"]])) if self.unseen_std else None,
            precision=Precision(
                scale_error=float(np.sqrt(np.mean(squared))),
                location_spearman=_mean_spearman(locations, self.location),
                scale_spearman=_mean_spearman(log_scales, log_scale),
            ),
        )


def _mean_spearman(draws: np.ndarray, truth: np.ndarray) -> float:
    """Mean rank correlation of draws `(N, M)` with the truth `(N,)`; nan where the truth is one number."""
    ranks, true = (rankdata(values, axis=0) - (len(truth) + 1) / 2 for values in (draws, truth))
    norm = np.linalg.norm(ranks, axis=0) * np.linalg.norm(true)
    return float(np.mean(true @ ranks / norm)) if true.any() else math.nan


def asymptotic_errors(
    population: Population, *asked: Comparisons | Ratings, log_scale_std: float | None = None, seed: int = 0
) -> AsymptoticErrors:
    """
    Evaluates the errors that a linear fit to judgements is expected to make, from their Fisher information.

    What the features do not explain of the true locations counts as the model's own error τ, which is learned as well.
    The errors are sampling errors alone, of a model whose form is right. If it is not (the scales of [`camps`] and
    [`tastes`] are not log-linear in the features), a fit stays further from the truth, however many votes there are.

    Args:
        population ([`Population`]):
            The truth about N texts. The family of the model is that of the noise.
        *asked ([`Comparisons`] or [`Ratings`]):
            What people are asked.
        log_scale_std (`float`, *optional*):
            As in [`~disco_trl.simulation.planning.fit_linear`]; without it, there is no prior.
        seed (`int`, *optional*, defaults to `0`):
            Seed of 100 draws of the errors, from which rank correlations are computed.

    Returns:
        [`AsymptoticErrors`]: For every text and overall.

    Raises:
        `ValueError`: If the judgements do not determine the parameters at all.
    """
    truth = Truth(population, asked)
    information = sum((truth.information(question, seed) for question in asked), np.zeros((truth.count, truth.count)))
    return truth.errors(information, log_scale_std, seed)
