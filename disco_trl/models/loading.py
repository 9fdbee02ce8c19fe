"""The loading of a model from files: a base language model, a scalar reward model, a disco checkpoint or an adapter.

No reward may be random without an error. `disco_trl.models.checkpoint_kind` decides from what was loaded what a
checkpoint is, and whether it is complete. A reward head or scale that is missing is an error, because a warning would
scroll away during training.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any, cast

from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import find_adapter_config_file, logging

from .adapters import (
    ADAPTER_SETTINGS_FILE,
    HUB_KEYWORDS,
    adapter_shapes,
    check_kind,
    find_file,
    keep_to_one_family,
    read_settings,
)
from .checkpoint_kind import CheckpointKind, check_finite, first_few, kind_of_files, layers_without_room
from .settings import merge_likelihood, resolve_settings


logger = logging.get_logger(__name__)

# `disco_trl.models.modeling.disco_class`, which makes the class of a disco model from a stock classifier and its
# config. It is an argument because that class itself imports this module.
ClassFactory = Callable[[type[PreTrainedModel], PreTrainedConfig], Any]


HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def check_found(path: str, hub_kwargs: dict[str, Any] | None = None) -> None:
    """
    Check that a model exists before any of its files is asked for, whose own error would be about that file.

    Args:
        path (`str`):
            Directory or Hub id.
        hub_kwargs (`dict`, *optional*):
            Values of [`~disco_trl.models.adapters.HUB_KEYWORDS`].

    Raises:
        `FileNotFoundError`: If there is neither such a folder nor such a model on the Hub.
    """
    if os.path.isdir(path):
        return
    if os.path.isfile(path):
        raise FileNotFoundError(f"{path} is a file; name the folder of the model")
    if not HUB_ID.fullmatch(path):
        raise FileNotFoundError(f"{path}: there is no such folder")
    names = ("config.json", "adapter_config.json", "tokenizer_config.json")
    try:
        if any(find_file(path, name, hub_kwargs or {}) is not None for name in names):
            return
        reason = "it is not in the cache, and the Hub is out of reach, or has no model of that name"
    except OSError as error:
        reason = " ".join(str(error).split())
    raise FileNotFoundError(f"{path}: there is no such folder, and no such model on the Hub ({reason})")


def load_reward_model(
    path: str | os.PathLike[str],
    disco_class: ClassFactory,
    *,
    reward_family: str | None = None,
    fixed_scale: float | None = None,
    is_trainable: bool = False,
    **kwargs: Any,
) -> tuple[Any, CheckpointKind]:
    """
    Load a disco model and say what it was loaded from.

    Args:
        path (`str` or `os.PathLike`):
            Hub id or directory of a full checkpoint or a PEFT adapter.
        disco_class (`Callable`):
            [`~disco_trl.models.modeling.disco_class`].
        reward_family (`str`, *optional*):
            As in [`~disco_trl.DiscoRewardModel.from_pretrained`].
        fixed_scale (`float`, *optional*):
            As in [`~disco_trl.DiscoRewardModel.from_pretrained`].
        is_trainable (`bool`, *optional*, defaults to `False`):
            Whether to continue the training of an adapter.
        **kwargs:
            Arguments of `AutoModelForSequenceClassification.from_pretrained`.

    Returns:
        `tuple` of ([`~disco_trl.DiscoRewardModel`] or [`~peft.PeftModel`]) and [`CheckpointKind`]: The model and its
        kind.

    Raises:
        `ValueError`: As in [`~disco_trl.DiscoRewardModel.from_pretrained`].
    """
    path = os.fspath(path)
    hub_kwargs = {name: kwargs.pop(name) for name in HUB_KEYWORDS if kwargs.get(name) is not None}
    probe_kwargs = {name: value for name, value in hub_kwargs.items() if name != "force_download"}
    check_found(path, probe_kwargs)
    if find_adapter_config_file(path, **probe_kwargs) is not None:
        return _load_adapter(path, disco_class, hub_kwargs, is_trainable, reward_family, fixed_scale, kwargs)
    return _load_full(path, disco_class, hub_kwargs, reward_family, fixed_scale, kwargs)


def _load_full(
    path: str,
    disco_class: ClassFactory,
    hub_kwargs: dict[str, Any],
    reward_family: str | None,
    fixed_scale: float | None,
    kwargs: dict[str, Any],
    stored_with_adapter: dict[str, Any] | None = None,
) -> tuple[Any, CheckpointKind]:
    # 1. Config: whether the architecture can be a reward model, and its settings. These arguments say how to load and
    # not what, so they must not become entries of the config.
    names = ("dtype", "torch_dtype", "quantization_config", "device_map")
    loading = {name: kwargs.pop(name) for name in names if name in kwargs}
    trust_remote_code = bool(kwargs.pop("trust_remote_code", False))
    kwargs.pop("num_labels", None)  # always 1
    kwargs.pop("ignore_mismatched_sizes", None)  # a head of another shape is an error
    config = copy.deepcopy(kwargs.pop("config", None))  # it is changed below, and belongs to the caller
    if config is None:
        with _naming_bad_files(path, TypeError):  # a list, say, where an object should be
            config, kwargs = AutoConfig.from_pretrained(
                path, return_unused_kwargs=True, trust_remote_code=trust_remote_code, **hub_kwargs, **kwargs
            )
    architecture = (config.architectures or [None])[0]
    stored = getattr(config, "disco", None)
    settings = resolve_settings(stored, reward_family, fixed_scale, where=path)
    beside = stored_with_adapter or {}
    if "likelihood" in beside:
        settings["likelihood"] = merge_likelihood(settings.get("likelihood", {}), beside["likelihood"], path)
    if stored_with_adapter is not None:
        settings.pop("scale_layer", None)  # the scale is the adapter's own, and so is what it reads
    settings |= {name: beside[name] for name in ("epistemic", "scale_layer", "attributes") if name in beside}
    stock = stock_class(config, path, trust_remote_code, hub_kwargs)
    config.num_labels = 1
    config.disco = settings
    disco = disco_class(stock, config)

    # 2. Quantization: it skips the head, and every module that a base model lacks.
    if hasattr(loading.get("quantization_config"), "llm_int8_skip_modules"):
        loading["quantization_config"] = copy.deepcopy(loading["quantization_config"])
        skipped = loading["quantization_config"].llm_int8_skip_modules or []
        loading["quantization_config"].llm_int8_skip_modules = [*skipped, *disco.unquantized_modules]

    # 3. Weights, and what they make of the checkpoint. The load report of transformers is silenced: it calls the new
    # head of a base model a fault, too.
    with _quiet_transformers(), _naming_bad_files(path):
        model, info = disco.from_pretrained(
            path,
            config=config,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, with the name of the key
            trust_remote_code=trust_remote_code,
            **hub_kwargs,
            **loading,
            **kwargs,
        )
    kind = kind_of_files(model, info, path, architecture, stored is not None, reward_family)
    check_finite(model, path)
    model.newly_initialized = tuple(sorted({key.rpartition(".")[0] for key in info["missing_keys"]}))
    return model, kind


def _load_adapter(
    path: str,
    disco_class: ClassFactory,
    hub_kwargs: dict[str, Any],
    is_trainable: bool,
    reward_family: str | None,
    fixed_scale: float | None,
    kwargs: dict[str, Any],
) -> tuple[Any, CheckpointKind]:
    from peft import PeftConfig, PeftModel

    # 1. Settings
    with _naming_bad_files(path, TypeError):
        peft_config = PeftConfig.from_pretrained(path, **hub_kwargs)
    settings_file = find_file(path, ADAPTER_SETTINGS_FILE, hub_kwargs)
    stored = None
    if settings_file is not None:
        stored = read_settings(settings_file)
        settings = resolve_settings(stored, reward_family, fixed_scale, where=path)
        reward_family, fixed_scale = settings["reward_family"], settings["fixed_scale"]
    weights_file = find_file(path, "adapter_model.safetensors", hub_kwargs)
    if weights_file is None:
        raise ValueError(f"{path}: the adapter has no adapter_model.safetensors (pickled weights are not loaded)")
    with _naming_bad_files(path):
        shapes = adapter_shapes(weights_file)

    # 2. Base model. Revision and subfolder are those of the adapter, so the base model does not get them.
    base_kwargs = {name: value for name, value in hub_kwargs.items() if name not in ("revision", "subfolder")}
    if peft_config.revision is not None:
        base_kwargs["revision"] = peft_config.revision
    if not isinstance(peft_config.base_model_name_or_path, str):
        raise ValueError(f"{path}: adapter_config.json names no base model (base_model_name_or_path); add its path")
    try:
        check_found(peft_config.base_model_name_or_path, base_kwargs)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path}: its base model cannot be found ({error}); set base_model_name_or_path in adapter_config.json"
        ) from error
    base, base_kind = _load_full(
        peft_config.base_model_name_or_path, disco_class, base_kwargs, reward_family, fixed_scale, kwargs, stored
    )

    # 3. Kind, and what the adapter has to contain: whatever its base lacks, and the whole head if that was trained
    check_kind(peft_config, base, path)
    head, scale = base.head_name, f"{base.head_name}.scale"
    expected = list(base.get_submodule(head).weight.shape)
    if (found := shapes.get(f"{head}.weight", expected)) != expected:
        raise ValueError(
            f"{path}: {head}.weight has shape {found} in its files, where a reward model on its base model "
            f"{peft_config.base_model_name_or_path} has {expected}; it is a classifier, or of another base model"
        )
    if strange := layers_without_room(base, shapes):
        raise ValueError(
            f"{path}: the adapter holds {first_few(strange)}, which its base model "
            f"{peft_config.base_model_name_or_path} does not have; load it on the base model that it was trained on"
        )
    brings_scale = any(key.startswith(f"{scale}.") for key in shapes)
    if stored is None and brings_scale and reward_family is None:
        raise ValueError(
            f"{path}: the adapter holds a scale, but {ADAPTER_SETTINGS_FILE}, which names its family, is missing; "
            "pass reward_family= if you know it"
        )
    is_disco = stored is not None or brings_scale or base_kind is CheckpointKind.DISCO
    kind = CheckpointKind.DISCO if is_disco else CheckpointKind.SCALAR
    modules_to_save = getattr(peft_config, "modules_to_save", None) or ()
    trained_whole = [head] if any(f".{module}." in f".{head}." for module in modules_to_save) else []
    needed = {
        f"{name}.{key}"
        for name in (*base.newly_initialized, *trained_whole)
        for key in base.get_submodule(name).state_dict()
    }
    if kind is CheckpointKind.SCALAR:
        needed = {key for key in needed if not key.startswith(f"{scale}.")}
    if lost := sorted(needed - shapes.keys()):
        raise ValueError(
            f"{path}: the adapter lacks {first_few(lost)}, so its rewards would be random, or those of its base "
            f"model {peft_config.base_model_name_or_path}; it was lost when the adapter was saved (train it with "
            "task_type='SEQ_CLS' or modules_to_save)"
        )

    # 4. What training changed in the base model and no config.json of an adapter records: vocabulary and padding token
    _resize_vocabulary(base, shapes, peft_config, path)
    if find_file(path, "tokenizer_config.json", hub_kwargs) is not None:
        pad_token_id = AutoTokenizer.from_pretrained(path, trust_remote_code=False, **hub_kwargs).pad_token_id
        if pad_token_id is not None:
            base.config.get_text_config().pad_token_id = pad_token_id

    # 5. Adapter. PEFT refuses one that does not contain every tensor of the head, so the scale that a scalar adapter
    # lacks is taken away while PEFT loads, and added again.
    if kind is CheckpointKind.SCALAR:
        del base.get_submodule(head).scale
    with _refusing_half_an_adapter(path, peft_config.base_model_name_or_path):
        model = PeftModel.from_pretrained(base, path, is_trainable=is_trainable, **hub_kwargs)
    if kind is CheckpointKind.SCALAR:
        base.convert_heads(base.config.disco)
    check_finite(base, path)
    keep_to_one_family(model)
    return model, kind


@contextlib.contextmanager
def _refusing_half_an_adapter(path: str, base: str) -> Iterator[None]:
    """Raise a `ValueError` where PEFT warns that a model has adapted layers for which the files have no weights."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*Found missing adapter keys", category=UserWarning)
        try:
            yield
        except UserWarning as error:
            raise ValueError(
                f"{path}: its files lack a part of the adapter that its base model {base} is to have, as if it had "
                f"been trained on another ({str(error)[:300]}); load it on the base model that it was trained on"
            ) from error


