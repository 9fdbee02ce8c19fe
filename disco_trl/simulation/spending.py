"""
How to spend the next judgements: what votes, graded comparisons and ratings are expected to teach about σ.

An [`Outlook`] is a world like the one that is expected, with the Fisher information of each way to ask. Information
adds up, so that what is at hand and what is planned are sums of it. A comparison reads two answers, a rating one: that
is what ways to ask are compared by.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import numpy as np

from .information import Precision, Truth
from .judging import random_pairs
from .population import Population, heteroscedastic
from .questions import Comparisons, Ratings


SAMPLED = 120
"""Pairs, or texts, whose information is averaged."""
TIED = 0.15
"""Share of two random rewards that are so near to each other that people call it a tie."""
RATING_VALUES = 5


@dataclass(frozen=True)
class Ask:
    """
    A way to ask about a pair, or about an answer.

    Args:
        what (`str`):
            `"votes"` (which of two is better), `"grades"` (by how much) or `"ratings"` (of one).
        people (`int`, *optional*, defaults to `1`):
            How many people are asked about each.
    """

    what: Literal["votes", "grades", "ratings"]
    people: int = 1

    @property
    def readings(self) -> int:
        """How many answers are read: two for a comparison, one for a rating."""
        return self.people * (1 if self.what == "ratings" else 2)


class Outlook:
    """
    What judgements of each kind are expected to teach about σ.

    Args:
        population ([`Population`], *optional*):
            People and texts like those that you expect, by default [`typical_world`]`()`.
        levels (`int`, *optional*, defaults to `3`):
            Number of strengths of a graded comparison, beside ties.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the pairs, texts and rewards that are averaged over.
    """

    def __init__(self, population: Population | None = None, levels: int = 3, seed: int = 0):
        self.population = typical_world() if population is None else population
        self.seed = seed
        rng = np.random.default_rng(seed)
        pairs = random_pairs(len(self.population), 5_000, seed)
        rewards = self.population.draw(pairs, self.population.draw_groups(pairs.shape, rng), rng)
        # After ties, each strength is as frequent as the next, and so is each rating.
        shares = TIED + (1 - TIED) * np.arange(levels) / levels
        tie_half_width, *boundaries = np.quantile(np.abs(rewards[:, 0] - rewards[:, 1]), shares)
        thresholds = np.quantile(rewards, np.arange(1, RATING_VALUES) / RATING_VALUES)
        texts = rng.permutation(len(self.population))[:SAMPLED]
        self._asked: dict[str, Comparisons | Ratings] = {
            "votes": Comparisons(pairs[:SAMPLED]),
            "grades": Comparisons(pairs[:SAMPLED], 1, boundaries, tie_half_width),
            "ratings": Ratings(texts, 1, thresholds),
        }
        self._truth = Truth(self.population, [*self._asked.values()])
        self._information = cache(self._information_of_one)

    def _information_of_one(self, ask: Ask) -> np.ndarray:
        """Information in what all the people say about one pair, or one text."""
        question = self._asked[ask.what]
        question = replace(question, people=ask.people)
        return self._truth.information(question, self.seed) / len(question.items)

    def expected(self, asked: Mapping[Ask, float]) -> Precision:
        """
        What to expect of a fit to judgements, of which there are some.

        Args:
            asked (`Mapping[Ask, float]`):
                The number of pairs, or of texts, that are asked about in each way.

        Returns:
            [`Precision`]: Expected errors of a fit that knows by how much log σ differs in this world. With few
            judgements `scale_error` is the deviation of log σ itself.
        """
        truth = self._truth
        # A little about everything: what nobody was asked about is not determined otherwise.
        information = np.eye(truth.count)
        for ask, count in asked.items():
            information += count * self._information(ask)
        return truth.errors(information, float(np.std(np.log(self.population.scale))), self.seed).precision


def typical_world(
    dimension: int = 64, texts: int = 1000, log_scale_std: float = 0.5, unseen_std: float = 0.5, seed: int = 0
) -> Population:
    """
    A world to plan in: standard normal features, μ ~ N(0, 1) and log σ ~ N(0, `log_scale_std`²).

    Args:
        dimension (`int`, *optional*, defaults to `64`):
            Number of features that location and scale depend on.
        texts (`int`, *optional*, defaults to `1000`):
            Number of texts.
        log_scale_std (`float`, *optional*, defaults to `0.5`):
            Standard deviation of log σ over texts.
        unseen_std (`float`, *optional*, defaults to `0.5`):
            Standard deviation of the part of a location that the model does not learn.
        seed (`int`, *optional*, defaults to `0`):
            Seed of features and directions.

    Returns:
        [`Population`]: As [`~disco_trl.simulation.population.heteroscedastic`].
    """
    features = np.random.default_rng(seed).standard_normal((texts, dimension))
    return heteroscedastic(features, log_scale_std=log_scale_std, unseen_std=unseen_std, seed=seed)


@dataclass(frozen=True)
class Way:
    """
    A way to spend judgements, and what it is expected to teach.

    Args:
        what (`str`):
            What people are asked, in words.
        asked (`dict[Ask, int]`):
            The number of pairs, or of texts, that are asked about in each way.
        expected ([`Precision`]):
            What a fit to it, and to what was at hand before, should reach.
    """

    what: str
    asked: dict[Ask, int]
    expected: Precision


def ways_to_spend(outlook: Outlook, judgements: int = 1000, at_hand: Mapping[Ask, float] | None = None) -> list[Way]:
    """
    Compares ways to spend the next judgements.

    Each way has the same amount to read: that of so many comparisons. In some, a tenth or a fifth of it is read by
    people who rate single answers.

    Args:
        outlook ([`Outlook`]):
            The world to plan in.
        judgements (`int`, *optional*, defaults to `1000`):
            The number of comparisons that can be paid for.
        at_hand (`Mapping[Ask, float]`, *optional*):
            What has been asked already, as in [`Outlook.expected`].

    Returns:
        `list[Way]`: The ways, from the least to the most precise scales.
    """
    plans: list[dict[Ask, int]] = [
        *({Ask("votes", people): judgements // people} for people in (1, 3, 5)),
        {Ask("grades"): judgements},
    ]
    for kind in (Ask("votes"), Ask("grades")):
        for share, people in ((0.1, 3), (0.2, 5)):
            rated = round(2 * judgements * share / people)
            plans.append({kind: judgements - round(judgements * share), Ask("ratings", people): rated})
    found = []
    for plan in plans:
        together = dict(at_hand or {})
        for ask, count in plan.items():
            together[ask] = together.get(ask, 0) + count
        found.append(Way(describe(plan), plan, outlook.expected(together)))
    return sorted(found, key=lambda way: way.expected.scale_spearman)


def describe(asked: Mapping[Ask, float]) -> str:
    """What people are asked, in words."""
    names = {"votes": "vote", "grades": "graded comparison", "ratings": "rating"}
    parts = []
    for ask, count in asked.items():
        of = f" of {'an answer' if ask.what == 'ratings' else 'a pair'}"
        parts.append(
            f"{count * ask.people:,.0f} {names[ask.what]}s" + (f", {ask.people}{of}" if ask.people > 1 else "")
        )
    return "; ".join(parts)
