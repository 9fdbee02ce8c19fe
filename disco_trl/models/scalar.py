"""A reward model for PPO, which runs the backbone itself and asks the head at every token."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from ..distributions.reward_distribution import RewardDistribution, get_family
from ..distributions.transforms import Sample, get_transform
from .distributed import process_state
from .outputs import RewardModelOutput
from .reward_view import RewardView
from .scale_head import MAX_LOG_SCALE
from .scale_layer import states_of


class ScalarReward(nn.Module):
    """
    A disco model whose reward is a number: a module for the argument `reward_model` of PPO.

    TRL's PPO (1.12) runs the backbone, `getattr(model, model.base_model_prefix)`, and applies `model.score` to its
    last hidden states. This module has these attributes, and a `forward` whose `logits`, of shape `(B, 1)`, are the
    transformed rewards. The backbone is that of the model, which is not copied. [`DiscoRewardModel.as_scalar`] makes
    one.

    Args:
        model ([`~disco_trl.DiscoRewardModel`]):
            A decoder-only disco model.
        transform (`str`, *optional*, defaults to `"mean"`):
            Name of a transform; see `disco_trl.distributions.transforms`.
        view ([`~disco_trl.models.reward_view.RewardView`], *optional*):
            Which reward, of a model that knows several attributes. By default the overall one.
        **options:
            Options of the transform.

    Raises:
        `ValueError`: If the transform needs groups of answers or does not exist for the family; if it is infinite for
            a scale that the model can return (PPO transforms the reward at every token, so a single one would stop
            it); or if the model is an encoder.
    """

    def __init__(self, model: Any, transform: str = "mean", view: RewardView | None = None, **options: Any):
        super().__init__()
        self.transform = get_transform(transform, **options)
        self.family = model.config.disco["reward_family"]
        self.transform.check_family(self.family)
        if self.transform.needs_groups:
            raise ValueError(
                f"transform {transform!r} compares the answers to one prompt, and PPO scores each answer alone; use "
                "'lower_bound', 'quantile' or 'certainty_equivalent', or GRPO or RLOO with DiscoReward"
            )
        if model.head_name != "score":
            raise ValueError(
                f"{type(model).__name__} is an encoder: PPO runs the backbone of a decoder-only model and calls its "
                "'score' on every token, and an encoder's head is for its pooled text only; use DiscoReward in GRPO "
                "or RLOO instead"
            )
        fixed_scale = model.config.disco["fixed_scale"]
        widest = torch.tensor(fixed_scale or get_family(self.family).unit_scale * math.exp(MAX_LOG_SCALE))
        # The trial has its own transform, because a transform may count its calls.
        shape = get_family(self.family).shape_from_raw(torch.zeros(len(get_family(self.family).shape_names)))
        get_transform(transform, **options)(RewardDistribution(torch.zeros(()), widest, self.family, shape))
        self.view = view or RewardView()
        self.view.of_nothing(model)
        self.config = model.config
        self.base_model_prefix = model.base_model_prefix
        self.model_ = model  # `model` is the name of the backbone in most architectures
        setattr(self, self.base_model_prefix, getattr(model, model.base_model_prefix))
        self.train(model.training)
        if isinstance(self.transform, Sample):
            # With one seed the rows of all processes would get the same noise.
            seed = (self.transform.seed + 1_000_003 * process_state().process_index) % 2**63
            self.transform = get_transform("sample", seed=seed)

    def score(self, hidden_states: Tensor) -> Tensor:
        """
        Compute the transformed reward at every token.

        Args:
            hidden_states (`torch.Tensor` of shape `(..., H)`):
                Last hidden states of the backbone; the very tensor that it returned, if the scale reads a layer of its
                own.

        Returns:
            `torch.Tensor` of shape `(..., 1)`: Transformed rewards.

        Raises:
            `ValueError`: If the scale reads a layer of its own, and the states of that layer do not come with
                `hidden_states`.
        """
        scale_states = None if self.model_.scale_layer is None else states_of(hidden_states)
        head = self.model_.reward_head(hidden_states, True, scale_states)
        output = RewardModelOutput.from_head(head, hidden_states, scale_states)
        return self.transform(self.view.rewards_of(self.model_, output))[..., None]

    def forward(self, **inputs: Any) -> SequenceClassifierOutputWithPast:
        """
        Compute the transformed reward of each row of a batch.

        Args:
            **inputs:
                Arguments of the forward of the model.

        Returns:
            [`~transformers.modeling_outputs.SequenceClassifierOutputWithPast`]: `logits`, of shape `(B, 1)`, are the
            transformed rewards.
        """
        reward = self.view.rewards_of(self.model_, self.model_.run_once(**inputs))
        return SequenceClassifierOutputWithPast(logits=self.transform(reward)[:, None])
