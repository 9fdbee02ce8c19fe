"""PEFT adapters of a reward model: how the head is saved with one, and the settings file beside it.

`disco_trl.models.loading` loads an adapter and its base model.
"""

from __future__ import annotations

import inspect
import json
import os
import re
from pathlib import Path
from typing import Any, cast

from safetensors import safe_open
from transformers.utils import cached_file, logging

from .settings import resolve_settings


logger = logging.get_logger(__name__)


# The file that holds the reward settings of an adapter. It is not called config.json, because with that file
# `AutoModelForSequenceClassification.from_pretrained(adapter_dir)` would expect a full model in the directory.
ADAPTER_SETTINGS_FILE = "disco_config.json"

# Arguments of `from_pretrained` that say where files come from.
HUB_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


# Kinds of adapters that no reward model can have, and why (PEFT 0.20 to 0.21).
UNFIT_KINDS = {
    "CPT": "PEFT loads it for causal language models only",
    "LILY": "it mixes its weights by averages over a batch, so that a reward would depend on the other rows and on "
    "padding",
    "MULTITASK_PROMPT_TUNING": "it needs a task id with each text, which comparisons do not have",
    "POLY": "it needs a task id with each text, which comparisons do not have",
}
FIT_KINDS = "use LoRA (LoraConfig) or another kind that has modules_to_save"


def check_kind(peft_config: Any, model: Any, where: str = "peft_config") -> None:
    """
    Check that rewards are right with an adapter of this kind, and that it trains and saves the reward head.

    Args:
        peft_config ([`~peft.PeftConfig`]):
            Config of the adapter.
        model ([`~transformers.PreTrainedModel`]):
            Classifier that has the adapter, or is to have it.
        where (`str`, *optional*, defaults to `"peft_config"`):
            Where the config comes from, for the error message.

    Raises:
        `ValueError`: If an adapter of this kind cannot be used.
    """
    kind = getattr(peft_config.peft_type, "value", peft_config.peft_type)
    reason = UNFIT_KINDS.get(kind)
    if not hasattr(peft_config, "modules_to_save"):
        reason = "it neither trains nor saves the reward head, and the reward would be lost with it"
        if kind == "TRAINABLE_TOKENS":
            reason += " (LoraConfig has trainable_token_indices as well)"
    if peft_config.is_prompt_learning and model.config.is_encoder_decoder:
        reason = "it passes embeddings, and the classifier of an encoder-decoder finds the end of a text by its ids"
    # PEFT passes the prefix under this name, which transformers has renamed in 5.24.
    elif (
        kind in ("PREFIX_TUNING", "CARTRIDGE") and "past_key_values" not in inspect.signature(model.forward).parameters
    ):
        reason = f"PEFT passes it as past_key_values, which this {type(model).__name__} does not take"
    if reason is not None:
        raise ValueError(f"{where}: a reward model cannot have an adapter of the kind {kind}: {reason}; {FIT_KINDS}")


def save_reward_head(peft_config: Any, model: Any) -> None:
    """
    Change a PEFT config so that PEFT trains and saves the reward head, and all else that the base model lacks.

    Args:
        peft_config ([`~peft.PeftConfig`]):
            Config to change, in place.
        model ([`~disco_trl.DiscoRewardModel`]):
            Model that is to have the adapter.

    Raises:
        `ValueError`: If an adapter of this kind cannot be used; see [`check_kind`].
    """
    check_kind(peft_config, model)
    # With any other task type PEFT expects a model that generates, and `all-linear` includes the head.
    peft_config.task_type = "SEQ_CLS"
    if peft_config.inference_mode:
        logger.warning(
            "peft_config has inference_mode=True, as the config of a saved adapter does, under which nothing would be "
            "trained; the adapter is trained all the same"
        )
        peft_config.inference_mode = False
    modules = list(peft_config.modules_to_save or [])
    for name in (model.head_name, *model.newly_initialized):
        # A head inside a block (classifier.out_proj in RoBERTa) is saved with the whole block. PEFT adds modules that
        # are called score or classifier by itself.
        block = model.head_name.split(".")[0]
        module = block if name.startswith(block) else name
        if module not in ("score", "classifier", *modules):
            modules.append(module)
    peft_config.modules_to_save = modules or None


