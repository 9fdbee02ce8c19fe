"""The last layer of a reward model, which turns hidden states into rewards.

The final `nn.Linear` of a stock classifier becomes a [`DiscoHead`] and stays the location row. Its submodules, which
other tools ignore, hold the rest:

- [`~disco_trl.models.scale_head.ScaleHead`]: the scale of each reward;
- [`ShapeHead`]: raw shape parameters, for families that have them;
- [`LikelihoodHead`]: quantities such as the tie width, where the training data hold more than forced choices;
- [`EpistemicHead`]: what the training data leave open about the location row.

They live under the head because PEFT, FSDP and `save_pretrained` treat a module and its submodules as one: whatever
saves the head saves them too.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from ..distributions.likelihood import Responses
from .outputs import HeadOutput
from .scale_head import MEMORY_OF_ROWS, ScaleHead, bounded_exp, bounded_log


# Whether heads return their input. The flag is per thread because a server may call one model from several threads.
_BYPASS = threading.local()


@contextlib.contextmanager
def heads_bypassed() -> Iterator[None]:
    """Make every [`DiscoHead`] return its input unchanged within the context, in this thread only."""
    _BYPASS.is_on = True
    try:
        yield
    finally:
        _BYPASS.is_on = False


class ShapeHead(nn.Module):
    """
    Raw shape parameters of a reward, linear in its hidden state. Weight and bias start at zero.

    Args:
        hidden_size (`int`):
            Size H of the hidden states.
        size (`int`):
            Number S of shape parameters of the family.
        device (`torch.device`, *optional*):
            Device of the parameters.
    """

    def __init__(self, hidden_size: int, size: int, device: torch.device | None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, hidden_size, dtype=torch.float32, device=device))
        self.bias = nn.Parameter(torch.zeros(size, dtype=torch.float32, device=device))

    def init_weights(self) -> None:
        """Set to zero what a checkpoint did not load."""
        for tensor in self.parameters():
            init.zeros_(tensor)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map hidden states of shape `(..., H)` to raw shape parameters of shape `(..., S)`."""
        return F.linear(hidden_states, self.weight.to(hidden_states.dtype), self.bias.to(hidden_states.dtype))


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


class EpistemicHead(nn.Module):
    """
    Error of the location over the posterior of the location row w.

    The posterior is normal, N(w, A⁻¹), over features φ = (h - mean) / unit of the hidden state h. A is the precision λ
    of the prior plus the information of the training pairs, of which the R strongest directions are kept. In all other
    directions the prior holds. `disco_trl.trainer.epistemic` fits it.

    Args:
        hidden_size (`int`):
            Size H of the hidden states.
        rank (`int`):
            Number R of directions.
        device (`torch.device`, *optional*):
            Device of the buffers.

    Attributes:
        mean, unit (`torch.Tensor` of shape `(H,)`):
            Mean and unit of the hidden states.
        directions (`torch.Tensor` of shape `(R, H)`):
            Orthonormal directions.
        variances (`torch.Tensor` of shape `(R,)`):
            Posterior variance of w along each direction.
        prior_variance (`torch.Tensor` of shape `()`):
            1/λ, or 0 if the posterior has not been fitted.
    """

    mean: Tensor
    unit: Tensor
    directions: Tensor
    variances: Tensor
    prior_variance: Tensor

    def __init__(self, hidden_size: int, rank: int, device: torch.device | None):
        super().__init__()
        shapes: dict[str, tuple[int, ...]] = {"mean": (hidden_size,), "unit": (hidden_size,)}
        shapes |= {"directions": (rank, hidden_size), "variances": (rank,), "prior_variance": ()}
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float32, device=device))

    def init_weights(self) -> None:
        """Set to zero what a checkpoint did not load."""
        for tensor in self.buffers():
            init.zeros_(tensor)

    @property
    def is_fitted(self) -> bool:
        """Whether the posterior has been fitted."""
        return bool(self.prior_variance > 0)

    def rescale(self, factor: float) -> None:
        """
        Multiply the standard deviations, in place.

        Args:
            factor (`float`):
                Factor that the locations are multiplied by.
        """
        self.variances.mul_(factor**2)
        self.prior_variance.mul_(factor**2)

    @torch.no_grad()
    def forward(self, hidden_states: Tensor) -> Tensor:
        """
        Compute factors of the errors of locations.

        Args:
            hidden_states (`torch.Tensor` of shape `(..., H)`):
                Pooled hidden states, or those of every token.

        Returns:
            `torch.Tensor` of shape `(..., H)`, float32: A^(-1/2) φ, in reward units. Its norm is the standard
            deviation of the location, and the inner product of two of them the covariance of two locations.
        """
        features = (hidden_states.float() - self.mean) / self.unit
        along = features @ self.directions.T
        rest = features - along @ self.directions
        return self.prior_variance.sqrt() * rest + (along * self.variances.sqrt()) @ self.directions


