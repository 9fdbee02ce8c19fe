"""From the output of a reward model to random rewards: overall, for one attribute, or for all of them jointly."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ..data.columns import OVERALL
from ..distributions.joint import JointRewardDistribution
from ..distributions.likelihood import Responses
from ..distributions.reward_distribution import Family, RewardDistribution
from .heads import DiscoHead
from .likelihood_head import to_responses
from .outputs import RewardModelOutput, overall
from .scale_head import ScaleHead
from .settings import attribute_likelihoods


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    _Model = PreTrainedModel  # every instance is one
else:
    _Model = object


class RewardReader(_Model):
    """
    A model that reads random rewards off its outputs. It is a part of [`~disco_trl.DiscoRewardModel`].

    Attributes:
        family (`Family`):
            Family of the rewards.
        head_name (`str`):
            Name of the head, such as `"score"`.
    """

    family: Family
    head_name: str

    @property
    def reward_head(self) -> DiscoHead:
        """The head in use. With an adapter it is PEFT's wrapper, which forwards attributes to the active copy."""
        return functools.reduce(getattr, self.head_name.split("."), cast(Any, self))

    @property
    def scale_head(self) -> ScaleHead:
        """The scale head in use; with an adapter, that of the active adapter."""
        return self.reward_head.scale

    def reward_distribution(self, **inputs: Any) -> RewardDistribution:
        """
        Compute the reward distribution of each row of a batch.

        Args:
            **inputs:
                Arguments of the model's `forward`.

        Returns:
            [`~disco_trl.RewardDistribution`]: Location and scale of shape `(B,)`, in float32. It has a
            `location_error` if the model has learned one, or was trained with `epistemic=True`.
        """
        return self.rewards_of(self.run_once(**inputs))

    def run_once(self, **inputs: Any) -> RewardModelOutput:
        """
        Call the model without a cache, as nothing continues a scored answer.

        Args:
            **inputs:
                Arguments of the model's `forward`. By default a decoder would keep the keys and values of all layers.

        Returns:
            [`~disco_trl.models.outputs.RewardModelOutput`]: What `forward` returns.
        """
        if "use_cache" in inspect.signature(self.forward).parameters:
            inputs.setdefault("use_cache", False)
        return self(**inputs)

    def joint_distribution(self, **inputs: Any) -> JointRewardDistribution:
        """
        Compute the joint reward distribution of each row of a batch, in a model that knows several attributes.

        Args:
            **inputs:
                Arguments of the model's `forward`.

        Returns:
            [`~disco_trl.JointRewardDistribution`]: Location and scale of shape `(B, A)`, in float32, for the
            attributes in [`DiscoRewardModel.attributes`].

        Raises:
            `ValueError`: If the model knows no attributes.
        """
        return self.joint_of(self.run_once(**inputs))

    def rewards_of(self, output: RewardModelOutput, attribute: str = OVERALL) -> RewardDistribution:
        """
        Convert an output of this model to the distributions of the rewards for one attribute.

        Args:
            output ([`~disco_trl.models.outputs.RewardModelOutput`]):
                What `forward` returned.
            attribute (`str`, *optional*, defaults to `"overall"`):
                The attribute.

        Returns:
            [`~disco_trl.RewardDistribution`]: Location and scale of shape `(B,)`.

        Raises:
            `ValueError`: If the model does not know the attribute.
        """
        heads = self.reward_head.by_attribute()
        if attribute not in heads:
            known = ", ".join(map(repr, heads))
            raise ValueError(f"the model does not know the attribute {attribute!r}; it knows {known}")
        if attribute == OVERALL and self.is_weighted_sum:
            return self.joint_of(output).project(self.attribute_weights)
        place, head = [*heads].index(attribute), heads[attribute]
        part, errors, factor = output.by_attribute()[place], [], None
        location = overall(part.location)
        if part.likelihood is not None and "location_error" in part.likelihood:
            errors.append(overall(part.likelihood["location_error"]))
        if head.scale.has_location_error:
            errors.append(head.scale.location_error.to(location).expand_as(location))
        if head.epistemic is not None and head.epistemic.is_fitted:
            factor = head.epistemic(cast(Tensor, output.pooled_hidden_state))
            errors.append(factor.norm(dim=-1))
        return RewardDistribution(
            location,
            overall(part.scale),
            self.family,
            shape=None if part.raw_shape is None else self.family.shape_from_raw(part.raw_shape),
            # The two errors are independent, so their variances add. The first is each answer's own; the second comes
            # from one location row, which all answers share.
            location_error=functools.reduce(torch.hypot, errors) if errors else None,
            error_factor=factor,
        )

    def joint_of(self, output: RewardModelOutput) -> JointRewardDistribution:
        """
        Convert an output of this model to the joint distributions of the rewards for all attributes.

        Args:
            output ([`~disco_trl.models.outputs.RewardModelOutput`]):
                What `forward` returned.

        Returns:
            [`~disco_trl.JointRewardDistribution`]: Location and scale of shape `(B, A)`.

        Raises:
            `ValueError`: If the model knows no attributes.
        """
        if self.reward_head.attributes is None:
            raise ValueError(
                "the model knows no attributes: nobody rated or compared any in its training data (chosen_rating as "
                "a dict, or a column 'attribute'); its reward_distribution is the overall one"
            )
        parts = [self.rewards_of(output, name) for name in self.attributes]

        def together(name: str) -> Tensor | None:
            tensors = [getattr(part, name) for part in parts]
            if all(tensor is None for tensor in tensors):
                return None
            # An attribute without a location error has one of 0, and nothing in common between answers.
            like = next(tensor for tensor in tensors if tensor is not None)
            filled = [torch.zeros_like(like) if tensor is None else tensor for tensor in tensors]
            return torch.stack(filled, dim=parts[0].location.ndim)

        return JointRewardDistribution(
            cast(Tensor, together("location")),
            cast(Tensor, together("scale")),
            self.reward_head.attributes.correlation.detach().to(parts[0].location),
            self.attributes,
            self.family,
            together("shape"),
            together("location_error"),
            together("error_factor"),
        )

    @property
    def attributes(self) -> tuple[str, ...]:
        """Names of the attributes that the model knows beside the overall judgement."""
        return tuple(self.config.disco.get("attributes", {}).get("names", ()))

    @property
    def likelihoods(self) -> dict[str, dict[str, Any]]:
        """What the model knows of how people answer, by attribute, `"overall"` first; empty where it knows nothing."""
        return {OVERALL: self.config.disco.get("likelihood", {}), **attribute_likelihoods(self.config.disco)}

    @property
    def attribute_weights(self) -> dict[str, float]:
        """Weights of the attributes in the overall reward."""
        attributes = self.reward_head.attributes
        return {} if attributes is None else dict(zip(attributes.names, attributes.weights().tolist(), strict=True))

    @property
    def learns_attribute_weights(self) -> bool:
        """Whether the weights of the attributes are learned."""
        return self.config.disco.get("attributes", {"are_learned": False})["are_learned"]

    @property
    def is_weighted_sum(self) -> bool:
        """Whether the overall reward is no more than the weighted sum of the attributes."""
        return not self.config.disco.get("attributes", {"has_rest": True})["has_rest"]

    def responses_of(self, output: RewardModelOutput, attribute: str = OVERALL) -> Responses:
        """
        Read from an output of this model how people answer given their rewards, as far as the model has learned it.

        Args:
            output ([`~disco_trl.models.outputs.RewardModelOutput`]):
                What `forward` returned. In training the parameters have to come from there, with their gradient, and
                not from the head, which may be sharded. Of a head that is whole,
                [`~disco_trl.models.reward_head.RewardHead.responses`] reads the same.
            attribute (`str`, *optional*, defaults to `"overall"`):
                Attribute that is asked about.

        Returns:
            [`~disco_trl.distributions.likelihood.Responses`]: Quantities that are the same for all rows.
        """
        part = output.by_attribute()[[OVERALL, *self.attributes].index(attribute)]
        return to_responses({name: value[0] for name, value in (part.likelihood or {}).items()})

    @property
    def has_location_error(self) -> bool:
        """Whether the overall rewards of this model have a `location_error`."""
        heads = self.reward_head.by_attribute()
        if self.is_weighted_sum:
            del heads[OVERALL]
        else:
            heads = {OVERALL: heads[OVERALL]}
        return any(
            head.scale.has_location_error
            or (head.likelihood is not None and "location_error" in head.likelihood.names)
            or (head.epistemic is not None and head.epistemic.is_fitted)
            for head in heads.values()
        )
