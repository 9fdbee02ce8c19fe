"""Families of reward distributions, and the probability that one random reward exceeds another.

A reward is a random variable ``R = μ + σ·ε`` with location μ and scale σ > 0, independent across answers. A
:class:`Family` says what ε is and what ``P(R_a > R_b)`` follows from that, with Δ = μ_a - μ_b:

=============  =======================================  ===============================================================
family         P(R_a > R_b)                             status
=============  =======================================  ===============================================================
``normal``     Φ(Δ / √(σ_a² + σ_b²))                    exact (Thurstone 1927, a variance for every answer)
``cauchy``     ½ + arctan(Δ / (σ_a + σ_b)) / π          exact; mean and variance do not exist
``logistic``   sigmoid(Δ / √(σ_a² + σ_b²))              a link: no distribution adds logistic scales in quadrature
``laplace``    see :class:`Laplace`                     exact; tails of e^(-|z|), also where the two scales are equal
``mixture``    four terms, see `NormalMixture`          exact; two camps, with two ``shape`` parameters for each answer
=============  =======================================  ===============================================================

Everything here takes and returns tensors and knows nothing of language models. Methods about a difference or a
standardized variable (``log_prob_exceeds``, ``log_cdf``, ``standard_*``) are float64 in and out, because a pair is one
number and this costs nothing; the others work in float64 and return the inputs' dtype, at least float32.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


LOG_2 = math.log(2)


def to_float64(*tensors: Tensor) -> list[Tensor]:
    """The tensors in float64, on the CPU where their device has none."""
    # MPS has no float64: such tensors are worked on by the CPU, and `_to_dtype_of` takes the result back.
    return [(tensor.cpu() if tensor.device.type == "mps" else tensor).double() for tensor in tensors]


def _shape_to_float64(shape: Tensor | None) -> Tensor | None:
    return None if shape is None else to_float64(shape)[0]


def _to_dtype_of(result: Tensor, *inputs: Tensor) -> Tensor:
    dtype = torch.float32
    for tensor in inputs:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return result.to(device=inputs[0].device, dtype=dtype)


def _negative_magnitude(x: Tensor) -> Tensor:
    # Not `-x.abs()`: its gradient is 0 at x = 0, where every training run begins.
    return torch.where(x < 0, x, -x)


def _log_prob_by_tail(x: Tensor, log_tail: Tensor) -> Tensor:
    """log F(x) of a symmetric F from log F(-|x|), with no cancellation on either side."""
    return torch.where(x < 0, log_tail, torch.log1p(-log_tail.exp()))


class Family(ABC):
    """A location-scale family of reward distributions.

    A new family is one subclass with the members below and one entry in
    `disco_trl.distributions.reward_distribution.FAMILIES`. What it
    needs beside location and scale are its `shape` parameters: tensors ``[..., len(shape_names)]`` whose leading sizes
    broadcast with the other arguments; families without any ignore the argument.
    """

    name: str
    unit_scale: float
    """The scale at which P(a ≻ b) has slope ¼ at μ_a = μ_b, as Bradley–Terry's sigmoid has. A reward model whose
    scales average to it (geometrically) speaks Bradley–Terry's unit: one unit of reward is about one logit."""
    shape_names: tuple[str, ...] = ()
    infinite_cumulant = "its expectation overflows with beta={beta}"
    """Why E[e^(-R/β)] is infinite where it is, for the message."""

    @abstractmethod
    def difference_scale(self, scale_a: Tensor, scale_b: Tensor) -> Tensor:
        """The scale s of R_a - R_b, from σ_a and σ_b (any broadcastable shapes).

        Where the difference leaves the family it is the scale that has the difference's variance.
        """

    @abstractmethod
    def log_cdf(self, z: Tensor, shape: Tensor | None = None) -> Tensor:
        """log P(ε ≤ z), elementwise, for float64 z; value and gradient to full relative accuracy in both tails."""

    def log_survival(self, z: Tensor, shape: Tensor | None = None) -> Tensor:
        """log P(ε > z), elementwise, for float64 z; as accurate as :meth:`log_cdf`."""
        return self.log_cdf(-z, shape)

    @abstractmethod
    def standard_quantile(self, q: Tensor, shape: Tensor | None = None) -> Tensor:
        """The z with P(ε ≤ z) = q, elementwise, for 0 < q < 1 in float64."""

    def standard_draw(self, uniform: Tensor, shape: Tensor | None = None) -> Tensor:
        """A draw of ε from each number drawn uniformly from (0, 1), in float64."""
        return self.standard_quantile(uniform, shape)

    @abstractmethod
    def standard_cumulant(self, t: Tensor, shape: Tensor | None = None) -> Tensor:
        """log E[e^(tε)], elementwise, in float64; ∞ where the expectation is."""

    def shape_from_raw(self, raw: Tensor) -> Tensor:
        """Shape parameters ``[..., S]`` in their domain from any real numbers ``[..., S]``; zeros are the start."""
        return raw

    def log_prob_exceeds(
        self,
        delta: Tensor,
        scale_a: Tensor,
        scale_b: Tensor,
        shape_a: Tensor | None = None,
        shape_b: Tensor | None = None,
    ) -> Tensor:
        """log P(R_a - R_b > 0) in nats, where μ_a - μ_b = delta.

        Args:
            delta, scale_a, scale_b: float64, of any shapes that broadcast to ``S``; scales > 0.
            shape_a, shape_b: float64, ``[..., len(shape_names)]``.

        Returns:
            Float64 tensor ``S``, at most 0, differentiable in all arguments.
        """
        return self.log_cdf(delta / self.difference_scale(scale_a, scale_b))

    def log_mean_prob_exceeds(
        self,
        delta: Tensor,
        error: Tensor,
        scale_a: Tensor,
        scale_b: Tensor,
        shape_a: Tensor | None = None,
        shape_b: Tensor | None = None,
    ) -> Tensor:
        """log E[P(R_a - R_b > 0)] in nats, where μ_a - μ_b = delta + error·η with η ~ N(0, 1) is not known exactly.

        Arguments as in :meth:`log_prob_exceeds`, and `error` ≥ 0, which broadcasts with them. Normal and mixture have
        a closed form. The others are symmetric and integrated numerically: to 1e-6 relative for error ≤ 3 s; beyond
        that the far tails are rough, but finite.
        """
        nodes, log_weights = _error_quadrature(delta, error)
        tail = _negative_magnitude(delta)[..., None] + error[..., None] * nodes
        log_prob = self.log_prob_exceeds(tail, scale_a[..., None], scale_b[..., None])
        return _log_prob_by_tail(delta, torch.logsumexp(log_prob + log_weights, dim=-1))

    def log_prob_greater(
        self,
        loc_a: Tensor,
        scale_a: Tensor,
        loc_b: Tensor,
        scale_b: Tensor,
        shape_a: Tensor | None = None,
        shape_b: Tensor | None = None,
        error_a: Tensor | None = None,
        error_b: Tensor | None = None,
    ) -> Tensor:
        """log P(R_a > R_b) in nats.

        Args:
            loc_a, scale_a, loc_b, scale_b: locations, and scales > 0, of any shapes that broadcast to ``S``.
            shape_a, shape_b: ``[..., len(shape_names)]``, for families that have shape parameters.
            error_a, error_b: standard deviations ≥ 0 of independent normal errors of `loc_a` and `loc_b`, over which P
                is averaged; None is no error.

        Returns:
            Tensor ``S``, at most 0. Differentiable in all arguments; without errors accurate to 1e-5 relative, value
            and gradients, for -1e4 ≤ (loc_a - loc_b) / s ≤ 10 and scales from 1e-3 to 1e3 (float32 in and out).
        """
        mu_a, sigma_a, mu_b, sigma_b = to_float64(loc_a, scale_a, loc_b, scale_b)
        shapes = _shape_to_float64(shape_a), _shape_to_float64(shape_b)
        errors = to_float64(*(error for error in (error_a, error_b) if error is not None))
        if not errors:
            log_prob = self.log_prob_exceeds(mu_a - mu_b, sigma_a, sigma_b, *shapes)
        else:
            variance = errors[0].square() + (errors[1].square() if len(errors) == 2 else 0)
            # Above 0, where a square root has no gradient.
            error = variance.clamp_min(1e-300).sqrt()
            log_prob = self.log_mean_prob_exceeds(mu_a - mu_b, error, sigma_a, sigma_b, *shapes)
        return _to_dtype_of(log_prob, loc_a, scale_a, loc_b, scale_b)

    def log_prob_less(
        self,
        loc_a: Tensor,
        scale_a: Tensor,
        loc_b: Tensor,
        scale_b: Tensor,
        shape_a: Tensor | None = None,
        shape_b: Tensor | None = None,
        error_a: Tensor | None = None,
        error_b: Tensor | None = None,
    ) -> Tensor:
        """log P(R_a < R_b): the complement, with no cancellation where P(R_a > R_b) is close to 1."""
        return self.log_prob_greater(loc_b, scale_b, loc_a, scale_a, shape_b, shape_a, error_b, error_a)

    def prob_greater(
        self,
        loc_a: Tensor,
        scale_a: Tensor,
        loc_b: Tensor,
        scale_b: Tensor,
        shape_a: Tensor | None = None,
        shape_b: Tensor | None = None,
        error_a: Tensor | None = None,
        error_b: Tensor | None = None,
    ) -> Tensor:
        """P(R_a > R_b), in [0, 1]; arguments as in :meth:`log_prob_greater`."""
        return self.log_prob_greater(loc_a, scale_a, loc_b, scale_b, shape_a, shape_b, error_a, error_b).exp()

    def cdf(self, x: Tensor, loc: Tensor, scale: Tensor, shape: Tensor | None = None) -> Tensor:
        """P(R ≤ x) (broadcast shapes)."""
        wide_x, mu, sigma = to_float64(x, loc, scale)
        return _to_dtype_of(self.log_cdf((wide_x - mu) / sigma, _shape_to_float64(shape)).exp(), x, loc, scale)

    def quantile(self, q: Tensor, loc: Tensor, scale: Tensor, shape: Tensor | None = None) -> Tensor:
        """The reward that R stays below with probability q (broadcast shapes).

        Raises:
            ValueError: unless every q lies strictly between 0 and 1.
        """
        if not bool(((q > 0) & (q < 1)).all()):
            raise ValueError(f"a quantile level must lie strictly between 0 and 1, got {q.tolist()}")
        wide_q, mu, sigma = to_float64(q, loc, scale)
        return _to_dtype_of(mu + sigma * self.standard_quantile(wide_q, _shape_to_float64(shape)), loc, scale)

    def certainty_equivalent(self, loc: Tensor, scale: Tensor, beta: float, shape: Tensor | None = None) -> Tensor:
        """-β log E[e^(-R/β)]: the sure reward that someone with risk tolerance β > 0 takes for R (broadcast shapes).

        It is at most the mean and tends to it as β grows. For the normal it is μ - σ²/2β. Exponential utility and its
        certainty equivalent: J. W. Pratt, 1964; as a reward: arXiv 2606.09073.

        Raises:
            ValueError: where it is -∞, with the reason: for Cauchy always, for logistic and Laplace where σ ≥ β.
        """
        mu, sigma = to_float64(loc, scale)
        cumulant = self.standard_cumulant(-sigma / beta, _shape_to_float64(shape))
        if not bool(cumulant.isfinite().all()):
            raise ValueError(
                f"the certainty equivalent of a {self.name!r} reward is -∞: {self.infinite_cumulant.format(beta=beta)}"
                f" (the largest scale is {sigma.max().item():.4g}); use 'lower_bound' or 'quantile', which always are "
                "finite"
            )
        return _to_dtype_of(mu - beta * cumulant, loc, scale)

    def sample(
        self,
        loc: Tensor,
        scale: Tensor,
        size: Sequence[int] = (),
        generator: torch.Generator | None = None,
        shape: Tensor | None = None,
    ) -> Tensor:
        """Independent draws of R, of shape ``size + S`` for locations and scales that broadcast to ``S``."""
        mu, sigma = to_float64(loc, scale)
        drawn = torch.Size(size) + torch.broadcast_shapes(loc.shape, scale.shape)
        uniform = torch.rand(drawn, dtype=torch.float64, device=mu.device, generator=generator)
        # `rand` can return 0, whose quantile is infinite; its next value is 2⁻⁵³.
        uniform = uniform.clamp_min(2**-53)
        return _to_dtype_of(mu + sigma * self.standard_draw(uniform, _shape_to_float64(shape)), loc, scale)


