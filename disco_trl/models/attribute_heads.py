"""Heads of several attributes of an answer, and how these make up the overall reward."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .outputs import HeadOutput
from .reward_head import RewardHead


class AttributeHead(RewardHead):
    """
    The head of one attribute. Its location row starts at zero.

    Args:
        hidden_size (`int`):
            Size H of the hidden states.
        unit_scale (`float`):
            Unit of the family, in reward units.
        fixed_scale (`float`, *optional*):
            Scale of every reward; `None` learns one.
        shape_size (`int`):
            Number of shape parameters of the family.
        device (`torch.device`, *optional*):
            Device of the parameters.
    """

    # Not an `nn.Linear`: quantizers and `target_modules="all-linear"` would take it for a layer of the backbone.

    def __init__(
        self,
        hidden_size: int,
        unit_scale: float,
        fixed_scale: float | None,
        shape_size: int,
        device: torch.device | None,
    ):
        super().__init__()
        self.in_features = hidden_size
        self.weight = nn.Parameter(torch.zeros(1, hidden_size, dtype=torch.float32, device=device))
        self.bias = None
        self.add_parts(unit_scale, fixed_scale, shape_size)

    def init_weights(self) -> None:
        """Set to zero what a checkpoint did not load."""
        init.zeros_(self.weight)

    def forward(self, hidden_states: Tensor, scale_states: Tensor) -> HeadOutput:
        """Compute rewards; see [`RewardHead.rewards`]."""
        return self.rewards(hidden_states, scale_states)


class AttributeHeads(nn.Module):
    """
    The heads of A attributes, and how these make up the overall reward.

    ```text
    overall = Σ w_a R_a + rest,    w_a = start_a · exp(raw_weight_a)
    ```

    The signs of the weights are those that the user has declared. The rest is what the attributes do not explain of
    overall judgements, with a location row of its own. If nobody has judged the answers overall there is none, and the
    overall reward is the weighted sum.

    The location row of the overall reward, which every other tool reads, is the sum of these rows. It is a parameter
    that follows them ([`DiscoHead.fold`]).

    Args:
        settings (`dict`):
            `"names"`, `"weights"` (the start of each), `"are_learned"` (whether the weights are) and `"has_rest"`.
        head ([`DiscoHead`]):
            Head of the overall reward, to whose family and size they belong.

    Attributes:
        names (`tuple[str, ...]`):
            Names of the attributes.
        heads (`torch.nn.ModuleList` of [`AttributeHead`]):
            Their heads, in this order.
        raw_weight (`torch.Tensor` of shape `(A,)`):
            Log of the factor between a weight and its start. It is a parameter if the weights are learned.
        rest (`torch.nn.Parameter` of shape `(1, H)`, *optional*):
            Location row of the rest.
        correlation (`torch.Tensor` of shape `(A, A)`):
            How people's rewards for the attributes correlate. The identity until training ends.
    """

    raw_weight: Tensor
    correlation: Tensor
    rest: nn.Parameter | None

    def __init__(self, settings: dict[str, Any], head: RewardHead):
        super().__init__()
        device, size = head.weight.device, head.in_features
        shape_size = 0 if head.shape is None else len(head.shape.weight)
        self.names = tuple(settings["names"])
        self.start = tuple(settings["weights"])
        self.are_learned = settings["are_learned"]
        parts = size, head.scale.unit_scale, head.scale.fixed_scale, shape_size, device
        self.heads = nn.ModuleList(AttributeHead(*parts) for _ in self.names)
        raw_weight = torch.zeros(len(self.names), dtype=torch.float32, device=device)
        if self.are_learned:
            self.raw_weight = nn.Parameter(raw_weight)
        else:
            self.register_buffer("raw_weight", raw_weight)
        self.register_buffer("correlation", torch.eye(len(self.names), dtype=torch.float32, device=device))
        self.rest = None
        if settings["has_rest"]:
            self.rest = nn.Parameter(torch.zeros(1, size, dtype=torch.float32, device=device))

    def init_weights(self) -> None:
        """Set to its start what a checkpoint did not load."""
        init.zeros_(self.raw_weight)
        init.copy_(self.correlation, torch.eye(len(self.names)))
        if self.rest is not None:
            init.zeros_(self.rest)

    def weights(self) -> Tensor:
        """Weights `(A,)` of the attributes in the overall reward."""
        start = torch.tensor(self.start, dtype=self.raw_weight.dtype, device=self.raw_weight.device)
        return start * self.raw_weight.exp()

    def overall_row(self) -> Tensor:
        """Location row `(1, H)` of the overall reward."""
        rows = torch.cat([cast(AttributeHead, head).weight for head in self.heads])
        explained = self.weights() @ rows
        return explained[None] if self.rest is None else explained[None] + self.rest

    def overall_scale(self, scales: Tensor) -> Tensor:
        """From scales `(..., A)` of the attributes to those `(..., 1)` of their weighted sum, for normal rewards."""
        weighted = self.weights() * scales
        square = torch.einsum("...a,ab,...b->...", weighted, self.correlation.to(weighted), weighted)
        return square.sqrt()[..., None]

    @torch.no_grad()
    def compensate(self, name: str, factor: float) -> None:
        """
        Keep the overall reward as it is after the location of an attribute was multiplied, where there is a rest.

        A learned weight makes up for the factor. A weight that the user has given stays, and the rest makes up for it.

        Args:
            name (`str`):
                Name of the attribute.
            factor (`float`):
                What its location was multiplied by.
        """
        if self.rest is None:
            return
        place = self.names.index(name)
        if self.are_learned:
            self.raw_weight[place] -= math.log(factor)
        else:
            row = cast(AttributeHead, self.heads[place]).weight
            self.rest.add_(self.weights()[place] * (1 / factor - 1) * row)

    @torch.no_grad()
    def divide(self, shares: Tensor) -> None:
        """
        Divide the overall row anew between weights that are learned and the rest. The row stays as it is.

        Args:
            shares (`torch.Tensor` of shape `(A,)`):
                Positive factors between the weights and their start.
        """
        assert self.rest is not None
        row = self.overall_row()
        self.raw_weight.copy_(shares.log())
        self.rest.add_(row - self.overall_row())

    def forward(self, hidden_states: Tensor, scale_states: Tensor) -> tuple[HeadOutput, ...]:
        """Compute the rewards for each attribute; see [`RewardHead.rewards`]."""
        return tuple(head(hidden_states, scale_states) for head in self.heads)
