"""The last layer of a reward model, which turns hidden states into rewards.

The final `nn.Linear` of a stock classifier becomes a [`DiscoHead`] and stays the location row. Its submodules, which
other tools ignore, hold the rest:

- [`~disco_trl.models.scale_head.ScaleHead`]: the scale of each reward;
- [`ShapeHead`]: raw shape parameters, for families that have them;
- [`~disco_trl.models.likelihood_head.LikelihoodHead`]: quantities such as the tie width, where the training data hold
  more than forced choices;
- [`~disco_trl.models.epistemic_head.EpistemicHead`]: what the training data leave open about the location row.

They live under the head because PEFT, FSDP and `save_pretrained` treat a module and its submodules as one: whatever
saves the head saves them too.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from ..distributions.likelihood import Responses
from .epistemic_head import EpistemicHead
from .likelihood_head import LikelihoodHead, to_responses
from .outputs import HeadOutput
from .scale_head import MEMORY_OF_ROWS, ScaleHead


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


class DiscoHead(nn.Linear):
    """
    The last layer of a classifier, which is the location row, with the other heads of a reward as submodules.

    It computes in float32 for any dtype of the backbone, because rewards are compared by their differences and
    bfloat16 keeps three digits.

    Attributes:
        scale ([`~disco_trl.models.scale_head.ScaleHead`]):
            Scale of each reward.
        shape ([`ShapeHead`], *optional*):
            Shape parameters, for families that have them.
        likelihood ([`~disco_trl.models.likelihood_head.LikelihoodHead`], *optional*):
            What the likelihood learns beside the rewards.
        epistemic ([`~disco_trl.models.epistemic_head.EpistemicHead`], *optional*):
            Posterior of the location row.
    """

    scale: ScaleHead
    shape: ShapeHead | None
    likelihood: LikelihoodHead | None
    epistemic: EpistemicHead | None

    @classmethod
    def convert(cls, layer: nn.Linear, unit_scale: float, fixed_scale: float | None, shape_size: int = 0) -> DiscoHead:
        """
        Turn a layer into a head, in place. Its parameters stay the same objects.

        Args:
            layer (`torch.nn.Linear`):
                Last layer of a classifier with one label.
            unit_scale (`float`):
                Unit of the family, in reward units.
            fixed_scale (`float`, *optional*):
                Scale of every reward; `None` learns one.
            shape_size (`int`, *optional*, defaults to `0`):
                Number of shape parameters of the family.
        """
        layer.__class__ = cls
        head = cast(DiscoHead, layer.to(torch.float32))
        head.scale = ScaleHead(head.in_features, unit_scale, fixed_scale, head.weight.device)
        head.shape = ShapeHead(head.in_features, shape_size, head.weight.device) if shape_size else None
        head.likelihood = None
        head.epistemic = None
        head.requires_grad_(head.weight.requires_grad)
        return head

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
        self.weight.mul_(factor)
        if self.bias is not None:
            self.bias.mul_(factor)
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
            bias = None if self.bias is None else self.bias.to(hidden_states.dtype)
            location = F.linear(hidden_states, self.weight.to(hidden_states.dtype), bias)
            if not full_output:
                return location
            if scale_states is None:
                if self.scale.layer is not None:
                    raise ValueError(
                        f"the scale reads layer {self.scale.layer} (scale_layer), so that its head needs "
                        "scale_states, which disco_trl.models.scale_layer computes"
                    )
                scale_states = hidden_states
            return HeadOutput(
                location,
                self.scale(scale_states.to(hidden_states)),
                None if self.shape is None else self.shape(hidden_states),
                None if self.likelihood is None else self.likelihood(hidden_states),
            )