@contextlib.contextmanager
def _naming_bad_files(path: str, *of_configuration: type[Exception]) -> Iterator[None]:
    """Add the path of the checkpoint to errors of readers, which name only what they found in a file."""
    fix = "download or save the checkpoint again"
    configuration: tuple[type[Exception], ...] = (RecursionError, json.JSONDecodeError, *of_configuration)
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{path}: its weights are not whole ({error}); {fix}") from error
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: its pickled weights hold more than tensors, so reading them might run code, and they were not "
            "read; save the model as safetensors where you trust it"
        ) from error
    except AssertionError as error:  # torch's, when an embedding is built whose padding index is not one of its rows
        raise ValueError(
            f"{path}: its configuration is not what it should be ({error}); set pad_token_id in config.json to the id "
            "of a token that the model has"
        ) from error
    except configuration as error:
        raise ValueError(f"{path}: its configuration is not what it should be ({error}); {fix}") from error


def _resize_vocabulary(base: Any, shapes: dict[str, list[int]], peft_config: Any, path: str) -> None:
    """
    Resize the embeddings of the base model to the number of tokens it had when the adapter was saved.

    TRL adds tokens when it clones a chat template. PEFT then saves the embeddings with the adapter (unless it cannot
    read the config of the base model, as offline), but does not resize the base model when it loads them.
    """
    embeddings = base.get_input_embeddings()
    (name,) = (name for name, module in base.named_modules() if module is embeddings)
    rows = len(embeddings.weight)
    # Names of the embeddings: saved whole, wrapped by an adapter of the layer, or by one of some of its tokens
    keys = (f"{name}.{layer}weight" for layer in ("", "base_layer.", "token_adapter.base_layer."))
    saved_rows = next((shapes[key][0] for key in keys if key in shapes), None)
    if saved_rows is None:
        indices = getattr(peft_config, "trainable_token_indices", None) or ()
        tokens = {token for group in indices.values() for token in group} if isinstance(indices, dict) else {*indices}
        saved_rows = max(rows, *(token + 1 for token in tokens)) if tokens else rows
        if lost := sorted({*range(rows, saved_rows)} - tokens):
            raise ValueError(
                f"{path}: the adapter was trained with at least {saved_rows} tokens, its base model "
                f"{peft_config.base_model_name_or_path} has {rows}, and the embeddings of tokens such as {lost[0]} "
                "were not saved with it; save the adapter again with save_embedding_layers=True"
            )
    if saved_rows != rows:
        base.resize_token_embeddings(saved_rows, mean_resizing=False)


def stock_class(
    config: PreTrainedConfig, path: str, trust_remote_code: bool, hub_kwargs: dict[str, Any]
) -> type[PreTrainedModel]:
    """
    Find the sequence classifier of an architecture.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            Config of the checkpoint.
        path (`str`):
            Where the config comes from, for error messages.
        trust_remote_code (`bool`):
            Whether to take the class from code in the checkpoint, if it has any.
        hub_kwargs (`dict`):
            Arguments of the Hub, such as `revision`.

    Returns:
        `type[PreTrainedModel]`: The stock class.

    Raises:
        `ValueError`: If the architecture cannot be a reward model.
    """
    auto_map = getattr(config, "auto_map", None) or {}
    if trust_remote_code and "AutoModelForSequenceClassification" in auto_map:
        return get_class_from_dynamic_module(auto_map["AutoModelForSequenceClassification"], path, **hub_kwargs)
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ValueError(
            f"{path}: transformers has no sequence classifier for the architecture {config.model_type!r}, so it "
            "cannot be a reward model; use a decoder-only language model such as Llama, Qwen, Mistral, Gemma or "
            "GPT-2, or an encoder such as BERT"
        )
    return cast(type[PreTrainedModel], MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)])


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
