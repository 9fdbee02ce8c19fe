"""A PEFT adapter: what its folder holds beside PEFT's own files, and how its reward head comes to be saved with it.

Reading one, and the base model under it, is `disco_trl.models.loading`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from safetensors import safe_open
from transformers.utils import cached_file

from .settings import resolve_settings


ADAPTER_SETTINGS_FILE = "disco_config.json"
"""Holds an adapter's `reward_family` and `fixed_scale`. (Not `config.json`: with that beside the adapter,
`AutoModelForSequenceClassification.from_pretrained(adapter_dir)` would look for a full model there.)"""


HUB_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def save_reward_head(peft_config: Any, head_name: str, newly_initialized: Sequence[str]) -> None:
    """Have PEFT train and save the reward head, and whatever else the checkpoint of the base did not bring."""
    # With any other task type PEFT expects a model that generates, and all-linear takes the head for a target.
    peft_config.task_type = "SEQ_CLS"
    if not hasattr(peft_config, "modules_to_save"):  # prompt learning: the task type alone saves the head
        return
    modules = list(peft_config.modules_to_save or [])
    for name in (head_name, *newly_initialized):
        # A head inside a block (RoBERTa's classifier.out_proj) is saved with the whole block. PEFT itself adds the
        # modules called score and classifier.
        module = name.split(".")[0] if name.startswith(head_name.split(".")[0]) else name
        if module not in ("score", "classifier", *modules):
            modules.append(module)
    peft_config.modules_to_save = modules or None


class _OneFamily:
    """A `PeftModel` whose adapters all are of one family and fixed scale, which are saved with each of them.

    A mixin before PEFT's own class.
    """

    def save_pretrained(self, save_directory: Any, *args: Any, is_main_process: bool = True, **kwargs: Any) -> Any:
        saved = cast(Any, super()).save_pretrained(save_directory, *args, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            save_adapter_settings(self, Path(save_directory))
        return saved

    def load_adapter(self, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        model: Any = self
        _check_same_settings(model.get_base_model(), os.fspath(model_id), kwargs)
        return cast(Any, super()).load_adapter(model_id, adapter_name, *args, **kwargs)


def keep_to_one_family(model: Any) -> None:
    """Make a `PeftModel` around a disco model save family and fixed scale, and refuse adapters of others, in place.

    PEFT neither writes nor reads :data:`ADAPTER_SETTINGS_FILE`: it would put a Cauchy adapter's head beside a normal
    one's, and the scale of either would be read as the first one's. `set_adapter` and `add_weighted_adapter` take only
    what `load_adapter` has let in.
    """
    if not isinstance(model, _OneFamily):
        kind = type(model)
        # It keeps PEFT's name, which is what a user sees and PEFT's model card says.
        model.__class__ = type(
            kind.__name__, (_OneFamily, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__}
        )


def save_adapter_settings(model: Any, directory: Path) -> None:
    """Write :data:`ADAPTER_SETTINGS_FILE` beside each adapter of a `PeftModel` around a disco model."""
    settings = json.dumps(model.get_base_model().config.disco, indent=2) + "\n"
    for name in model.peft_config:
        # PEFT gives every adapter but the one called "default" a folder of its own.
        folder = directory / ("" if name == "default" else name)
        if folder.is_dir():  # else this adapter was not among those to save
            (folder / ADAPTER_SETTINGS_FILE).write_text(settings, encoding="utf-8")


def _check_same_settings(base: Any, path: str, kwargs: dict[str, Any]) -> None:
    hub_kwargs = {name: kwargs[name] for name in HUB_KEYWORDS if kwargs.get(name) is not None}
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
    """A file of a directory or of the Hub; None if there is none of that name."""
    return cached_file(path, name, _raise_exceptions_for_missing_entries=False, **hub_kwargs)


def read_settings(path: str) -> Any:
    """What a file of the name :data:`ADAPTER_SETTINGS_FILE` says."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); save the adapter again") from error


def adapter_shapes(weights_file: str) -> dict[str, list[int]]:
    """Names of an adapter's tensors, as they are in the model, and their shapes."""
    with safe_open(weights_file, framework="pt") as file:
        # PEFT's own prefix, which prompt learning writes without "model."
        return {
            key.removeprefix("base_model.").removeprefix("model."): file.get_slice(key).get_shape()
            for key in file.keys()
        }


def _settings_in_words(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())
