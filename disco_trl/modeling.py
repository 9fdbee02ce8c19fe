"""The model: a Hugging Face sequence classifier whose one-number head also says how wide the reward is.

What changes in a stock classifier is its last `nn.Linear` alone. That layer becomes a :class:`DiscoHead`: the same
layer with the same weight under the same name (the location row), plus a small submodule `scale`. Hence a saved
checkpoint is a plain scalar reward model to any other tool, which ignores the keys under `scale`, and a live one
answers `model(**inputs).logits` and `model.score(hidden_states)` with the location.

Hugging Face pools differently in each architecture, and its own pooling is the only right one for a checkpoint that
it must also load. So while the stock `forward` runs, the head lets its input through: whether the stock code picks a
token's logits or averages those of all, it does so to the hidden states, and the head then works on what remains.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import os
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .distributions import RewardDistribution, get_family
from .prefix_sharing import as_attention_mask


# The last layer of the classifiers in transformers that end in a plain linear map. One that goes on after it (an
# activation, a second projection) has another name and is refused, because hidden states would not pass it.
HEAD_LAYER_NAMES = ("score", "classifier", "out_proj")
# log σ stays within this distance of the family's unit: σ never leaves the range in which log P is tested.
MAX_LOG_SCALE = math.log(1e3)
# `is_pooling` is true while a model's `forward` runs the stock one. By thread: a server may call a model from several.
_THREAD = threading.local()


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
        raw = F.linear(hidden_states - self.mean_hidden.to(dtype), self.weight.to(dtype))
        return self.unit_scale * torch.exp(MAX_LOG_SCALE * torch.tanh(raw / MAX_LOG_SCALE))

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


class DiscoHead(nn.Linear):
    """A classifier's last layer, which is the location row, with a :class:`ScaleHead` beside it.

    It works in float32 whatever the backbone's dtype: rewards are compared by their differences, and bfloat16 keeps
    three digits.
    """

    scale: ScaleHead

    @classmethod
    def convert(cls, layer: nn.Linear, unit_scale: float, fixed_scale: float | None) -> DiscoHead:
        """Make a head of this very layer: its parameters stay the same objects."""
        layer.__class__ = cls
        head = cast(DiscoHead, layer.to(torch.float32))
        head.scale = ScaleHead(head.in_features, unit_scale, fixed_scale, head.weight.device)
        head.scale.requires_grad_(head.weight.requires_grad)
        return head

    def forward(self, hidden_states: Tensor, with_scale: bool = False) -> Tensor:
        """`[..., H]` to the location `[..., 1]`, or to location and scale `[..., 2]`; unchanged during `_pooling`."""
        if getattr(_THREAD, "is_pooling", False):
            return hidden_states
        with torch.autocast(hidden_states.device.type, enabled=False):
            hidden_states = hidden_states.to(torch.promote_types(self.weight.dtype, torch.float32))
            bias = None if self.bias is None else self.bias.to(hidden_states.dtype)
            location = F.linear(hidden_states, self.weight.to(hidden_states.dtype), bias)
            return torch.cat([location, self.scale(hidden_states)], dim=-1) if with_scale else location


@contextlib.contextmanager
def _pooling() -> Iterator[None]:
    """While it lasts, heads let their input through, for stock code to pool."""
    _THREAD.is_pooling = True
    try:
        yield
    finally:
        _THREAD.is_pooling = False


@dataclass
class RewardModelOutput(ModelOutput):
    """What a disco model returns: a stock classifier's fields and, after them, its own.

    Attributes:
        loss: mean squared error of the location, if `labels` were passed (as a stock one-label classifier does).
        logits: Tensor `[B, 1]`, the location.
        scale: Tensor `[B, 1]`, positive.
        pooled_hidden_state: Tensor `[B, H]`, what the head saw of each row, without gradient.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    scale: Tensor | None = None
    pooled_hidden_state: Tensor | None = None


if TYPE_CHECKING:
    _Stock = PreTrainedModel  # every instance is one: `disco_class` puts the stock class behind this one
else:
    _Stock = object


