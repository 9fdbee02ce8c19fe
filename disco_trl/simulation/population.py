"""Worlds with known truth: people who judge texts, and whose disagreement is known.

Real data never say what the scale of a reward should have been. Here it is known. A :class:`Population` is a number of
groups of people, each with its own opinion of every text, and noise about it; location and scale of each text's reward
follow. From it come votes, ties, soft labels and ratings, as arrays and as rows of a dataset to train on.
`disco_trl.simulation.planning` says how much such judgements tell, and how many are enough.

Arrays are NumPy's, `[N]` for N texts, `[N, D]` for their features, `[P, 2]` for pairs of indices of texts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from ..distributions.reward_distribution import RewardDistribution


NOISE_FAMILIES = ("normal", "laplace", "cauchy")
"""Families that are distributions. The logistic one is a link: no rewards have its pairwise probabilities."""
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
    Synthetic texts that say in words what their features are, for a language model to learn from.

    Each trait has one of five levels, drawn evenly, and the text names them all: "very clear, not at all polite, ...".
    The features are these levels and nothing else, so that all there is to know about a text can be read in it.

    Args:
        count: number of texts, `N`.
        traits: number of features, `D`, at most 32.
        seed: of the levels.

    Returns:
        The texts, and their features `[N, D]`, of mean 0 and variance 1 in expectation.
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
    People who judge N texts, in G groups that each are of one opinion.

    The reward of text i at one reading by someone of group g is `opinions[g, i] + noise[i] · ε`, ε of `noise_family`.
    One group and its noise is a location-scale family itself; two are camps; hundreds are persons, each with a taste.

    Attributes:
        features: `[N, D]`, what a linear model may know of the texts.
        opinions: `[G, N]`, in reward units.
        share: `[G]`, how much of the population each group is; sums to 1.
        noise: `[N]`, positive, in reward units.
        noise_family: `"normal"`, `"laplace"` or `"cauchy"`; with several groups `"normal"`.
        texts: `N` strings, or None for arrays alone.
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
        if self.noise_family not in NOISE_FAMILIES:
            raise ValueError(
                f"noise_family={self.noise_family!r} is no distribution of a reward; choose one of "
                f"{', '.join(map(repr, NOISE_FAMILIES))}"
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
        """`[N]`: the mean opinion, which is the mean reward (of Cauchy noise, which has no mean, the median)."""
        return self.share @ self.opinions

    @property
    def scale(self) -> np.ndarray:
        """`[N]`: the scale of the noise for one group (as its family means it), for several the standard deviation."""
        return np.hypot(self.noise, self.division)

    @property
    def division(self) -> np.ndarray:
        """`[N]`: the standard deviation of opinions between groups. Over `scale` it is the polarization of a text."""
        return np.sqrt(self.share @ (self.opinions - self.location) ** 2)

    @property
    def family(self) -> str:
        """The family of rewards: of the noise for one group, a mixture for two, and near enough normal for many."""
        return {1: self.noise_family, 2: "mixture"}.get(len(self.share), "normal")

    def draw_groups(self, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
        """The groups of people drawn at random, an array of that shape."""
        return rng.choice(len(self.share), size=shape, p=self.share)

    def draw(self, texts: np.ndarray, groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Rewards of texts by people of the given groups, both indices, of the shape that they broadcast to."""
        location, scale = np.broadcast_arrays(self.opinions[groups, texts], self.noise[texts])
        generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
        rewards = RewardDistribution(torch.tensor(location), torch.tensor(scale), self.noise_family)
        return rewards.sample(generator=generator).numpy()

    def prob_greater(self, pairs: np.ndarray, same_annotator: bool = False) -> np.ndarray:
        """
        P(first ≻ second) for each pair, `[P]`, exactly, summed over groups.

        Args:
            pairs: indices of texts, `[P, 2]`.
            same_annotator: one person judges both sides, rather than a person each. Reward models take rewards to be
                independent across answers; people who read both sides bring one taste to both.
        """
        pairs = np.asarray(pairs)
        groups = np.arange(len(self.share))
        ours, theirs = (groups, groups) if same_annotator else (array.ravel() for array in np.meshgrid(groups, groups))
        weight = self.share if same_annotator else self.share[ours] * self.share[theirs]
        probs = np.empty(len(pairs))
        # Persons meet persons: 100 of them are 10,000 terms for a pair, and memory holds some pairs at a time.
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
    People of one opinion who are surer of some texts than of others; heavy-tailed for another `family`.

    Location and log scale are linear in the features, in directions drawn at random: over standard normal features
    μ ~ N(0, 1) and log σ ~ N(0, `log_scale_std`²).

    Args:
        features: `[N, D]`.
        log_scale_std: how differently sure they are; 0 for a scale of 1 everywhere.
        family: of the noise.
        unseen_std: standard deviation of a further part of each location that the features do not tell: the error that
            a model of these features is bound to make.
        texts: `N` strings.
        seed: of the directions and of what is unseen.
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
    Persons who each weigh the features in their own way.

    Weights are normal: their mean gives each text its location, their covariance and the noise its scale. Some
    features are more disputed than others. Location and scale are those of the persons drawn, not of all there could
    be. The variance is quadratic in the features: a model that has them alone cannot tell it, one with their squares
    can, as no person's weights go together.

    Args:
        features: `[N, D]`.
        annotators: number of persons, `G`.
        taste_std: root mean square over standard normal features of what persons differ by; the locations' is 1.
        noise: standard deviation of one person's reward of one text from reading to reading.
        texts: `N` strings.
        seed: of tastes.
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
    Two opposed groups: what one adds to the common opinion of a text, the other takes away.

    The variance is the square of something linear in the features, and noise: it takes their products to tell it.

    Args:
        features: `[N, D]`.
        share: the first group's part of the population.
        division_std: standard deviation over standard normal features of what is added; the common opinion's is 1.
        noise: standard deviation within a group.
        texts: `N` strings.
        seed: of common and opposed opinions.
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


