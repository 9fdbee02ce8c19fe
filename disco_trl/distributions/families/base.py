"""What a family of reward distributions is, the registry of all, and the difference of two rewards."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from ..numerics import log_difference, log_prob_by_tail, negative_magnitude, to_dtype_of, to_float64
from ..quadrature import log_marginal


_MOST_AT_ONCE = 4096
"""Number of differences that are integrated over their errors together, at some hundred nodes each."""


class Family(ABC):
    """
    A family of reward distributions: a reward is R = μ + σ·ε, with location μ, scale σ > 0 and a random ε.

    A family says what ε is, and which P(a ≻ b) = P(R_a > R_b) follows for two independent rewards. A batch of rewards
    is a [`~disco_trl.RewardDistribution`], which moves and scales what is here.

    A new family is a subclass with the members below, decorated with [`register_family`]; everything that lists
    families (command-line help, model cards, error messages) then lists it too. The tests that all families share run
    over the registry. `docs/families.md` shows an example.

    All tensors are float64, because a pair is one number and this costs nothing. A family may have *shape parameters*
    beside location and scale: tensors of shape `(..., S)` with `S = len(shape_names)`, whose leading dimensions
    broadcast with the other arguments. Families without any ignore the argument.

    Attributes:
        name (`str`):
            What `reward_family` calls it.
        formula (`str`):
            P(a ≻ b) in one line of plain text, for tables in Markdown.
        summary (`str`):
            What distinguishes it from the others, in a few words.
        reading (`str`):
            What location and scale are in this family, as a sentence for the readers of a model card.
        unit_scale (`float`):
            The scale at which P(a ≻ b) has slope ¼ at μ_a = μ_b, as Bradley–Terry's sigmoid has. A reward model whose
            scales have this geometric mean uses Bradley–Terry's unit: one unit of reward is about one logit.
        shape_names (`tuple[str, ...]`, *optional*, defaults to `()`):
            The names of its shape parameters.
        is_link (`bool`, *optional*, defaults to `False`):
            Whether P(a ≻ b) is only a link function, which no two independent rewards of the family have.
        infinite_cumulant (`str`, *optional*):
            Why E[e^(−R/β)] is infinite where it is, for an error message that has `beta`.
    """

    name: ClassVar[str]
    formula: ClassVar[str]
    summary: ClassVar[str]
    reading: ClassVar[str]
    unit_scale: ClassVar[float]
    shape_names: ClassVar[tuple[str, ...]] = ()
    is_link: ClassVar[bool] = False
    infinite_cumulant: ClassVar[str] = "its expectation overflows with beta={beta}"

    # One reward, standardized

    @abstractmethod
    def log_cdf(self, z: Tensor, shape: Tensor | None = None) -> Tensor:
        """
        Evaluates log P(ε ≤ z).

        Args:
            z (`torch.Tensor`):
                Tensor of shape `(...)`.
            shape (`torch.Tensor`, *optional*):
                Shape parameters `(..., S)`.

        Returns:
            `torch.Tensor` of shape `(...)`: At most 0, with value and gradient at full relative accuracy in both
            tails.
        """

    def log_survival(self, z: Tensor, shape: Tensor | None = None) -> Tensor:
        """Evaluates log P(ε > z); arguments, shape and accuracy are those of [`Family.log_cdf`]."""
        return self.log_cdf(-z, shape)

    @abstractmethod
    def quantile(self, q: Tensor, shape: Tensor | None = None) -> Tensor:
        """
        Evaluates the z with P(ε ≤ z) = q.

        Args:
            q (`torch.Tensor`):
                Levels of shape `(...)`, strictly between 0 and 1.
            shape (`torch.Tensor`, *optional*):
                Shape parameters `(..., S)`.

        Returns:
            `torch.Tensor` of shape `(...)`: The quantiles.
        """

    def draw(self, uniform: Tensor, shape: Tensor | None = None) -> Tensor:
        """
        Turns uniform random numbers into draws of ε.

        Args:
            uniform (`torch.Tensor`):
                Tensor of shape `(...)`, drawn uniformly from the open interval (0, 1).
            shape (`torch.Tensor`, *optional*):
                Shape parameters `(..., S)`.

        Returns:
            `torch.Tensor` of shape `(...)`: One draw for each number; by default the quantile at it.
        """
        return self.quantile(uniform, shape)

    @abstractmethod
    def cumulant(self, t: Tensor, shape: Tensor | None = None) -> Tensor:
        """
        Evaluates log E[e^(tε)].

        Args:
            t (`torch.Tensor`):
                Tensor of shape `(...)`.
            shape (`torch.Tensor`, *optional*):
                Shape parameters `(..., S)`.

        Returns:
            `torch.Tensor` of shape `(...)`: ∞ where the expectation is infinite.
        """

    def shape_from_raw(self, raw: Tensor) -> Tensor:
        """
        Maps what a network predicts to shape parameters.

        Args:
            raw (`torch.Tensor`):
                Any real numbers, of shape `(..., S)` and of any floating-point type. Training starts at zeros.

        Returns:
            `torch.Tensor` of shape `(..., S)`: Shape parameters in their domain.
        """
        return raw

    # Two rewards

    @abstractmethod
    def difference_scale(self, scale_a: Tensor, scale_b: Tensor) -> Tensor:
        """
        Evaluates the scale of R_a − R_b.

        Args:
            scale_a, scale_b (`torch.Tensor`):
                Scales > 0 of any shapes that broadcast, and of any floating-point type.

        Returns:
            `torch.Tensor` of the broadcast shape: The scale s with which R_a − R_b is μ_a − μ_b + s·ε. If the
            difference is not of the family, s is the scale that has the difference's variance.
        """

    def scale_of_sum(self, scales: Tensor, correlation: Tensor) -> Tensor:
        """
        Evaluates the scale of a weighted sum of several rewards of one answer.

        A family that is closed under sums overrides it.

        Args:
            scales (`torch.Tensor` of shape `(..., A)`):
                Scales, times the weights, which may be negative.
            correlation (`torch.Tensor` of shape `(A, A)`):
                Correlation matrix of the rewards.

        Returns:
            `torch.Tensor` of shape `(...)`: The scale s with which the sum is Σ w_a μ_a + s·ε.

        Raises:
            `ValueError`: If the sum is not of the family, with the reason.
        """
        raise ValueError(
            f"a weighted sum of {self.name!r} rewards is not {self.name!r}, and not of any family; use the normal "
            "family, or take one attribute"
        )

    def log_prob_positive(self, difference: Difference) -> Tensor:
        """
        Evaluates log P(R_a − R_b > 0).

        A family whose differences are not of the family overrides it.

        Args:
            difference ([`Difference`]):
                R_a − R_b, of shape `(...)`.

        Returns:
            `torch.Tensor` of shape `(...)`: In nats, at most 0, differentiable in all tensors of the difference.
        """
        return self.log_cdf(difference.location / self.difference_scale(difference.scale_a, difference.scale_b))

    def log_mean_prob_positive(self, difference: Difference, error: Tensor) -> Tensor:
        """
        Evaluates log E[P(R_a − R_b > 0)], where the location of the difference is off by error·η with η ~ N(0, 1).

        The default integrates numerically ([`~disco_trl.distributions.quadrature.log_marginal`]), for families that
        are symmetric and have no shape parameters. A family with a closed form overrides it.

        Args:
            difference ([`Difference`]):
                R_a − R_b, of shape `(...)`.
            error (`torch.Tensor`):
                Standard deviations ≥ 0, of shape `(...)`.

        Returns:
            `torch.Tensor` of shape `(...)`: In nats, at most 0, differentiable in all tensors.
        """
        location, scale_a, scale_b, error = torch.broadcast_tensors(
            difference.location, difference.scale_a, difference.scale_b, error
        )
        pieces = (tensor.flatten().split(_MOST_AT_ONCE) for tensor in (location, scale_a, scale_b, error))
        means = [self._log_mean_of_piece(*piece) for piece in zip(*pieces, strict=True)]
        return torch.cat(means).view_as(location)

    def _log_mean_of_piece(self, location: Tensor, scale_a: Tensor, scale_b: Tensor, error: Tensor) -> Tensor:
        below = Difference(self, negative_magnitude(location), scale_a, scale_b)
        width = self.difference_scale(scale_a, scale_b)
        log_tail = log_marginal(lambda e: self.log_prob_positive(below + e), error, -below.location[None], width)
        return log_prob_by_tail(location, log_tail)

    def log_prob_greater(
        self,
        loc_a: Tensor,
        scale_a: Tensor,
        loc_b: Tensor,
        scale_b: Tensor,
        shape_a: Tensor | None = None,
        shape_b: Tensor | None = None,
    ) -> Tensor:
        """
        Evaluates log P(R_a > R_b) from plain tensors.

        [`RewardDistribution.log_prob_greater`] is the same for rewards that carry their parameters, and takes the
        errors of their locations into account.

        Args:
            loc_a, loc_b (`torch.Tensor`):
                Locations, of any shapes that broadcast to `(...)` and of any floating-point type.
            scale_a, scale_b (`torch.Tensor`):
                Scales > 0, which broadcast with the locations.
            shape_a, shape_b (`torch.Tensor`, *optional*):
                Shape parameters `(..., S)`, for families that have them.

        Returns:
            `torch.Tensor` of shape `(...)`: In nats, at most 0, in the widest type of locations and scales and at
            least float32. Differentiable in all arguments; value and gradients are accurate to 1e-5 relative for −1e4
            ≤ (loc_a − loc_b) / √(scale_a² + scale_b²) ≤ 10 and scales from 1e-3 to 1e3.

        Raises:
            `ValueError`: If the family has shape parameters and they are missing.

        Example:

        ```python
        >>> import torch
        >>> from disco_trl import get_family
        >>> # z = (1.7 - 1.2) / √(0.4² + 0.3²) = 1
        >>> get_family("normal").log_prob_greater(*map(torch.tensor, (1.7, 0.4, 1.2, 0.3))).exp()
        tensor(0.8413)

        ```
        """
        difference = Difference(
            self,
            to_float64(loc_a) - to_float64(loc_b),
            to_float64(scale_a),
            to_float64(scale_b),
            None if shape_a is None else to_float64(shape_a),
            None if shape_b is None else to_float64(shape_b),
        )
        return to_dtype_of(difference.log_prob_exceeds(), loc_a, scale_a, loc_b, scale_b)


@dataclass(frozen=True)
class Difference:
    """
    The random difference D = R_a − R_b of two independent rewards, given their locations.

    `a - b` of two [`~disco_trl.RewardDistribution`] makes one. Margins and thresholds move it (`difference - margin`),
    and `-difference` is R_b − R_a. That turns every question about a comparison into one about the sign of a
    difference, and keeps each scale and shape with its side.

    Args:
        kind ([`Family`]):
            The family of both rewards.
        location (`torch.Tensor`):
            μ_a − μ_b of shape `(...)`, in reward units. All tensors are float64.
        scale_a, scale_b (`torch.Tensor`):
            Scales > 0, which broadcast with `location`.
        shape_a, shape_b (`torch.Tensor`, *optional*):
            Shape parameters `(..., S)`, for families that have them.
    """

    kind: Family
    location: Tensor
    scale_a: Tensor
    scale_b: Tensor
    shape_a: Tensor | None = None
    shape_b: Tensor | None = None

    def __add__(self, shift: float | Tensor) -> Difference:
        return replace(self, location=self.location + shift)

    def __sub__(self, shift: float | Tensor) -> Difference:
        return replace(self, location=self.location - shift)

    def __neg__(self) -> Difference:
        return Difference(self.kind, -self.location, self.scale_b, self.scale_a, self.shape_b, self.shape_a)

    def log_prob_exceeds(self, threshold: float | Tensor = 0.0, error: Tensor | None = None) -> Tensor:
        """
        Evaluates log P(D > threshold).

        Args:
            threshold (`float` or `torch.Tensor`, *optional*, defaults to `0.0`):
                In reward units; it broadcasts with `location`.
            error (`torch.Tensor`, *optional*):
                Standard deviations ≥ 0 of a normal error of `location`, over which the probability is averaged. If
                `None`, the location is exact.

        Returns:
            `torch.Tensor` of the broadcast shape: In nats, at most 0.
        """
        if error is None:
            return self.kind.log_prob_positive(self - threshold)
        return self.kind.log_mean_prob_positive(self - threshold, error)

    def log_probs_of_signs(self, threshold: Tensor) -> tuple[Tensor, Tensor]:
        """
        Evaluates log P(D > threshold) and log P(−D > threshold) together, in half the operators.

        Args:
            threshold (`torch.Tensor`):
                In reward units; it broadcasts with `location`.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]` of the broadcast shape: In nats, at most 0.
        """

        def both(ours: Tensor, theirs: Tensor) -> Tensor:
            return torch.stack([ours.expand_as(self.location), theirs.expand_as(self.location)])

        shapes: list[Tensor | None] = [None, None]
        if self.shape_a is not None and self.shape_b is not None:
            a, b = (shape.expand(*self.location.shape, -1) for shape in (self.shape_a, self.shape_b))
            shapes = [torch.stack([a, b]), torch.stack([b, a])]
        scales = both(self.scale_a, self.scale_b), both(self.scale_b, self.scale_a)
        signs = Difference(self.kind, both(self.location, -self.location), *scales, *shapes)
        positive, negative = signs.log_prob_exceeds(threshold).unbind()
        return positive, negative

    def log_prob_within(self, half_width: Tensor) -> Tensor:
        """
        Evaluates log P(−half_width < D < half_width).

        Args:
            half_width (`torch.Tensor`):
                Positive, in reward units; it broadcasts with `location`.

        Returns:
            `torch.Tensor` of the broadcast shape: In nats, at most 0.
        """
        # From the side on which both probabilities are small, so that their difference does not cancel.
        tail = self._less_likely_side()
        return log_difference(tail.log_prob_exceeds(-half_width), tail.log_prob_exceeds(half_width))

    def log_prob_between(self, low: Tensor, high: Tensor) -> Tensor:
        """
        Evaluates log P(low < D < high).

        Args:
            low, high (`torch.Tensor`):
                Ends with `low < high`, in reward units; they broadcast with `location`.

        Returns:
            `torch.Tensor` of the broadcast shape: In nats, at most 0.
        """
        return (self - (low + high) / 2).log_prob_within((high - low) / 2)

    def _less_likely_side(self) -> Difference:
        """D or −D, elementwise, whichever has its location at or below 0."""
        is_swapped = self.location > 0
        swapped = -self

        def choose(theirs: Tensor, ours: Tensor) -> Tensor:
            return torch.where(is_swapped, theirs, ours)

        def choose_shape(theirs: Tensor | None, ours: Tensor | None) -> Tensor | None:
            if theirs is None or ours is None:
                return None
            return torch.where(is_swapped[..., None], theirs, ours)

        return Difference(
            self.kind,
            choose(swapped.location, self.location),
            choose(swapped.scale_a, self.scale_a),
            choose(swapped.scale_b, self.scale_b),
            choose_shape(swapped.shape_a, self.shape_a),
            choose_shape(swapped.shape_b, self.shape_b),
        )


FAMILIES: dict[str, Family] = {}
"""All families by their names, in the order in which they were registered."""

_Registered = TypeVar("_Registered", bound=type[Family])


def register_family(kind: _Registered) -> _Registered:
    """
    Registers a subclass of [`Family`] under its name; to be used as a decorator.

    Args:
        kind (`type[Family]`):
            A class without abstract methods that has all attributes of a family.

    Returns:
        `type[Family]`: The same class.

    Raises:
        `TypeError`: If a method or an attribute is missing.
        `ValueError`: If another class has the name.
    """
    missing = [name for name in ("name", "formula", "summary", "reading", "unit_scale") if not hasattr(kind, name)]
    if missing:
        raise TypeError(f"the family {kind.__name__} has no {' and no '.join(missing)}; set it in the class")
    if not 0 < kind.unit_scale < math.inf:
        raise ValueError(f"the family {kind.name!r} has unit_scale={kind.unit_scale!r}, which must be positive")
    known = type(FAMILIES.get(kind.name))
    # The same class again is one whose notebook cell was run, or module reloaded, a second time.
    if kind.name in FAMILIES and (known.__module__, known.__qualname__) != (kind.__module__, kind.__qualname__):
        raise ValueError(
            f"reward_family={kind.name!r} is the name of {known.__module__}.{known.__qualname__} already; give "
            f"{kind.__name__} another name"
        )
    FAMILIES[kind.name] = kind()
    return kind


def get_family(name: str) -> Family:
    """
    Looks up a family by its name.

    Args:
        name (`str`):
            A name in `FAMILIES`, such as `"normal"`.

    Returns:
        [`Family`]: The family.

    Raises:
        `ValueError`: If there is no such family; the message lists those there are.
    """
    if name not in FAMILIES:
        raise ValueError(f"reward_family={name!r} is unknown; choose one of {', '.join(map(repr, FAMILIES))}")
    return FAMILIES[name]
