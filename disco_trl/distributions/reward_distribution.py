"""Rewards as random variables: a batch of distributions of one family, and what can be asked of it.

The families themselves, standardized, are in `disco_trl.distributions.families`. Here they get locations and scales.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .families import FAMILIES, Difference, Family, Normal, get_family
from .numerics import to_dtype_of, to_float64


__all__ = ["FAMILIES", "Family", "RewardDistribution", "get_family"]

PAIRS_AT_ONCE = 2**13  # of 6 KB each, about 50 MB


@dataclass(frozen=True, init=False)
class RewardDistribution:
    """
    The distributions of a batch of rewards.

    Location, scale and shape describe how people's rewards for an answer are distributed. The location is itself an
    estimate, and `location_error` says how good it is: P(a ≻ b) averages over that error, or it would be
    overconfident. `cdf`, `quantile` and `sample` are about people and leave it out.

    All computations are done in float64. Results have the widest type of the tensors involved, and at least float32.

    Args:
        location (`torch.Tensor`):
            Locations in reward units, of shape `(B,)`. Any other shape works as well and takes the place of `(B,)`
            below.
        scale (`torch.Tensor`):
            Positive scales in reward units, of shape `(B,)`, or of a shape that broadcasts with the locations.
        family (`str` or [`Family`]):
            The family, by its name or as [`get_family`] returns it.
        shape (`torch.Tensor`, *optional*):
            Shape parameters `(B, S)` of a family that has S of them (`Family.shape_names`). For other families, `None`
            or a tensor of shape `(B, 0)`.
        location_error (`torch.Tensor`, *optional*):
            Standard deviations ≥ 0 of normal errors of the locations, in reward units, of shape `(B,)` and independent
            across answers. If `None`, the locations are exact.

    Attributes:
        family (`str`):
            The name of the family.
        kind ([`Family`]):
            The family itself.

    Raises:
        `ValueError`: If the family is unknown, or if `shape` or `location_error` does not have the size that family
        and location require.

    Example:

    ```python
    >>> import torch
    >>> from disco_trl import RewardDistribution
    >>> a = RewardDistribution(torch.tensor([1.7]), torch.tensor([0.4]), "normal")
    >>> b = RewardDistribution(torch.tensor([1.2]), torch.tensor([0.3]), "normal")
    >>> a.prob_greater(b)
    tensor([0.8413])

    ```
    """

    location: Tensor
    scale: Tensor
    family: str
    shape: Tensor | None
    location_error: Tensor | None
    # Not part of what `dataclasses.replace` passes on: it follows from the family.
    kind: Family = field(init=False, repr=False)

    def __init__(
        self,
        location: Tensor,
        scale: Tensor,
        family: str | Family,
        shape: Tensor | None = None,
        location_error: Tensor | None = None,
    ) -> None:
        kind = family if isinstance(family, Family) else get_family(family)
        names, size = kind.shape_names, (*location.shape, len(kind.shape_names))
        if (names or shape is not None) and (shape is None or shape.shape != size):
            found = "None" if shape is None else f"of size {list(shape.shape)}"
            raise ValueError(
                f"the shape of {kind.name!r} rewards must be of size {list(size)} ({', '.join(names) or 'none'}), "
                f"but it is {found}"
            )
        if location_error is not None and location_error.shape != location.shape:
            raise ValueError(
                f"location_error is of size {list(location_error.shape)} and location of {list(location.shape)}; "
                "expand it to one error for each location"
            )
        values = {
            "location": location,
            "scale": scale,
            "family": kind.name,
            "shape": shape,
            "location_error": location_error,
            "kind": kind,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen

    # Batches

    def __len__(self) -> int:
        return len(self.location)

    def __getitem__(self, index: Any) -> RewardDistribution:
        """Selects rewards by an index, a slice or a tensor of indices, such as the chosen sides of a batch."""
        return self.map(lambda tensor: tensor[index])

    def map(self, function: Callable[[Tensor], Tensor]) -> RewardDistribution:
        """
        Applies a function to each tensor, such as a move to another device.

        Args:
            function (`Callable[[torch.Tensor], torch.Tensor]`):
                It must treat the leading dimensions of all tensors alike; the last one of `shape` holds the
                parameters.

        Returns:
            [`RewardDistribution`]: The rewards made of the results.
        """
        return RewardDistribution(
            function(self.location),
            function(self.scale),
            self.kind,
            None if self.shape is None else function(self.shape),
            None if self.location_error is None else function(self.location_error),
        )

    @classmethod
    def cat(cls, rewards: Sequence[RewardDistribution]) -> RewardDistribution:
        """
        Concatenates batches.

        Args:
            rewards (`Sequence[RewardDistribution]`):
                Batches of one family, all with a location error or all without.

        Returns:
            [`RewardDistribution`]: One batch, in the order of the arguments.

        Raises:
            `ValueError`: If there are none, if their families differ, or if only some have a location error.
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
            rewards[0].kind,
            torch.cat(shapes) if shapes else None,
            torch.cat(errors) if errors else None,
        )

    # Two rewards

    def __sub__(self, other: RewardDistribution) -> Difference:
        """
        Subtracts independent rewards, given their locations.

        Args:
            other ([`RewardDistribution`]):
                Rewards of the same family, whose shape broadcasts with this one's.

        Returns:
            [`Difference`]: R − R_other of the broadcast shape, in float64. The location errors are left out: whoever
            asks a single question averages over them ([`RewardDistribution.log_prob_greater`]), and whoever asks
            several about one pair of answers does so for all together ([`log_likelihood`]).

        Raises:
            `ValueError`: If the families differ.
        """
        if other.family != self.family:
            raise ValueError(f"a {self.family!r} reward cannot be compared with a {other.family!r} one")
        a, b = self.map(to_float64), other.map(to_float64)
        return Difference(self.kind, a.location - b.location, a.scale, b.scale, a.shape, b.shape)

    def log_prob_greater(self, other: RewardDistribution) -> Tensor:
        """
        Evaluates log P(this > other), averaged over the errors of both locations.

        Args:
            other ([`RewardDistribution`]):
                Rewards of the same family, whose shape broadcasts with this one's.

        Returns:
            `torch.Tensor` of shape `(B,)`, or of the broadcast shape: In nats, at most 0. Its accuracy is that of
            [`Family.log_prob_greater`], and with errors that of [`Family.log_mean_prob_positive`].

        Raises:
            `ValueError`: If the families differ.
        """
        variances = [
            to_float64(reward.location_error).square() for reward in (self, other) if reward.location_error is not None
        ]
        # Above 0, where a square root has no gradient.
        error = sum(variances[1:], variances[0]).clamp_min(1e-300).sqrt() if variances else None
        log_prob = (self - other).log_prob_exceeds(error=error)
        return to_dtype_of(log_prob, self.location, self.scale, other.location, other.scale)

    def prob_greater(self, other: RewardDistribution) -> Tensor:
        """Evaluates P(this > other), in [0, 1]; see [`RewardDistribution.log_prob_greater`]."""
        return self.log_prob_greater(other).exp()

    def prob_greater_within(self, first: Tensor, second: Tensor) -> Tensor:
        """
        Evaluates P(a > b) for pairs of rewards of this batch, `PAIRS_AT_ONCE` at a time.

        A probability that is averaged over the errors of the locations takes 6 KB of memory while it is computed,
        which for all pairs of a thousand rewards at once are 6 GB.

        Args:
            first, second (`torch.LongTensor` of shape `(P,)`):
                Positions of a and b in the batch, of shape `(B,)`.

        Returns:
            `torch.Tensor` of shape `(P,)`: Probabilities in [0, 1]; see [`RewardDistribution.log_prob_greater`].
        """
        parts = zip(first.split(PAIRS_AT_ONCE), second.split(PAIRS_AT_ONCE), strict=True)
        return torch.cat([self[a].prob_greater(self[b]) for a, b in parts])

    # One reward

    def total(self) -> RewardDistribution:
        """
        Moves the errors of the locations into the scales, for what looks at scales alone.

        The scale becomes √(σ² + (c e)²), where c converts the error e, the standard deviation of a normal, into the
        family's unit. For normal rewards that is the exact distribution of a reward whose location is that uncertain;
        for others it is one of about the same width.

        Returns:
            [`RewardDistribution`]: Rewards without a location error; these, if they have none already.
        """
        if self.location_error is None:
            return self
        ratio = self.kind.unit_scale / Normal.unit_scale
        scale = torch.hypot(self.scale, ratio * self.location_error)
        return RewardDistribution(self.location, scale, self.kind, self.shape)

    def cdf(self, x: float | Tensor) -> Tensor:
        """
        Evaluates P(reward ≤ x) for a person drawn at random.

        Args:
            x (`float` or `torch.Tensor`):
                In reward units, of a shape that broadcasts with `(B,)`.

        Returns:
            `torch.Tensor` of shape `(B,)`, or of the broadcast shape: Probabilities in [0, 1].
        """
        wide = self.map(to_float64)
        z = (self._argument(x) - wide.location) / wide.scale
        return self._in_own_dtype(self.kind.log_cdf(z, wide.shape).exp())

    def quantile(self, q: float | Tensor) -> Tensor:
        """
        Evaluates the reward that a share q of people stay below.

        Args:
            q (`float` or `torch.Tensor`):
                Levels of a shape that broadcasts with `(B,)`.

        Returns:
            `torch.Tensor` of shape `(B,)`, or of the broadcast shape: In reward units.

        Raises:
            `ValueError`: If a level does not lie strictly between 0 and 1.
        """
        wide, levels = self.map(to_float64), self._argument(q)
        if not bool(((levels > 0) & (levels < 1)).all()):
            raise ValueError(f"a quantile level must lie strictly between 0 and 1, got {levels.tolist()}")
        return self._in_own_dtype(wide.location + wide.scale * self.kind.quantile(levels, wide.shape))

    def certainty_equivalent(self, beta: float) -> Tensor:
        """
        Evaluates −β log E[e^(−R/β)], the sure reward that someone with risk tolerance β accepts in place of R.

        It is at most the mean and tends to it as β grows. For the normal it is μ − σ²/2β. Source: exponential utility
        and its certainty equivalent, J. W. Pratt, 1964; as a reward, arXiv 2606.09073.

        Args:
            beta (`float`):
                Risk tolerance above 0, in reward units.

        Returns:
            `torch.Tensor` of shape `(B,)`: In reward units.

        Raises:
            `ValueError`: If it is −∞, with the reason: for Cauchy always, for logistic and Laplace where σ ≥ β.
        """
        wide = self.map(to_float64)
        cumulant = self.kind.cumulant(-wide.scale / beta, wide.shape)
        if not bool(cumulant.isfinite().all()):
            raise ValueError(
                f"the certainty equivalent of a {self.family!r} reward is -∞: "
                f"{self.kind.infinite_cumulant.format(beta=beta)} (the largest scale is "
                f"{wide.scale.max().item():.4g}); use 'lower_bound' or 'quantile', which always are finite"
            )
        return self._in_own_dtype(wide.location - beta * cumulant)

    def sample(self, shape: Sequence[int] = (), generator: torch.Generator | None = None) -> Tensor:
        """
        Draws the rewards of people, independently.

        Args:
            shape (`Sequence[int]`, *optional*, defaults to `()`):
                Leading dimensions of the result, one draw for each entry.
            generator (`torch.Generator`, *optional*):
                Source of randomness. If `None`, torch's global one.

        Returns:
            `torch.Tensor` of shape `(*shape, B)`: In reward units.
        """
        wide = self.map(to_float64)
        size = torch.Size(shape) + torch.broadcast_shapes(wide.location.shape, wide.scale.shape)
        uniform = torch.rand(size, dtype=torch.float64, device=wide.location.device, generator=generator)
        # `rand` can return 0, whose quantile is infinite; its next value is 2⁻⁵³.
        uniform = uniform.clamp_min(2**-53)
        return self._in_own_dtype(wide.location + wide.scale * self.kind.draw(uniform, wide.shape))

    def _argument(self, value: float | Tensor) -> Tensor:
        # Not in the location's type: bfloat16 rounds a level of 0.999 to 1.
        dtype = torch.promote_types(torch.float32, self.location.dtype)
        return to_float64(torch.as_tensor(value, dtype=dtype, device=self.location.device))

    def _in_own_dtype(self, result: Tensor) -> Tensor:
        return to_dtype_of(result, self.location, self.scale)
