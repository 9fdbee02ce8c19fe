"""Rewards for several attributes of an answer, as one random vector: their joint distribution and its projections."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from scipy.stats import multivariate_normal
from torch import Tensor

from .families import Family, Normal, get_family
from .numerics import is_identity, to_dtype_of, to_float64
from .reward_distribution import RewardDistribution


_TOLERANCE = 1e-6
"""Largest deviation of a correlation matrix from symmetry and from a diagonal of ones, which float32 explains."""


class JointRewardDistribution:
    """
    The joint distributions of the rewards of a batch of answers for A attributes, such as helpfulness and verbosity.

    The reward for attribute a is R_a = μ_a + σ_a ε_a. The ε of one person for different attributes are correlated, by
    one matrix for all answers: who likes an answer more than others do for its helpfulness may do so for its style as
    well. Different people, and different answers, are independent.

    A weighted sum of the attributes is a reward again ([`JointRewardDistribution.project`]). With normal rewards it is
    exactly normal, N(wᵀμ, wᵀSCSw) with S = diag(σ) and the correlation matrix C. With Cauchy rewards it is exactly
    Cauchy if the attributes are independent. In the other families it is of no family, and refused.

    Args:
        location (`torch.Tensor` of shape `(B, A)`):
            Locations, in reward units. Any other leading dimensions work as well and take the place of B below.
        scale (`torch.Tensor` of shape `(B, A)`):
            Positive scales, in reward units.
        correlation (`torch.Tensor` of shape `(A, A)`, *optional*):
            Correlation matrix C. By default the identity.
        names (`Sequence[str]`, *optional*):
            Names of the attributes. By default `"0"`, `"1"` and so on.
        family (`str` or [`Family`], *optional*, defaults to `"normal"`):
            Family of each attribute's reward.
        shape (`torch.Tensor` of shape `(B, A, S)`, *optional*):
            Shape parameters of families that have them.
        location_error (`torch.Tensor` of shape `(B, A)`, *optional*):
            Standard deviations of the errors of the locations, independent across attributes; see
            [`RewardDistribution`].
        error_factor (`torch.Tensor` of shape `(B, A, K)`, *optional*):
            What the errors of different answers have in common, for each attribute; see [`RewardDistribution`].

    Raises:
        `ValueError`: If sizes do not match, if names repeat, or if `correlation` is not a correlation matrix:
            symmetric, positive definite, with ones on the diagonal.

    Example:

    ```python
    >>> import torch
    >>> from disco_trl import JointRewardDistribution
    >>> rewards = JointRewardDistribution(
    ...     location=torch.tensor([[1.0, 2.0], [1.5, 0.5]]),
    ...     scale=torch.tensor([[0.3, 0.4], [0.3, 0.4]]),
    ...     correlation=torch.tensor([[1.0, -0.5], [-0.5, 1.0]]),
    ...     names=["helpfulness", "verbosity"],
    ... )
    >>> print(rewards.project({"helpfulness": 1.0, "verbosity": -0.25}))
    [0.50 ± 0.36, 1.38 ± 0.36]
    >>> rewards.prob_all_greater({"helpfulness": 0.8, "verbosity": 1.0})
    tensor([0.7414, 0.1004])

    ```
    """

    def __init__(
        self,
        location: Tensor,
        scale: Tensor,
        correlation: Tensor | None = None,
        names: Sequence[str] | None = None,
        family: str | Family = "normal",
        shape: Tensor | None = None,
        location_error: Tensor | None = None,
        error_factor: Tensor | None = None,
    ) -> None:
        if location.ndim < 2 or scale.shape != location.shape:
            raise ValueError(
                f"location is of size {list(location.shape)} and scale of {list(scale.shape)}; both must be of size "
                "[answers, attributes]"
            )
        count = location.shape[-1]
        self.names = tuple(map(str, range(count))) if names is None else tuple(names)
        if len(self.names) != count or len({*self.names}) != count:
            raise ValueError(f"the names {list(self.names)} must be {count} different ones, one for each attribute")
        self.kind = family if isinstance(family, Family) else get_family(family)
        self.correlation = torch.eye(count).to(scale) if correlation is None else correlation
        _check_correlation(self.correlation, count)
        # Checks the sizes of the rest, and takes over what one attribute needs.
        self._rewards = RewardDistribution(location, scale, self.kind, shape, location_error, error_factor)

    @property
    def location(self) -> Tensor:
        """Locations `(B, A)`, in reward units."""
        return self._rewards.location

    @property
    def scale(self) -> Tensor:
        """Scales `(B, A)`, in reward units."""
        return self._rewards.scale

    @property
    def family(self) -> str:
        """Name of the family."""
        return self._rewards.family

    @property
    def location_error(self) -> Tensor | None:
        """Standard deviations `(B, A)` of the errors of the locations, or `None` if they are exact."""
        return self._rewards.location_error

    @property
    def is_independent(self) -> bool:
        """Whether the correlation matrix is the identity."""
        return is_identity(self.correlation)

    # Batches

    def __len__(self) -> int:
        return len(self.location)

    def __str__(self) -> str:
        return ", ".join(f"{name}: {self.marginal(name)}" for name in self.names)

    def __getitem__(self, index: Any) -> JointRewardDistribution:
        """Selects answers by a slice or a tensor of indices."""
        return self.map(lambda tensor: tensor[index])

    def map(self, function: Callable[[Tensor], Tensor]) -> JointRewardDistribution:
        """
        Applies a function to each tensor of the answers, such as a selection.

        Args:
            function (`Callable[[torch.Tensor], torch.Tensor]`):
                It must treat the first dimension of all tensors alike.

        Returns:
            [`JointRewardDistribution`]: The rewards made of the results.
        """
        return self._with(self._rewards.map(function), self.correlation)

    def to(self, *args: Any, **kwargs: Any) -> JointRewardDistribution:
        """Moves or converts all tensors, as [`torch.Tensor.to`] does."""
        rewards = self._rewards.map(lambda tensor: tensor.to(*args, **kwargs))
        return self._with(rewards, self.correlation.to(*args, **kwargs))

    @classmethod
    def cat(cls, rewards: Sequence[JointRewardDistribution]) -> JointRewardDistribution:
        """
        Concatenates batches of answers, in the order of the arguments.

        Args:
            rewards (`Sequence[JointRewardDistribution]`):
                Batches of one model.

        Returns:
            [`JointRewardDistribution`]: One batch.

        Raises:
            `ValueError`: If there are none, or if they differ in anything but the answers.
        """
        if len({batch.names for batch in rewards}) != 1:
            raise ValueError(f"only rewards for the same attributes can be put together; got {len(rewards)} batches")
        return rewards[0]._with(RewardDistribution.cat([batch._rewards for batch in rewards]), rewards[0].correlation)

    # Rewards of one dimension

    def marginal(self, name: str) -> RewardDistribution:
        """
        The rewards for one attribute.

        Args:
            name (`str`):
                Its name.

        Returns:
            [`RewardDistribution`]: Rewards of shape `(B,)`.

        Raises:
            `ValueError`: If there is no such attribute.
        """
        return self._only(self._place(name))

    def project(self, weights: Mapping[str, float]) -> RewardDistribution:
        """
        A weighted sum of the attributes, Σ w_a R_a.

        Args:
            weights (`Mapping[str, float]`):
                Weights by the names of attributes. A negative weight counts against an answer, and attributes that
                are left out have the weight 0.

        Returns:
            [`RewardDistribution`]: Rewards of shape `(B,)`, of the same family.

        Raises:
            `ValueError`: If an attribute is unknown, if no weight differs from 0 or one is not finite, or if the sum
                is not of the family, with the reason.
        """
        weight = self._weights(weights)
        places = weight.nonzero()[:, 0]
        if len(places) == 1 and (weight[places[0]] > 0 or not self.kind.shape_names):
            # One attribute, in another unit. (Families without shape parameters are symmetric.)
            (place,) = places.tolist()
            factor = weight[place].item()
            only = self._only(place)
            error, shared = only.location_error, only.error_factor
            return only.replace(
                location=factor * only.location,
                scale=abs(factor) * only.scale,
                location_error=None if error is None else abs(factor) * error,
                error_factor=None if shared is None else factor * shared,
            )
        wide = self._rewards.map(to_float64)
        scale = self.kind.scale_of_sum(weight * wide.scale, to_float64(self.correlation))
        error, shared = wide.location_error, wide.error_factor
        error = None if error is None else (weight * error).norm(dim=-1)
        shared = None if shared is None else (weight[:, None] * shared).flatten(-2)
        result = RewardDistribution(wide.location @ weight, scale, self.kind, None, error, shared)
        return result.map(lambda tensor: to_dtype_of(tensor, self.location, self.scale))

    def prob_greater(self, other: JointRewardDistribution, weights: Mapping[str, float]) -> Tensor:
        """
        Evaluates the probability that the weighted sum of this reward exceeds that of another answer.

        Args:
            other ([`JointRewardDistribution`]):
                Rewards of as many answers, for the same attributes.
            weights (`Mapping[str, float]`):
                As in [`JointRewardDistribution.project`].

        Returns:
            `torch.Tensor` of shape `(B,)`: Probabilities in [0, 1], averaged over the errors of the locations.

        Raises:
            `ValueError`: As in [`JointRewardDistribution.project`].
        """
        return self.project(weights).prob_greater(other.project(weights))

    def prob_all_greater(self, bars: Mapping[str, float]) -> Tensor:
        """
        Evaluates the probability that a person's reward exceeds a bar for each of some attributes at once.

        It is about people, and leaves out the errors of the locations.

        Args:
            bars (`Mapping[str, float]`):
                Bars by the names of attributes, in reward units.

        Returns:
            `torch.Tensor` of shape `(B,)`: Probabilities in [0, 1]. For two attributes or more that are correlated, of
                which the rewards have to be normal, they are within 1e-5 (A. Genz, 1992, as `scipy` has it).

        Raises:
            `ValueError`: If an attribute is unknown, if there are none, or if the attributes are correlated and not
                normal.
        """
        if not bars:
            raise ValueError(f"no bar is given; name one or more of the attributes {', '.join(self.names)}")
        places = [self._place(name) for name in bars]
        attributes = torch.tensor(places, device=self.location.device)
        wide = self._rewards.map(lambda tensor: to_float64(tensor.index_select(self.location.ndim - 1, attributes)))
        limit = torch.tensor([float(bar) for bar in bars.values()], dtype=torch.float64, device=wide.location.device)
        z = (limit - wide.location) / wide.scale
        correlation = to_float64(self.correlation)[places][:, places]
        if is_identity(correlation):
            probability = self.kind.log_survival(z, wide.shape).sum(dim=-1).exp()
        elif isinstance(self.kind, Normal):
            # P(ε > z) = P(-ε < -z), and -ε is distributed as ε is.
            at, matrix = (-z.detach()).cpu().numpy(), correlation.cpu().numpy()
            found = multivariate_normal.cdf(at, mean=[0.0] * len(places), cov=matrix) if at.size else []
            probability = torch.as_tensor(found, dtype=torch.float64).reshape(z.shape[:-1]).clamp(0, 1)
        else:
            raise ValueError(
                f"several attributes of {self.family!r} rewards have a known joint distribution only if they are "
                "independent; use the normal family"
            )
        return to_dtype_of(probability, self.location, self.scale)

    def exceeds_all(self, bars: Mapping[str, float], probability: float) -> Tensor:
        """
        Tells whether [`JointRewardDistribution.prob_all_greater`] is at least a number, for most answers at once.

        With the probabilities p_a for each attribute alone, that for all lies between 1 − Σ (1 − p_a) and min p_a
        (M. Fréchet, 1935). Only where the number is between these bounds is it computed.

        Args:
            bars (`Mapping[str, float]`):
                Bars by the names of attributes, in reward units.
            probability (`float`):
                The number, in [0, 1].

        Returns:
            `torch.BoolTensor` of shape `(B,)`: Whether it is.

        Raises:
            `ValueError`: As in [`JointRewardDistribution.prob_all_greater`].
        """
        alone = [self.prob_all_greater({name: bar}) for name, bar in bars.items()]
        if len(alone) < 2:
            return self.prob_all_greater(bars) >= probability
        each = torch.stack(alone, dim=-1)
        found = 1 - (1 - each).sum(dim=-1) >= probability
        is_open = ~found & (each.amin(dim=-1) >= probability)
        if is_open.any():
            found[is_open] = self[is_open].prob_all_greater(bars) >= probability
        return found

    def sample(self, shape: Sequence[int] = (), generator: torch.Generator | None = None) -> Tensor:
        """
        Draws the rewards of people, each for all attributes.

        Args:
            shape (`Sequence[int]`, *optional*, defaults to `()`):
                Leading dimensions of the result, one person for each entry and answer.
            generator (`torch.Generator`, *optional*):
                Source of randomness. If `None`, torch's global one.

        Returns:
            `torch.Tensor` of shape `(*shape, B, A)`: In reward units.

        Raises:
            `ValueError`: If the attributes are correlated and not normal.
        """
        if self.is_independent:
            return self._rewards.sample(shape, generator)
        if not isinstance(self.kind, Normal):
            raise ValueError(
                f"{self.family!r} rewards can be drawn for several attributes only if these are independent; use the "
                "normal family"
            )
        wide = self._rewards.map(to_float64)
        size = (*shape, *wide.location.shape)
        independent = torch.randn(size, dtype=torch.float64, device=wide.location.device, generator=generator)
        factor = torch.linalg.cholesky(to_float64(self.correlation))
        return to_dtype_of(wide.location + wide.scale * (independent @ factor.mT), self.location, self.scale)

    def _with(self, rewards: RewardDistribution, correlation: Tensor) -> JointRewardDistribution:
        return JointRewardDistribution(
            rewards.location,
            rewards.scale,
            correlation,
            self.names,
            self.kind,
            rewards.shape,
            rewards.location_error,
            rewards.error_factor,
        )

    def _only(self, place: int) -> RewardDistribution:
        return self._rewards.map(lambda tensor: tensor.select(self.location.ndim - 1, place))

    def _place(self, name: str) -> int:
        if name not in self.names:
            raise ValueError(f"there is no attribute {name!r}; there are {', '.join(map(repr, self.names))}")
        return self.names.index(name)

    def _weights(self, weights: Mapping[str, float]) -> Tensor:
        """The weights of all attributes `(A,)`, in float64."""
        weight = torch.zeros(len(self.names), dtype=torch.float64, device=to_float64(self.location).device)
        for name, value in weights.items():
            if not math.isfinite(value):
                raise ValueError(f"the weight of {name!r} is {value!r}; give a finite number")
            weight[self._place(name)] = float(value)
        if not weight.any():
            raise ValueError("no attribute has a weight other than 0, which makes every reward 0; give one or more")
        return weight


def _check_correlation(correlation: Tensor, count: int) -> None:
    """Raise a `ValueError` unless this is a correlation matrix of `count` attributes."""
    if correlation.shape != (count, count):
        raise ValueError(
            f"the correlation matrix is of size {list(correlation.shape)}, and must be of size {[count, count]}"
        )
    wide = to_float64(correlation.detach())
    deviation = torch.maximum((wide - wide.mT).abs().max(), (wide.diag() - 1).abs().max())
    if not deviation <= _TOLERANCE:
        raise ValueError(f"{wide.tolist()} is no correlation matrix: make it symmetric, with ones on the diagonal")
    if torch.linalg.cholesky_ex(wide).info.item() or torch.linalg.eigvalsh(wide)[0] <= 0:
        raise ValueError(
            f"{wide.tolist()} is no correlation matrix, as it is not positive definite: no three or more people's "
            "opinions are correlated like that; shrink what is off the diagonal"
        )
