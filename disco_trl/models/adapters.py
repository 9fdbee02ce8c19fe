"""PEFT adapters of a reward model: how the head is saved with one, and the settings file beside it.

`disco_trl.models.loading` loads an adapter and its base model.
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


# The file that holds the reward settings of an adapter. It is not called config.json, because with that file
# `AutoModelForSequenceClassification.from_pretrained(adapter_dir)` would expect a full model in the directory.
ADAPTER_SETTINGS_FILE = "disco_config.json"

# Arguments of `from_pretrained` that say where files come from.
HUB_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def save_reward_head(peft_config: Any, head_name: str, newly_initialized: Sequence[str]) -> None:
    """
    Change a PEFT config so that PEFT trains and saves the reward head, and all else that the base model lacks.

    Args:
        peft_config ([`~peft.PeftConfig`]):
            Config to change, in place.
        head_name (`str`):
            Name of the head in the model.
        newly_initialized (`Sequence[str]`):
            Names of the modules that the checkpoint of the base model did not contain.
    """
    # With any other task type PEFT expects a model that generates, and `all-linear` includes the head.
    peft_config.task_type = "SEQ_CLS"
    if not hasattr(peft_config, "modules_to_save"):  # prompt learning, where the task type alone saves the head
        return
    modules = list(peft_config.modules_to_save or [])
    for name in (head_name, *newly_initialized):
        # A head inside a block (classifier.out_proj in RoBERTa) is saved with the whole block. PEFT adds modules that
        # are called score or classifier by itself.
        module = name.split(".")[0] if name.startswith(head_name.split(".")[0]) else name
        if module not in ("score", "classifier", *modules):
            modules.append(module)
    peft_config.modules_to_save = modules or None


class _OneFamily:
    """Mixin for a `PeftModel` whose adapters have the same settings, which are saved with each of them."""

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


def _check_same_settings(base: Any, path: str, kwargs: dict[str, Any]) -> None:
    """Raise a `ValueError` if an adapter has other settings than the model that is to load it."""
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
