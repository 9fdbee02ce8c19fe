"""What simulated people say: the pairs they are asked about, their votes, grades and ratings, and rows of a dataset.

Arrays are NumPy's: `(N,)` for N texts, and `(P, 2)` for pairs of indices of texts. Rows are dictionaries with the
columns that `DiscoRewardTrainer` reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .population import Population


# Pairs


def random_pairs(texts: int, pairs: int, seed: int = 0) -> np.ndarray:
    """
    Draws pairs of two different texts, evenly.

    Args:
        texts (`int`):
            The number of texts, at least 2.
        pairs (`int`):
            The number of pairs, P.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the pairs.

    Returns:
        `numpy.ndarray` of shape `(P, 2)`: Indices of texts.

    Raises:
        `ValueError`: If there are not two texts.
    """
    if texts < 2:
        raise ValueError(f"texts={texts}: a pair takes two")
    rng = np.random.default_rng(seed)
    first, step = rng.integers(0, texts, pairs), rng.integers(1, texts, pairs)
    return np.stack([first, (first + step) % texts], axis=1)


def balanced_pairs(texts: int, pairs_per_text: int, seed: int = 0) -> np.ndarray:
    """
    Draws pairs in which every text occurs equally often.

    Args:
        texts (`int`):
            The number of texts, N, which has to be even.
        pairs_per_text (`int`):
            How many pairs each text is in.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the pairs.

    Returns:
        `numpy.ndarray` of shape `(N * pairs_per_text / 2, 2)`: Indices of texts.

    Raises:
        `ValueError`: If the number of texts is odd.
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

    Args:
        pairs (`numpy.ndarray` of shape `(P, 2)`):
            Indices of texts.
        wins, losses, ties (`numpy.ndarray` of shape `(P,)`):
            Numbers of votes.
        forced (`bool`):
            Whether nobody could have called a pair a tie.
        strengths (`numpy.ndarray` of shape `(P, 2 * L)`, *optional*):
            How many of the wins are of strength 1 to L, and after them how many of the losses. If `None`, nobody was
            asked.
    """

    pairs: np.ndarray
    wins: np.ndarray
    losses: np.ndarray
    ties: np.ndarray
    forced: bool
    strengths: np.ndarray | None = None

    def rows(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        """
        Makes rows of a preference dataset: `chosen` is the text with more votes, and `chosen_votes` and
        `rejected_votes` are their numbers.

        If people could call a pair a tie, there is a column `tie` as well. It is false in the row with the votes, and
        the ties of a pair are a row of their own, whose `weight` is their number.

        With strengths, each pair is one row with all of them in the column `preference_strength`, ties as 0.

        Args:
            texts (`Sequence[str]`):
                N texts.

        Returns:
            `list[dict[str, Any]]`: A row or two for each pair; none for a pair without votes.
        """
        if self.strengths is not None:
            return self._graded_rows(texts)
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

    def _graded_rows(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        assert self.strengths is not None
        levels = self.strengths.shape[1] // 2
        values = [*range(1, levels + 1), *range(-1, -levels - 1, -1), 0]
        rows: list[dict[str, Any]] = []
        for pair, counts in zip(self.pairs, np.column_stack([self.strengths, self.ties]), strict=True):
            given = np.repeat(values, counts)
            # The side that more people prefer, or that is preferred more strongly, is `chosen`.
            swapped = (np.sign(given).sum() or given.sum()) < 0
            first, second = pair[::-1] if swapped else pair
            if len(given):
                strengths = sorted((-given if swapped else given).tolist(), reverse=True)
                rows.append({"chosen": texts[first], "rejected": texts[second], "preference_strength": strengths})
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
    Lets people vote on pairs: each draws a reward of either text and prefers the higher one.

    Args:
        population ([`Population`]):
            Who votes, and on what.
        pairs (`numpy.ndarray` of shape `(P, 2)`):
            Indices of texts.
        votes_per_pair (`int`, *optional*, defaults to `1`):
            The number of people who vote on each pair, drawn anew for every vote.
        tie_half_width (`float`, *optional*, defaults to `0.0`):
            Rewards that are nearer to each other than this are called a tie. At 0 everybody has to choose.
        label_noise (`float`, *optional*, defaults to `0.0`):
            The share, below ½, of the votes for either side that are recorded for the other.
        same_annotator (`bool`, *optional*, defaults to `False`):
            Whether one person judges both sides; see [`Population.prob_greater`].
        seed (`int`, *optional*, defaults to `0`):
            Seed of people and rewards.

    Returns:
        [`Votes`]: What they said.

    Raises:
        `ValueError`: If an argument is out of its range, or if a pair names a text that does not exist.
    """
    said = grade(
        population,
        pairs,
        (),
        votes_per_pair,
        tie_half_width=tie_half_width,
        label_noise=label_noise,
        same_annotator=same_annotator,
        seed=seed,
    )
    return replace(said, strengths=None)


