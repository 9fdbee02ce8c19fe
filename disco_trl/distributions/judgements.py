"""What people said about the comparisons of a batch, as tensors for the likelihood."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Judgements:
    """
    What was said about the P comparisons of a batch, in float32.

    Args:
        wins, losses, ties (`torch.Tensor` of shape `(P,)`):
            How often the chosen side won, lost and tied. A soft label p is p wins and 1 − p losses.
        tie_allowed (`torch.Tensor` of shape `(P,)`):
            1 where people could call a tie, 0 in forced choices.
        margin (`torch.Tensor` of shape `(P,)`):
            By how much the chosen side has to exceed the other one, in reward units.
        weight (`torch.Tensor` of shape `(P,)`):
            The weight in the loss of all that is said in the row of the comparison. Its mean over rows of weight 1
            is 1.
        rating_counts (`torch.Tensor` of shape `(2 * P, L)`, *optional*):
            How many people gave each of L ratings, to the chosen sides first and then to the rejected ones. If `None`,
            the dataset has no ratings.
        strength_counts (`torch.Tensor` of shape `(P, 2 * L)`, *optional*):
            How many of the wins were said to be of strength 1 to L, and after them how many of the losses. The other
            wins and losses were said without a strength. If `None`, all were.
    """

    wins: Tensor
    losses: Tensor
    ties: Tensor
    tie_allowed: Tensor
    margin: Tensor
    weight: Tensor
    rating_counts: Tensor | None = None
    strength_counts: Tensor | None = None

    @classmethod
    def forced_choices(
        cls, count: int, device: torch.device, margin: Tensor | None = None, said: float = 1.0
    ) -> Judgements:
        """
        Makes one vote for each chosen side, which is what a dataset with none of the columns says.

        Args:
            count (`int`):
                The number of comparisons, P.
            device (`torch.device`):
                Where the tensors are.
            margin (`torch.Tensor` of shape `(P,)`, *optional*):
                Margins; 0 by default.
            said (`float`, *optional*, defaults to `1.0`):
                Number of votes for each chosen side; 0 if nobody compared the two.

        Returns:
            [`Judgements`]: Of weight 1 each.
        """
        zeros = torch.zeros(count, device=device)
        return cls(zeros + said, zeros, zeros, zeros, zeros if margin is None else margin, zeros + 1)

    @classmethod
    def of_batch(cls, batch: dict[str, Any]) -> Judgements | None:
        """
        Takes the judgements out of a batch that the data collator has made.

        Args:
            batch (`dict[str, Any]`):
                The batch. The entries `judgements`, `rating_counts` and `strength_counts` are removed from it, as
                models do not take them.

        Returns:
            [`Judgements`] or `None`: `None` if the dataset has none of the columns.
        """
        table, *counts = (batch.pop(name, None) for name in ("judgements", "rating_counts", "strength_counts"))
        return None if table is None else cls.of_table(table, *counts)

    @classmethod
    def of_table(
        cls, table: Tensor, rating_counts: Tensor | None = None, strength_counts: Tensor | None = None
    ) -> Judgements:
        """Makes judgements of a [`Judgements.table`], `(P, 6)`, and of the counts of ratings and strengths."""
        wins, losses, ties, tie_allowed, margin, weight = table.unbind(dim=-1)
        return cls(wins, losses, ties, tie_allowed, margin, weight, rating_counts, strength_counts)

    def without_strengths(self) -> Judgements:
        """The same judgements, with strengths read as votes."""
        return replace(self, strength_counts=None)

    def only(self, keep: Tensor) -> Judgements:
        """
        The comparisons alone, and nothing said about some of them.

        Args:
            keep (`torch.BoolTensor` of shape `(P,)`):
                Comparisons about which the same is said as before.
        """
        kept = keep.to(self.wins)
        counts = {name: getattr(self, name) * kept for name in ("wins", "losses", "ties")}
        strengths = None if self.strength_counts is None else self.strength_counts * kept[:, None]
        return replace(self, **counts, rating_counts=None, strength_counts=strengths)

    def select(self, keep: Tensor) -> Judgements:
        """The judgements of some of the comparisons, given by a boolean tensor of shape `(P,)`."""
        return replace(
            self.of_table(self.table[keep]),
            rating_counts=None if self.rating_counts is None else self.rating_counts[keep.repeat(2)],
            strength_counts=None if self.strength_counts is None else self.strength_counts[keep],
        )

    @property
    def table(self) -> Tensor:
        """All but the ratings and strengths as one tensor of shape `(P, 6)`, which processes and files can hold."""
        return torch.stack([self.wins, self.losses, self.ties, self.tie_allowed, self.margin, self.weight], dim=-1)
