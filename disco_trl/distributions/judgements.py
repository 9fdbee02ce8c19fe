"""What people said about the comparisons of a batch, as tensors for the likelihood."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Judgements:
    """
    What was said about the P comparisons of a batch; all tensors `[P]`, in float32.

    Attributes:
        wins, losses, ties: how often the chosen side won, lost and tied; a soft label is a part of a win and the rest
            of a loss.
        tie_allowed: 1 where a tie could have been said, 0 in forced choices.
        margin: in units of reward.
        weight: of all that is said in the comparison's row; its mean over rows of weight 1 is 1.
        rating_counts: `[2 * P, L]`, how many people gave each of L ratings to the chosen sides and then to the
            rejected ones; None where the dataset has no ratings.
    """

    wins: Tensor
    losses: Tensor
    ties: Tensor
    tie_allowed: Tensor
    margin: Tensor
    weight: Tensor
    rating_counts: Tensor | None = None

    @classmethod
    def forced_choices(cls, count: int, device: torch.device, margin: Tensor | None = None) -> Judgements:
        """One vote for each chosen side, as a dataset without any of the columns has."""
        zeros = torch.zeros(count, device=device)
        return cls(zeros + 1, zeros, zeros, zeros, zeros if margin is None else margin, zeros + 1)

    @classmethod
    def of_batch(cls, batch: dict[str, Any]) -> Judgements | None:
        """Take out of a batch what `to_tensors` put there, if it put anything."""
        table, rating_counts = batch.pop("judgements", None), batch.pop("rating_counts", None)
        return None if table is None else cls.of_table(table, rating_counts)

    @classmethod
    def of_table(cls, table: Tensor, rating_counts: Tensor | None = None) -> Judgements:
        """From what :attr:`table` is."""
        wins, losses, ties, tie_allowed, margin, weight = table.unbind(dim=-1)
        return cls(wins, losses, ties, tie_allowed, margin, weight, rating_counts)

    @property
    def table(self) -> Tensor:
        """All but the ratings, `[P, 6]`."""
        return torch.stack([self.wins, self.losses, self.ties, self.tie_allowed, self.margin, self.weight], dim=-1)
