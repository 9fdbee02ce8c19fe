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
from .heads import MAX_LOG_SCALE
from .outputs import RewardModelOutput


class ScalarReward(nn.Module):
    """A disco model with a transform on its head: a module for PPO's `reward_model=`, made by `model.as_scalar(...)`.

    TRL's PPO (1.12) runs ``getattr(model, model.base_model_prefix)`` and hands its last hidden states to
    ``model.score``; this module has the three, and a `forward` whose `logits` `[B, 1]` are the transformed rewards.
    The backbone is the model's own, not a copy.

    Args:
        model: a decoder-only disco model.
        transform, **options: see `disco_trl.distributions.transforms`.

    Raises:
        ValueError: if the transform needs groups of answers, does not exist for the family, or is infinite for some
            scale that the model can give (PPO transforms the reward at every token, so that a single one would stop
            it); or if the model is an encoder.
    """

    def __init__(self, model: Any, transform: str = "mean", **options: Any):
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
        # (By a transform of its own, for it may count how often it was called.)
        shape = get_family(self.family).shape_from_raw(torch.zeros(len(get_family(self.family).shape_names)))
        get_transform(transform, **options)(RewardDistribution(torch.zeros(()), widest, self.family, shape))
        self.config = model.config
        self.base_model_prefix = model.base_model_prefix
        self.model_ = model  # under a name of its own: `model` is the backbone's in most architectures
        setattr(self, self.base_model_prefix, getattr(model, model.base_model_prefix))
        self.train(model.training)
        if isinstance(self.transform, Sample):
            # Else the rows of each process would get the same noise.
            seed = (self.transform.seed + 1_000_003 * process_state().process_index) % 2**63
            self.transform = get_transform("sample", seed=seed)

    def score(self, hidden_states: Tensor) -> Tensor:
        """`[..., H]` to the transformed reward `[..., 1]`."""
        head: Any = self.model_.score
        columns = self.model_.split_columns(head(hidden_states, with_scale=True))
        output = RewardModelOutput(**columns, pooled_hidden_state=hidden_states)
        return self.transform(self.model_.rewards_of(output))[..., None]

    def forward(self, **inputs: Any) -> SequenceClassifierOutputWithPast:
        """What a sequence classifier takes; `logits` `[B, 1]` are the transformed rewards."""
        reward = self.model_.reward_distribution(**inputs)
        return SequenceClassifierOutputWithPast(logits=self.transform(reward)[:, None])