class DiscoHead(nn.Linear):
    """
    The last layer of a classifier, which is the location row, with the other heads of a reward as submodules.

    It computes in float32 for any dtype of the backbone, because rewards are compared by their differences and
    bfloat16 keeps three digits.

    Attributes:
        scale ([`~disco_trl.models.scale_head.ScaleHead`]):
            Scale of each reward.
        shape ([`ShapeHead`], *optional*):
            Shape parameters, for families that have them.
        likelihood ([`LikelihoodHead`], *optional*):
            What the likelihood learns beside the rewards.
        epistemic ([`EpistemicHead`], *optional*):
            Posterior of the location row.
    """

    scale: ScaleHead
    shape: ShapeHead | None
    likelihood: LikelihoodHead | None
    epistemic: EpistemicHead | None

    @classmethod
    def convert(cls, layer: nn.Linear, unit_scale: float, fixed_scale: float | None, shape_size: int = 0) -> DiscoHead:
        """
        Turn a layer into a head, in place. Its parameters stay the same objects.

        Args:
            layer (`torch.nn.Linear`):
                Last layer of a classifier with one label.
            unit_scale (`float`):
                Unit of the family, in reward units.
            fixed_scale (`float`, *optional*):
                Scale of every reward; `None` learns one.
            shape_size (`int`, *optional*, defaults to `0`):
                Number of shape parameters of the family.
        """
        layer.__class__ = cls
        head = cast(DiscoHead, layer.to(torch.float32))
        head.scale = ScaleHead(head.in_features, unit_scale, fixed_scale, head.weight.device)
        head.shape = ShapeHead(head.in_features, shape_size, head.weight.device) if shape_size else None
        head.likelihood = None
        head.epistemic = None
        head.requires_grad_(head.weight.requires_grad)
        return head

    def add_likelihood(self, settings: dict[str, Any]) -> None:
        """
        Add a [`LikelihoodHead`]. Parameters that the head already has keep their values.

        Args:
            settings (`dict`):
                Settings of the [`LikelihoodHead`].
        """
        before = self.likelihood
        self.likelihood = LikelihoodHead(settings, self.scale.unit_scale, self.weight.device)
        self.likelihood.requires_grad_(self.weight.requires_grad)
        if before is not None:
            for name, parameter in before.named_parameters():
                self.likelihood.get_parameter(name).data.copy_(parameter.data)

    def add_epistemic(self, rank: int) -> None:
        """
        Add an [`EpistemicHead`], unless the head has one of that rank.

        Args:
            rank (`int`):
                Number of directions.
        """
        if self.epistemic is None or len(self.epistemic.variances) != rank:
            self.epistemic = EpistemicHead(self.in_features, rank, self.weight.device)

    @torch.no_grad()
    def responses(self) -> Responses:
        """
        Read how people answer from the parameters, which have to be whole, and not in shards.

        Returns:
            [`~disco_trl.distributions.likelihood.Responses`]: Its tensors are on the CPU. All are `None` if the head
            has no [`LikelihoodHead`].
        """
        learned = {} if self.likelihood is None else self.likelihood.values()
        return to_responses({name: value.cpu() for name, value in learned.items()})

    def tensors(self) -> list[Tensor]:
        """All that a checkpoint holds of the head: its parameters and buffers, without their gradients."""
        return [tensor.detach() for tensor in (*self.parameters(), *self.buffers())]

    @torch.no_grad()
    def refit(
        self, scale_states: Tensor, location: Tensor, factor: float = 1.0, scale_weight: Tensor | None = None
    ) -> None:
        """
        Change a head that has been trained, in place, with everything that hangs on what is changed.

        The factor multiplies all that is learned in reward units: the location, the learned quantities of the
        likelihood and the posterior. The scales keep their unit (see
        [`~disco_trl.models.scale_head.ScaleHead`]). The moments of the traits are estimated again, or a policy's
        answers would be compared with rewards that no longer exist.

        Args:
            scale_states (`torch.Tensor` of shape `(N, H)`):
                States of training rows that the scale is read from, the oldest first.
            location (`torch.Tensor` of shape `(N,)`):
                Their locations, before they are multiplied.
            factor (`float`, *optional*, defaults to `1.0`):
                Factor of the locations. An error that they have by [`~disco_trl.models.scale_head.ScaleHead`] is in
                the unit that it leads to.
            scale_weight (`torch.Tensor` of shape `(1, H)`, *optional*):
                Weight of the scale head. If `None`, it stays.
        """
        self.weight.mul_(factor)
        if self.bias is not None:
            self.bias.mul_(factor)
        for part in (self.likelihood, self.epistemic):
            if part is not None:
                part.rescale(factor)
        if self.scale.fixed_scale is None:
            if scale_weight is not None:
                self.scale.weight.copy_(scale_weight)
            # Older rows weigh e⁻⁸ and less.
            latest = slice(-8 * MEMORY_OF_ROWS, None)
            states, location = scale_states[latest].to(self.weight), factor * location[latest].to(self.weight)
            self.scale.retrack(states, location[:, None])

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, full_output: bool = False, scale_states: Tensor | None = None
    ) -> Tensor | HeadOutput:
        """
        Compute rewards.

        Args:
            hidden_states (`torch.Tensor` of shape `(..., H)`):
                Pooled hidden states, or those of every token.
            full_output (`bool`, *optional*, defaults to `False`):
                Whether to return a [`~disco_trl.models.outputs.HeadOutput`] rather than the location alone. It is an
                argument, and not a method of its own, because FSDP and ZeRO gather the parameters only for a call.
            scale_states (`torch.Tensor` of shape `(..., H)`, *optional*):
                What the scale reads, if it reads a layer of its own. By default `hidden_states`.

        Returns:
            `torch.Tensor` of shape `(..., 1)` or [`~disco_trl.models.outputs.HeadOutput`]: The location, in reward
            units, or everything. Within [`heads_bypassed`], `hidden_states`.

        Raises:
            `ValueError`: If the scale reads a layer of its own, and `scale_states` is missing.
        """
        if getattr(_BYPASS, "is_on", False):
            return hidden_states
        with torch.autocast(hidden_states.device.type, enabled=False):
            hidden_states = hidden_states.to(torch.promote_types(self.weight.dtype, torch.float32))
            bias = None if self.bias is None else self.bias.to(hidden_states.dtype)
            location = F.linear(hidden_states, self.weight.to(hidden_states.dtype), bias)
            if not full_output:
                return location
            if scale_states is None:
                if self.scale.layer is not None:
                    raise ValueError(
                        f"the scale reads layer {self.scale.layer} (scale_layer), so that its head needs "
                        "scale_states, which disco_trl.models.scale_layer computes"
                    )
                scale_states = hidden_states
            return HeadOutput(
                location,
                self.scale(scale_states.to(hidden_states)),
                None if self.shape is None else self.shape(hidden_states),
                None if self.likelihood is None else self.likelihood(hidden_states),
            )