def add_reward_head(model: Any) -> None:
    """
    Have the active adapter of a `PeftModel` train and save the reward head, if it does not yet, in place.

    The head of an adapter that was made without `task_type="SEQ_CLS"` or `modules_to_save` is frozen, so that TRL
    would train the adapter around a random head, and save it without the head. Layers beside the backbone that are
    frozen as well, such as the pooler of an encoder, stay so, as with TRL, but are saved: they may be random, too.

    Args:
        model ([`~peft.PeftModel`]):
            Adapter around a disco model.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    inner = model.get_base_model()
    if any(head.weight.requires_grad for _, head in inner.named_reward_heads()):
        return
    adapter, peft_config = model.active_adapters[0], model.active_peft_config
    block = inner.head_name.split(".")[0]
    beside = re.compile("|".join(inner.unquantized_modules))
    saved = {
        name: module
        for name, module in inner.named_modules()
        if (name == block or beside.fullmatch(name))
        and any(True for _ in module.parameters())
        and not any(isinstance(part, BaseTunerLayer | ModulesToSaveWrapper) for part in module.modules())
    }
    for name, module in saved.items():
        wrapper = ModulesToSaveWrapper(module, adapter)
        wrapper.set_adapter(adapter, inference_mode=name != block)
        inner.set_submodule(name, wrapper)
    peft_config.modules_to_save = [*(peft_config.modules_to_save or []), *saved]
    peft_config.task_type = "SEQ_CLS"


class _OneFamily:
    """Mixin for a `PeftModel` whose adapters have the same settings, which are saved with each of them."""

    def save_pretrained(self, save_directory: Any, *args: Any, is_main_process: bool = True, **kwargs: Any) -> Any:
        saved = cast(Any, super()).save_pretrained(save_directory, *args, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            save_adapter_settings(self, Path(save_directory))
        return saved

    def load_adapter(self, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        model: Any = self
        _check_can_join(model.get_base_model(), os.fspath(model_id), kwargs)
        return cast(Any, super()).load_adapter(model_id, adapter_name, *args, **kwargs)


def keep_to_one_family(model: Any) -> None:
    """
    Make a `PeftModel` save the reward settings with each adapter and refuse adapters with others, in place.

    PEFT neither writes nor reads [`ADAPTER_SETTINGS_FILE`]. It would load the head of a Cauchy adapter beside that of
    a normal one, and the scales of both would be read as those of the first. Checking `load_adapter` is enough,
    because `set_adapter` and `add_weighted_adapter` know only adapters that it has loaded.

    Args:
        model ([`~peft.PeftModel`]):
            Adapter around a disco model. Its class is replaced by a subclass.
    """
    if not isinstance(model, _OneFamily):
        kind = type(model)
        # The subclass keeps the name that PEFT gave it, which users and PEFT's model card see.
        model.__class__ = type(
            kind.__name__, (_OneFamily, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__}
        )


def save_adapter_settings(model: Any, directory: Path) -> None:
    """
    Write [`ADAPTER_SETTINGS_FILE`] beside each adapter of a `PeftModel` around a disco model.

    Args:
        model ([`~peft.PeftModel`]):
            The model.
        directory (`Path`):
            Where PEFT has saved the adapters.
    """
    settings = json.dumps(model.get_base_model().config.disco, indent=2) + "\n"
    for name in model.peft_config:
        # PEFT saves every adapter in a subfolder, except the one called "default".
        folder = directory / ("" if name == "default" else name)
        if folder.is_dir():  # `selected_adapters` may leave some out
            (folder / ADAPTER_SETTINGS_FILE).write_text(settings, encoding="utf-8")


def _check_can_join(base: Any, path: str, kwargs: dict[str, Any]) -> None:
    """Raise a `ValueError` if a model cannot load an adapter: for its kind, or because its settings are others."""
    from peft import PeftConfig

    hub_kwargs = {name: kwargs[name] for name in HUB_KEYWORDS if kwargs.get(name) is not None}
    check_kind(PeftConfig.from_pretrained(path, **hub_kwargs), base, path)
    own = base.config.disco
    settings_file = find_file(path, ADAPTER_SETTINGS_FILE, hub_kwargs)
    weights_file = find_file(path, "adapter_model.safetensors", hub_kwargs)
    if settings_file is not None:
        other = resolve_settings(read_settings(settings_file), where=path)
        if other != own:
            raise ValueError(
                f"{path}: the adapter was trained with {_settings_in_words(other)}, but this model and its adapters "
                f"with {_settings_in_words(own)}; rewards of the two cannot be compared or merged. Load it on its own"
            )
    elif weights_file is not None and any(
        key.startswith(f"{base.head_name}.scale.") for key in adapter_shapes(weights_file)
    ):
        raise ValueError(
            f"{path}: the adapter holds a scale, but {ADAPTER_SETTINGS_FILE}, which names its family, is missing; put "
            "that file there if you know the family"
        )


def find_file(path: str, name: str, hub_kwargs: dict[str, Any]) -> str | None:
    """
    Find a file of a checkpoint, downloading it if needed.

    Args:
        path (`str`):
            Directory or Hub id.
        name (`str`):
            Name of the file.
        hub_kwargs (`dict`):
            Values of [`HUB_KEYWORDS`].

    Returns:
        `str`, *optional*: Path of the file, or `None` if the checkpoint has no file of that name.

    Raises:
        `OSError`: If the repository does not exist or cannot be read.
    """
    # transformers (5.18 to 5.24) has no public way to ask this. By default `cached_file` raises the same error for a
    # missing file as for a missing repository, and `has_file` takes an error of the server for a missing file, after
    # which an adapter would be read without its settings.
    return cached_file(path, name, _raise_exceptions_for_missing_entries=False, **hub_kwargs)


def read_settings(path: str) -> Any:
    """
    Read the settings of an adapter, which are not validated.

    Args:
        path (`str`):
            Path of an [`ADAPTER_SETTINGS_FILE`].

    Raises:
        `ValueError`: If the file is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); save the adapter again") from error


def adapter_shapes(weights_file: str) -> dict[str, list[int]]:
    """
    Read the names and shapes of the tensors of an adapter, without loading them.

    Args:
        weights_file (`str`):
            Path of an `adapter_model.safetensors`.

    Returns:
        `dict` from `str` to `list[int]`: Shapes by the names that the tensors have in the base model.

    Raises:
        `safetensors.SafetensorError`: If the file is damaged or cut short.
    """
    with safe_open(weights_file, framework="pt") as file:
        # The prefix of PEFT, which prompt learning writes without "model."
        return {
            key.removeprefix("base_model.").removeprefix("model."): file.get_slice(key).get_shape()
            for key in file.keys()
        }


def _settings_in_words(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())
