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

_MOST_SHOWN = 8
BYTES_AT_ONCE = 2**26


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
            Standard deviations ≥ 0 of normal errors of the locations, in reward units, of shape `(B,)`. If `None`, the
            locations are exact.
        error_factor (`torch.Tensor`, *optional*):
            What the errors of different answers have in common, of shape `(B, K)`: the inner product of two rows is
            the covariance of the errors of two answers, and the square of a row's norm is the part of its
            `location_error`² that it explains. If `None`, errors are independent across answers.
        cap (`torch.Tensor`, *optional*):
            Largest number of shape `(B,)` that a transform may make of each reward, such as that of an answer that
            fails a constraint. It has no part in the distribution. If `None`, there is none.

    Attributes:
        family (`str`):
            The name of the family.
        kind ([`Family`]):
            The family itself.

    Raises:
        `ValueError`: If the family is unknown, or if `shape`, `location_error` or `error_factor` does not have the
        size that family and location require.

    Example:

    ```python
    >>> import torch
    >>> from disco_trl import RewardDistribution
    >>> a = RewardDistribution(torch.tensor([1.7]), torch.tensor([0.4]), "normal")
    >>> b = RewardDistribution(torch.tensor([1.2]), torch.tensor([0.3]), "normal")
    >>> print(a)
    [1.70 ± 0.40]
    >>> a.prob_greater(b)
    tensor([0.8413])

    ```
    """

    location: Tensor
    scale: Tensor
    family: str
    shape: Tensor | None
    location_error: Tensor | None
    error_factor: Tensor | None = field(repr=False)
    cap: Tensor | None = field(repr=False)
    # Not part of what `dataclasses.replace` passes on: it follows from the family.
    kind: Family = field(init=False, repr=False)

    def __init__(
        self,
        location: Tensor,
        scale: Tensor,
        family: str | Family,
        shape: Tensor | None = None,
        location_error: Tensor | None = None,
        error_factor: Tensor | None = None,
        cap: Tensor | None = None,
    ) -> None:
        kind = family if isinstance(family, Family) else get_family(family)
        if torch.broadcast_shapes(location.shape, scale.shape) == location.shape:
            scale = scale.expand(location.shape)  # so that an index selects from all tensors alike
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
        if error_factor is not None and (location_error is None or error_factor.shape[:-1] != location.shape):
            raise ValueError(
                f"error_factor is of size {list(error_factor.shape)} and location of {list(location.shape)}; it needs "
                "one row for each location, and a location_error"
            )
        if cap is not None and cap.shape != location.shape:
            raise ValueError(f"cap is of size {list(cap.shape)} and location of {list(location.shape)}; give one each")
        values = {
            "location": location,
            "scale": scale,
            "family": kind.name,
            "shape": shape,
            "location_error": location_error,
            "error_factor": error_factor,
            "cap": cap,
            "kind": kind,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen

    # Batches

    def __len__(self) -> int:
        return len(self.location)

    def __str__(self) -> str:
        numbers = (x.flatten()[:_MOST_SHOWN].tolist() for x in torch.broadcast_tensors(self.location, self.scale))
        shown = [f"{location:.2f} ± {scale:.2f}" for location, scale in zip(*numbers, strict=True)]
        if self.location.ndim == 0:
            return shown[0]
        rest = self.location.numel() - len(shown)
        return f"[{', '.join(shown)}{f', ... and {rest} more' if rest else ''}]"

    def __getitem__(self, index: Any) -> RewardDistribution:
        """Selects rewards by an index, a slice or a tensor of indices, such as the chosen sides of a batch."""
        return self.map(lambda tensor: tensor[index])

    def map(self, function: Callable[[Tensor], Tensor]) -> RewardDistribution:
        """
        Applies a function to each tensor, such as a move to another device.

        Args:
            function (`Callable[[torch.Tensor], torch.Tensor]`):
                It must treat the leading dimensions of all tensors alike; `shape` and `error_factor` have one more,
                which is their own.

        Returns:
            [`RewardDistribution`]: The rewards made of the results.
        """
        return RewardDistribution(
            function(self.location),
            function(self.scale),
            self.kind,
            None if self.shape is None else function(self.shape),
            None if self.location_error is None else function(self.location_error),
            None if self.error_factor is None else function(self.error_factor),
            None if self.cap is None else function(self.cap),
        )

    def replace(self, **tensors: Tensor | None) -> RewardDistribution:
        """
        Replaces some of the tensors.

        Args:
            **tensors (`torch.Tensor`):
                New ones, by the names of the attributes.

        Returns:
            [`RewardDistribution`]: The rewards with these, and the others as they are.
        """
        names = ("location", "scale", "shape", "location_error", "error_factor", "cap")
        known: dict[str, Any] = {name: getattr(self, name) for name in names} | tensors
        return RewardDistribution(family=self.kind, **known)

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
        parts = {
            name: [tensor for reward in rewards if (tensor := getattr(reward, name)) is not None]
            for name in ("location", "scale", "shape", "location_error", "error_factor", "cap")
        }
        if len(families) != 1 or any(len(tensors) not in (0, len(rewards)) for tensors in parts.values()):
            raise ValueError(
                "only rewards of one family, all with the same kind of location error or all without, can be put "
                f"together; got {len(rewards)} batches of the families {sorted(families)}, "
                f"{len(parts['location_error'])} with an error and {len(parts['error_factor'])} with an error factor"
            )
        known = {name: torch.cat(tensors) for name, tensors in parts.items() if tensors}
        return cls(family=rewards[0].kind, **known)

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
        Evaluates log P(this > other), averaged over the errors of both locations
        ([`RewardDistribution.error_of_difference`]).

        Args:
            other ([`RewardDistribution`]):
                Rewards of the same family, whose shape broadcasts with this one's.

        Returns:
            `torch.Tensor` of shape `(B,)`, or of the broadcast shape: In nats, at most 0. Its accuracy is that of
            [`Family.log_prob_greater`], and with errors that of [`Family.log_mean_prob_positive`].

        Raises:
            `ValueError`: If the families differ.
        """
        log_prob = (self - other).log_prob_exceeds(error=self.error_of_difference(other))
        return to_dtype_of(log_prob, self.location, self.scale, other.location, other.scale)

    def error_of_difference(self, other: RewardDistribution) -> Tensor | None:
        """
        Evaluates the standard deviation of the error of this location minus the other one.

        Two answers to one prompt look alike to a model, so what it does not know about them is much the same, and
        cancels in their difference.

        Args:
            other ([`RewardDistribution`]):
                Rewards whose shape broadcasts with this one's.

        Returns:
            `torch.Tensor` of the broadcast shape or `None`: In reward units, in float64; `None` if both locations are
            exact.
        """
        errors = [reward.location_error for reward in (self, other) if reward.location_error is not None]
        if not errors:
            return None
        variances = [to_float64(error).square() for error in errors]
        variance = sum(variances[1:], variances[0])
        if self.error_factor is not None and other.error_factor is not None:
            # einsum and not a product of all pairs of rows, which would take K times the memory of the result
            ours, theirs = to_float64(self.error_factor), to_float64(other.error_factor)
            variance = variance - 2 * torch.einsum("...k,...k->...", ours, theirs)
        # Above 0, where a square root has no gradient.
        return variance.clamp_min(1e-300).sqrt()

    def prob_greater(self, other: RewardDistribution) -> Tensor:
        """Evaluates P(this > other), in [0, 1]; see [`RewardDistribution.log_prob_greater`]."""
        return self.log_prob_greater(other).exp()

    def prob_greater_within(self, first: Tensor, second: Tensor) -> Tensor:
        """
        Evaluates P(a > b) for pairs of rewards of this batch, as many at a time as fit into `BYTES_AT_ONCE`.

        A pair takes the `error_factor` of both answers, which for all pairs of a thousand rewards at once are
        gigabytes.

        Args:
            first, second (`torch.LongTensor` of shape `(P,)`):
                Positions of a and b in the batch, of shape `(B,)`.

        Returns:
            `torch.Tensor` of shape `(P,)`: Probabilities in [0, 1]; see [`RewardDistribution.log_prob_greater`].
        """
        # Both sides in the type they have and in float64, beside some hundred numbers a pair
        size = 0 if self.error_factor is None else self.error_factor.shape[-1]
        most = BYTES_AT_ONCE // (8 * (256 + 4 * size))
        parts = zip(first.split(most), second.split(most), strict=True)
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
        return RewardDistribution(self.location, scale, self.kind, self.shape, cap=self.cap)

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
        # Not in the location's type: bfloat16 rounds a level of 0.999 to 1, and float32 one of 1 - 1e-9.
        device = to_float64(self.location).device
        return torch.as_tensor(value, dtype=torch.float64, device=device)

    def _in_own_dtype(self, result: Tensor) -> Tensor:
        return to_dtype_of(result, self.location, self.scale)
