"""The tensors that a reward head and a reward model return."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from torch import Tensor
from transformers.modeling_outputs import SequenceClassifierOutputWithPast


# The fields of a stock output that are passed on unchanged. They are read from the class because transformers renames
# them: 5.24 calls `cache` what was `past_key_values`.
STOCK_OUTPUTS = tuple({field.name for field in fields(SequenceClassifierOutputWithPast)} - {"loss", "logits"})
# The fields that a stock classifier does not have. The model lists them in `keys_to_ignore_at_inference`, so that
# `compute_metrics` still receives a single array.
OWN_OUTPUTS = ("scale", "raw_shape", "likelihood", "attributes", "pooled_hidden_state", "scale_state")


# A named tuple and not a dataclass: a sharded head is found by what its forward returns. FSDP2 registers its hooks for
# the backward pass on the tensors in that output (torch before 2.13 by `tree_flatten`), DeepSpeed wraps them, and
# DataParallel gathers them. All of them look into tuples and dicts, and none of the three into every dataclass.
class HeadOutput(NamedTuple):
    """
    Output of a [`~disco_trl.models.heads.DiscoHead`] for hidden states of shape `(..., H)`.

    Attributes:
        location (`torch.Tensor` of shape `(..., 1)`):
            Locations, in reward units.
        scale (`torch.Tensor` of shape `(..., 1)`):
            Scales, positive, in reward units.
        raw_shape (`torch.Tensor` of shape `(..., S)`, *optional*):
            Unconstrained shape parameters of a family that has S of them, which `Family.shape_from_raw` maps to their
            domain. `None` for a family without shape parameters.
        likelihood (`dict` from `str` to `torch.Tensor` of shape `(..., J)`, *optional*):
            Quantities that the likelihood learns beside the rewards, by name (see
            [`~disco_trl.models.likelihood_head.LikelihoodHead`]). They are the same in each row. `None` if there are
            none.
        attributes (`tuple` of [`HeadOutput`], *optional*, defaults to `()`):
            Rewards for each attribute of a model that knows several.
    """

    location: Tensor
    scale: Tensor
    raw_shape: Tensor | None
    likelihood: dict[str, Tensor] | None
    attributes: tuple[HeadOutput, ...] = ()


def overall(values: Tensor) -> Tensor:
    """
    Take the last dimension, of size 1, off values of a reward.

    Args:
        values (`torch.Tensor` of shape `(..., 1)`):
            A location, scale or location error.

    Returns:
        `torch.Tensor` of shape `(...)`: The values.
    """
    return values[..., 0]


@dataclass
class RewardModelOutput(SequenceClassifierOutputWithPast):
    """
    Output of a disco model: the fields of a stock classifier's output and, after them, its own.

    `loss` is the mean squared error of the location if `labels` were passed, as it is for a stock classifier with one
    label. `logits` is the location, of shape `(B, 1)`, in reward units.

    Attributes:
        scale (`torch.Tensor` of shape `(B, 1)`):
            Scale of each reward, positive, in reward units.
        raw_shape (`torch.Tensor` of shape `(B, S)`, *optional*):
            As in [`HeadOutput`].
        likelihood (`dict` from `str` to `torch.Tensor` of shape `(B, J)`, *optional*):
            As in [`HeadOutput`].
        attributes (`tuple` of [`HeadOutput`], *optional*):
            As in [`HeadOutput`]. `None` if there are none.
        pooled_hidden_state (`torch.Tensor` of shape `(B, H)`):
            The hidden state that the location was read from in each row, without gradient.
        scale_state (`torch.Tensor` of shape `(B, H)`):
            What the scale was read from, without gradient: the mean hidden state of the scale layer, or
            `pooled_hidden_state` in a model without one.
    """

    scale: Tensor | None = None
    raw_shape: Tensor | None = None
    likelihood: dict[str, Tensor] | None = None
    attributes: tuple[HeadOutput, ...] | None = None
    pooled_hidden_state: Tensor | None = None
    scale_state: Tensor | None = None

    @classmethod
    def from_head(
        cls, head: HeadOutput, pooled_hidden_state: Tensor, scale_states: Tensor | None = None, **stock: Any
    ) -> RewardModelOutput:
        """
        Build the output from what the head returned.

        Args:
            head ([`HeadOutput`]):
                Output of the head for these hidden states.
            pooled_hidden_state (`torch.Tensor` of shape `(..., H)`):
                Hidden states that the head read.
            scale_states (`torch.Tensor` of shape `(..., H)`, *optional*):
                As the head got them.
            **stock:
                Fields of the stock output other than `logits`.
        """
        return cls(
            logits=head.location,
            scale=head.scale,
            raw_shape=head.raw_shape,
            likelihood=head.likelihood,
            attributes=head.attributes or None,
            pooled_hidden_state=pooled_hidden_state.detach(),
            scale_state=(pooled_hidden_state if scale_states is None else scale_states).detach(),
            **stock,
        )

    def by_attribute(self) -> tuple[HeadOutput, ...]:
        """The overall rewards, and after them those for each attribute."""
        assert self.logits is not None and self.scale is not None
        overall = HeadOutput(self.logits, self.scale, self.raw_shape, self.likelihood)
        return (overall, *(self.attributes or ()))
