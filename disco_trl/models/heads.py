"""The last layer of a reward model, which turns hidden states into rewards.

The final `nn.Linear` of a stock classifier becomes a [`DiscoHead`] and stays the location row. Its submodules, which
other tools ignore, hold the rest:

- [`~disco_trl.models.scale_head.ScaleHead`]: the scale of each reward;
- [`~disco_trl.models.reward_head.ShapeHead`]: raw shape parameters, for families that have them;
- [`~disco_trl.models.likelihood_head.LikelihoodHead`]: quantities such as the tie width, where the training data hold
  more than forced choices;
- [`~disco_trl.models.epistemic_head.EpistemicHead`]: what the training data leave open about the location row;
- [`~disco_trl.models.attribute_heads.AttributeHeads`]: the same for each attribute of an answer, and how these make up
  the overall reward.

They live under the head because PEFT, FSDP and `save_pretrained` treat a module and its submodules as one: whatever
saves the head saves them too.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.columns import OVERALL
from .attribute_heads import AttributeHead, AttributeHeads
from .outputs import HeadOutput
from .reward_head import RewardHead


# Whether heads return their input. The flag is per thread because a server may call one model from several threads.
_BYPASS = threading.local()


@contextlib.contextmanager
def heads_bypassed() -> Iterator[None]:
    """Make every [`DiscoHead`] return its input unchanged within the context, in this thread only."""
    _BYPASS.is_on = True
    try:
        yield
    finally:
        _BYPASS.is_on = False


class DiscoHead(RewardHead, nn.Linear):
    """
    The last layer of a classifier, which is the location row of the overall reward.

    Attributes:
        attributes ([`AttributeHeads`], *optional*):
            Heads of attributes.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None  # type: ignore[assignment]  # nn.Linear leaves it out of its annotation
    in_features: int
    attributes: AttributeHeads | None

    @classmethod
    def convert(cls, layer: nn.Linear, unit_scale: float, fixed_scale: float | None, shape_size: int = 0) -> DiscoHead:
        """
        Turn a layer into a head, in place. Its parameters stay the same objects.

        Args:
            layer (`torch.nn.Linear`):
                Last layer of a classifier with one label.
            unit_scale, fixed_scale, shape_size:
                As in [`RewardHead.add_parts`].
        """
        layer.__class__ = cls
        head = cast(DiscoHead, layer.to(torch.float32))
        head.add_parts(unit_scale, fixed_scale, shape_size)
        head.attributes = None
        head.requires_grad_(head.weight.requires_grad)
        return head

    def add_attributes(self, settings: dict[str, Any], is_new: bool = False) -> None:
        """
        Add [`AttributeHeads`]. The overall reward stays as it is.

        Args:
            settings (`dict`):
                As in [`AttributeHeads`].
            is_new (`bool`, *optional*, defaults to `False`):
                Whether the location row is a random one, which is then forgotten.
        """
        self.attributes = AttributeHeads(settings, self)
        self.attributes.requires_grad_(self.weight.requires_grad)
        if self.attributes.rest is not None and not is_new:
            self.attributes.rest.data.copy_(self.weight.data)
        if self.attributes.rest is None and self.bias is not None:
            # A weighted sum has no bias: the heads of attributes have none.
            self.bias.data.zero_()
            self.bias.requires_grad_(False)
        for head in self.attributes.heads:
            cast(AttributeHead, head).scale.layer = self.scale.layer
        self.fold()

    def keep_only(self, attribute: str) -> None:
        """
        Become the head of one attribute, in place, and forget the others.

        Args:
            attribute (`str`):
                Name of the attribute, or `"overall"`.
        """
        head = self.by_attribute()[attribute]
        if head is not self:
            self.weight.data.copy_(head.weight.data)
            if self.bias is not None:
                self.bias.data.zero_()
            self.scale, self.shape = head.scale, head.shape
            self.likelihood, self.epistemic = head.likelihood, head.epistemic
        self.attributes = None

    @torch.no_grad()
    def keep_sum(self, weights: Mapping[str, float]) -> None:
        """
        Become the head of a weighted sum of attributes, in place, as far as the location goes.

        Args:
            weights (`Mapping[str, float]`):
                Weights by the names of the attributes.
        """
        heads = self.by_attribute()
        rows = torch.stack([weight * heads[name].weight for name, weight in weights.items()])
        self.weight.data.copy_(rows.sum(dim=0))
        if self.bias is not None:
            self.bias.data.zero_()
        self.attributes = None

    def by_attribute(self) -> dict[str, RewardHead]:
        """All heads by the names of their attributes, that of the overall reward first."""
        heads: dict[str, RewardHead] = {OVERALL: self}
        if self.attributes is not None:
            heads |= zip(self.attributes.names, cast(Any, self.attributes.heads), strict=True)
        return heads

    @torch.no_grad()
    def fold(self) -> None:
        """Have the location row of the overall reward follow those that it is made of, in place."""
        if self.attributes is not None:
            self.weight.copy_(self.attributes.overall_row())

    @torch.no_grad()
    def multiply_location(self, factor: float) -> None:
        if self.attributes is not None:
            self.attributes.raw_weight += math.log(factor)
            if self.attributes.rest is not None:
                self.attributes.rest.mul_(factor)
        super().multiply_location(factor)
        self.fold()

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, full_output: bool = False, scale_states: Tensor | None = None
    ) -> Tensor | HeadOutput:
        """
        Compute rewards.

        Args:
            hidden_states (`torch.Tensor` of shape `(..., H)`):
                Pooled hidden states, or those of every token.
            full_output (`bool`, *optional*, defaults to `False`):
                Whether to return a [`~disco_trl.models.outputs.HeadOutput`] rather than the location alone. It is an
                argument, and not a method of its own, because FSDP and ZeRO gather the parameters only for a call.
            scale_states (`torch.Tensor` of shape `(..., H)`, *optional*):
                What the scale reads, if it reads a layer of its own. By default `hidden_states`.

        Returns:
            `torch.Tensor` of shape `(..., 1)` or [`~disco_trl.models.outputs.HeadOutput`]: The location, in reward
            units, or everything. Within [`heads_bypassed`], `hidden_states`.

        Raises:
            `ValueError`: If the scale reads a layer of its own, and `scale_states` is missing.
        """
        if getattr(_BYPASS, "is_on", False):
            return hidden_states
        with torch.autocast(hidden_states.device.type, enabled=False):
            hidden_states = hidden_states.to(torch.promote_types(self.weight.dtype, torch.float32))
            weight: Tensor = self.weight
            if self.attributes is not None:
                # The row itself gets a gradient of 0 and not none, as DDP waits for all.
                weight = self.attributes.overall_row() + 0 * self.weight
            if not full_output:
                bias = None if self.bias is None else self.bias.to(hidden_states.dtype)
                return F.linear(hidden_states, weight.to(hidden_states.dtype), bias)
            if scale_states is None:
                if self.scale.layer is not None:
                    raise ValueError(
                        f"the scale reads layer {self.scale.layer} (scale_layer), so that its head needs "
                        "scale_states, which disco_trl.models.scale_layer computes"
                    )
                scale_states = hidden_states
            scale_states = scale_states.to(hidden_states)
            output = self.rewards(hidden_states, scale_states, weight)
            if self.attributes is None:
                return output
            of_attributes = self.attributes(hidden_states, scale_states)
            if self.attributes.rest is None:
                scales = torch.cat([attribute.scale for attribute in of_attributes], dim=-1)
                output = output._replace(scale=self.attributes.overall_scale(scales) + 0 * output.scale)
            return output._replace(attributes=of_attributes)
