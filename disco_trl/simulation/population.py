"""Worlds whose truth is known: people who judge texts, and whose disagreement is given.

Real data never say what the scale of a reward should have been. Here it is known. A [`Population`] consists of groups
of people, each with its own opinion of every text and noise about it, from which the location and the scale of each
text's reward follow. `disco_trl.simulation.judging` lets these people vote and rate, and
`disco_trl.simulation.planning` says how much such judgements reveal, and how many are enough.

All arrays are NumPy's: `(N,)` for N texts, `(N, D)` for their features, `(P, 2)` for pairs of indices of texts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike

from ..distributions.families import FAMILIES
from ..distributions.reward_distribution import RewardDistribution


LEVELS = ("not at all", "slightly", "fairly", "very", "extremely")
TRAITS = (
    *("clear", "polite", "brief", "formal", "funny", "cautious", "vivid", "technical", "warm", "direct", "modest"),
    *("concrete", "bold", "patient", "playful", "precise", "friendly", "serious", "original", "balanced", "practical"),
    *("cheerful", "careful", "dramatic", "simple", "detailed", "honest", "gentle", "ironic", "hopeful", "strict"),
    "curious",
)


# Texts


def trait_texts(count: int, traits: int = 8, seed: int = 0) -> tuple[list[str], np.ndarray]:
    """
    Makes synthetic texts that say in words what their features are, for a language model to learn from.

    Each trait has one of five levels, drawn evenly, and the text names them all: "very clear, not at all polite, ...".
    The features are these levels and nothing else, so that all there is to know about a text can be read in it.

    Args:
        count (`int`):
            The number of texts, N.
        traits (`int`, *optional*, defaults to `8`):
            The number of features, D, at most 32.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the levels.

    Returns:
        `tuple[list[str], numpy.ndarray]`: The texts, and their features `(N, D)`, of mean 0 and variance 1 in
        expectation.

    Raises:
        `ValueError`: If there are no names for so many traits.
    """
    if not 1 <= traits <= len(TRAITS):
        raise ValueError(f"traits={traits} must lie between 1 and {len(TRAITS)}, the number of traits with a name")
    levels = np.random.default_rng(seed).integers(0, len(LEVELS), (count, traits))
    texts = [
        "This answer is " + ", ".join(f"{LEVELS[level]} {trait}" for level, trait in zip(row, TRAITS, strict=False))
        for row in levels
    ]
    return texts, (levels - 2) / math.sqrt(2)


# Populations


@dataclass(frozen=True)
class Population:
    """
    People who judge N texts, in G groups that each hold one opinion.

    The reward of text i at one reading by someone of group g is `opinions[g, i] + noise[i] · ε`, with ε of
    `noise_family`. One group with its noise is a location-scale family itself, two groups are camps, and hundreds are
    persons, each with a taste.

    Args:
        features (`numpy.ndarray` of shape `(N, D)`):
            What a linear model may know about the texts.
        opinions (`numpy.ndarray` of shape `(G, N)`):
            Each group's opinion of each text, in reward units.
        share (`numpy.ndarray` of shape `(G,)`):
            The share of each group in the population. The shares sum to 1.
        noise (`numpy.ndarray` of shape `(N,)`):
            Positive scales of the noise, in reward units.
        noise_family (`str`, *optional*, defaults to `"normal"`):
            A family without shape parameters that is a distribution and not a link. With several groups, only
            `"normal"`.
        texts (`Sequence[str]`, *optional*):
            N texts. If `None`, there are arrays alone and no rows can be made.

    Raises:
        `ValueError`: If sizes do not match, or if noise, shares or the family are out of their domain.
    """

    features: np.ndarray
    opinions: np.ndarray
    share: np.ndarray
    noise: np.ndarray
    noise_family: str = "normal"
    texts: Sequence[str] | None = None

    def __post_init__(self) -> None:
        groups, count = self.opinions.shape
        for name, size in {"features": count, "noise": count, "share": groups, "texts": count}.items():
            value = getattr(self, name)
            if value is not None and len(value) != size:
                raise ValueError(f"{name} has {len(value)} rows where opinions {self.opinions.shape} ask for {size}")
        # Of a link nobody could draw rewards that win as often as it says; a shape the population does not have.
        drawable = [name for name, family in FAMILIES.items() if not (family.is_link or family.shape_names)]
        if self.noise_family not in drawable:
            raise ValueError(
                f"noise_family={self.noise_family!r} is no distribution of a reward; choose one of "
                f"{', '.join(map(repr, drawable))}"
            )
        if groups > 1 and self.noise_family != "normal":
            raise ValueError(
                f"{groups} groups with {self.noise_family!r} noise are of no family with a scale; use 'normal' noise"
            )
        if not (np.isfinite(self.noise) & (self.noise > 0)).all():
            raise ValueError("noise must be positive and finite for every text")
        if (self.share < 0).any() or not math.isclose(self.share.sum(), 1, rel_tol=1e-9):
            raise ValueError(f"share must hold parts of 1, got {self.share.tolist()[:5]} with sum {self.share.sum()}")

    def __len__(self) -> int:
        return len(self.noise)

    @property
    def location(self) -> np.ndarray:
        """The mean opinion `(N,)`, which is the mean reward (for Cauchy noise, which has no mean, the median)."""
        return self.share @ self.opinions

    @property
    def scale(self) -> np.ndarray:
        """For one group the scale of its noise, as the family means it; for several the standard deviation. `(N,)`."""
        return np.hypot(self.noise, self.division)

    @property
    def division(self) -> np.ndarray:
        """The standard deviation of opinions between groups, `(N,)`. Over `scale` it is the polarization of a text."""
        return np.sqrt(self.share @ (self.opinions - self.location) ** 2)

    @property
    def family(self) -> str:
        """The family of the rewards: that of the noise for one group, a mixture for two, about normal for many."""
        return {1: self.noise_family, 2: "mixture"}.get(len(self.share), "normal")

    def draw_groups(self, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
        """Draws people at random; returns their groups, integers of the given shape."""
        return rng.choice(len(self.share), size=shape, p=self.share)

    def draw(self, texts: np.ndarray, groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """
        Draws rewards.

        Args:
            texts, groups (`numpy.ndarray`):
                Indices of texts, and of the groups of those who read them, of any shapes that broadcast.
            rng (`numpy.random.Generator`):
                Source of randomness.

        Returns:
            `numpy.ndarray` of the broadcast shape: One reward for each reading.
        """
        location, scale = np.broadcast_arrays(self.opinions[groups, texts], self.noise[texts])
        generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
        rewards = RewardDistribution(torch.tensor(location), torch.tensor(scale), self.noise_family)
        return rewards.sample(generator=generator).numpy()

    def prob_greater(self, pairs: np.ndarray, same_annotator: bool = False) -> np.ndarray:
        """
        Evaluates P(first ≻ second) for each pair, exactly, by summing over groups.

        Args:
            pairs (`numpy.ndarray` of shape `(P, 2)`):
                Indices of texts.
            same_annotator (`bool`, *optional*, defaults to `False`):
                Whether one person judges both sides, rather than a person each. Reward models take rewards to be
                independent across answers; people who read both sides bring one taste to both.

        Returns:
            `numpy.ndarray` of shape `(P,)`: Probabilities.
        """
        pairs = np.asarray(pairs)
        groups = np.arange(len(self.share))
        ours, theirs = (groups, groups) if same_annotator else (array.ravel() for array in np.meshgrid(groups, groups))
        weight = self.share if same_annotator else self.share[ours] * self.share[theirs]
        probs = np.empty(len(pairs))
        # Persons meet persons: 100 of them are 10,000 terms for a pair, so that memory holds a part of the pairs.
        for part in np.array_split(np.arange(len(pairs)), max(1, len(pairs) * len(weight) // 2**20)):
            first, second = (
                RewardDistribution(
                    torch.tensor(self.opinions[group[:, None], texts]),
                    torch.tensor(self.noise[texts]),
                    self.noise_family,
                )
                for group, texts in zip((ours, theirs), pairs[part].T, strict=True)
            )
            probs[part] = weight @ first.prob_greater(second).numpy()
        return probs


def heteroscedastic(
    features: ArrayLike,
    *,
    log_scale_std: float = 0.5,
    family: str = "normal",
    unseen_std: float = 0.0,
    texts: Sequence[str] | None = None,
    seed: int = 0,
) -> Population:
    """
    Makes people of one opinion who are surer about some texts than about others.

    Location and log scale are linear in the features, in directions drawn at random: over standard normal features
    μ ~ N(0, 1) and log σ ~ N(0, `log_scale_std`²).

    Args:
        features (`ArrayLike` of shape `(N, D)`):
            Features of the texts.
        log_scale_std (`float`, *optional*, defaults to `0.5`):
            How much the scales differ; 0 gives a scale of 1 everywhere.
        family (`str`, *optional*, defaults to `"normal"`):
            Family of the noise.
        unseen_std (`float`, *optional*, defaults to `0.0`):
            Standard deviation of a further part of each location that the features do not reveal: the error that a
            model of these features is bound to make.
        texts (`Sequence[str]`, *optional*):
            N texts.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the directions and of the unseen part.

    Returns:
        [`Population`]: One group.
    """
    features, rng = _as_features(features), np.random.default_rng(seed)
    location, log_scale = features @ _direction(features, rng), features @ _direction(features, rng) * log_scale_std
    location = location + unseen_std * rng.standard_normal(len(features))
    return Population(features, location[None], np.ones(1), np.exp(log_scale), family, texts)


def tastes(
    features: ArrayLike,
    *,
    annotators: int = 100,
    taste_std: float = 1.0,
    noise: float = 0.5,
    texts: Sequence[str] | None = None,
    seed: int = 0,
) -> Population:
    """
    Makes persons who each weigh the features in their own way.

    The weights are normal: their mean gives each text its location, and their covariance and the noise give it its
    scale. Some features are more disputed than others. Location and scale are those of the persons drawn, not of all
    there could be. The variance is quadratic in the features. A model that has the features alone cannot express it;
    one that has their squares can, because a person's weights are independent of each other.

    Args:
        features (`ArrayLike` of shape `(N, D)`):
            Features of the texts.
        annotators (`int`, *optional*, defaults to `100`):
            The number of persons, G.
        taste_std (`float`, *optional*, defaults to `1.0`):
            Root mean square, over standard normal features, of what persons differ by; that of the locations is 1.
        noise (`float`, *optional*, defaults to `0.5`):
            Standard deviation of one person's reward of one text from reading to reading.
        texts (`Sequence[str]`, *optional*):
            N texts.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the tastes.

    Returns:
        [`Population`]: One group for each person.
    """
    features, rng = _as_features(features), np.random.default_rng(seed)
    mean = _direction(features, rng)
    dispute = np.exp(rng.standard_normal(features.shape[1]))
    dispute *= taste_std / np.linalg.norm(dispute)
    weights = mean + dispute * rng.standard_normal((annotators, features.shape[1]))
    share = np.full(annotators, 1 / annotators)
    return Population(features, weights @ features.T, share, np.full(len(features), noise), texts=texts)


def camps(
    features: ArrayLike,
    *,
    share: float = 0.5,
    division_std: float = 1.0,
    noise: float = 0.5,
    texts: Sequence[str] | None = None,
    seed: int = 0,
) -> Population:
    """
    Makes two opposed groups: what one adds to the common opinion of a text, the other subtracts.

    The variance is the square of something linear in the features, plus noise, so that a model needs their products to
    express it.

    Args:
        features (`ArrayLike` of shape `(N, D)`):
            Features of the texts.
        share (`float`, *optional*, defaults to `0.5`):
            The share of the first group in the population.
        division_std (`float`, *optional*, defaults to `1.0`):
            Standard deviation, over standard normal features, of what is added; that of the common opinion is 1.
        noise (`float`, *optional*, defaults to `0.5`):
            Standard deviation within a group.
        texts (`Sequence[str]`, *optional*):
            N texts.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the common and the opposed opinions.

    Returns:
        [`Population`]: Two groups.
    """
    features, rng = _as_features(features), np.random.default_rng(seed)
    common, opposed = features @ _direction(features, rng), features @ _direction(features, rng) * division_std
    opinions = np.stack([common + opposed, common - opposed])
    return Population(features, opinions, np.array([share, 1 - share]), np.full(len(features), noise), texts=texts)


def _as_features(features: ArrayLike) -> np.ndarray:
    array = np.asarray(features, dtype=float)
    if array.ndim != 2 or not np.isfinite(array).all():
        raise ValueError(f"features must be finite numbers [texts, features], got shape {array.shape}")
    return array


def _direction(features: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    weights = rng.standard_normal((features.shape[1],))
    return weights / math.sqrt(weights @ weights)
