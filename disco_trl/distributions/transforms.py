"""From the distribution of a reward to the one number that an optimizer of policies takes.

=========================  ==============================================  ============================================
transform                  reward                                          what it is for
=========================  ==============================================  ============================================
``mean``                   μ, the location                                 what any scalar reward model gives
``lower_bound``            μ - k σ                                         pays only for what is good for nearly all
``quantile``               F⁻¹(q)                                          the same, said as a share of people
``certainty_equivalent``   -β log E[e^(-R/β)]                              the same, from a utility; exact for risk β
``win_rate``               mean over siblings of P(this ≻ sibling)         bounded, free of the unit of reward
``sample``                 a draw of R                                     people's disagreement, kept as noise
=========================  ==============================================  ============================================

`sample` draws from people's disagreement and not from the model's ignorance: averaged over draws it is `mean`.
`win_rate` compares the answers to one prompt, its siblings, and so needs to know which answers those are. Its values
are probabilities already: in GRPO and RLOO use it with ``scale_rewards="none"``, or dividing by the group's standard
deviation blows the differences up again.

Everything here takes and returns tensors; it is the same code in every place that a reward leaves the model.
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

from .reward_distribution import RewardDistribution, get_family


@dataclass(frozen=True)
class Transform(ABC):
    """A rule that turns distributions into numbers. Options are fields, checked when the transform is made.

    Attributes:
        total: whether the scale counts the error of the location too (`RewardDistribution.total`): not only what
            people disagree about, but also what the model does not know.
    """

    name: ClassVar[str]
    needs_groups: ClassVar[bool] = False
    total: bool = field(default=False, kw_only=True)

    def __call__(self, reward: RewardDistribution, group: Tensor | None = None) -> Tensor:
        """One number for each reward.

        Args:
            reward: location and scale of shape ``S``; ``[B]`` where groups are needed.
            group: LongTensor ``[B]``; rows with equal numbers answer the same prompt.

        Returns:
            Tensor ``S``, in reward units (`win_rate`: a probability).
        """
        return self._of(reward.total() if self.total else reward, group)

    @abstractmethod
    def _of(self, reward: RewardDistribution, group: Tensor | None) -> Tensor:
        """What :meth:`__call__` returns, whatever `total` says."""

    def check_family(self, family: str) -> None:  # noqa: B027 (most exist for all)
        """Raise a `ValueError` with the reason if this transform does not exist for that family."""

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
    """μ - k σ, for k ≥ 0."""

    name = "lower_bound"
    k: float = 1.0

    def __post_init__(self) -> None:
        self._check("k", lambda k: 0 <= k < math.inf, "a finite number of at least 0")

    def _of(self, reward: RewardDistribution, group: Tensor | None) -> Tensor:
        return reward.location - self.k * reward.scale


@dataclass(frozen=True)
class Quantile(Transform):
    """F⁻¹(q), for 0 < q < 1: a share q of people give the answer less."""

    name = "quantile"
    q: float = 0.1

    def __post_init__(self) -> None:
        self._check("q", lambda q: 0 < q < 1, "a number strictly between 0 and 1")

    def _of(self, reward: RewardDistribution, group: Tensor | None) -> Tensor:
        return reward.quantile(self.q)


@dataclass(frozen=True)
class CertaintyEquivalent(Transform):
    """-β log E[e^(-R/β)], for β > 0: see `Family.certainty_equivalent`, also for where it is infinite."""

    name = "certainty_equivalent"
    beta: float = 1.0

    def __post_init__(self) -> None:
        self._check("beta", lambda beta: 0 < beta < math.inf, "a finite number above 0")

    def check_family(self, family: str) -> None:
        # No scale is small enough where even this one is too large.
        tiny = torch.tensor(self.beta * 1e-9, dtype=torch.float64)
        kind = get_family(family)
        start = kind.shape_from_raw(torch.zeros(len(kind.shape_names), dtype=torch.float64))
        kind.certainty_equivalent(torch.zeros_like(tiny), tiny, self.beta, start)

    def _of(self, reward: RewardDistribution, group: Tensor | None) -> Tensor:
        family = get_family(reward.family)
        return family.certainty_equivalent(reward.location, reward.scale, self.beta, reward.shape)


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
        result = torch.full_like(reward.location, 0.5)
        for members in group_members(group):
            if len(members) > 1:
                rewards = reward[members]
                wins = rewards[:, None].prob_greater(rewards[None, :])
                result[members] = (wins.sum(dim=1) - wins.diagonal()) / (len(members) - 1)
        return result


@dataclass(frozen=True)
class Sample(Transform):
    """A draw of R, from a generator that is seeded once."""

    name = "sample"
    seed: int = 0

    def __post_init__(self) -> None:
        self._check("seed", lambda seed: 0 <= seed < 2**63, "an integer from 0 to 2⁶³ - 1", kind=Integral)
        object.__setattr__(self, "_generators", {})

    def _of(self, reward: RewardDistribution, group: Tensor | None) -> Tensor:
        generators: dict[torch.device, torch.Generator] = getattr(self, "_generators")  # noqa: B009 (frozen)
        device = reward.location.device
        if device not in generators:
            generators[device] = torch.Generator(device).manual_seed(int(self.seed))
        return reward.sample(generator=generators[device])


TRANSFORMS: dict[str, type[Transform]] = {
    kind.name: kind for kind in (Mean, LowerBound, Quantile, CertaintyEquivalent, WinRate, Sample)
}


def get_transform(name: str, **options: Any) -> Transform:
    """The transform of that name with its options: `k`, `q`, `beta` or `seed`, and `total`.

    Raises:
        ValueError: if there is no such transform or option, or the option's value is out of its domain.
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
    """The positions (LongTensors) of each group's rows, in the order of the groups' numbers; `group` is `[B]`."""
    order = torch.argsort(group, stable=True)
    _, counts = torch.unique_consecutive(group[order], return_counts=True)
    return list(order.split(counts.tolist()))