class DiscoRewardModel(_Stock):
    """A sequence classifier that gives each answer a reward distribution.

    It is not built directly: :meth:`from_pretrained` returns an instance of the stock class for the checkpoint's
    architecture (same name, same forward signature) that is also a `DiscoRewardModel`.

    Example:
        >>> from disco_trl import DiscoRewardModel
        >>> from transformers import AutoTokenizer
        >>> model = DiscoRewardModel.from_pretrained("my-reward-model")
        >>> tokenizer = AutoTokenizer.from_pretrained("my-reward-model")
        >>> reward = model.reward_distribution(**tokenizer(["Paris.", "Lyon."], padding=True, return_tensors="pt"))
        >>> reward.location, reward.scale, reward.quantile(0.05)
    """

    head_name: str
    unquantized_modules: tuple[str, ...]
    """What quantization has to leave alone: all that follows the backbone, and an encoder's pooler. In a base model
    they are fresh, and a quantized layer can be neither initialized nor trained."""
    newly_initialized: tuple[str, ...] = ()
    """Names of the modules that the checkpoint did not bring (the head of a base model, an encoder's pooler): they
    have to be trained and saved whole, or the reward is random."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        self._convert_heads(resolve_settings(getattr(config, "disco", None)))

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        reward_family: str | None = None,
        fixed_scale: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a reward model, or start one.

        Args:
            pretrained_model_name_or_path: a Hub id or directory of a disco checkpoint; of a scalar reward model (its
                head becomes the location row); of a base language model (the head starts fresh); or of a PEFT adapter
                (its base is found from its config).
            reward_family: `"normal"`, `"cauchy"` or `"logistic"`; by default the checkpoint's, or `"normal"`.
            fixed_scale: give every reward this scale instead of learning one; by default the checkpoint's setting.
            **kwargs: as for `AutoModelForSequenceClassification.from_pretrained` (dtype, device_map,
                quantization_config, revision, ...). For an adapter, `is_trainable=True` goes on training it.

        Returns:
            The model, or for an adapter a `PeftModel` around it.

        Raises:
            ValueError: if the architecture has no scalar head to build on, if a reward model's head or scale is
                missing from its files, or if `reward_family` or `fixed_scale` contradict the checkpoint.
        """
        if cls is not DiscoRewardModel:  # called on a concrete class: what Hugging Face does
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        from .loading import load_reward_model

        path = os.fspath(pretrained_model_name_or_path)
        return load_reward_model(path, reward_family=reward_family, fixed_scale=fixed_scale, **kwargs)

    def reward_distribution(self, **inputs: Any) -> RewardDistribution:
        """The distribution of the reward of each row of a batch, from what the model's `forward` takes.

        Returns:
            :class:`RewardDistribution` with location and scale of shape `[B]`, in float32.
        """
        output = self(**inputs)
        return RewardDistribution(
            output.logits.squeeze(-1), output.scale.squeeze(-1), self.config.disco["reward_family"]
        )

    def as_scalar(self, transform: str = "mean", **options: Any) -> nn.Module:
        """This model with a plain number for a reward, for PPO's `reward_model=`: see `disco_trl.scalar.ScalarReward`.

        Args:
            transform: what becomes of the distribution, such as `"lower_bound"`; see `disco_trl.transforms`.
            **options: the transform's, such as `k=1.0`.

        Raises:
            ValueError: if the transform needs groups of answers or does not exist for the family, or if the model is
                an encoder.
        """
        from .scalar import ScalarReward

        return ScalarReward(self, transform, **options)

    @property
    def scale_head(self) -> ScaleHead:
        """The scale head in use: that of the active adapter, if there is one."""
        # PEFT's wrapper of a trained module hands attributes on to the active copy.
        return functools.reduce(getattr, [*self.head_name.split("."), "scale"], cast(Any, self))

    def named_reward_heads(self) -> Iterator[tuple[str, DiscoHead]]:
        """Name and module of the head and of the copies that PEFT keeps of it."""
        block = self.head_name.split(".")[0]
        for name, module in getattr(self, block).named_modules(prefix=block):
            stock_name = re.sub(r"\.(original_module|modules_to_save\.[^.]+)", "", name)
            if stock_name == self.head_name and isinstance(module, nn.Linear):
                yield name, cast(DiscoHead, module)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ScaleHead):
            module.init_weights()
        else:
            super()._init_weights(module)

    def _convert_heads(self, settings: dict[str, Any]) -> None:
        unit_scale = get_family(settings["reward_family"]).unit_scale
        for _, layer in self.named_reward_heads():
            DiscoHead.convert(layer, unit_scale, settings["fixed_scale"])
        self.config.disco = settings
        own = ["scale", "pooled_hidden_state"]
        ignored = getattr(self.config, "keys_to_ignore_at_inference", [])
        self.config.keys_to_ignore_at_inference = [*(key for key in ignored if key not in own), *own]