# Pairs


def random_pairs(texts: int, pairs: int, seed: int = 0) -> np.ndarray:
    """Pairs of two different texts, each drawn evenly: indices `[pairs, 2]`."""
    if texts < 2:
        raise ValueError(f"texts={texts}: a pair takes two")
    rng = np.random.default_rng(seed)
    first, step = rng.integers(0, texts, pairs), rng.integers(1, texts, pairs)
    return np.stack([first, (first + step) % texts], axis=1)


def balanced_pairs(texts: int, pairs_per_text: int, seed: int = 0) -> np.ndarray:
    """Pairs in which every text occurs equally often: indices `[texts * pairs_per_text / 2, 2]`.

    Raises:
        ValueError: unless the number of texts is even.
    """
    if texts % 2:
        raise ValueError(f"texts={texts} is odd, so that one would be left over in every round; leave one out")
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.permutation(texts).reshape(-1, 2) for _ in range(pairs_per_text)])


# Judgements


@dataclass(frozen=True)
class Votes:
    """
    How often the first text of each pair won, lost and tied.

    Attributes:
        pairs: indices of texts, `[P, 2]`.
        wins, losses, ties: `[P]`.
        forced: whether nobody could have called a pair a tie.
    """

    pairs: np.ndarray
    wins: np.ndarray
    losses: np.ndarray
    ties: np.ndarray
    forced: bool

    def rows(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        """
        Rows of a preference dataset: `chosen` is what more voted for, with `chosen_votes` and `rejected_votes`.

        Where people could say that a pair was a tie, `tie` is there as well: false with the votes, and the ties of a
        pair are a row of their own, with their number for a `weight`.
        """
        rows: list[dict[str, Any]] = []
        for (first, second), wins, losses, ties in zip(self.pairs, self.wins, self.losses, self.ties, strict=True):
            sides = [(int(wins), texts[first]), (int(losses), texts[second])]
            (most, chosen), (least, rejected) = sides if wins >= losses else sides[::-1]
            row: dict[str, Any] = {"chosen": chosen, "rejected": rejected}
            if most:
                votes: dict[str, Any] = {"chosen_votes": most, "rejected_votes": least}
                rows.append(row | votes | ({} if self.forced else {"tie": False, "weight": 1.0}))
            if ties:
                rows.append(row | {"chosen_votes": 0, "rejected_votes": 0, "tie": True, "weight": float(ties)})
        return rows


def vote(
    population: Population,
    pairs: np.ndarray,
    votes_per_pair: int = 1,
    *,
    tie_half_width: float = 0.0,
    label_noise: float = 0.0,
    same_annotator: bool = False,
    seed: int = 0,
) -> Votes:
    """
    Let people vote on pairs: each draws a reward of either text and prefers the higher.

    Args:
        population: who votes, and on what.
        pairs: indices of texts, `[P, 2]`.
        votes_per_pair: people, drawn anew for every vote.
        tie_half_width: rewards nearer to each other than this are called a tie. 0: everybody has to choose.
        label_noise: part of the votes for either side that are recorded for the other.
        same_annotator: as for `Population.prob_greater`.
        seed: of people and rewards.

    Raises:
        ValueError: if an argument is out of its range, or a pair names a text that is not there.
    """
    pairs = np.asarray(pairs)
    if votes_per_pair < 1 or tie_half_width < 0 or not 0 <= label_noise < 0.5:
        raise ValueError(
            f"votes_per_pair={votes_per_pair} must be at least 1, tie_half_width={tie_half_width} at least 0, and "
            f"label_noise={label_noise} at least 0 and below 0.5"
        )
    if (
        pairs.ndim != 2
        or pairs.shape[1] != 2
        or (len(pairs) and not 0 <= pairs.min() <= pairs.max() < len(population))
    ):
        raise ValueError(f"pairs must be [P, 2] indices of the {len(population)} texts, got shape {pairs.shape}")
    rng = np.random.default_rng(seed)
    groups = population.draw_groups((len(pairs), votes_per_pair, 1 if same_annotator else 2), rng)
    rewards = population.draw(pairs[:, None, :], groups, rng)
    difference = rewards[..., 0] - rewards[..., 1]
    tied = np.abs(difference) < tie_half_width
    won = (difference > 0) ^ (rng.random(difference.shape) < label_noise)
    ties = tied.sum(axis=1)
    wins = (won & ~tied).sum(axis=1)
    return Votes(pairs, wins, votes_per_pair - wins - ties, ties, forced=tie_half_width == 0)


def soft_label_rows(population: Population, pairs: np.ndarray) -> list[dict[str, Any]]:
    """Rows whose `preference_probability` is the true P(chosen ≻ rejected); `chosen` is the likelier winner."""
    texts, rows = _texts_of(population), []
    for (first, second), prob in zip(pairs, population.prob_greater(pairs), strict=True):
        sides = (texts[first], texts[second]) if prob >= 0.5 else (texts[second], texts[first])
        probability = float(max(prob, 1 - prob))
        rows.append({"chosen": sides[0], "rejected": sides[1], "preference_probability": probability})
    return rows


def rate(
    population: Population, ratings_per_text: int, thresholds: ArrayLike, *, lowest: int = 1, seed: int = 0
) -> np.ndarray:
    """
    Let people rate every text: a rating is `lowest` and one more for each threshold that the reward exceeds.

    Rewards rounded to whole numbers and clipped to lowest … highest are `thresholds=np.arange(lowest + 0.5, highest)`.

    Args:
        population: who rates, and what.
        ratings_per_text: people, drawn anew for every rating.
        thresholds: increasing, in reward units; one fewer than there are ratings.
        lowest: the lowest rating.
        seed: of people and rewards.

    Returns:
        Whole numbers `[N, ratings_per_text]`.
    """
    thresholds = np.asarray(thresholds, dtype=float)
    if thresholds.ndim != 1 or len(thresholds) == 0 or (np.diff(thresholds) <= 0).any():
        raise ValueError(f"thresholds must increase, got {thresholds.tolist()}")
    rng = np.random.default_rng(seed)
    groups = population.draw_groups((len(population), ratings_per_text), rng)
    rewards = population.draw(np.arange(len(population))[:, None], groups, rng)
    return lowest + np.searchsorted(thresholds, rewards)


def rating_rows(population: Population, ratings: np.ndarray) -> list[dict[str, Any]]:
    """
    Rows that hold the ratings `[N, R]` of all texts, each text's once, and no comparison.

    Texts are put into rows two by two; of an odd number the last shares its row with the first, which has its ratings
    already.
    """
    texts, rows = _texts_of(population), []
    for first in range(0, len(texts), 2):
        second = (first + 1) % len(texts)
        rows.append(
            {
                "chosen": texts[first],
                "rejected": texts[second],
                "chosen_votes": 0,
                "rejected_votes": 0,
                "chosen_rating": ratings[first].tolist(),
                "rejected_rating": ratings[second].tolist() if second else None,
            }
        )
    return rows


def _texts_of(population: Population) -> Sequence[str]:
    if population.texts is None:
        raise ValueError("rows are made of texts and this population has none; pass texts= where it is made")
    return population.texts