def grade(
    population: Population,
    pairs: np.ndarray,
    boundaries: ArrayLike,
    votes_per_pair: int = 1,
    *,
    tie_half_width: float = 0.0,
    label_noise: float = 0.0,
    same_annotator: bool = False,
    seed: int = 0,
) -> Votes:
    """
    Lets people say of pairs which text is better and by how much: each draws a reward of either text.

    Args:
        population ([`Population`]):
            Who judges, and what.
        pairs (`numpy.ndarray` of shape `(P, 2)`):
            Indices of texts.
        boundaries (`ArrayLike` of shape `(L - 1,)`):
            Boundaries c_2 to c_L between L strengths, increasing, above `tie_half_width`, in reward units: rewards
            that differ by c_k or more make a preference of strength k or more.
        votes_per_pair, tie_half_width, label_noise, same_annotator, seed:
            As in [`vote`]. Label noise exchanges k and -k.

    Returns:
        [`Votes`]: What they said, with strengths.

    Raises:
        `ValueError`: If an argument is out of its range, or if a pair names a text that does not exist.
    """
    pairs = np.asarray(pairs)
    if votes_per_pair < 1 or tie_half_width < 0 or not 0 <= label_noise < 0.5:
        raise ValueError(
            f"votes_per_pair={votes_per_pair} must be at least 1, tie_half_width={tie_half_width} at least 0, and "
            f"label_noise={label_noise} at least 0 and below 0.5"
        )
    edges = np.array([tie_half_width, *np.asarray(boundaries, dtype=float)])
    if (np.diff(edges) <= 0).any():
        raise ValueError(f"boundaries must increase above tie_half_width={tie_half_width}, got {edges[1:].tolist()}")
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
    level = np.searchsorted(edges[1:], np.abs(difference), side="right")
    strengths = [(side & ~tied & (level == k)).sum(axis=1) for side in (won, ~won) for k in range(len(edges))]
    counts = np.stack(strengths, axis=1)
    wins, ties = counts[:, : len(edges)].sum(axis=1), tied.sum(axis=1)
    return Votes(pairs, wins, votes_per_pair - wins - ties, ties, forced=tie_half_width == 0, strengths=counts)


def soft_label_rows(population: Population, pairs: np.ndarray) -> list[dict[str, Any]]:
    """
    Makes rows with soft labels: `preference_probability` is the true P(chosen ≻ rejected).

    Args:
        population ([`Population`]):
            Who judges, and what; with texts.
        pairs (`numpy.ndarray` of shape `(P, 2)`):
            Indices of texts.

    Returns:
        `list[dict[str, Any]]`: A row for each pair, in which `chosen` is the likelier winner.

    Raises:
        `ValueError`: If the population has no texts.
    """
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
    Lets people rate every text: a rating is `lowest`, plus one for each threshold that the reward exceeds.

    With `thresholds=np.arange(lowest + 0.5, highest)`, ratings are rewards that are rounded to whole numbers and
    clipped to lowest … highest.

    Args:
        population ([`Population`]):
            Who rates, and what.
        ratings_per_text (`int`):
            The number of people who rate each text, drawn anew for every rating.
        thresholds (`ArrayLike` of shape `(L - 1,)`):
            Thresholds between L ratings, increasing, in reward units.
        lowest (`int`, *optional*, defaults to `1`):
            The lowest rating.
        seed (`int`, *optional*, defaults to `0`):
            Seed of people and rewards.

    Returns:
        `numpy.ndarray` of shape `(N, ratings_per_text)`: Whole numbers.

    Raises:
        `ValueError`: If the thresholds do not increase.
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
    Makes rows that hold the ratings of all texts, each text's once, and no comparison.

    Texts are put into rows two by two. If their number is odd, the last one shares its row with the first, which has
    its ratings already.

    Args:
        population ([`Population`]):
            Who rated, and what; with texts.
        ratings (`numpy.ndarray` of shape `(N, R)`):
            What [`rate`] returns.

    Returns:
        `list[dict[str, Any]]`: A row for every two texts, with `chosen_rating` and `rejected_rating`.

    Raises:
        `ValueError`: If the population has no texts.
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