def _distribution_forward(stock: type[PreTrainedModel]) -> Any:
    @functools.wraps(stock.forward)
    def forward(
        self: Any,
        *args: Any,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        nodes: Tensor | None = None,
        read_at: Tensor | None = None,
        **kwargs: Any,
    ) -> RewardModelOutput | tuple[Tensor, ...]:
        if nodes is None:
            with _pooling():
                output = stock.forward(self, *args, return_dict=True, **kwargs)
            pooled = output.logits
        else:
            # Nothing goes on from a forest, so no cache either.
            kwargs |= {"attention_mask": as_attention_mask(nodes), "use_cache": False}
            output = getattr(self, self.base_model_prefix)(*args, return_dict=True, **kwargs)
            pooled = output.last_hidden_state[0, cast(Tensor, read_at).to(output.last_hidden_state.device)]
        # By way of the module and not of its weights: FSDP and ZeRO gather those when it is called.
        head = functools.reduce(getattr, self.head_name.split("."), self)
        location, scale = head(pooled, with_scale=True).split(1, dim=-1)
        loss = None if labels is None else F.mse_loss(location.squeeze(-1), labels.to(location).reshape(-1))
        result = RewardModelOutput(
            loss=loss,
            logits=location,
            past_key_values=output.get("past_key_values"),
            hidden_states=output.get("hidden_states"),
            attentions=output.get("attentions"),
            scale=scale,
            pooled_hidden_state=pooled.detach(),
        )
        if return_dict is None:
            return_dict = self.config.return_dict
        return result if return_dict else result.to_tuple()

    return forward


def resolve_settings(
    stored: dict[str, Any] | None, reward_family: str | None = None, fixed_scale: float | None = None, where: str = ""
) -> dict[str, Any]:
    """Family and fixed scale, from what a checkpoint says and what was asked for.

    Args:
        stored: `config.disco` of a disco checkpoint, or `None` for any other model.
        reward_family, fixed_scale: what was asked for; `None` leaves it to the checkpoint.
        where: path of the checkpoint, for the message.

    Raises:
        ValueError: if what was asked for contradicts the checkpoint, the family is unknown, or the scale not positive.
    """
    asked: dict[str, Any] = {"reward_family": reward_family, "fixed_scale": fixed_scale}
    if stored is None:
        settings: dict[str, Any] = {"reward_family": reward_family or "normal", "fixed_scale": fixed_scale}
    else:
        settings = {name: stored[name] for name in asked}
        for name, value in asked.items():
            if value is not None and value != settings[name]:
                raise ValueError(
                    f"{where}: {name}={value!r} contradicts the checkpoint, which was trained with "
                    f"{name}={settings[name]!r}; leave {name} out to use the checkpoint as it is"
                )
    get_family(settings["reward_family"])
    if settings["fixed_scale"] is not None and not 0 < settings["fixed_scale"] < math.inf:
        raise ValueError(f"fixed_scale={settings['fixed_scale']!r} must be a positive, finite number")
    return settings


_CLASSES: dict[type[PreTrainedModel], type[DiscoRewardModel]] = {}


def disco_class(stock: type[PreTrainedModel], config: PreTrainedConfig) -> type[DiscoRewardModel]:
    """The stock class with a disco head, made once for each architecture.

    It keeps the stock class's name and module: the name is what `save_pretrained` writes into `config.architectures`,
    and transformers reads the module's source to learn what its attention supports.
    """
    if stock not in _CLASSES:
        head_name, unquantized_modules = _find_head(stock, config)
        _CLASSES[stock] = type(
            stock.__name__,
            (DiscoRewardModel, stock),
            {
                "__module__": stock.__module__,
                "__doc__": DiscoRewardModel.__doc__,
                "head_name": head_name,
                "unquantized_modules": unquantized_modules,
                "forward": _distribution_forward(stock),
                "_keep_in_fp32_modules_strict": {*(stock._keep_in_fp32_modules_strict or ()), head_name},
                # Nothing may be missing in silence; TRL (1.12 to 1.16) lets `score.weight` be while it loads.
                "_keys_to_ignore_on_load_missing": None,
            },
        )
    return _CLASSES[stock]


