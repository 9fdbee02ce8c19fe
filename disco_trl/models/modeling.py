"""The model: a Hugging Face sequence classifier whose one-number head also says how wide the reward is.

What changes in a stock classifier is its last `nn.Linear` alone. That layer becomes a `DiscoHead` (`heads.py`): the
same layer with the same weight under the same name (the location row), plus a few small submodules. Hence a saved
checkpoint is a plain scalar reward model to any other tool, which ignores the keys of these, and a live one answers
`model(**inputs).logits` and `model.score(hidden_states)` with the location.

Hugging Face pools differently in each architecture, and its own pooling is the only right one for a checkpoint that
it must also load. So while the stock `forward` runs, the head lets its input through: whether the stock code picks a
token's logits or averages those of all, it does so to the hidden states, and the head then works on what remains.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import set_zero3_state

from ..distributions.likelihood import Responses
from ..distributions.reward_distribution import Family, RewardDistribution, get_family
from .heads import THREAD, DiscoHead, EpistemicHead, LikelihoodHead, ScaleHead, ShapeHead
from .loading import load_reward_model
from .outputs import HANDED_ON, OWN_OUTPUTS, RewardModelOutput
from .prefix_sharing import as_attention_mask
from .scalar import ScalarReward
from .settings import merge_likelihood, resolve_settings


# The last layer of the classifiers in transformers that end in a plain linear map. One that goes on after it (an
# activation, a second projection) has another name and is refused, because hidden states would not pass it.
HEAD_LAYER_NAMES = ("score", "classifier", "out_proj")


@contextlib.contextmanager
def _pooling() -> Iterator[None]:
    """While it lasts, heads let their input through, for stock code to pool."""
    THREAD.is_pooling = True
    try:
        yield
    finally:
        THREAD.is_pooling = False


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

    family: Family
    """The family of its rewards."""
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
            reward_family: `"normal"`, `"cauchy"`, `"logistic"`, `"laplace"`, `"mixture"`, or any other registered
                family; by default the checkpoint's, or `"normal"`.
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
        path = os.fspath(pretrained_model_name_or_path)
        return load_reward_model(path, disco_class, reward_family=reward_family, fixed_scale=fixed_scale, **kwargs)

    def reward_distribution(self, **inputs: Any) -> RewardDistribution:
        """The distribution of the reward of each row of a batch, from what the model's `forward` takes.

        Returns:
            :class:`RewardDistribution` with location and scale of shape `[B]`, in float32; `location_error` if the
            model has learned one, or knows what its training data leave open (`epistemic=True` in training).
        """
        return self.rewards_of(self(**inputs))

    def split_columns(self, columns: Tensor) -> dict[str, Any]:
        """What a :class:`DiscoHead` gives `with_scale`, `[..., 2 + S + J]`, as fields of the output."""
        shape_size = len(self.family.shape_names)
        sizes = [1, 1, shape_size, columns.shape[-1] - 2 - shape_size]
        names = ("logits", "scale", "raw_shape", "likelihood")
        parts = zip(names, columns.split(sizes, dim=-1), sizes, strict=True)
        return {name: part for name, part, size in parts if size}

    def rewards_of(self, output: RewardModelOutput) -> RewardDistribution:
        """The distributions `[B]` that a `forward` of this model has come to."""
        shape = output.raw_shape
        errors = [error.squeeze(-1) for name, error in self._learned(output).items() if name == "location_error"]
        if self._epistemic is not None:
            errors.append(self._epistemic(cast(Tensor, output.pooled_hidden_state)))
        return RewardDistribution(
            cast(Tensor, output.logits).squeeze(-1),
            cast(Tensor, output.scale).squeeze(-1),
            self.family,
            shape=None if shape is None else self.family.shape_from_raw(shape),
            location_error=functools.reduce(torch.hypot, errors) if errors else None,
        )

    @property
    def _epistemic(self) -> EpistemicHead | None:
        epistemic = self._head.epistemic
        return epistemic if epistemic is not None and epistemic.is_fitted else None

    @property
    def has_location_error(self) -> bool:
        """Whether its rewards have a `location_error`."""
        return "location_error" in self.config.disco.get("likelihood", {}) or self._epistemic is not None

    def responses_of(self, output: RewardModelOutput) -> Responses:
        """How people answer, as far as this model has learned it."""
        learned = {name: value[0] for name, value in self._learned(output).items() if name != "location_error"}
        return Responses(**learned)

    def _learned(self, output: RewardModelOutput) -> dict[str, Tensor]:
        if output.likelihood is None:
            return {}
        head = cast(LikelihoodHead, self._head.likelihood)
        return dict(zip(head.names, output.likelihood.split(head.sizes, dim=-1), strict=True))

    def as_scalar(self, transform: str = "mean", **options: Any) -> nn.Module:
        """This model with a plain number for a reward, for PPO's `reward_model=`: see
        `disco_trl.models.scalar.ScalarReward`.

        Args:
            transform: what becomes of the distribution, such as `"lower_bound"`; see
            `disco_trl.distributions.transforms`.
            **options: the transform's, such as `k=1.0`.

        Raises:
            ValueError: if the transform needs groups of answers or does not exist for the family, or if the model is
                an encoder.
        """
        return ScalarReward(self, transform, **options)

    @property
    def _head(self) -> DiscoHead:
        # PEFT's wrapper of a trained module hands attributes on to the active copy.
        return functools.reduce(getattr, self.head_name.split("."), cast(Any, self))

    @property
    def scale_head(self) -> ScaleHead:
        """The scale head in use: that of the active adapter, if there is one."""
        return self._head.scale

    def named_reward_heads(self) -> Iterator[tuple[str, DiscoHead]]:
        """Name and module of the head and of the copies that PEFT keeps of it."""
        block = self.head_name.split(".")[0]
        for name, module in getattr(self, block).named_modules(prefix=block):
            stock_name = re.sub(r"\.(original_module|modules_to_save\.[^.]+)", "", name)
            if stock_name == self.head_name and isinstance(module, nn.Linear):
                yield name, cast(DiscoHead, module)

    def know_epistemic(self, most_directions: int) -> None:
        """Have room for what the training data leave open: see :class:`~disco_trl.models.heads.EpistemicHead`."""
        rank = min(most_directions, self._head.in_features)
        for _, head in self.named_reward_heads():
            head.know_epistemic(rank)
        self.config.disco = {**self.config.disco, "epistemic": rank}

    def start_thresholds(self, ratings: Mapping[float, int]) -> None:
        """Begin with the thresholds at which rewards that are all alike would get these ratings so often.

        What a checkpoint has learned already is left as it is.
        """
        family = self.family
        shape = family.shape_from_raw(torch.zeros(len(family.shape_names), dtype=torch.float64))
        for _, head in self.named_reward_heads():
            likelihood = cast(LikelihoodHead, head.likelihood)
            if not likelihood.get_parameter("thresholds").any():
                counts = [ratings.get(value, 0) for value in likelihood.settings["rating_values"]]
                likelihood.start_thresholds(counts, lambda levels: family.quantile(levels, shape))

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ScaleHead | ShapeHead | LikelihoodHead | EpistemicHead):
            module.init_weights()
        else:
            super()._init_weights(module)

    def _convert_heads(self, settings: dict[str, Any]) -> None:
        self.family = family = get_family(settings["reward_family"])
        for _, layer in self.named_reward_heads():
            head = DiscoHead.convert(layer, family.unit_scale, settings["fixed_scale"], len(family.shape_names))
            if "likelihood" in settings:
                head.learn_likelihood(settings["likelihood"])
            if "epistemic" in settings:
                head.know_epistemic(settings["epistemic"])
        self.config.disco = settings
        ignored = getattr(self.config, "keys_to_ignore_at_inference", [])
        stock = [key for key in ignored if key not in OWN_OUTPUTS]
        self.config.keys_to_ignore_at_inference = [*stock, *OWN_OUTPUTS]


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
        parts = self.split_columns(self._head(pooled, with_scale=True))
        location = parts["logits"]
        loss = None if labels is None else F.mse_loss(location.squeeze(-1), labels.to(location).reshape(-1))
        result = RewardModelOutput(
            loss=loss,
            pooled_hidden_state=pooled.detach(),
            **{name: output[name] for name in HANDED_ON if name in output},
            **parts,
        )
        if return_dict is None:
            return_dict = self.config.return_dict
        return result if return_dict else result.to_tuple()

    return forward


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
    # Under ZeRO-3 transformers would take the backbone to pieces and initialize them, which have no data to copy to;
    # inside of `set_zero3_state` it takes somebody else to have seen to that.
    with torch.device("meta"), torch.random.fork_rng(devices=[]), set_zero3_state():
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


def upgrade(
    model: Any,
    reward_family: str | None = None,
    fixed_scale: float | None = None,
    likelihood: dict[str, Any] | None = None,
) -> DiscoRewardModel:
    """Turn a stock sequence classifier into a disco model, in place.

    Args:
        model: a stock classifier with one label, a `PeftModel` around one (whose head is trained), or either with a
            disco model inside, whose settings are then checked.
        reward_family, fixed_scale: as for :meth:`DiscoRewardModel.from_pretrained`.
        likelihood: what is to be learned of how people answer, as the settings of a :class:`LikelihoodHead`.

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
    where = inner.config._name_or_path or name
    settings = resolve_settings(stored, reward_family, fixed_scale, where=where)
    if likelihood:
        settings["likelihood"] = merge_likelihood(settings.get("likelihood", {}), likelihood, where)
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
    elif likelihood:
        for head in heads:
            cast(DiscoHead, head).learn_likelihood(settings["likelihood"])
        inner.config.disco = settings
    return inner
