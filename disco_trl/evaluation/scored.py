"""What a model says about held-out answers: their rewards, overall and for each attribute, and how people answer given
these rewards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor

from ..data.columns import OVERALL
from ..distributions.likelihood import Responses
from ..distributions.reward_distribution import RewardDistribution
from ..models.inference import TOKENS_PER_BATCH, score_by_attribute
from ..models.reward_view import RewardView


@dataclass(frozen=True)
class Scored:
    """Rewards of held-out answers, and how people answer given them, according to a model.

    Attributes:
        rewards ([`RewardDistribution`]):
            Rewards of shape `(S,)`, for the overall judgement or for an attribute.
        responses ([`~disco_trl.distributions.likelihood.Responses`], *optional*):
            How people answer. Without any entry for a model that does not say.
        rating_values (`Sequence[float]`, *optional*, defaults to `()`):
            The L ratings that the thresholds of `responses` lie between, ascending.
        attributes (`dict[str, Scored]`, *optional*, defaults to `{}`):
            The same for each attribute that the model knows.
        correlation (`torch.Tensor` of shape `(A, A)`, *optional*):
            How people's rewards for these attributes correlate, in their order.
    """

    rewards: RewardDistribution
    responses: Responses = field(default_factory=Responses)
    rating_values: Sequence[float] = ()
    attributes: dict[str, Scored] = field(default_factory=dict)
    correlation: Tensor | None = None

    @property
    def tie_width(self) -> float | None:
        """Half-width of the band in which two rewards count as a tie, or `None` if the model does not say."""
        return None if self.responses.tie_width is None else self.responses.tie_width.item()

    def plain(self) -> Scored:
        """The model as a tool sees it that knows only scalar rewards: Bradley–Terry with the same locations.

        Returns:
            [`Scored`]: Rewards of the logistic family with every scale at 1/√2.
        """
        scale = torch.full_like(self.rewards.location, 2**-0.5)
        return Scored(RewardDistribution(self.rewards.location, scale, "logistic"))


def score_held_out(
    model: Any,
    sequences: Sequence[list[int]],
    tokens_per_batch: int = TOKENS_PER_BATCH,
    view: RewardView | None = None,
) -> Scored:
    """Scores held-out answers, overall and for each attribute that the model knows, in one pass.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A disco model, or any sequence classifier with one label, which is Bradley–Terry and knows no attributes.
        sequences (`Sequence[list[int]]`):
            Token ids of S answers.
        tokens_per_batch (`int`, *optional*, defaults to `8192`):
            As in [`~disco_trl.models.inference.score`].
        view ([`~disco_trl.models.reward_view.RewardView`], *optional*):
            Reward that takes the place of the overall one.

    Returns:
        [`Scored`]: What the model says. How people answer given a weighted sum, no model knows.
    """
    view = view or RewardView()
    inner = model.get_base_model() if is_peft_model(model) else model
    found = score_by_attribute(model, sequences, tokens_per_batch, "Scoring")
    if not hasattr(inner.config, "disco"):
        return Scored(view.read(model, found))
    rewards = {OVERALL: view.read(inner, found)}
    if found.joint is not None:
        rewards |= {name: found.joint.marginal(name) for name in inner.attributes}
    heads, likelihoods = inner.reward_head.by_attribute(), inner.likelihoods

    def scored(name: str, attribute: str, **more: Any) -> Scored:
        return Scored(
            rewards[name], heads[attribute].responses(), likelihoods[attribute].get("rating_values", ()), **more
        )

    more: dict[str, Any] = {"attributes": {name: scored(name, name) for name in inner.attributes}}
    if inner.attributes:
        more["correlation"] = inner.reward_head.attributes.correlation.detach().float().cpu()
    if view.weights is not None:
        return Scored(rewards[OVERALL], **more)
    return scored(OVERALL, view.attribute or OVERALL, **more)