def _find_head(stock: type[PreTrainedModel], config: PreTrainedConfig) -> tuple[str, tuple[str, ...]]:
    """Name of the layer that gives the one logit, and `unquantized_modules`, from an instance without memory."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        model = stock(copy.deepcopy(config))
    backbone = getattr(model, model.base_model_prefix, None)
    inside = set(backbone.modules()) if backbone is not None and backbone is not model else set()
    heads = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == 1 and module not in inside
    ]
    if len(heads) != 1 or heads[0].rpartition(".")[2] not in HEAD_LAYER_NAMES:
        raise ValueError(
            f"{stock.__name__} cannot carry a reward distribution: it has no single last linear layer named "
            f"{' or '.join(HEAD_LAYER_NAMES)} (found: {heads or 'none'}). Use a decoder-only language model, or an "
            "encoder such as BERT, RoBERTa, DeBERTa-v2 or ModernBERT."
        )
    following = [name for name, child in model.named_children() if child is not backbone]
    return heads[0], (*following, r".*\.pooler")


def upgrade(model: Any, reward_family: str | None = None, fixed_scale: float | None = None) -> DiscoRewardModel:
    """Turn a stock sequence classifier into a disco model, in place.

    Args:
        model: a stock classifier with one label, a `PeftModel` around one (whose head is trained), or either with a
            disco model inside, whose settings are then checked.
        reward_family, fixed_scale: as for :meth:`DiscoRewardModel.from_pretrained`.

    Returns:
        The disco model itself, which for a `PeftModel` is the one inside.

    Raises:
        ValueError: if the model has other than one label, no scalar head, a head that is quantized or that the adapter
            would lose, or if the settings contradict it.
    """
    inner = model.get_base_model() if is_peft_model(model) else model
    name = type(inner).__name__
    is_disco = isinstance(inner, DiscoRewardModel)
    stored = inner.config.disco if is_disco else None
    settings = resolve_settings(stored, reward_family, fixed_scale, where=inner.config._name_or_path or name)
    if not is_disco:
        if inner.config.num_labels != 1:
            raise ValueError(
                f"{name} has num_labels={inner.config.num_labels}, but a reward model has one output; load it with "
                "num_labels=1, or pass its name or path instead"
            )
        if hasattr(inner, "_old_forward"):
            # accelerate has bound the stock forward to the instance, so a new class would have no say.
            raise ValueError(
                f"this {name} is spread over several devices, and cannot be upgraded in place; pass its name or path, "
                "or load it with DiscoRewardModel.from_pretrained(..., device_map=...)"
            )
        stock = type(inner)
        inner.__class__ = disco_class(stock, inner.config)
    heads = [head for _, head in inner.named_reward_heads()]
    fault = None
    if not is_disco and {type(head) for head in heads} != {nn.Linear}:
        kind = next((type(head) for head in heads if type(head) is not nn.Linear), None)
        kind = kind or type(inner.get_submodule(inner.head_name))
        fault = (
            f"the head {inner.head_name!r} of this {name} is a {kind.__module__}.{kind.__name__}; a reward head must "
            "stay whole and in full precision: list it in llm_int8_skip_modules when quantizing, make the PeftModel "
            "with task_type='SEQ_CLS', or pass the name or path of the model instead"
        )
    elif is_peft_model(model) and not any(head.weight.requires_grad for head in heads):
        fault = (
            f"the adapter of this PeftModel neither trains nor saves the reward head, so the reward would be lost "
            f"with it; make it with task_type='SEQ_CLS', or modules_to_save=[{inner.head_name.split('.')[0]!r}] (and "
            "is_trainable=True when loading it to go on training)"
        )
    if fault is not None:
        if not is_disco:
            inner.__class__ = stock  # a model that is refused is left as it was
        raise ValueError(fault)
    if not is_disco:
        inner._convert_heads(settings)
    return inner
