"""The mathematics of a random reward: families of distributions and the probability that one reward exceeds another.

A reward is a random variable ``R = μ + σ·ε`` with location μ and scale σ > 0, independent across answers. A
:class:`Family` says what ε is, how two scales combine, and hence ``P(R_a > R_b) = F((μ_a - μ_b) / s)``:

=============  ====================  ====================  ============================================================
family         F                     s                     status
=============  ====================  ====================  ============================================================
``normal``     Φ (standard normal)   √(σ_a² + σ_b²)        exact (Thurstone 1927, a variance for every answer)
``cauchy``     ½ + arctan(z) / π     σ_a + σ_b             exact; mean and variance do not exist
``logistic``   sigmoid               √(σ_a² + σ_b²)        a link: no distribution adds logistic scales in quadrature
=============  ====================  ====================  ============================================================

Everything here takes and returns tensors and knows nothing of language models. Probabilities are worked out in float64
(a pair is one number, so this costs nothing) and returned in the inputs' dtype, at least float32.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def _to_float64(*tensors: Tensor) -> list[Tensor]:
    # MPS has no float64: such tensors are worked on by the CPU, and `_to_dtype_of` takes the result back.
    return [(tensor.cpu() if tensor.device.type == "mps" else tensor).double() for tensor in tensors]


def _to_dtype_of(result: Tensor, *inputs: Tensor) -> Tensor:
    dtype = torch.float32
    for tensor in inputs:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return result.to(device=inputs[0].device, dtype=dtype)


class Family(ABC):
    """A location-scale family of reward distributions.

    A new family is one subclass with the members below and one line in :data:`FAMILIES`.
    """

    name: str
    unit_scale: float
    """The scale at which P(a ≻ b) has slope ¼ at μ_a = μ_b, as Bradley–Terry's sigmoid has. A reward model whose
    scales average to it (geometrically) speaks Bradley–Terry's unit: one unit of reward is about one logit."""
    infinite_cumulant = "its expectation overflows with beta={beta}"
    """Why E[e^(-R/β)] is infinite where it is, for the message."""

    @abstractmethod
    def difference_scale(self, scale_a: Tensor, scale_b: Tensor) -> Tensor:
        """The scale s of R_a - R_b, from σ_a and σ_b (any broadcastable shapes)."""

    @abstractmethod
    def log_link(self, z: Tensor) -> Tensor:
        """log F(z), elementwise, for float64 z; value and gradient to full relative accuracy in both tails."""

    @abstractmethod
    def standard_cdf(self, z: Tensor) -> Tensor:
        """P(ε ≤ z), elementwise."""

    @abstractmethod
    def standard_quantile(self, q: Tensor) -> Tensor:
        """The inverse of :meth:`standard_cdf` on 0 < q < 1, elementwise."""

    @abstractmethod
    def standard_cumulant(self, t: Tensor) -> Tensor:
        """log E[e^(tε)], elementwise, in float64; ∞ where the expectation is."""

    def log_prob_greater(self, loc_a: Tensor, scale_a: Tensor, loc_b: Tensor, scale_b: Tensor) -> Tensor:
        """log P(R_a > R_b) in nats.

        Args:
            loc_a, scale_a, loc_b, scale_b: locations, and scales > 0, of any shapes that broadcast to ``S``.

        Returns:
            Tensor ``S``, at most 0. Differentiable in all four arguments; accurate to 1e-5 relative, value and
            gradients, for -1e4 ≤ (loc_a - loc_b) / s ≤ 10 and scales from 1e-3 to 1e3 (float32 in and out).
        """
        mu_a, sigma_a, mu_b, sigma_b = _to_float64(loc_a, scale_a, loc_b, scale_b)
        z = (mu_a - mu_b) / self.difference_scale(sigma_a, sigma_b)
        return _to_dtype_of(self.log_link(z), loc_a, scale_a, loc_b, scale_b)

    def log_prob_less(self, loc_a: Tensor, scale_a: Tensor, loc_b: Tensor, scale_b: Tensor) -> Tensor:
        """log P(R_a < R_b): the complement, with no cancellation where P(R_a > R_b) is close to 1."""
        return self.log_prob_greater(loc_b, scale_b, loc_a, scale_a)

    def prob_greater(self, loc_a: Tensor, scale_a: Tensor, loc_b: Tensor, scale_b: Tensor) -> Tensor:
        """P(R_a > R_b), in [0, 1]; shapes as in :meth:`log_prob_greater`."""
        return self.log_prob_greater(loc_a, scale_a, loc_b, scale_b).exp()

    def cdf(self, x: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        """P(R ≤ x) (broadcast shapes)."""
        wide_x, mu, sigma = _to_float64(x, loc, scale)
        return _to_dtype_of(self.standard_cdf((wide_x - mu) / sigma), x, loc, scale)

    def quantile(self, q: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        """The reward that R stays below with probability q (broadcast shapes).

        Raises:
            ValueError: unless every q lies strictly between 0 and 1.
        """
        if not bool(((q > 0) & (q < 1)).all()):
            raise ValueError(f"a quantile level must lie strictly between 0 and 1, got {q.tolist()}")
        wide_q, mu, sigma = _to_float64(q, loc, scale)
        return _to_dtype_of(mu + sigma * self.standard_quantile(wide_q), loc, scale)

    def certainty_equivalent(self, loc: Tensor, scale: Tensor, beta: float) -> Tensor:
        """-β log E[e^(-R/β)]: the sure reward that someone with risk tolerance β > 0 takes for R (broadcast shapes).

        It is at most the mean and tends to it as β grows. For the normal it is μ - σ²/2β. Exponential utility and its
        certainty equivalent: J. W. Pratt, 1964; as a reward: arXiv 2606.09073.

        Raises:
            ValueError: where it is -∞, with the reason: for Cauchy always, for the logistic where σ ≥ β.
        """
        mu, sigma = _to_float64(loc, scale)
        cumulant = self.standard_cumulant(-sigma / beta)
        if not bool(cumulant.isfinite().all()):
            raise ValueError(
                f"the certainty equivalent of a {self.name!r} reward is -∞: {self.infinite_cumulant.format(beta=beta)}"
                f" (the largest scale is {sigma.max().item():.4g}); use 'lower_bound' or 'quantile', which always are "
                "finite"
            )
        return _to_dtype_of(mu - beta * cumulant, loc, scale)

    def sample(
        self, loc: Tensor, scale: Tensor, shape: Sequence[int] = (), generator: torch.Generator | None = None
    ) -> Tensor:
        """Independent draws of R, of shape ``shape + S`` for locations and scales that broadcast to ``S``."""
        size = torch.Size(shape) + torch.broadcast_shapes(loc.shape, scale.shape)
        mu, sigma = _to_float64(loc, scale)
        uniform = torch.rand(size, dtype=torch.float64, device=mu.device, generator=generator)
        # `rand` can return 0, whose quantile is infinite; its next value is 2⁻⁵³.
        uniform = uniform.clamp_min(2**-53)
        return _to_dtype_of(mu + sigma * self.standard_quantile(uniform), loc, scale)


class Normal(Family):
    """R ~ N(μ, σ²): P(a ≻ b) = Φ((μ_a - μ_b) / √(σ_a² + σ_b²)), exact. L. L. Thurstone, 1927."""

    name = "normal"
    unit_scale = 2 / math.sqrt(math.pi)

    def difference_scale(self, scale_a: Tensor, scale_b: Tensor) -> Tensor:
        return torch.hypot(scale_a, scale_b)

    def log_link(self, z: Tensor) -> Tensor:
        # Below 0: Φ(z) = ½ erfcx(-z/√2) exp(-z²/2), whose logarithm never underflows. Above: 1 - Φ(-z) by log1p.
        # `log_ndtr` has the same value, but its float32 gradient is wrong by a factor at z = -1e4 (torch 2.13).
        # Each branch sees only arguments of its own side, so that the unused one has a finite gradient as well.
        lower, upper = z.clamp_max(0), z.clamp_min(0)
        log_lower = torch.log(torch.special.erfcx(-lower / math.sqrt(2)) / 2) - lower.square() / 2
        log_upper = torch.log1p(-torch.special.erfc(upper / math.sqrt(2)) / 2)
        return torch.where(z < 0, log_lower, log_upper)

    def standard_cdf(self, z: Tensor) -> Tensor:
        # Not `ndtr`, which goes by erf and cancels in the lower tail.
        return torch.special.erfc(-z / math.sqrt(2)) / 2

    def standard_quantile(self, q: Tensor) -> Tensor:
        return torch.special.ndtri(q)

    def standard_cumulant(self, t: Tensor) -> Tensor:
        return t.square() / 2


class Cauchy(Family):
    """R ~ Cauchy(μ, σ): P(a ≻ b) = ½ + arctan((μ_a - μ_b) / (σ_a + σ_b)) / π, exact.

    The location is the median; a mean and a variance do not exist.
    """

    name = "cauchy"
    unit_scale = 2 / math.pi
    infinite_cumulant = "its tails are so heavy that E[e^(-R/β)] does not exist, whatever beta is"

    def difference_scale(self, scale_a: Tensor, scale_b: Tensor) -> Tensor:
        return scale_a + scale_b

    def log_link(self, z: Tensor) -> Tensor:
        # P(z) = angle(-z, 1) / π below 0 and 1 - angle(z, 1) / π above: ½ + arctan(z) / π would cancel in either tail.
        # (Not `z.abs()`: its gradient is 0 at z = 0, where every training run begins.)
        tail = torch.atan2(torch.ones_like(z), torch.where(z < 0, -z, z)) / math.pi
        return torch.where(z < 0, tail.log(), torch.log1p(-tail))

    def standard_cdf(self, z: Tensor) -> Tensor:
        return torch.atan2(torch.ones_like(z), -z) / math.pi

    def standard_quantile(self, q: Tensor) -> Tensor:
        # ∓cot of π times the nearer tail's probability, which keeps its accuracy where tan(π(q - ½)) meets its poles.
        return torch.where(q < 0.5, -1.0, 1.0) / torch.tan(math.pi * torch.minimum(q, 1 - q))

    def standard_cumulant(self, t: Tensor) -> Tensor:
        return torch.full_like(t, math.inf)


class Logistic(Family):
    """P(a ≻ b) = sigmoid((μ_a - μ_b) / √(σ_a² + σ_b²)): Bradley–Terry's link with a scale for every answer.

    With every σ = 1/√2 this is Bradley–Terry, and the loss is ``trl.RewardTrainer``'s. It is a link and not the law of
    a difference of two logistic variables. Quantiles and samples of one reward come from the logistic distribution of
    location μ and scale σ: its variance π²σ²/3 is what makes the variances of two rewards add up to that of the link.
    """

    name = "logistic"
    unit_scale = 1 / math.sqrt(2)
    infinite_cumulant = "E[e^(-R/β)] exists only for scales below beta={beta}"

    def difference_scale(self, scale_a: Tensor, scale_b: Tensor) -> Tensor:
        return torch.hypot(scale_a, scale_b)

    def log_link(self, z: Tensor) -> Tensor:
        return logsigmoid(z)

    def standard_cdf(self, z: Tensor) -> Tensor:
        return torch.sigmoid(z)

    def standard_quantile(self, q: Tensor) -> Tensor:
        return torch.logit(q)

    def standard_cumulant(self, t: Tensor) -> Tensor:
        # E[e^(tε)] = Γ(1 + t) Γ(1 - t) = πt / sin(πt) for |t| < 1, and sinc(t) is its inverse, also at 0.
        return torch.where(t.abs() < 1, -torch.log(torch.sinc(t)), math.inf)


FAMILIES: dict[str, Family] = {family.name: family for family in (Normal(), Cauchy(), Logistic())}


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

    Attributes:
        location: Tensor ``[B]``, in reward units.
        scale: Tensor ``[B]``, positive, in reward units.
        family: the name of their family.

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

    def __len__(self) -> int:
        return len(self.location)

    def __getitem__(self, index: Any) -> RewardDistribution:
        """The rewards at an index, slice or tensor of indices, such as the chosen sides of a batch."""
        return RewardDistribution(self.location[index], self.scale[index], self.family)

    def log_prob_greater(self, other: RewardDistribution) -> Tensor:
        """log P(this > other), ``[B]`` (or broadcast), in nats.

        Raises:
            ValueError: if the two are of different families.
        """
        if other.family != self.family:
            raise ValueError(f"a {self.family!r} reward cannot be compared with a {other.family!r} one")
        return get_family(self.family).log_prob_greater(self.location, self.scale, other.location, other.scale)

    def prob_greater(self, other: RewardDistribution) -> Tensor:
        """P(this > other), ``[B]`` (or broadcast)."""
        return self.log_prob_greater(other).exp()

    def _as_tensor(self, value: float | Tensor) -> Tensor:
        # Not in the location's dtype: bfloat16 rounds a level of 0.999 to 1.
        dtype = torch.promote_types(torch.float32, self.location.dtype)
        return torch.as_tensor(value, dtype=dtype, device=self.location.device)

    def cdf(self, x: float | Tensor) -> Tensor:
        """P(reward ≤ x), ``[B]`` (or broadcast)."""
        return get_family(self.family).cdf(self._as_tensor(x), self.location, self.scale)

    def quantile(self, q: float | Tensor) -> Tensor:
        """The reward's q-quantile, ``[B]`` (or broadcast), for 0 < q < 1."""
        return get_family(self.family).quantile(self._as_tensor(q), self.location, self.scale)

    def sample(self, shape: Sequence[int] = (), generator: torch.Generator | None = None) -> Tensor:
        """Independent draws, ``shape + [B]``."""
        return get_family(self.family).sample(self.location, self.scale, shape, generator)
