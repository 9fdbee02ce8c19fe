"""What turns a hidden state into a reward: the last layer of a classifier, with what disco-trl adds to it.

The classifier's own last `nn.Linear` becomes a :class:`DiscoHead`, which is the location row. Beside it, as submodules
that every other tool ignores, are a :class:`ScaleHead`, for families that have shape parameters a :class:`ShapeHead`,
and, where the training data tell more than forced choices, a :class:`LikelihoodHead` with what is learned of how
people answer. All live here so that whatever saves the head saves them too.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers import initialization as init


# log σ stays within this distance of the family's unit: σ never leaves the range in which log P is tested.
MAX_LOG_SCALE = math.log(1e3)
# `is_pooling` is true while a model's `forward` runs the stock one. By thread: a server may call a model from several.
THREAD = threading.local()


def _within_bounds(raw: Tensor) -> Tensor:
    """exp(raw) near 1, and never further than e^±MAX_LOG_SCALE."""
    return torch.exp(MAX_LOG_SCALE * torch.tanh(raw / MAX_LOG_SCALE))


class ScaleHead(nn.Module):
    """The scale of a reward from its hidden state h: σ = u · exp(L tanh(raw / L)), raw = weight · (h - mean_hidden).

    u is the family's unit (`Family.unit_scale`) and L is :data:`MAX_LOG_SCALE`; near the unit log(σ / u) = raw. The
    weight starts at zero, so that a new model gives every answer the scale u and takes no random numbers. With
    `fixed_scale` there is no parameter and σ is that number.

    The likelihood of a preference does not change when all locations and scales are multiplied by one number: left
    alone, both drift along that direction (it is the model's gauge). Here it is gone by construction. `mean_hidden` is
    the mean hidden state of the training rows, so that log(σ / u) has mean zero over them whatever the weight is: the
    geometric mean of the scales is the family's unit, and one unit of reward stays about one logit. Nothing pulls on
    any row's own scale, nothing depends on the batch size or on the number of processes, and nothing needs tuning.

    It is not an `nn.Linear`, which quantizers and `all-linear` adapters would take for one of the backbone's.

    Beside the mean it keeps what the training rows looked like, so that whoever optimizes a policy against the reward
    can be told when the policy's answers look otherwise (:meth:`traits`). Buffers, all of them running moments:

    Attributes:
        weight: parameter `[1, H]`.
        mean_hidden, var_hidden: `[H]`, of the pooled hidden states of the training rows.
        mean_traits, var_traits: `[3]`, of the rows' :meth:`traits`.
        rows_seen: scalar, how many rows these are moments of.
    """

    mean_hidden: Tensor
    var_hidden: Tensor
    mean_traits: Tensor
    var_traits: Tensor
    rows_seen: Tensor

    def __init__(self, hidden_size: int, unit_scale: float, fixed_scale: float | None, device: torch.device | None):
        super().__init__()
        self.unit_scale = unit_scale
        self.fixed_scale = fixed_scale
        if fixed_scale is None:
            shapes = {"mean_hidden": hidden_size, "var_hidden": hidden_size, "mean_traits": 3, "var_traits": 3}
            self.weight = nn.Parameter(torch.zeros(1, hidden_size, dtype=torch.float32, device=device))
            for name, size in shapes.items():
                self.register_buffer(name, torch.zeros(size, dtype=torch.float32, device=device))
            self.register_buffer("rows_seen", torch.zeros((), dtype=torch.float32, device=device))

    def init_weights(self) -> None:
        """Zero everything that a checkpoint did not bring (Hugging Face's `init` skips what it did)."""
        for tensor in (*self.parameters(), *self.buffers()):
            init.zeros_(tensor)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """σ `[..., 1]`, positive, of hidden states `[..., H]`."""
        if self.fixed_scale is not None:
            return hidden_states.new_full((*hidden_states.shape[:-1], 1), self.fixed_scale)
        dtype = hidden_states.dtype
        # In pieces it is seen here by `track` alone: FSDP2 puts a head together while that is called, with its parts.
        weight = self.weight.full_tensor() if isinstance(self.weight, DTensor) else self.weight
        raw = F.linear(hidden_states - self.mean_hidden.to(dtype), weight.to(dtype))
        return self.unit_scale * _within_bounds(raw)

    @torch.no_grad()
    def traits(self, hidden_states: Tensor, location: Tensor, scale: Tensor) -> Tensor:
        """What is compared between training rows and others, `[B, 3]`.

        Location; log(σ / u); and the log of how far the pooled hidden state lies from those of the training rows, as
        the mean over dimensions of its squared distance from their mean, each in units of their variance.

        Args:
            hidden_states: pooled, `[B, H]`.
            location, scale: `[B, 1]`.
        """
        deviation = hidden_states.float() - self.mean_hidden
        distance = (deviation.square() / self.var_hidden.clamp_min(1e-12)).mean(dim=-1, keepdim=True)
        return torch.cat([location, (scale / self.unit_scale).log(), distance.clamp_min(1e-12).log()], dim=-1).float()

    @torch.no_grad()
    def track(
        self,
        hidden_states: Tensor,
        location: Tensor,
        gather: Callable[[Tensor], Tensor] = lambda tensor: tensor,
        memory: float = 512,
    ) -> None:
        """Bring the running moments up to date with one step's rows.

        The weight of a row decays with the number of rows since (e-fold in `memory` rows), and not of steps, so that
        it does not depend on the batch size.

        Args:
            hidden_states: pooled, `[B, H]`, of this process.
            location: `[B, 1]`.
            gather: puts the `[1, ...]` of each process together to `[processes, ...]`.
            memory: rows.
        """

        def update(mean: Tensor, var: Tensor, values: Tensor, share: Tensor) -> None:
            # Each about its own mean (the processes', the step's, the running one), and the means' differences added:
            # moments about one point would cancel where the means are large, as those of hidden states are.
            own_var, own_mean = torch.var_mean(values, dim=0, correction=0)
            means, variances = gather(torch.stack([own_mean, own_var])[None]).unbind(dim=1)
            step_mean = means.mean(dim=0)
            step_var = variances.mean(dim=0) + means.var(dim=0, correction=0)
            shift = step_mean - mean
            mean += share * shift
            var.lerp_(step_var + (1 - share) * shift.square(), share)

        hidden_states = hidden_states.float()
        rows = gather(self.rows_seen.new_tensor([len(hidden_states)])).sum()
        self.rows_seen += rows
        # The new rows' part of all weights so far: of a long run 1 - exp(-rows / memory), of the first step 1.
        share = torch.expm1(-rows / memory) / torch.expm1(-self.rows_seen / memory)
        update(self.mean_hidden, self.var_hidden, hidden_states, share)
        update(self.mean_traits, self.var_traits, self.traits(hidden_states, location, self(hidden_states)), share)


class ShapeHead(nn.Module):
    """The raw shape parameters of a reward, `[..., S]`, from its hidden state; `Family.shape_from_raw` reads them.

    All zeros at first, as the scale's weight is.
    """

    def __init__(self, hidden_size: int, size: int, device: torch.device | None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, hidden_size, dtype=torch.float32, device=device))
        self.bias = nn.Parameter(torch.zeros(size, dtype=torch.float32, device=device))

    def init_weights(self) -> None:
        """Zero what a checkpoint did not bring."""
        for tensor in self.parameters():
            init.zeros_(tensor)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[..., H]` to `[..., S]`."""
        return F.linear(hidden_states, self.weight.to(hidden_states.dtype), self.bias.to(hidden_states.dtype))


class LikelihoodHead(nn.Module):
    """What the likelihood learns beside the rewards themselves, a few numbers for the whole model.

    Args:
        settings: which there are: `location_error` (True), `tie_width` and `label_noise` (a number if it is given,
            `"learned"` if not), `rating_values` (the L ratings, ascending).
        unit_scale: the family's unit; all but the noise are in units of reward.

    A parameter is zero at first, which means: location error and tie width half a unit, label noise 0.06, thresholds a
    unit apart (until :meth:`start_thresholds`).
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
        self.names = tuple(sizes)
        self.sizes = list(sizes.values())
        """How many of the columns of :meth:`forward` belong to each of `names`."""
        for name, size in sizes.items():
            value = settings.get(name)
            if not isinstance(value, float):
                # One-dimensional: FSDP cannot shard a scalar.
                self.register_parameter(name, nn.Parameter(torch.zeros(size, dtype=torch.float32, device=device)))

    def init_weights(self) -> None:
        """Zero what a checkpoint did not bring."""
        for tensor in self.parameters():
            init.zeros_(tensor)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The quantities, in the order of `names`, the same in each row: `[..., H]` to `[..., J]`.

        As columns beside the rewards they come out of a model however it is wrapped and split up.
        """
        columns = torch.cat([self._value(name, hidden_states) for name in self.names])
        return columns.expand(*hidden_states.shape[:-1], -1)

    def _value(self, name: str, like: Tensor) -> Tensor:
        if isinstance(self.settings.get(name), float):
            return like.new_tensor([self.settings[name]])
        raw = getattr(self, name).to(like.dtype)
        if name == "label_noise":
            return torch.sigmoid(raw - 2) / 2
        if name == "thresholds":
            return self.unit_scale * torch.cat([raw[:1], raw[:1] + _within_bounds(raw[1:]).cumsum(dim=0)])
        return 0.5 * self.unit_scale * _within_bounds(raw)

    @torch.no_grad()
    def start_thresholds(self, counts: Sequence[int], standard_quantile: Callable[[Tensor], Tensor]) -> None:
        """Put the thresholds where rewards at location 0 and scale 1 unit would give each rating `counts` times."""
        shares = torch.tensor(counts, dtype=torch.float64) + 1
        at = standard_quantile((shares.cumsum(dim=0) / shares.sum())[:-1])
        self.get_parameter("thresholds").copy_(torch.cat([at[:1], at.diff().clamp_min(1e-2).log()]))

    def take_over(self, other: LikelihoodHead) -> None:
        """Keep what another one has learned already."""
        own = dict(self.named_parameters())
        for name, parameter in other.named_parameters():
            own[name].data.copy_(parameter.data)


class EpistemicHead(nn.Module):
    """What the data leave open about the location row w: the standard deviation of μ over the posterior of w.

    The posterior is normal, N(w, A⁻¹), about hidden states φ = (h - mean) / unit: A is the ridge's precision λ plus
    what the training pairs say, of which the R strongest directions are kept. Outside of them the prior holds.
    `disco_trl.trainer.epistemic` fits it. Buffers:

    Attributes:
        mean, unit: `[H]`.
        directions: `[R, H]`, orthonormal.
        variances: `[R]`, of w along each direction.
        prior_variance: scalar, 1/λ; 0 while nothing has been fitted.
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
        """Zero what a checkpoint did not bring."""
        for tensor in self.buffers():
            init.zeros_(tensor)

    @property
    def is_fitted(self) -> bool:
        """Whether there is anything to tell."""
        return bool(self.prior_variance > 0)

    @torch.no_grad()
    def forward(self, hidden_states: Tensor) -> Tensor:
        """Standard deviation of the location, `[...]`, of hidden states `[..., H]`."""
        features = (hidden_states.float() - self.mean) / self.unit
        along = features @ self.directions.T
        # The rest is a difference of vectors and not of squares, which would cancel.
        rest = features - along @ self.directions
        variance = along.square() @ self.variances + self.prior_variance * rest.square().sum(dim=-1)
        return variance.sqrt()


class DiscoHead(nn.Linear):
    """A classifier's last layer, which is the location row, with a :class:`ScaleHead` and its like beside it.

    It works in float32 whatever the backbone's dtype: rewards are compared by their differences, and bfloat16 keeps
    three digits.
    """

    scale: ScaleHead
    shape: ShapeHead | None
    likelihood: LikelihoodHead | None
    epistemic: EpistemicHead | None

    @classmethod
    def convert(cls, layer: nn.Linear, unit_scale: float, fixed_scale: float | None, shape_size: int = 0) -> DiscoHead:
        """Make a head of this very layer: its parameters stay the same objects."""
        layer.__class__ = cls
        head = cast(DiscoHead, layer.to(torch.float32))
        head.scale = ScaleHead(head.in_features, unit_scale, fixed_scale, head.weight.device)
        head.shape = ShapeHead(head.in_features, shape_size, head.weight.device) if shape_size else None
        head.likelihood = None
        head.epistemic = None
        head.requires_grad_(head.weight.requires_grad)
        return head

    def learn_likelihood(self, settings: dict[str, Any]) -> None:
        """Have these quantities beside the reward; what is there already keeps its values."""
        before = self.likelihood
        self.likelihood = LikelihoodHead(settings, self.scale.unit_scale, self.weight.device)
        self.likelihood.requires_grad_(self.weight.requires_grad)
        if before is not None:
            self.likelihood.take_over(before)

    def know_epistemic(self, rank: int) -> None:
        """Have room for an :class:`EpistemicHead` of that many directions; one that is there keeps its values."""
        if self.epistemic is None or len(self.epistemic.variances) != rank:
            self.epistemic = EpistemicHead(self.in_features, rank, self.weight.device)

    def forward(self, hidden_states: Tensor, with_scale: bool = False) -> Tensor:
        """`[..., H]` to the location `[..., 1]`; `with_scale` to location, scale, raw shape parameters and what is
        learned beside the reward, `[..., 2 + S + J]`, S and J often 0; unchanged while the stock code is pooling."""
        if getattr(THREAD, "is_pooling", False):
            return hidden_states
        with torch.autocast(hidden_states.device.type, enabled=False):
            hidden_states = hidden_states.to(torch.promote_types(self.weight.dtype, torch.float32))
            bias = None if self.bias is None else self.bias.to(hidden_states.dtype)
            location = F.linear(hidden_states, self.weight.to(hidden_states.dtype), bias)
            if not with_scale:
                return location
            others = [module for module in (self.scale, self.shape, self.likelihood) if module is not None]
            return torch.cat([location, *(module(hidden_states) for module in others)], dim=-1)
