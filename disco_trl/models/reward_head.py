"""A head that gives the reward of an answer for one attribute: location, scale, and what else is learned of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from ..distributions.likelihood import Responses
from .epistemic_head import EpistemicHead
from .likelihood_head import LikelihoodHead, to_responses
from .outputs import HeadOutput
from .scale_head import MEMORY_OF_ROWS, ScaleHead


class ShapeHead(nn.Module):
    """
    Raw shape parameters of a reward, linear in its hidden state. Weight and bias start at zero.

    Args:
        hidden_size (`int`):
            Size H of the hidden states.
        size (`int`):
            Number S of shape parameters of the family.
        device (`torch.device`, *optional*):
            Device of the parameters.
    """

    def __init__(self, hidden_size: int, size: int, device: torch.device | None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, hidden_size, dtype=torch.float32, device=device))
        self.bias = nn.Parameter(torch.zeros(size, dtype=torch.float32, device=device))

    def init_weights(self) -> None:
        """Set to zero what a checkpoint did not load."""
        for tensor in self.parameters():
            init.zeros_(tensor)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map hidden states of shape `(..., H)` to raw shape parameters of shape `(..., S)`."""
        return F.linear(hidden_states, self.weight.to(hidden_states.dtype), self.bias.to(hidden_states.dtype))


class RewardHead(nn.Module):
    """
    A head that gives the reward of an answer for one attribute: a location row, and the other heads of a reward.

    It computes in float32 for any dtype of the backbone, because rewards are compared by their differences and
    bfloat16 keeps three digits.

    Attributes:
        weight (`torch.nn.Parameter` of shape `(1, H)`):
            Location row.
        bias (`torch.nn.Parameter` of shape `(1,)`, *optional*):
            Its bias, where the architecture has one.
        scale ([`~disco_trl.models.scale_head.ScaleHead`]):
            Scale of each reward.
        shape ([`ShapeHead`], *optional*):
            Shape parameters, for families that have them.
        likelihood ([`~disco_trl.models.likelihood_head.LikelihoodHead`], *optional*):
            What the likelihood learns beside the rewards.
        epistemic ([`~disco_trl.models.epistemic_head.EpistemicHead`], *optional*):
            Posterior of the location row.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    in_features: int
    scale: ScaleHead
    shape: ShapeHead | None
    likelihood: LikelihoodHead | None
    epistemic: EpistemicHead | None

    def add_parts(self, unit_scale: float, fixed_scale: float | None, shape_size: int) -> None:
        """
        Add the other heads of a reward to the location row.

        Args:
            unit_scale (`float`):
                Unit of the family, in reward units.
            fixed_scale (`float`, *optional*):
                Scale of every reward; `None` learns one.
            shape_size (`int`):
                Number of shape parameters of the family.
        """
        device = self.weight.device
        self.scale = ScaleHead(self.in_features, unit_scale, fixed_scale, device)
        self.shape = ShapeHead(self.in_features, shape_size, device) if shape_size else None
        self.likelihood = None
        self.epistemic = None

    def add_likelihood(self, settings: dict[str, Any]) -> None:
        """
        Add a [`~disco_trl.models.likelihood_head.LikelihoodHead`].

        Parameters that the head already has keep their values.

        Args:
            settings (`dict`):
                Settings of the [`~disco_trl.models.likelihood_head.LikelihoodHead`].
        """
        before = self.likelihood
        self.likelihood = LikelihoodHead(settings, self.scale.unit_scale, self.weight.device)
        self.likelihood.requires_grad_(self.weight.requires_grad)
        if before is not None:
            for name, parameter in before.named_parameters():
                self.likelihood.get_parameter(name).data.copy_(parameter.data)

    def add_epistemic(self, rank: int) -> None:
        """
        Add an [`~disco_trl.models.epistemic_head.EpistemicHead`], unless the head has one of that rank.

        Args:
            rank (`int`):
                Number of directions.
        """
        if self.epistemic is None or len(self.epistemic.variances) != rank:
            self.epistemic = EpistemicHead(self.in_features, rank, self.weight.device)

    @torch.no_grad()
    def responses(self) -> Responses:
        """
        Read how people answer from the parameters, which have to be whole, and not in shards.

        Returns:
            [`~disco_trl.distributions.likelihood.Responses`]: Its tensors are on the CPU. All are `None` if the head
            has no [`~disco_trl.models.likelihood_head.LikelihoodHead`].
        """
        learned = {} if self.likelihood is None else self.likelihood.values()
        return to_responses({name: value.cpu() for name, value in learned.items()})

    def tensors(self) -> list[Tensor]:
        """All that a checkpoint holds of the head: its parameters and buffers, without their gradients."""
        return [tensor.detach() for tensor in (*self.parameters(), *self.buffers())]

    @torch.no_grad()
    def refit(
        self, scale_states: Tensor, location: Tensor, factor: float = 1.0, scale_weight: Tensor | None = None
    ) -> None:
        """
        Change a head that has been trained, in place, with everything that hangs on what is changed.

        The factor multiplies all that is learned in reward units: the location, the learned quantities of the
        likelihood and the posterior. The scales keep their unit (see
        [`~disco_trl.models.scale_head.ScaleHead`]). The moments of the traits are estimated again, or a policy's
        answers would be compared with rewards that no longer exist.

        Args:
            scale_states (`torch.Tensor` of shape `(N, H)`):
                States of training rows that the scale is read from, the oldest first.
            location (`torch.Tensor` of shape `(N,)`):
                Their locations, before they are multiplied.
            factor (`float`, *optional*, defaults to `1.0`):
                Factor of the locations. An error that they have by [`~disco_trl.models.scale_head.ScaleHead`] is in
                the unit that it leads to.
            scale_weight (`torch.Tensor` of shape `(1, H)`, *optional*):
                Weight of the scale head. If `None`, it stays.
        """
        self.multiply_location(factor)
        for part in (self.likelihood, self.epistemic):
            if part is not None:
                part.rescale(factor)
        if self.scale.fixed_scale is None:
            if scale_weight is not None:
                self.scale.weight.copy_(scale_weight)
            # Older rows weigh e⁻⁸ and less.
            latest = slice(-8 * MEMORY_OF_ROWS, None)
            states, location = scale_states[latest].to(self.weight), factor * location[latest].to(self.weight)
            self.scale.retrack(states, location[:, None])

    @torch.no_grad()
    def multiply_location(self, factor: float) -> None:
        """
        Multiply the location, in place.

        Args:
            factor (`float`):
                The factor.
        """
        self.weight.mul_(factor)
        if self.bias is not None:
            self.bias.mul_(factor)

    def rewards(self, hidden_states: Tensor, scale_states: Tensor, weight: Tensor | None = None) -> HeadOutput:
        """
        Compute rewards, in the dtype of the hidden states.

        Args:
            hidden_states, scale_states (`torch.Tensor` of shape `(..., H)`):
                What location and scale are read from.
            weight (`torch.Tensor` of shape `(1, H)`, *optional*):
                Location row in place of the head's own.

        Returns:
            [`~disco_trl.models.outputs.HeadOutput`]: The rewards.
        """
        weight = self.weight if weight is None else weight
        bias = None if self.bias is None else self.bias.to(hidden_states.dtype)
        return HeadOutput(
            F.linear(hidden_states, weight.to(hidden_states.dtype), bias),
            self.scale(scale_states),
            None if self.shape is None else self.shape(hidden_states),
            None if self.likelihood is None else self.likelihood(hidden_states),
        )