@functools.cache
def _unit_quadrature() -> tuple[Tensor, Tensor]:
    nodes, weights = np.polynomial.legendre.leggauss(40)
    return torch.from_numpy((nodes + 1) / 2), torch.from_numpy(weights / 2)


@torch.no_grad()
def _error_quadrature(delta: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes η ``[..., K]`` and log weights for the mean over η ~ N(0, 1) of a function of error·η - |delta|.

    Such a function bends where its argument is 0, and more sharply than a normal density where scales are small, which
    is what Gauss–Hermite is slow at. So the line is cut there and each part gets its own Gauss–Legendre rule. The
    upper end leaves room for tails like e^z, which move the integrand's peak from 0 to error / s.
    """
    lowest, highest = -9.0, 12.0
    bend = (delta.abs() / error.clamp_min(1e-300)).clamp_max(highest)[..., None]
    unit_nodes, unit_weights = (tensor.to(delta.device) for tensor in _unit_quadrature())
    nodes = torch.cat([lowest + (bend - lowest) * unit_nodes, bend + (highest - bend) * unit_nodes], dim=-1)
    weights = torch.cat([(bend - lowest) * unit_weights, (highest - bend) * unit_weights], dim=-1)
    return nodes, weights.log() - nodes.square() / 2 - math.log(2 * math.pi) / 2


class Normal(Family):
    """R ~ N(μ, σ²): P(a ≻ b) = Φ((μ_a - μ_b) / √(σ_a² + σ_b²)), exact. L. L. Thurstone, 1927."""

    name = "normal"
    unit_scale = 2 / math.sqrt(math.pi)

    def difference_scale(self, scale_a: Tensor, scale_b: Tensor) -> Tensor:
        return torch.hypot(scale_a, scale_b)

    def log_mean_prob_exceeds(
        self,
        delta: Tensor,
        error: Tensor,
        scale_a: Tensor,
        scale_b: Tensor,
        shape_a: Tensor | None = None,
        shape_b: Tensor | None = None,
    ) -> Tensor:
        return self.log_cdf(delta / torch.hypot(self.difference_scale(scale_a, scale_b), error))

    def log_cdf(self, z: Tensor, shape: Tensor | None = None) -> Tensor:
        # Below 0: Φ(z) = ½ erfcx(-z/√2) exp(-z²/2), whose logarithm never underflows. Above: 1 - Φ(-z) by log1p.
        # `log_ndtr` has the same value, but its float32 gradient is wrong by a factor at z = -1e4 (torch 2.13).
        # Each branch sees only arguments of its own side, so that the unused one has a finite gradient as well.
        lower, upper = z.clamp_max(0), z.clamp_min(0)
        log_lower = torch.log(torch.special.erfcx(-lower / math.sqrt(2)) / 2) - lower.square() / 2
        log_upper = torch.log1p(-torch.special.erfc(upper / math.sqrt(2)) / 2)
        return torch.where(z < 0, log_lower, log_upper)

    def standard_quantile(self, q: Tensor, shape: Tensor | None = None) -> Tensor:
        return torch.special.ndtri(q)

    def standard_cumulant(self, t: Tensor, shape: Tensor | None = None) -> Tensor:
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

    def log_cdf(self, z: Tensor, shape: Tensor | None = None) -> Tensor:
        # P = angle(-z, 1) / π below 0 and 1 - angle(z, 1) / π above: ½ + arctan(z) / π would cancel in either tail.
        tail = torch.atan2(torch.ones_like(z), -_negative_magnitude(z)) / math.pi
        return torch.where(z < 0, tail.log(), torch.log1p(-tail))

    def standard_quantile(self, q: Tensor, shape: Tensor | None = None) -> Tensor:
        # ∓cot of π times the nearer tail's probability, which keeps its accuracy where tan(π(q - ½)) meets its poles.
        return torch.where(q < 0.5, -1.0, 1.0) / torch.tan(math.pi * torch.minimum(q, 1 - q))

    def standard_cumulant(self, t: Tensor, shape: Tensor | None = None) -> Tensor:
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

    def log_cdf(self, z: Tensor, shape: Tensor | None = None) -> Tensor:
        return logsigmoid(z)

    def standard_quantile(self, q: Tensor, shape: Tensor | None = None) -> Tensor:
        return torch.logit(q)

    def standard_cumulant(self, t: Tensor, shape: Tensor | None = None) -> Tensor:
        # E[e^(tε)] = Γ(1 + t) Γ(1 - t) = πt / sin(πt) for |t| < 1, and sinc(t) is its inverse, also at 0.
        return torch.where(t.abs() < 1, -torch.log(torch.sinc(t)), math.inf)


class Laplace(Family):
    """R ~ Laplace(μ, σ), of density e^(-|r - μ| / σ) / 2σ: a peak at what most people say, and tails beyond it.

    With b₁ ≥ b₂ the two scales and t = |μ_a - μ_b|, the less likely order has the probability

        (b₁² e^(-t/b₁) - b₂² e^(-t/b₂)) / (2 (b₁² - b₂²))  =  ½ e^(-t/b₁) (1 + φ(d) t b₂ / (b₁ (b₁ + b₂)))

    where d = t (1/b₂ - 1/b₁) and φ(d) = (1 - e^(-d)) / d. The form on the left is 0/0 at equal scales; the one on the
    right has nothing to cancel there. Mean and median are μ, the variance is 2σ².
    """

    name = "laplace"
    unit_scale = 1.0
    infinite_cumulant = "E[e^(-R/β)] exists only for scales below beta={beta}"

    def difference_scale(self, scale_a: Tensor, scale_b: Tensor) -> Tensor:
        return torch.hypot(scale_a, scale_b)

    def log_prob_exceeds(
        self,
        delta: Tensor,
        scale_a: Tensor,
        scale_b: Tensor,
        shape_a: Tensor | None = None,
        shape_b: Tensor | None = None,
    ) -> Tensor:
        # At equal scales `maximum` and `minimum` pass half of the gradient to either side; the formula is symmetric
        # in b₁ and b₂ there, so that the halves add up to the right one.
        wide, narrow = torch.maximum(scale_a, scale_b), torch.minimum(scale_a, scale_b)
        t = -_negative_magnitude(delta)
        d = t * (wide - narrow) / (wide * narrow)
        excess = _mean_decay(d) * t * narrow / (wide * (wide + narrow))
        return _log_prob_by_tail(delta, torch.log1p(excess) - t / wide - LOG_2)

    def log_cdf(self, z: Tensor, shape: Tensor | None = None) -> Tensor:
        return _log_prob_by_tail(z, _negative_magnitude(z) - LOG_2)

    def standard_quantile(self, q: Tensor, shape: Tensor | None = None) -> Tensor:
        return torch.where(q < 0.5, 1.0, -1.0) * torch.log(2 * torch.minimum(q, 1 - q))

    def standard_cumulant(self, t: Tensor, shape: Tensor | None = None) -> Tensor:
        # E[e^(tε)] = 1 / (1 - t²) for |t| < 1.
        return torch.where(t.abs() < 1, -torch.log1p(-t.square()), math.inf)


def _mean_decay(d: Tensor) -> Tensor:
    """(1 - e^(-d)) / d, the mean of e^(-x) over 0 ≤ x ≤ d, for d ≥ 0; value and gradient, also at and near 0."""
    # The quotient's gradient cancels for small d, where ten terms of Σ (-d)^k / (k + 1)! are exact in float64.
    small, large = d.clamp_max(0.1), d.clamp_min(0.1)
    series = torch.ones_like(d)
    for k in range(10, 1, -1):
        series = 1 - small / k * series
    return torch.where(d < 0.1, series, -torch.expm1(-large) / large)
