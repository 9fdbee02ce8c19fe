"""
How people's rewards for the attributes of an answer correlate, fitted when training ends.

What flows: ratings of several attributes by the same people → sums of products of their deviations from the mean of
each answer, kept with the predictions of training (`disco_trl.trainer.predictions`) → the correlation matrix at which
such sums are expected (`disco_trl.distributions.correlation`), by the scales, thresholds and locations of the heads as
they are then.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..distributions.correlation import RatedAnswers, estimate_correlation
from ..distributions.families import Normal
from ..distributions.reward_distribution import RewardDistribution
from ..models.reward_head import RewardHead
from .head_fit import HeadFit, NothingToFit
from .predictions import Predictions, last_of_each


LEAST_FREEDOM = 100
"""Smallest number of deviations that a correlation is estimated from. Its standard error is then a tenth or more."""
MOST_ANSWERS = 4096
"""Number of latest answers that the correlation is estimated from."""


class Correlation(HeadFit):
    """
    Fits the correlation of people's rewards for attributes; see `disco_trl.distributions.correlation`.

    Args:
        whole_head, family, memory, log, attribute, refusal:
            As in [`HeadFit`].
    """

    without: ClassVar[str] = "The attributes count as independent"

    def fit(self, predictions: Predictions, args: Any, state: Any) -> dict[str, float]:
        attributes, memory = self.whole_head.attributes, self.memory
        assert attributes is not None and memory is not None
        if not isinstance(self.family, Normal):
            raise NothingToFit(f"the joint distribution of {self.family.name!r} rewards that correlate is not known")
        names, heads = attributes.names, self.whole_head.by_attribute()
        kept = [found for name in names if (found := memory.predictions(name)) is not None]
        products, freedom = kept[0].products.flatten(0, 1).double().unbind(dim=1)
        rated = last_of_each(kept[0].answers.flatten(), freedom.sum(dim=(1, 2)) > 0)[-MOST_ANSWERS:]
        support = freedom[rated].sum(dim=0).fill_diagonal_(0)
        if not bool((support >= LEAST_FREEDOM).any()):
            raise NothingToFit(
                f"too few people have rated two attributes of the same answer ({int(support.max())} deviations from "
                f"an answer's mean, and {LEAST_FREEDOM} are needed); give the ratings of several people as lists, in "
                "the same order for each attribute"
            )
        columns = [self._rated(heads[name], found, rated) for name, found in zip(names, kept, strict=True)]
        enough = (support >= LEAST_FREEDOM).fill_diagonal_(True)
        rewards, counts, thresholds = zip(*columns, strict=True)
        said = RatedAnswers.of_attributes(rewards, counts, thresholds, products[rated], freedom[rated] * enough)
        correlation, _ = estimate_correlation(said)
        with torch.no_grad():
            attributes.correlation.copy_(correlation)
        return {
            f"correlation/{names[b]}/{names[a]}": correlation[a, b].item()
            for a in range(len(names))
            for b in range(a)
            if support[a, b] >= LEAST_FREEDOM
        }

    @torch.no_grad()
    def _rated(
        self, head: RewardHead, predictions: Predictions, places: Tensor
    ) -> tuple[RewardDistribution, Tensor, Tensor | None]:
        """Rewards of answers for an attribute, how many people gave each rating, and the thresholds if anybody did."""
        states = predictions.scale_states.flatten(0, 1)[places]
        scale = head.scale(states.to(head.weight.device))[..., 0].cpu()
        rewards = RewardDistribution(predictions.location.flatten()[places], scale, self.family)
        return rewards, predictions.rating_counts.flatten(0, 1)[places], head.responses().thresholds
