"""What the likelihood learns beside the rewards: tie width, thresholds, boundaries, label noise, location error."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
from scipy.optimize import brentq
from torch import Tensor, nn
from transformers import initialization as init

from ..distributions.likelihood import Responses
from ..distributions.reward_distribution import Family, RewardDistribution
from .scale_head import bounded_exp, bounded_log


def label_noise_from_raw(raw: Tensor) -> Tensor:
    """Map raw parameters of any shape to label noise, from 0 to ½. Training starts at zeros, which stand for 0.06."""
    return torch.sigmoid(raw - 2) / 2


class LikelihoodHead(nn.Module):
    """
    The few numbers that the likelihood learns beside the rewards, one set for the whole model.

    Every parameter starts at zero, which stands for a location error and a tie width of half a unit, a label noise of
    0.06, thresholds one unit apart (until [`LikelihoodHead.init_thresholds`] is called), and boundaries between
    strengths half a unit apart (until [`LikelihoodHead.init_strengths`] is).

    Args:
        settings (`dict`):
            The quantities that exist: `"location_error"` (`True`), `"tie_width"` and `"label_noise"` (a number that is
            used as it is, or `"learned"`), `"rating_values"` (the L rating values in ascending order, for which
            L - 1 thresholds are learned), and `"strength_levels"` (the number L of strengths of a preference, at least
            2, for which L - 1 boundaries above the tie width are learned).
        unit_scale (`float`):
            Unit of the family. All quantities but the label noise are in reward units and scale with it.
        device (`torch.device`, *optional*):
            Device of the parameters.
    """

    def __init__(self, settings: dict[str, Any], unit_scale: float, device: torch.device | None):
        super().__init__()
        self.settings = settings
        self.unit_scale = unit_scale
        sizes: dict[str, int] = {
            name: 1 for name in ("location_error", "tie_width", "label_noise") if name in settings
        }
        if "rating_values" in settings:
            sizes["thresholds"] = len(settings["rating_values"]) - 1
        if "strength_levels" in settings:
            sizes["strength_boundaries"] = settings["strength_levels"] - 1
        self.names = tuple(sizes)
        for name, size in sizes.items():
            if not isinstance(settings.get(name), float):
                # FSDP cannot shard a scalar, so that each parameter has one dimension.
                self.register_parameter(name, nn.Parameter(torch.zeros(size, dtype=torch.float32, device=device)))

    def init_weights(self) -> None:
        """Set to zero what a checkpoint did not load."""
        for tensor in self.parameters():
            init.zeros_(tensor)

    @property
    def in_unit_of_locations(self) -> tuple[str, ...]:
        """
        Names of the quantities that are learned in reward units, and follow the locations if those are multiplied.

        A quantity that the user has given, as a margin is, is one in the unit that the scales fix, and stays.
        """
        return tuple(
            name for name in self.names if name != "label_noise" and not isinstance(self.settings.get(name), float)
        )

    def values(self) -> dict[str, Tensor]:
        """
        Read the quantities from the parameters, which have to be whole, and not in shards.

        Returns:
            `dict` from `str` to `torch.Tensor` of shape `(J,)`: Each quantity by its name, in float32 at least. J is
            the number of thresholds for `"thresholds"`, of boundaries for `"strength_boundaries"`, and 1 otherwise.
        """
        return {name: self._value(name) for name in self.names}

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        """
        Multiply what is learned in reward units, in place.

        Args:
            factor (`float`):
                Factor that the locations are multiplied by.
        """
        before = {name: factor * self._value(name) / self.unit_scale for name in self.in_unit_of_locations}
        lowest = factor * self._lowest_boundary() / self.unit_scale
        for name, in_units in before.items():
            if name == "thresholds":
                raw = torch.cat([in_units[:1], bounded_log(in_units.diff())])
            elif name == "strength_boundaries":
                raw = bounded_log(2 * in_units.diff(prepend=lowest.to(in_units)))
            else:
                raw = bounded_log(2 * in_units)
            self.get_parameter(name).copy_(raw)

    @torch.no_grad()
    def forget_location_error(self) -> None:
        """Make a location error that is learned as small as can be, in place."""
        if "location_error" in self.settings:
            self.get_parameter("location_error").fill_(-1e4)

    def forward(self, hidden_states: Tensor) -> dict[str, Tensor]:
        """
        Return the quantities once for each row of a batch.

        In training they have to be computed by a call of the module: FSDP and ZeRO gather its parameters only then.

        Args:
            hidden_states (`torch.Tensor` of shape `(..., H)`):
                Any hidden states; only their shape, dtype and device matter.

        Returns:
            `dict` from `str` to `torch.Tensor` of shape `(..., J)`: [`LikelihoodHead.values`], the same in each row.
        """
        # Repeated for each row, because DataParallel concatenates the rows of its replicas; and copied rather than
        # expanded, because FSDP2 warns of modules that return views.
        rows = hidden_states.shape[:-1]
        return {name: value.to(hidden_states).repeat(*rows, 1) for name, value in self.values().items()}

    def _value(self, name: str) -> Tensor:
        fixed = self.settings.get(name)
        if isinstance(fixed, float):
            return torch.tensor([fixed])
        parameter = self.get_parameter(name)
        raw = parameter.to(torch.promote_types(parameter.dtype, torch.float32))
        if name == "label_noise":
            return label_noise_from_raw(raw)
        if name == "thresholds":
            return self.unit_scale * torch.cat([raw[:1], raw[:1] + bounded_exp(raw[1:]).cumsum(dim=0)])
        widths = 0.5 * self.unit_scale * bounded_exp(raw)
        if name == "strength_boundaries":
            return self._lowest_boundary().to(widths) + widths.cumsum(dim=0)
        return widths

    def _lowest_boundary(self) -> Tensor:
        """Boundary below the weakest strength, of shape `(1,)`: the tie width, or 0 where nobody could call a tie."""
        return self._value("tie_width") if "tie_width" in self.settings else torch.zeros(1)

    @torch.no_grad()
    def init_thresholds(self, counts: Sequence[int], standard_quantile: Callable[[Tensor], Tensor]) -> None:
        """
        Place the thresholds where rewards of location 0 and scale `unit_scale` would give the observed ratings.

        Args:
            counts (`Sequence[int]`):
                How often each rating value occurs, in ascending order of the values.
            standard_quantile (`Callable`):
                Quantile function of the family at location 0 and scale 1.
        """
        shares = torch.tensor(counts, dtype=torch.float64) + 1  # no rating may have probability zero
        at = standard_quantile((shares.cumsum(dim=0) / shares.sum())[:-1])
        self.get_parameter("thresholds").copy_(torch.cat([at[:1], at.diff().clamp_min(1e-2).log()]))

    @torch.no_grad()
    def init_strengths(self, counts: Sequence[int], difference_quantile: Callable[[float], float]) -> None:
        """
        Place the tie width and the boundaries where answers of equal location would give the observed strengths.

        Args:
            counts (`Sequence[int]`):
                How often each strength occurs, in either direction: the ties, then the strengths 1 to L.
            difference_quantile (`Callable`):
                Quantile function of the difference of two rewards at location 0 and scale `unit_scale`.
        """
        shares = torch.tensor(counts, dtype=torch.float64) + 1  # no strength may have probability zero
        if "tie_width" not in self.settings:
            shares[0] = 0
        # The share below a boundary lies on both sides of 0.
        below = ((shares.cumsum(dim=0) / shares.sum())[:-1] + 1) / 2
        at = torch.tensor([difference_quantile(level) for level in below.tolist()]) / self.unit_scale
        if self.settings.get("tie_width") == "learned":
            self.get_parameter("tie_width").copy_(bounded_log(2 * at[:1].clamp_min(1e-2)))
        self.get_parameter("strength_boundaries").copy_(bounded_log(2 * at.diff().clamp_min(1e-2)))


def difference_quantile(family: Family) -> Callable[[float], float]:
    """
    Makes the quantile function of the difference of two rewards of location 0 and of the unit of their family.

    Args:
        family ([`~disco_trl.distributions.families.Family`]):
            The family.

    Returns:
        `Callable`: From a level of at least ½ to a quantile, in reward units.
    """
    zero = torch.zeros((), dtype=torch.float64)
    shape = family.shape_from_raw(zero.new_zeros(len(family.shape_names))) if family.shape_names else None
    rewards = RewardDistribution(zero, zero + family.unit_scale, family, shape)
    difference = rewards - rewards

    def quantile(level: float) -> float:
        above = math.log1p(-level)
        return brentq(lambda x: difference.log_prob_exceeds(zero + x).item() - above, 0, 1e3 * family.unit_scale)

    return quantile


def width_penalty(likelihood: dict[str, Tensor], unit_scale: float) -> Tensor | None:
    """
    Evaluates the negative log prior of the widths of ratings and strengths that lie between two others.

    Each width is log-normal about half a unit, with a standard deviation of 1. It is worth one judgement or so, and is
    there for a level that the training data do not hold, whose width the likelihood alone would send to zero.

    Args:
        likelihood (`dict` from `str` to `torch.Tensor` of shape `(J,)`):
            Quantities of a [`LikelihoodHead`].
        unit_scale (`float`):
            Unit of the family, in reward units.

    Returns:
        `torch.Tensor` of shape `()`, *optional*: In nats, up to a constant; `None` if there are no widths.
    """
    widths = []
    if "thresholds" in likelihood:
        widths.append(likelihood["thresholds"].diff())
    if "strength_boundaries" in likelihood:
        boundaries = likelihood["strength_boundaries"]
        lowest = likelihood.get("tie_width", boundaries.new_zeros(1))
        widths.append(boundaries.diff(prepend=lowest.to(boundaries)))
    if not widths:
        return None
    return (2 * torch.cat(widths) / unit_scale).clamp_min(1e-12).log().square().sum() / 2


def to_responses(likelihood: dict[str, Tensor]) -> Responses:
    """
    Convert the quantities of a [`LikelihoodHead`], each of shape `(J,)`, to how people answer given their rewards.

    The location error is left out: it belongs to the rewards.
    """
    return Responses(**{field.name: likelihood.get(field.name) for field in fields(Responses)})
