"""What people are asked: which of two texts is better, by how much, or how good one text is; and how they answer.

A question has C possible answers. Counts of them, `(n, C)` for n items that are judged, go into the package's own
likelihood (`disco_trl.distributions.likelihood`). An item is a pair of texts or a text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from ..distributions.judgements import Judgements
from ..distributions.likelihood import Responses, log_likelihood
from ..distributions.reward_distribution import RewardDistribution


MOST_ENUMERATED = 100
"""Most ways in which all the people asked about an item may have answered that are summed over one by one."""
DRAWS = 40
"""How many random ones are averaged over where there are more."""


@dataclass(frozen=True)
class Comparisons:
    """
    People say of pairs of texts which is better, or by how much.

    The possible answers are the strengths 1 to L for the first text, 1 to L for the second, and a tie if there may be
    one. With L = 1 they are votes.

    Args:
        pairs (`numpy.ndarray` of shape `(P, 2)`):
            Indices of texts.
        people (`int`, *optional*, defaults to `1`):
            The number of people who judge each pair.
        boundaries (`Sequence[float]`, *optional*, defaults to `()`):
            The L - 1 boundaries between strengths, as in [`~disco_trl.simulation.judging.grade`].
        tie_half_width (`float`, *optional*, defaults to `0.0`):
            As in [`~disco_trl.simulation.judging.vote`]; 0 if people have to choose.
    """

    pairs: np.ndarray
    people: int = 1
    boundaries: Sequence[float] = ()
    tie_half_width: float = 0.0

    @property
    def items(self) -> np.ndarray:
        """The texts of each item."""
        return np.asarray(self.pairs)

    @property
    def answers(self) -> int:
        """The number of possible answers, C."""
        return 2 * (len(self.boundaries) + 1) + (self.tie_half_width > 0)

    @property
    def extras(self) -> dict[str, np.ndarray]:
        """What the answers depend on beside the rewards, in reward units."""
        extras = {"tie_width": np.array([self.tie_half_width] if self.tie_half_width else [])}
        return {
            name: value for name, value in (extras | {"boundaries": np.array(self.boundaries)}).items() if len(value)
        }

    def log_probs(
        self, rewards: Callable[[int], RewardDistribution], counts: Tensor, extras: Mapping[str, Tensor]
    ) -> Tensor:
        """
        Evaluates the log-probability of answers, without the multinomial coefficient.

        Args:
            rewards (`Callable[[int], RewardDistribution]`):
                Rewards of the first and second texts of all pairs, by 0 and 1.
            counts (`torch.Tensor` of shape `(P, C)`):
                How many people gave each answer.
            extras (`Mapping[str, torch.Tensor]`):
                Values of [`Comparisons.extras`], of shape `(E,)`, or `(E, P)` if each pair has its own.

        Returns:
            `torch.Tensor` of shape `(P,)`: In nats.
        """
        levels = len(self.boundaries) + 1
        won, lost, tied = counts.split([levels, levels, counts.shape[1] - 2 * levels], dim=1)
        zeros = torch.zeros(len(counts), dtype=torch.float64)
        judgements = Judgements(
            wins=won.sum(dim=1),
            losses=lost.sum(dim=1),
            ties=tied.sum(dim=1),
            tie_allowed=zeros + (self.tie_half_width > 0),
            margin=zeros,
            weight=zeros + 1,
            strength_counts=counts[:, : 2 * levels] if levels > 1 else None,
        )
        responses = Responses(
            tie_width=extras["tie_width"][0] if self.tie_half_width else None,
            strength_boundaries=extras["boundaries"] if levels > 1 else None,
        )
        return log_likelihood(rewards(0), rewards(1), judgements, responses)


@dataclass(frozen=True)
class Ratings:
    """
    People rate texts on a scale of K numbers, which are the possible answers.

    Args:
        texts (`numpy.ndarray` of shape `(n,)`):
            Indices of texts.
        people (`int`):
            The number of people who rate each text.
        thresholds (`Sequence[float]`):
            The K - 1 thresholds between ratings, as in [`~disco_trl.simulation.judging.rate`].
    """

    texts: np.ndarray
    people: int
    thresholds: Sequence[float]

    @property
    def items(self) -> np.ndarray:
        """The texts of each item."""
        return np.asarray(self.texts)[:, None]

    @property
    def answers(self) -> int:
        """The number of possible answers, K."""
        return len(self.thresholds) + 1

    @property
    def extras(self) -> dict[str, np.ndarray]:
        """What the answers depend on beside the rewards, in reward units."""
        return {"thresholds": np.array(self.thresholds)}

    def log_probs(
        self, rewards: Callable[[int], RewardDistribution], counts: Tensor, extras: Mapping[str, Tensor]
    ) -> Tensor:
        """Evaluates the log-probability of ratings, as [`Comparisons.log_probs`] does for n texts."""
        of_texts, zeros = rewards(0), torch.zeros(len(counts), dtype=torch.float64)
        # The likelihood rates both sides of a pair. The other side here has no ratings, and nobody compares the two.
        rating_counts = torch.cat([counts, torch.zeros_like(counts)])
        judgements = Judgements(zeros, zeros, zeros, zeros, zeros, zeros + 1, rating_counts=rating_counts)
        thresholds = extras["thresholds"]
        if thresholds.ndim == 2:
            thresholds = torch.cat([thresholds.T, thresholds.T])
        responses = Responses(thresholds=thresholds)
        return log_likelihood(of_texts, of_texts, judgements, responses)


def rewards_of(
    location: Tensor, scale: Tensor, family: str, location_error: Tensor | None
) -> Callable[[int], RewardDistribution]:
    """
    Rewards of the texts of items, for `log_probs`.

    Args:
        location, scale (`torch.Tensor` of shape `(n, S)`):
            Of the S texts of each item.
        family (`str`):
            A family without shape parameters.
        location_error (`torch.Tensor` of shape `(n,)` or `()`, *optional*):
            τ, or `None` if the locations are exact.

    Returns:
        `Callable[[int], RewardDistribution]`: From the number of the text in the item to the rewards.
    """
    error = None if location_error is None else location_error.expand(len(location))
    return lambda side: RewardDistribution(location[:, side], scale[:, side], family, location_error=error)


def all_answers(people: int, answers: int) -> Iterator[tuple[np.ndarray, float]]:
    """
    All ways in which people may answer.

    Args:
        people (`int`):
            How many are asked.
        answers (`int`):
            The number of possible answers, C.

    Yields:
        `tuple[numpy.ndarray, float]`: How many gave each answer, `(C,)`, and the logarithm of the number of orders in
        which they may have said so.
    """
    for bars in combinations(range(people + answers - 1), answers - 1):
        counts = np.diff([-1, *bars, people + answers - 1]) - 1
        yield counts, math.lgamma(people + 1) - sum(math.lgamma(count + 1) for count in counts)
