"""Which classifiers of transformers can carry a reward distribution, and where their head is."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import set_zero3_state


# Names of the last layer in those classifiers of transformers that end in a linear map: of decoders, of most encoders,
# of encoders and encoder-decoders with a block for a head, of Funnel, of XLNet, and of Flaubert and XLM. A classifier
# that applies more after it (an activation, a second projection) is refused, because that code would receive hidden
# states while the head is bypassed.
HEAD_LAYER_NAMES = ("score", "classifier", "out_proj", "linear_out", "logits_proj", "summary")


def find_head(stock: type[PreTrainedModel], config: PreTrainedConfig) -> tuple[str, tuple[str, ...], bool]:
    """
    Find the head of a sequence classifier, in a model on the meta device.

    Args:
        stock (`type[PreTrainedModel]`):
            Sequence classifier of transformers.
        config ([`~transformers.PreTrainedConfig`]):
            Config of the model, with one label.

    Returns:
        `tuple[str, tuple[str, ...], bool]`: The name of the head, patterns of the modules that quantization has to
            skip, and whether the classifier sums up a text as `summary_type` in its config says.

    Raises:
        `ValueError`: If the classifier does not end in a single linear layer.
    """
    # Under ZeRO-3 transformers would shard and initialize the model, which has no data. Within `set_zero3_state` it
    # leaves both to the caller.
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
        raise _cannot_carry(
            stock,
            f"it has no single last linear layer named {' or '.join(HEAD_LAYER_NAMES)} (found: {heads or 'none'})",
        )
    following = [name for name, child in model.named_children() if child is not backbone]
    has_summary = any(hasattr(module, "summary_type") for module in model.modules())
    return heads[0], (*following, r".*\.pooler"), has_summary


def check_summary(stock: type[PreTrainedModel], config: Any, head_name: str) -> None:
    """
    Check that XLNet, Flaubert or XLM sum up a text in a way that a reward can be read in.

    Args:
        stock (`type[PreTrainedModel]`):
            Sequence classifier of transformers.
        config ([`~transformers.PreTrainedConfig`]):
            Config of the model.
        head_name (`str`):
            Name of its head.

    Raises:
        `ValueError`: If they do not.
    """
    place, activation = getattr(config, "summary_type", "last"), getattr(config, "summary_activation", None)
    if place != "first":  # the only position that is the same in a batch and alone
        raise _cannot_carry(stock, f"it reads a text at {place!r} (summary_type in its config.json), padding included")
    if head_name.endswith(".summary") and activation:
        raise _cannot_carry(
            stock, f"the activation {activation!r} follows its last linear layer {head_name} (summary_activation)"
        )


def _cannot_carry(stock: type[PreTrainedModel], reason: str) -> ValueError:
    return ValueError(
        f"{stock.__name__} cannot carry a reward distribution: {reason}. Use a decoder-only language model, or an "
        "encoder such as BERT, RoBERTa, DeBERTa-v2 or ModernBERT."
    )
