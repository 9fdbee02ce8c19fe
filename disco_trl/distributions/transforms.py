"""From the distribution of a reward to the one number that an optimizer of policies takes.

=========================  ==============================================  ============================================
transform                  reward                                          purpose
=========================  ==============================================  ============================================
``mean``                   μ, the location                                 what any scalar reward model gives
``lower_bound``            μ − k σ                                         pays only for what is good for nearly all
``quantile``               F⁻¹(q)                                          the same, stated as a share of people
``certainty_equivalent``   −β log E[e^(−R/β)]                              the same, from a utility; exact for risk β
``win_rate``               mean over siblings of P(this ≻ sibling)         bounded, independent of the unit of reward
``sample``                 a draw of R                                     keeps people's disagreement as noise
=========================  ==============================================  ============================================

`sample` draws from people's disagreement and not from the model's ignorance; averaged over draws it is `mean`.
`win_rate` compares the answers to one prompt, its siblings, and so needs to know which answers those are. Its values
are probabilities already. In GRPO and RLOO, use it with `scale_rewards="none"`: dividing by the group's standard
deviation would undo the bound.

Every place where a reward leaves the model uses this code.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from .families import get_family
from .reward_distribution import RewardDistribution


@dataclass(frozen=True)
class Transform(ABC):
    """
    A rule that turns distributions into numbers. Its options are fields, which are checked when it is made.

    Args:
        total (`bool`, *optional*, defaults to `False`):
            Whether the scale also counts the error of the location ([`RewardDistribution.total`]): not only what
            people disagree about, but also what the model does not know.
    """

    name: ClassVar[str]
    needs_groups: ClassVar[bool] = False
    total: bool = field(default=False, kw_only=True)

    def __call__(self, reward: RewardDistribution, group: Tensor | None = None) -> Tensor:
        """
        Transforms rewards.

        Args:
            reward ([`RewardDistribution`] of shape `(...)`):
                The rewards; of shape `(B,)` if the transform needs groups.
            group (`torch.LongTensor` of shape `(B,)`, *optional*):
                Rows with equal numbers are answers to the same prompt.

        Returns:
            `torch.Tensor` of shape `(...)`: One number for each reward, in reward units, or for `win_rate` a
            probability.
        """
        values = self._of(reward.total() if self.total else reward, group)
        return values if reward.cap is None else torch.minimum(values, reward.cap.to(values))

    @abstractmethod
    def _of(self, reward: RewardDistribution, group: Tensor | None) -> Tensor:
        """What `__call__` returns, whatever `total` says."""

    def check_family(self, family: str) -> None:  # noqa: B027 (most exist for all)
        """
        Checks that the transform exists for a family, before there are any rewards.

        Args:
            family (`str`):
                The name of the family.

        Raises:
            `ValueError`: If it does not exist, with the reason.
        """

    def _check(self, option: str, is_valid: Callable[[Any], bool], domain: str, kind: type = Real) -> None:
        value = getattr(self, option)
        # `is_valid` is written so that nan, which no comparison is true of, is refused as well.
        if isinstance(value, bool) or not isinstance(value, kind) or not is_valid(value):
            raise ValueError(f"transform {self.name!r}: {option}={value!r} must be {domain}")


@dataclass(frozen=True)
class Mean(Transform):
    """μ, the location. (For Cauchy, whose mean does not exist, it is the median.)"""

    name = "mean"

    def _of(self, reward: RewardDistribution, group: Tensor | None) -> Tensor:
        return reward.location


@dataclass(frozen=True)
class LowerBound(Transform):
    """
    μ − k σ.

    Args:
        k (`float`, *optional*, defaults to `1.0`):
            How many scales below the location, at least 0.
    """

    name = "lower_bound"
    k: float = 1.0

    def __post_init__(self) -> None:
        self._check("k", lambda k: 0 <= k < math.inf, "a finite number of at least 0")

    def _of(self, reward: RewardDistribution, group: Tensor | None) -> Tensor:
        return reward.location - self.k * reward.scale


@dataclass(frozen=True)
class Quantile(Transform):
    """
    F⁻¹(q).

    Args:
        q (`float`, *optional*, defaults to `0.1`):
            The share of people who give the answer less, strictly between 0 and 1.
    """

    name = "quantile"
    q: float = 0.1

    def __post_init__(self) -> None:
        self._check("q", lambda q: 0 < q < 1, "a number strictly between 0 and 1")

    def check_family(self, family: str) -> None:
        kind = get_family(family)
        start = kind.shape_from_raw(torch.zeros(len(kind.shape_names), dtype=torch.float64))
        quantile = kind.quantile(torch.tensor(self.q, dtype=torch.float64), start)
        if not quantile.float().isfinite():
            raise ValueError(
                f"transform 'quantile': at q={self.q!r} the quantile of a {family!r} reward is beyond float32 "
                f"({quantile.item():.3g} scales from the location); choose a less extreme level"
            )

    def _of(self, reward: RewardDistribution, group: Tensor | None) -> Tensor:
        return reward.quantile(self.q)


@dataclass(frozen=True)
class CertaintyEquivalent(Transform):
    """
    −β log E[e^(−R/β)]: see [`RewardDistribution.certainty_equivalent`], also for where it is infinite.

    Args:
        beta (`float`, *optional*, defaults to `1.0`):
            Risk tolerance above 0, in reward units.
    """

    name = "certainty_equivalent"
    beta: float = 1.0

    def __post_init__(self) -> None:
        self._check("beta", lambda beta: 0 < beta < math.inf, "a finite number above 0")

    def check_family(self, family: str) -> None:
        # A family that is infinite even for a scale as small as this one is infinite for all.
        tiny = torch.tensor(self.beta * 1e-9, dtype=torch.float64)
        kind = get_family(family)
        start = kind.shape_from_raw(torch.zeros(len(kind.shape_names), dtype=torch.float64))
        self._of(RewardDistribution(torch.zeros_like(tiny), tiny, kind, start), None)

    def _of(self, reward: RewardDistribution, group: Tensor | None) -> Tensor:
        return reward.certainty_equivalent(self.beta)


@dataclass(frozen=True)
class WinRate(Transform):
    """The mean over siblings, the other answers to the prompt, of P(this ≻ sibling); ½ where there is none."""

    name = "win_rate"
    needs_groups = True

    def _of(self, reward: RewardDistribution, group: Tensor | None) -> Tensor:
        if group is None:
            raise ValueError(
                "transform 'win_rate' compares the answers to one prompt, and nothing here says which those are; use "
                "it where groups of answers are scored (DiscoReward in GRPO or RLOO, best_of_n), or another transform"
            )
        # A probability has at least float32, whatever the type of the location.
        dtype = torch.promote_types(reward.location.dtype, torch.float32)
        result = torch.full_like(reward.location, 0.5, dtype=dtype)
        for members in group_members(group):
            if len(members) > 1:
                pairs = torch.cartesian_prod(members, members)
                wins = reward.prob_greater_within(*pairs.T).reshape(len(members), -1)
                result[members] = (wins.sum(dim=1) - wins.diagonal()) / (len(members) - 1)
        return result


@dataclass(frozen=True)
class Sample(Transform):
    """
    A draw of R.

    Args:
        seed (`int`, *optional*, defaults to `0`):
            Seeds a generator once, so that calls continue one stream of random numbers.
    """

    name = "sample"
    seed: int = 0

    def __post_init__(self) -> None:
        self._check("seed", lambda seed: 0 <= seed < 2**63, "an integer from 0 to 2⁶³ - 1", kind=Integral)
        object.__setattr__(self, "_generators", {})

    def _of(self, reward: RewardDistribution, group: Tensor | None) -> Tensor:
        # A generator belongs to a device, and which one that is only a reward says.
        generators: dict[torch.device, torch.Generator] = getattr(self, "_generators")  # noqa: B009 (frozen)
        device = reward.location.device
        if device not in generators:
            generators[device] = torch.Generator(device).manual_seed(int(self.seed))
        return reward.sample(generator=generators[device])


TRANSFORMS: dict[str, type[Transform]] = {
    kind.name: kind for kind in (Mean, LowerBound, Quantile, CertaintyEquivalent, WinRate, Sample)
}
"""All transforms by their names."""


def get_transform(name: str, **options: Any) -> Transform:
    """
    Makes a transform.

    Args:
        name (`str`):
            A name in `TRANSFORMS`.
        **options:
            Those of the transform: `k`, `q`, `beta` or `seed`, and `total`.

    Returns:
        [`Transform`]: The transform.

    Raises:
        `ValueError`: If there is no such transform or option, or if the value of an option is out of its domain.
    """
    if name not in TRANSFORMS:
        raise ValueError(f"transform={name!r} is unknown; choose one of {', '.join(map(repr, TRANSFORMS))}")
    known = [field.name for field in dataclasses.fields(TRANSFORMS[name])]
    known = [*known[1:], known[0]]  # its own before `total`, which all have
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            fix = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(map(repr, known))}"
            raise ValueError(f"transform {name!r} has no option {option!r}; {fix}")
    if not isinstance(options.get("total", False), bool):
        raise ValueError(f"transform {name!r}: total={options['total']!r} must be True or False")
    return TRANSFORMS[name](**options)


def group_members(group: Tensor) -> list[Tensor]:
    """
    Finds the rows of each group.

    Args:
        group (`torch.LongTensor` of shape `(B,)`):
            The number of each row's group.

    Returns:
        `list[torch.LongTensor]`: The positions of each group's rows, ascending, in the order of the groups' numbers.
    """
    order = torch.argsort(group, stable=True)
    _, counts = torch.unique_consecutive(group[order], return_counts=True)
    return list(order.split(counts.tolist()))
