"""Which reward leaves a model that knows several attributes: the overall one, another one, or a weighted sum.

A model computes all its rewards for an answer at once ([`RewardsByAttribute`]). A [`RewardView`] chooses among them
afterwards, so that answers that are scored together may be asked about in different ways.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.columns import OVERALL
from ..distributions.joint import JointRewardDistribution
from ..distributions.reward_distribution import RewardDistribution
from .outputs import RewardModelOutput


@dataclass(frozen=True)
class RewardsByAttribute:
    """
    All rewards that a model gives to a batch of answers.

    Args:
        overall ([`~disco_trl.RewardDistribution`]):
            Overall rewards, of shape `(B,)`.
        joint ([`~disco_trl.JointRewardDistribution`], *optional*):
            Rewards for the attributes, of shape `(B, A)`, of a model that knows any.
    """

    overall: RewardDistribution
    joint: JointRewardDistribution | None = None

    @classmethod
    def of_output(cls, model: Any, output: RewardModelOutput) -> RewardsByAttribute:
        """
        Read all rewards from an output of a model.

        Args:
            model ([`~disco_trl.DiscoRewardModel`]):
                The model.
            output ([`~disco_trl.models.outputs.RewardModelOutput`]):
                What its `forward` returned.

        Returns:
            [`RewardsByAttribute`]: The rewards.
        """
        return cls(model.rewards_of(output), model.joint_of(output) if model.attributes else None)

    @classmethod
    def of_nothing(cls, model: Any) -> RewardsByAttribute:
        """
        Give the rewards of no answers, with all the tensors that others have.

        Args:
            model ([`~disco_trl.DiscoRewardModel`]):
                The model.

        Returns:
            [`RewardsByAttribute`]: The rewards, with B = 0.
        """
        nothing = torch.zeros(0, model.reward_head.in_features, device=model.reward_head.weight.device)
        head = model.reward_head(nothing, True, nothing)
        return cls.of_output(model, RewardModelOutput.from_head(head, nothing, nothing))

    @classmethod
    def cat(cls, batches: Sequence[RewardsByAttribute]) -> RewardsByAttribute:
        """
        Concatenate batches of answers, in the order of the arguments.

        Args:
            batches (`Sequence[RewardsByAttribute]`):
                Batches of one model, at least one.

        Returns:
            [`RewardsByAttribute`]: One batch.
        """
        joints = [batch.joint for batch in batches if batch.joint is not None]
        overall = RewardDistribution.cat([batch.overall for batch in batches])
        return cls(overall, JointRewardDistribution.cat(joints) if joints else None)

    def __len__(self) -> int:
        return len(self.overall)

    def __getitem__(self, index: Any) -> RewardsByAttribute:
        """Selects answers by a slice or a tensor of indices."""
        return RewardsByAttribute(self.overall[index], None if self.joint is None else self.joint[index])

    def to(self, *args: Any, **kwargs: Any) -> RewardsByAttribute:
        """Moves or converts all tensors, as [`torch.Tensor.to`] does."""
        overall = self.overall.map(lambda tensor: tensor.to(*args, **kwargs))
        return RewardsByAttribute(overall, None if self.joint is None else self.joint.to(*args, **kwargs))

    def of_attributes(self) -> dict[str, RewardDistribution]:
        """The rewards for each attribute, by its name; empty if there are none."""
        return {} if self.joint is None else {name: self.joint.marginal(name) for name in self.joint.names}

    def of_attribute(self, name: str) -> RewardDistribution:
        """
        Choose the rewards for one attribute.

        Args:
            name (`str`):
                Its name, or `"overall"`.

        Returns:
            [`~disco_trl.RewardDistribution`]: Rewards of shape `(B,)`.

        Raises:
            `ValueError`: If the model does not know it.
        """
        known = {OVERALL: self.overall, **self.of_attributes()}
        if name not in known:
            raise ValueError(f"the model does not know the attribute {name!r}; it knows {', '.join(map(repr, known))}")
        return known[name]

    def weighted_sum(self, weights: Mapping[str, float]) -> RewardDistribution:
        """
        Choose the rewards for a weighted sum of attributes.

        Args:
            weights (`Mapping[str, float]`):
                As in [`~disco_trl.JointRewardDistribution.project`].

        Returns:
            [`~disco_trl.RewardDistribution`]: Rewards of shape `(B,)`.

        Raises:
            `ValueError`: If the model knows no attributes, and as in [`~disco_trl.JointRewardDistribution.project`].
        """
        if self.joint is None:
            raise ValueError(
                "weights: the model knows no attributes, because nobody rated or compared any in its training data; "
                "leave them out for its overall reward"
            )
        return self.joint.project(weights)


@dataclass(frozen=True)
class RewardView:
    """
    A choice among the rewards of a model.

    By default it is the overall reward. A `minimum` turns attributes into constraints: an answer of which too few
    people would say that it reaches the minimum in all of them gets at most the `floor`, however good it is otherwise.

    Args:
        attribute (`str`, *optional*):
            Attribute whose reward is taken.
        weights (`Mapping[str, float]`, *optional*):
            Weights of attributes, of whose rewards the weighted sum is taken. Give either, or neither.
        minimum (`Mapping[str, float]`, *optional*):
            Smallest rating that an answer should get, by attribute, in the values that people rated with.
        min_probability (`float`, *optional*, defaults to `0.5`):
            Share of people, between 0 and 1, who have to give that rating or a higher one, in all of these attributes.
        floor (`float`, *optional*):
            Largest reward, after the transform, of an answer that fails. It has to be given with a `minimum`.

    Raises:
        `ValueError`: If the arguments contradict each other.
    """

    attribute: str | None = None
    weights: Mapping[str, float] | None = None
    minimum: Mapping[str, float] | None = None
    min_probability: float = 0.5
    floor: float | None = None

    def __post_init__(self) -> None:
        if self.attribute is not None and self.weights is not None:
            raise ValueError("attribute and weights both say which reward is taken; give one of them")
        if not 0 < self.min_probability < 1:
            raise ValueError(f"min_probability={self.min_probability!r} must be between 0 and 1")
        if self.minimum and self.floor is None:
            raise ValueError("minimum needs a floor: the largest reward of an answer that does not reach it")
        if self.floor is not None and not math.isfinite(self.floor):
            raise ValueError(f"floor={self.floor!r} would be a reward; give a finite number")
        if self.floor is not None and not self.minimum:
            raise ValueError("floor is for answers that do not reach a minimum, and none is given")

    def read(self, model: Any, rewards: RewardsByAttribute) -> RewardDistribution:
        """
        Choose the rewards of this view.

        Args:
            model ([`~disco_trl.DiscoRewardModel`] or [`~peft.PeftModel`]):
                The model that gave the rewards. It says which reward has a rating as its bar.
            rewards ([`RewardsByAttribute`]):
                All rewards of B answers.

        Returns:
            [`~disco_trl.RewardDistribution`]: Rewards of shape `(B,)`, with a `cap` if there is a minimum.

        Raises:
            `ValueError`: If an attribute is unknown, if a weighted sum is not of the model's family, or if a minimum
                is not among the ratings of its attribute.
        """
        if self.weights is None:
            found = rewards.of_attribute(self.attribute or OVERALL)
        else:
            found = rewards.weighted_sum(self.weights)
        return found.replace(cap=self._cap(model, rewards)) if self.minimum else found

    def rewards_of(self, model: Any, output: RewardModelOutput) -> RewardDistribution:
        """
        Convert an output of a model to the rewards of this view.

        Args:
            model ([`~disco_trl.DiscoRewardModel`]):
                The model.
            output ([`~disco_trl.models.outputs.RewardModelOutput`]):
                What its `forward` returned.

        Returns:
            [`~disco_trl.RewardDistribution`]: As in [`RewardView.read`].
        """
        return self.read(model, RewardsByAttribute.of_output(model, output))

    def of_nothing(self, model: Any) -> RewardDistribution:
        """
        Give the rewards of no answers, which shows that a model has rewards of this view before it scores anything.

        Args:
            model ([`~disco_trl.DiscoRewardModel`]):
                The model.

        Returns:
            [`~disco_trl.RewardDistribution`]: Rewards of shape `(0,)`, with all the tensors that others have.

        Raises:
            `ValueError`: As in [`RewardView.read`].
        """
        return self.read(model, RewardsByAttribute.of_nothing(model))

    def _cap(self, model: Any, rewards: RewardsByAttribute) -> Tensor:
        assert self.minimum is not None and self.floor is not None
        bars = {name: _bar(model, name, float(value)) for name, value in self.minimum.items()}
        fails = torch.zeros_like(rewards.overall.location, dtype=torch.bool)
        if OVERALL in bars:
            fails = 1 - rewards.overall.cdf(bars.pop(OVERALL)) < self.min_probability
        if bars and rewards.joint is not None:
            fails = fails | ~rewards.joint.exceeds_all(bars, self.min_probability).to(fails.device)
        return torch.full_like(rewards.overall.location, torch.inf).masked_fill(fails, self.floor)


def _bar(model: Any, attribute: str, value: float) -> float:
    """The reward above which a person gives at least this rating."""
    heads = model.reward_head.by_attribute()
    if attribute not in heads:
        raise ValueError(
            f"minimum: there is no attribute {attribute!r}; the model knows {', '.join(map(repr, heads))}"
        )
    values, thresholds = model.likelihoods[attribute].get("rating_values"), heads[attribute].responses().thresholds
    if values is None or thresholds is None:
        raise ValueError(
            f"minimum: nobody has rated {attribute!r} in the training data, and the zero of a reward that was learned "
            "from comparisons is arbitrary; rate some answers, or leave it out"
        )
    if value not in values[1:]:
        known = ", ".join(f"{known:g}" for known in values[1:])
        raise ValueError(f"minimum: {value:g} is no rating of {attribute!r} that can be missed; give one of {known}")
    return thresholds[values.index(value) - 1].item()
