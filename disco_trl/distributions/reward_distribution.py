"""Rewards as random variables: a batch of distributions of one family, and what can be asked of them.

The mathematics is in `disco_trl.distributions.families` and `disco_trl.distributions.mixture`; here families have
names, and a model's tensors get one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .families import Cauchy, Family, Laplace, Logistic, Normal
from .mixture import NormalMixture


__all__ = ["FAMILIES", "Family", "RewardDistribution", "get_family"]

FAMILIES: dict[str, Family] = {
    family.name: family for family in (Normal(), Cauchy(), Logistic(), Laplace(), NormalMixture())
}


def get_family(name: str) -> Family:
    """The family of that name.

    Raises:
        ValueError: if there is none; the message lists those there are.
    """
    if name not in FAMILIES:
        raise ValueError(f"reward_family={name!r} is unknown; choose one of {', '.join(map(repr, FAMILIES))}")
    return FAMILIES[name]


@dataclass(frozen=True)
class RewardDistribution:
    """The distributions of a batch of rewards.

    Location, scale and shape say how people's rewards for an answer are distributed. The location is itself estimated,
    and `location_error` says how well: P(a ≻ b) takes it into account, or it would be overconfident. `cdf`,
    `quantile` and `sample` are about people and leave it out.

    Attributes:
        location: Tensor ``[B]``, in reward units.
        scale: Tensor ``[B]``, positive, in reward units.
        family: the name of their family.
        shape: Tensor ``[B, S]``, the shape parameters of families that have them (`Family.shape_names`), else None.
        location_error: Tensor ``[B]``, standard deviation ≥ 0 of a normal error of each location, in reward units,
            independent across answers; None is no error.

    Raises:
        ValueError: if `shape` or `location_error` is not of the size that family and location ask for.

    Example:
        >>> import torch
        >>> from disco_trl import RewardDistribution
        >>> a = RewardDistribution(torch.tensor([1.7]), torch.tensor([0.4]), "normal")
        >>> b = RewardDistribution(torch.tensor([1.2]), torch.tensor([0.3]), "normal")
        >>> a.prob_greater(b)
        tensor([0.8413])
    """

    location: Tensor
    scale: Tensor
    family: str
    shape: Tensor | None = None
    location_error: Tensor | None = None

    def __post_init__(self) -> None:
        names = get_family(self.family).shape_names
        size = (*self.location.shape, len(names))
        if (names or self.shape is not None) and (self.shape is None or self.shape.shape != size):
            found = "None" if self.shape is None else f"of size {list(self.shape.shape)}"
            raise ValueError(
                f"the shape of {self.family!r} rewards must be of size {list(size)} ({', '.join(names) or 'none'}), "
                f"but it is {found}"
            )
        if self.location_error is not None and self.location_error.shape != self.location.shape:
            raise ValueError(
                f"location_error is of size {list(self.location_error.shape)} and location of "
                f"{list(self.location.shape)}; expand it to one error for each location"
            )

    def __len__(self) -> int:
        return len(self.location)

    def __getitem__(self, index: Any) -> RewardDistribution:
        """The rewards at an index, slice or tensor of indices, such as the chosen sides of a batch."""
        return self.map(lambda tensor: tensor[index])

    def map(self, function: Callable[[Tensor], Tensor]) -> RewardDistribution:
        """These rewards with a function applied to each of their tensors, such as a move to another device.

        The function must treat the leading dimensions alike: of `shape` the last one holds the parameters.
        """
        return RewardDistribution(
            function(self.location),
            function(self.scale),
            self.family,
            None if self.shape is None else function(self.shape),
            None if self.location_error is None else function(self.location_error),
        )

    @classmethod
    def cat(cls, rewards: Sequence[RewardDistribution]) -> RewardDistribution:
        """Batches one after another as one batch.

        Raises:
            ValueError: if there are none, their families differ, or only some have a location error.
        """
        families = {reward.family for reward in rewards}
        shapes = [reward.shape for reward in rewards if reward.shape is not None]
        errors = [reward.location_error for reward in rewards if reward.location_error is not None]
        if len(families) != 1 or len(errors) not in (0, len(rewards)):
            raise ValueError(
                "only rewards of one family, all with a location error or all without, can be put together; got "
                f"{len(rewards)} batches of the families {sorted(families)}, {len(errors)} with an error"
            )
        return cls(
            torch.cat([reward.location for reward in rewards]),
            torch.cat([reward.scale for reward in rewards]),
            families.pop(),
            torch.cat(shapes) if shapes else None,
            torch.cat(errors) if errors else None,
        )

    def log_prob_greater(self, other: RewardDistribution) -> Tensor:
        """log P(this > other), ``[B]`` (or broadcast), in nats, averaged over the errors of both locations.

        Raises:
            ValueError: if the two are of different families.
        """
        if other.family != self.family:
            raise ValueError(f"a {self.family!r} reward cannot be compared with a {other.family!r} one")
        return get_family(self.family).log_prob_greater(
            self.location,
            self.scale,
            other.location,
            other.scale,
            self.shape,
            other.shape,
            self.location_error,
            other.location_error,
        )

    def prob_greater(self, other: RewardDistribution) -> Tensor:
        """P(this > other), ``[B]`` (or broadcast)."""
        return self.log_prob_greater(other).exp()

    def total(self) -> RewardDistribution:
        """
        The same rewards with the errors of their locations counted into their scales, for what looks at scales alone.

        The scale becomes √(σ² + (c e)²), where c turns the error, a normal's standard deviation, into this family's
        unit. That is the exact distribution of a normal reward whose location is that uncertain; of other families it
        is one of about the same width.
        """
        if self.location_error is None:
            return self
        ratio = get_family(self.family).unit_scale / FAMILIES["normal"].unit_scale
        scale = torch.hypot(self.scale, ratio * self.location_error)
        return RewardDistribution(self.location, scale, self.family, self.shape)

    def _as_tensor(self, value: float | Tensor) -> Tensor:
        # Not in the location's dtype: bfloat16 rounds a level of 0.999 to 1.
        dtype = torch.promote_types(torch.float32, self.location.dtype)
        return torch.as_tensor(value, dtype=dtype, device=self.location.device)

    def cdf(self, x: float | Tensor) -> Tensor:
        """P(reward ≤ x) of a person drawn at random, ``[B]`` (or broadcast)."""
        return get_family(self.family).cdf(self._as_tensor(x), self.location, self.scale, self.shape)

    def quantile(self, q: float | Tensor) -> Tensor:
        """The reward that a share q of people stay below, ``[B]`` (or broadcast), for 0 < q < 1."""
        return get_family(self.family).quantile(self._as_tensor(q), self.location, self.scale, self.shape)

    def sample(self, shape: Sequence[int] = (), generator: torch.Generator | None = None) -> Tensor:
        """Independent draws of people's rewards, ``shape + [B]``."""
        return get_family(self.family).sample(self.location, self.scale, shape, generator, self.shape)
