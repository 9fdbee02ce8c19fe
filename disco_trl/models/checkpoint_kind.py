"""What the files of a checkpoint hold: a base language model, a scalar reward model or a disco checkpoint.

The files decide. `config.json` is written by many tools, and what it says of the head (the architecture, the number of
labels) is often left over from the language model, while a trained `[1, H]` head in the files can be nothing else. The
config is asked only where there is no head in the files: then it says whether one was lost.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable
from typing import Any

import torch
import transformers
from torch import nn

from .heads import DiscoHead


LANGUAGE_MODEL_SUFFIXES = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForPreTraining", "ForConditionalGeneration")
# Names that other tools give to a trained reward or value head, at the top of a model
HEADS_OF_OTHERS = re.compile(r"(v_head|value_head|reward_head|rm_head|regression_(head|layer)|score|classifier)\b")
# Buffers in old files that are computed today. transformers drops most of them from what it calls unexpected.
OLD_BUFFERS = re.compile(r"(^|\.)(inv_freq|position_ids|masked_bias|causal_mask|attn\.bias|attention\.bias)$")


class CheckpointKind(enum.Enum):
    """
    What the files of a checkpoint hold. For an adapter: what it and its base model hold together.

    A scale counts because it is there and not for its values: a disco checkpoint that was saved before the first step
    of training, whose scale is still constant, is a disco checkpoint of its family.
    """

    BASE = "base"
    """A language model. Its reward head is newly initialized, so its rewards are random."""
    SCALAR = "scalar"
    """A reward model with a location and without a scale."""
    DISCO = "disco"
    """A reward model with a location and a scale of a known family."""


def kind_of_files(
    model: Any, info: dict[str, Any], path: str, architecture: str | None, is_disco: bool, reward_family: str | None
) -> CheckpointKind:
    """
    Tell from what was loaded which kind of checkpoint it was loaded from.

    Args:
        model ([`~disco_trl.DiscoRewardModel`]):
            The model.
        info (`dict`):
            What transformers reports of the loading: `missing_keys`, `unexpected_keys` and `mismatched_keys`.
        path (`str`):
            Where the files are, for error messages.
        architecture (`str`, *optional*):
            Class that `config.json` names.
        is_disco (`bool`):
            Whether `config.json` has reward settings.
        reward_family (`str`, *optional*):
            Family that the caller asks for.

    Returns:
        [`CheckpointKind`]: The kind.

    Raises:
        `ValueError`: If the files hold a head of another kind, lack a part of what they should hold, or hold weights
            that the config leaves no room for.
    """
    missing = set(info["missing_keys"])
    head = model.get_submodule(model.head_name)
    _check_shapes(model, info["mismatched_keys"], path)
    if not isinstance(head, DiscoHead) or head.weight.dtype != torch.float32:
        raise ValueError(
            f"{path}: the reward head {model.head_name!r} came out as {type(head).__name__} in {head.weight.dtype}; "
            "leave it out of quantization"
        )
    if strange := keys_without_room(model, info["unexpected_keys"]):
        raise ValueError(
            f"{path}: its files hold {first_few(strange)}, for which its config.json leaves no room; without these "
            "weights its rewards would be those of another model. Save the model again with its own config (do "
            "entries such as num_hidden_layers fit?)"
        )
    # Of the weights of a language model itself, only the pooler of an encoder may be new.
    backbone = f"{model.base_model_prefix}."
    if lost := sorted(key for key in missing if key.startswith(backbone) and ".pooler." not in key):
        raise ValueError(
            f"{path}: its files lack {first_few(lost)}; the language model would be random in part. Download or save "
            "it again"
        )
    # Everything that the head has beside the location row. A fixed scale has no keys, and is in the config.
    scale_keys = {f"{model.head_name}.{name}" for name in head.state_dict() if "." in name}
    location_keys = {f"{model.head_name}.{name}" for name in head.state_dict()} - scale_keys
    if location_keys <= missing:
        _check_no_head_is_lost(model, info["unexpected_keys"], path, architecture)
        kind = CheckpointKind.BASE
    elif lost := sorted(missing - scale_keys):
        raise ValueError(
            f"{path}: its files lack {first_few(lost)}; rewards would be random, although the rest of a trained "
            f"{type(model).__name__} is there. Download or save it again"
        )
    else:
        kind = CheckpointKind.DISCO if is_disco or scale_keys - missing else CheckpointKind.SCALAR
    if is_disco and (lost := sorted(missing & scale_keys)):
        raise ValueError(
            f"{path}: config.json says that the scale was learned, but its files lack {', '.join(lost)}; to go on "
            "with its location alone, remove 'disco' from config.json, which makes it a scalar reward model"
        )
    if not is_disco and scale_keys - missing and reward_family is None:
        raise ValueError(
            f"{path}: its files hold a scale, but config.json does not name the family ('disco' is missing there); "
            "pass reward_family= if you know it"
        )
    return kind


def _check_shapes(model: Any, mismatched: Iterable[tuple[str, Any, Any]], path: str) -> None:
    for key, found, expected in sorted(mismatched):
        if key == f"{model.head_name}.weight" and list(found)[1:] == list(expected)[1:]:
            raise ValueError(
                f"{path}: {key} has shape {list(found)} in its files, so it is a classifier with {found[0]} labels "
                f"and not a reward model, whose head has shape {list(expected)}; start from the language model that "
                "it was made of"
            )
        raise ValueError(
            f"{path}: {key} has shape {list(found)} in its files, where config.json makes it {list(expected)}; the "
            "two belong to different models: save the model again with its own config"
        )


def _check_no_head_is_lost(model: Any, unexpected: Iterable[str], path: str, architecture: str | None) -> None:
    """Raise a `ValueError` if files without a head of the stock classifier were to have one, or have another."""
    head = f"{model.head_name}.weight"
    if others := sorted(key for key in unexpected if HEADS_OF_OTHERS.match(key)):
        raise ValueError(
            f"{path}: its files hold the trained head {first_few(others)}, which would be thrown away, because "
            f"{type(model).__name__} has its head in {head}; if it is linear and gives one number, save it under "
            "that name"
        )
    if architecture is None:
        return
    if architecture.endswith("ForSequenceClassification"):
        raise ValueError(
            f"{path}: config.json says {architecture}, a trained reward model, but its files lack {head}; rewards "
            "would be random. The head was probably lost when it was saved: save it again, or start from the language "
            "model it was made of"
        )
    # LlamaModel and BertModel are backbones. LlamaForRewardModel and GPTRewardModel have a head that no stock class
    # would keep.
    is_backbone = architecture.endswith("Model") and not re.search("For|Reward", architecture)
    is_known = hasattr(transformers, architecture) or getattr(model.config, "auto_map", None) is not None
    if not (is_known and (is_backbone or architecture.endswith(LANGUAGE_MODEL_SUFFIXES))):
        raise ValueError(
            f"{path}: config.architectures names {architecture}, whose trained head would be thrown away, because its "
            f"files have none under the name {head}; a reward model starts from a language model or from a "
            "...ForSequenceClassification with one output"
        )


def keys_without_room(model: nn.Module, keys: Iterable[str]) -> list[str]:
    """
    Find the weights among keys that belong into modules of a model, but that these have no place for.

    Those are the layers beyond the number in the config, and weights such as biases of layers that have none. What
    belongs to no module of the model (the head of a language model, the pooler that a classifier does not use) is not
    among them.

    Args:
        model (`torch.nn.Module`):
            The model.
        keys (`Iterable[str]`):
            Keys of a checkpoint that the model does not have.

    Returns:
        `list[str]`: Some of them, sorted.
    """
    keys = list(keys)
    found = set(layers_without_room(model, keys))
    # Quantized checkpoints hold further numbers beside a weight, which their quantizer reads or ignores.
    if getattr(getattr(model, "config", None), "quantization_config", None) is None:
        modules = dict(model.named_modules())
        for key in keys:
            parent = _closest(modules, key)
            module, rest = modules[parent], key.removeprefix(f"{parent}.")
            # Part of a head, an empty place (as the bias of a linear layer without one), or unknown within a layer
            is_head, is_empty = isinstance(module, DiscoHead), hasattr(module, rest)
            if (is_head or is_empty or re.search(r"\.\d+(\.|$)", parent)) and not OLD_BUFFERS.search(key):
                found.add(key)
    return sorted(found)


def layers_without_room(model: nn.Module, keys: Iterable[str]) -> list[str]:
    """
    Find the weights among keys that are of layers beyond the number that a model has.

    Args:
        model (`torch.nn.Module`):
            The model.
        keys (`Iterable[str]`):
            Keys of a checkpoint or an adapter.

    Returns:
        `list[str]`: Some of them, sorted.
    """
    modules = dict(model.named_modules())
    return sorted(key for key in keys if isinstance(modules[_closest(modules, key)], nn.ModuleList))


def _closest(modules: dict[str, nn.Module], key: str) -> str:
    """Name of the innermost module that a key is in; of the model itself, `""`, in the last resort."""
    parent = key.rpartition(".")[0]
    while parent not in modules:
        parent = parent.rpartition(".")[0]
    return parent


def check_finite(model: Any, path: str) -> None:
    """
    Check that the reward heads of a model hold finite values only, without which every reward would be nan.

    Args:
        model ([`~disco_trl.DiscoRewardModel`]):
            The model.
        path (`str`):
            Where it was loaded from, for the error message.

    Raises:
        `ValueError`: If they do not.
    """
    for name, head in model.named_reward_heads():
        for key, tensor in head.state_dict().items():
            if not tensor.is_meta and not bool(tensor.isfinite().all()):
                raise ValueError(
                    f"{path}: {name}.{key} holds values that are not finite, so its rewards would be none; go back to "
                    "an earlier checkpoint of its training"
                )


def first_few(keys: list[str]) -> str:
    """Name the first keys of a list, and how many more there are."""
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
