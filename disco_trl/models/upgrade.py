"""The upgrade of a live stock classifier, or a `PeftModel` around one, to a disco model."""

from __future__ import annotations

from typing import Any, cast

from accelerate.utils import is_peft_model
from torch import nn

from .adapters import add_reward_head, check_kind
from .heads import DiscoHead
from .modeling import DiscoRewardModel, disco_class
from .settings import merge_likelihood, resolve_settings


def upgrade(
    model: Any,
    reward_family: str | None = None,
    fixed_scale: float | None = None,
    likelihood: dict[str, Any] | None = None,
) -> DiscoRewardModel:
    """
    Turn a stock sequence classifier into a disco model, in place.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Stock classifier with one label, or an adapter around one, which is made to train and save the head. Either
            may be a disco model already, whose settings are then checked.
        reward_family (`str`, *optional*):
            As in [`~disco_trl.DiscoRewardModel.from_pretrained`].
        fixed_scale (`float`, *optional*):
            As in [`~disco_trl.DiscoRewardModel.from_pretrained`].
        likelihood (`dict`, *optional*):
            What to learn beside the rewards: settings of a [`~disco_trl.models.likelihood_head.LikelihoodHead`].

    Returns:
        [`~disco_trl.DiscoRewardModel`]: The disco model; for a `PeftModel`, the one inside.

    Raises:
        `ValueError`: If the model has more than one label, has no scalar head, or has a head that is quantized or
            adapted; if its adapter is of a kind that cannot be used, or was loaded for inference; or if the settings
            contradict those of the model.
    """
    inner = model.get_base_model() if is_peft_model(model) else model
    if is_peft_model(model):
        check_kind(model.active_peft_config, inner, "this PeftModel")
        if model.active_peft_config.inference_mode:
            raise ValueError(
                "the adapter of this PeftModel is frozen (inference_mode=True), so nothing would be trained; load it "
                "with is_trainable=True, or make it from a config with inference_mode=False"
            )
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
            # accelerate has bound the stock forward to the instance, so that a new class would have no effect.
            raise ValueError(
                f"this {name} is spread over several devices, and cannot be upgraded in place; pass its name or path, "
                "or load it with DiscoRewardModel.from_pretrained(..., device_map=...)"
            )
        stock = type(inner)
        inner.__class__ = disco_class(stock, inner.config)
    heads = [head for _, head in inner.named_reward_heads()]
    if not is_disco and {type(head) for head in heads} != {nn.Linear}:
        kind = next((type(head) for head in heads if type(head) is not nn.Linear), None)
        kind = kind or type(inner.get_submodule(inner.head_name))
        head_name = inner.head_name
        inner.__class__ = stock  # a model that is refused is left unchanged
        raise ValueError(
            f"the head {head_name!r} of this {name} is a {kind.__module__}.{kind.__name__}; a reward head must "
            "stay whole and in full precision: list it in llm_int8_skip_modules when quantizing, make the PeftModel "
            "with task_type='SEQ_CLS', or pass the name or path of the model instead"
        )
    if not is_disco:
        inner.convert_heads(settings)
    elif likelihood:
        for head in heads:
            cast(DiscoHead, head).add_likelihood(settings["likelihood"])
        inner.config.disco = settings
    if is_peft_model(model):
        add_reward_head(model)
    return inner
