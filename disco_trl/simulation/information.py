"""What judgements can teach: their Fisher information, and the errors that no method can beat.

The model is linear in the features of a text, as in `disco_trl.simulation.planning`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import spearmanr

from ..distributions.reward_distribution import get_family
from .population import Population
from .questions import DRAWS, MOST_ENUMERATED, Comparisons, Ratings, all_answers, rewards_of


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
        location, scale = (torch.tensor(array)[items].requires_grad_() for array in (self.seen, self.scale))
        extras = {
            name: torch.tensor(self.extras[name])[:, None].expand(-1, len(items)).clone().requires_grad_()
            for name in question.extras
        }
        error = None
        if self.unseen_std is not None:
            error = torch.full((len(items),), self.unseen_std, dtype=torch.float64, requires_grad=True)
        # Without a shared error, k people are k times as informative as one.
        people = 1 if error is None else question.people
        design = torch.tensor(self.inputs)[items]  # (n, S, r)
        information = torch.zeros(self.count, self.count, dtype=torch.float64)
        for counts, log_weight in self._answers(question, people, seed):
            log_prob = question.log_probs(rewards_of(location, scale, self.family, error), counts, extras)
            leaves = [location, scale, *([] if error is None else [error]), *extras.values()]
            by_location, by_scale, *by_others = torch.autograd.grad(log_prob.sum(), leaves)
            slopes = torch.zeros(len(items), self.count, dtype=torch.float64)
            slopes[:, self.at["location"]] = torch.einsum("ns,nsr->nr", by_location, design)
            slopes[:, self.at["scale"]] = torch.einsum("ns,nsr->nr", by_scale * scale.detach(), design)
            if error is not None:
                slopes[:, self.at["location_error"]] = by_others.pop(0)[:, None]
            for name, slope in zip(extras, by_others, strict=True):
                slopes[:, self.at[name]] = slope.T
            half = log_weight / 2 if log_weight.ndim else (log_weight + log_prob.detach()) / 2
            weighted = torch.exp(half)[:, None] * slopes
            information += weighted.T @ weighted
        return information.numpy() * question.people / people

    def _answers(self, question: Comparisons | Ratings, people: int, seed: int):
        """
        Counts of answers `(n, C)`, each with the logarithm of its weight: `()` if the probability is to be multiplied
        by it, `(n,)` if the counts have been drawn with that probability.
        """
        count = len(question.items)
        if math.comb(people + question.answers - 1, people) <= MOST_ENUMERATED:
            for counts, log_orders in all_answers(people, question.answers):
                yield torch.tensor(counts, dtype=torch.float64).expand(count, -1), torch.tensor(log_orders)
            return
        rng = np.random.default_rng(seed)
        extras = {name: torch.tensor(self.extras[name]) for name in question.extras}
        ones = torch.eye(question.answers, dtype=torch.float64)
        scale = torch.tensor(self.scale)[question.items]
        for _ in range(DRAWS):
            shared = rng.standard_normal(question.items.shape) * (self.unseen_std or 0.0)
            rewards = rewards_of(torch.tensor(self.seen[question.items] + shared), scale, self.family, None)
            probs = [question.log_probs(rewards, one.expand(count, -1), extras).exp().numpy() for one in ones]
            drawn = rng.multinomial(people, np.stack(probs, axis=1) / np.sum(probs, axis=0)[:, None])
            yield torch.tensor(drawn, dtype=torch.float64), torch.full((count,), -math.log(DRAWS), dtype=torch.float64)

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
                location_spearman=float(np.mean([spearmanr(one, self.location).statistic for one in locations.T])),
                scale_spearman=float(np.mean([spearmanr(one, log_scale).statistic for one in log_scales.T])),
            ),
        )


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
