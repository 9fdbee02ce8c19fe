"""The scale of a reward: a bounded function of the hidden state, with running moments of the training rows."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers import initialization as init


# Bound of |log(σ / unit)|. It keeps σ in the range in which log P is tested.
MAX_LOG_SCALE = math.log(1e3)
# Number of rows in which the weight of a training row in the running moments decays by a factor of e
MEMORY_OF_ROWS = 512


def bounded_exp(raw: Tensor) -> Tensor:
    """exp(raw) near raw = 0, bounded by e^±MAX_LOG_SCALE."""
    return torch.exp(MAX_LOG_SCALE * torch.tanh(raw / MAX_LOG_SCALE))


def bounded_log(value: Tensor) -> Tensor:
    """Inverse of [`bounded_exp`]. A value at the bounds, or beyond, counts as one just inside."""
    # The distance to the bound is one that float32 resolves.
    return MAX_LOG_SCALE * torch.atanh((value.log() / MAX_LOG_SCALE).clamp(-1 + 1e-6, 1 - 1e-6))


class ScaleHead(nn.Module):
    """
    Scale of a reward as a function of a hidden state h of its answer.

    ```text
    raw = weight · (h - mean_hidden)
    σ   = unit_scale · exp(log_level + L · tanh(raw / L)),    L = MAX_LOG_SCALE
    ```

    Near the unit, log(σ / unit_scale) = raw. The weight starts at zero, so a new model gives every answer the scale
    `unit_scale` and draws no random numbers.

    The likelihood of a preference does not change when all locations and scales are multiplied by one number (the
    gauge of the model), so both would drift along that direction. `mean_hidden` fixes the gauge: it is the running
    mean of the hidden states of the training rows, so the mean of log(σ / unit_scale) over them is zero for any
    weight. The geometric mean of the scales is therefore the unit of the family, and one unit of reward stays about
    one logit. No penalty acts on the scale of a single row, and the result depends neither on the batch size nor on
    the number of processes.

    `log_level` is 0 while the head is trained. Calibration lowers it where some of the variance of a reward is the
    model's own error, see `disco_trl.trainer.calibration`.

    The other buffers describe the training rows, so that a warning can be given when a policy's answers look different
    from them (see [`ScaleHead.traits`]).

    Args:
        hidden_size (`int`):
            Size H of the hidden states.
        unit_scale (`float`):
            Unit of the family (`Family.unit_scale`), in reward units.
        fixed_scale (`float`, *optional*):
            Scale of every reward. If it is given, the module has no parameters and no buffers.
        device (`torch.device`, *optional*):
            Device of the parameters and buffers.

    Attributes:
        weight (`torch.nn.Parameter` of shape `(1, H)`):
            Weight of the raw scale.
        mean_hidden, var_hidden (`torch.Tensor` of shape `(H,)`):
            Running moments of the hidden states that it has read of the training rows.
        mean_traits, var_traits (`torch.Tensor` of shape `(3,)`):
            Running moments of the traits of the training rows.
        rows_seen (`torch.Tensor` of shape `()`):
            Number of rows that the moments were computed from.
        log_level (`torch.Tensor` of shape `()`):
            Log of a factor of all scales.
        location_error (`torch.Tensor` of shape `()`):
            Standard deviation of the model's own error, which every location has, in reward units. 0 until the head is
            calibrated.
        layer (`int`, *optional*):
            Layer whose mean hidden state the scale reads (see `disco_trl.models.scale_layer`). `None` for the pooled
            last hidden state, which the location reads.
    """

    # Not an `nn.Linear`: quantizers and `target_modules="all-linear"` would take it for a layer of the backbone.

    mean_hidden: Tensor
    var_hidden: Tensor
    mean_traits: Tensor
    var_traits: Tensor
    rows_seen: Tensor
    log_level: Tensor
    location_error: Tensor
    layer: int | None = None
    # `location_error` when it was last asked, how often it had changed by then, and whether it was positive
    _asked: tuple[Tensor | None, int, bool] = (None, -1, False)

    def __init__(self, hidden_size: int, unit_scale: float, fixed_scale: float | None, device: torch.device | None):
        super().__init__()
        self.unit_scale = unit_scale
        self.fixed_scale = fixed_scale
        if fixed_scale is None:
            shapes = {"mean_hidden": hidden_size, "var_hidden": hidden_size, "mean_traits": 3, "var_traits": 3}
            self.weight = nn.Parameter(torch.zeros(1, hidden_size, dtype=torch.float32, device=device))
            for name, size in shapes.items():
                self.register_buffer(name, torch.zeros(size, dtype=torch.float32, device=device))
            for name in ("rows_seen", "log_level", "location_error"):
                self.register_buffer(name, torch.zeros((), dtype=torch.float32, device=device))

    def init_weights(self) -> None:
        """Set to zero what a checkpoint did not load. (`transformers.initialization` skips what it did.)"""
        for tensor in (*self.parameters(), *self.buffers()):
            init.zeros_(tensor)

    @torch.no_grad()
    def reset_buffers(self) -> None:
        """Forget the training rows, and what calibration has found."""
        for buffer in self.buffers():
            buffer.zero_()

    @property
    def is_constant(self) -> bool:
        """
        Whether every answer has the same scale: the fixed one, or the unit, because the weight is zero.

        The weight has to be whole, and not in shards.
        """
        return self.fixed_scale is not None or not bool(self.weight.any())

    def forward(self, hidden_states: Tensor) -> Tensor:
        """
        Compute scales.

        Args:
            hidden_states (`torch.Tensor` of shape `(..., H)`):
                What the scale reads of each answer, or at each token.

        Returns:
            `torch.Tensor` of shape `(..., 1)`: Scales, positive, in reward units.
        """
        if self.fixed_scale is not None:
            return hidden_states.new_full((*hidden_states.shape[:-1], 1), self.fixed_scale)
        dtype = hidden_states.dtype
        # FSDP2 gathers the parameters of a head only while the head is called. `track` calls this module alone, and
        # then the weight is still sharded.
        weight = self.weight.full_tensor() if isinstance(self.weight, DTensor) else self.weight
        raw = F.linear(hidden_states - self.mean_hidden.to(dtype), weight.to(dtype))
        return self.unit_scale * self.log_level.exp().to(dtype) * bounded_exp(raw)

    @property
    def level(self) -> float:
        """Scale of an answer whose raw scale is 0, in reward units; of every answer, if it is constant."""
        if self.fixed_scale is not None:
            return self.fixed_scale
        return self.unit_scale * self.log_level.exp().item()

    @property
    def has_location_error(self) -> bool:
        """Whether every location has an error of the model's own."""
        if self.fixed_scale is not None:
            return False
        # Asked at each step, and changed by calibration and loading alone. The host would wait for the device.
        error = self.location_error
        version = -1 if error.is_inference() else error._version  # counts changes in place
        asked, asked_version, answer = self._asked
        if asked is not error or asked_version != version or version < 0:
            answer = bool(error > 0)
            self._asked = error, version, answer
        return answer

    @torch.no_grad()
    def make_constant(self) -> None:
        """Give every answer the same scale, the unit, in place. The moments of the traits follow."""
        if self.fixed_scale is None:
            # Of a parameter that ZeRO-3 has partitioned, this process holds `ds_tensor`.
            getattr(self.weight, "ds_tensor", self.weight).zero_()
            self.mean_traits[1] = self.var_traits[1] = 0

    @torch.no_grad()
    def traits(self, hidden_states: Tensor, location: Tensor, scale: Tensor) -> Tensor:
        """
        Compute the figures by which rows are compared with the training rows.

        Args:
            hidden_states (`torch.Tensor` of shape `(B, H)`):
                What the scale reads of each row.
            location (`torch.Tensor` of shape `(B, 1)`):
                Locations, in reward units.
            scale (`torch.Tensor` of shape `(B, 1)`):
                Scales, in reward units.

        Returns:
            `torch.Tensor` of shape `(B, 3)`, float32: The location; log(σ / unit_scale); and the log of the squared
            distance between the hidden state and `mean_hidden`, averaged over dimensions, each in units of its
            variance in the training rows.
        """
        deviation = hidden_states.float() - self.mean_hidden
        distance = (deviation.square() / self.var_hidden.clamp_min(1e-12)).mean(dim=-1, keepdim=True)
        log_scale = (scale / self.unit_scale).log() - self.log_level
        return torch.cat([location, log_scale, distance.clamp_min(1e-12).log()], dim=-1).float()

    @torch.no_grad()
    def track(
        self,
        hidden_states: Tensor,
        location: Tensor,
        gather: Callable[[Tensor], Tensor] = lambda tensor: tensor,
        memory: float = MEMORY_OF_ROWS,
    ) -> None:
        """
        Update the running moments with the rows of one training step.

        The weight of a row decays by the number of rows that followed it and not by the number of steps, so that the
        moments do not depend on the batch size.

        Args:
            hidden_states (`torch.Tensor` of shape `(B, H)`):
                What the scale has read of the rows of this process.
            location (`torch.Tensor` of shape `(B, 1)`):
                Their locations, in reward units.
            gather (`Callable`, *optional*, defaults to the identity):
                Function that concatenates a tensor of shape `(1, ...)` of each process to `(processes, ...)`, such as
                `accelerator.gather`.
            memory (`float`, *optional*, defaults to `512`):
                Number of rows in which the weight of a row decays by a factor of e.
        """

        def update(mean: Tensor, var: Tensor, values: Tensor, share: Tensor) -> None:
            # Moments about the mean of each process, the step and the run are combined by adding the squared
            # differences of these means. Moments about a common origin would cancel, because hidden states have means
            # that are large against their deviations.
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
        # The share of the new rows in the sum of all weights so far: 1 at the first step, and 1 - exp(-rows / memory)
        # after many.
        share = torch.expm1(-rows / memory) / torch.expm1(-self.rows_seen / memory)
        update(self.mean_hidden, self.var_hidden, hidden_states, share)
        update(self.mean_traits, self.var_traits, self.traits(hidden_states, location, self(hidden_states)), share)

    @torch.no_grad()
    def retrack(self, hidden_states: Tensor, location: Tensor) -> None:
        """
        Estimate the moments of the traits again, for a head that has changed since the training rows went through it.

        The moments of the hidden states stay: the head does not change those.

        Args:
            hidden_states (`torch.Tensor` of shape `(N, H)`):
                What the scale reads of training rows, the oldest first. They weigh as in [`ScaleHead.track`].
            location (`torch.Tensor` of shape `(N, 1)`):
                Their locations, in reward units, by the head as it is now.
        """
        traits = self.traits(hidden_states, location, self(hidden_states)).double()
        age = torch.arange(len(traits) - 1, -1, -1, device=traits.device)
        weight = torch.softmax(-age.double() / MEMORY_OF_ROWS, dim=0)
        mean = weight @ traits
        self.mean_traits.copy_(mean)
        self.var_traits.copy_(weight @ (traits - mean).square())
