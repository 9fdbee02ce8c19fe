"""
Rewards in the logits of a plain classifier, and the way back.

A scale is exp of a bounded function of its raw scale, and the raw scale is linear in the hidden state up to the
constant weight · mean_hidden. So a location and a scale are two logits. The heads of decoders have no bias that could
hold the constant, so for every architecture it is in `config.json`, with the other constants, under
`reward_distribution`: [`two_logit_entry`] for one reward, [`attribute_entry`] for those of several attributes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..distributions.joint import JointRewardDistribution
from ..distributions.reward_distribution import RewardDistribution
from .scale_head import MAX_LOG_SCALE, ScaleHead


# The entry of config.json that holds the constants.
ENTRY = "reward_distribution"


def _constants(scale: ScaleHead, first: int) -> dict[str, Any]:
    """The constants of a scale whose location is the logit number `first`, and whose raw scale is the next one."""
    offset = torch.dot(scale.weight[0].double(), scale.mean_hidden.double()).item()
    return {
        "unit_scale": scale.level,
        "max_log_scale": MAX_LOG_SCALE,
        "raw_scale_offset": offset,
        "formula": f"location = logits[{first}]; scale = unit_scale * exp(max_log_scale * "
        f"tanh((logits[{first + 1}] - raw_scale_offset) / max_log_scale))",
    }


def two_logit_entry(model: Any) -> dict[str, Any]:
    """
    Make the entry of a model with two logits, the location and the raw scale of its overall reward.

    Args:
        model ([`~disco_trl.DiscoRewardModel`]):
            The model.

    Returns:
        `dict`: What [`from_two_logits`] reads.
    """
    return {"reward_family": model.config.disco["reward_family"], **_constants(model.scale_head, 0)}


def attribute_entry(model: Any) -> dict[str, Any]:
    """
    Make the entry of a model with two logits, location and raw scale, for each of its attributes in turn.

    Args:
        model ([`~disco_trl.DiscoRewardModel`]):
            A model that knows attributes.

    Returns:
        `dict`: What [`from_attribute_logits`] reads. With it come the `"weight"` of each attribute in the overall
        reward, and `"has_rest"`: whether the overall reward has a part besides, which is not in the logits.
    """
    heads = model.reward_head.by_attribute()
    return {
        "reward_family": model.config.disco["reward_family"],
        "attributes": [
            {"name": name, "weight": weight, **_constants(heads[name].scale, 2 * place)}
            for place, (name, weight) in enumerate(model.attribute_weights.items())
        ],
        "correlation": model.reward_head.attributes.correlation.tolist(),
        "has_rest": not model.is_weighted_sum,
    }


def _scale(raw_with_offset: Tensor, constants: Mapping[str, Any]) -> Tensor:
    bound = constants["max_log_scale"]
    raw = raw_with_offset - constants["raw_scale_offset"]
    return constants["unit_scale"] * torch.exp(bound * torch.tanh(raw / bound))


def from_two_logits(logits: Tensor, constants: Mapping[str, Any]) -> RewardDistribution:
    """
    Convert the logits of a two-logit model to reward distributions.

    Args:
        logits (`torch.Tensor` of shape `(..., 2)`):
            Logits of the model, without an activation.
        constants (`Mapping`):
            Entry `reward_distribution` of its config.json.

    Returns:
        [`~disco_trl.RewardDistribution`]: Location and scale of shape `(...)`, in float32.
    """
    location, raw = logits.double().unbind(-1)
    return RewardDistribution(location.float(), _scale(raw, constants).float(), constants["reward_family"])


def from_attribute_logits(logits: Tensor, entry: Mapping[str, Any]) -> JointRewardDistribution:
    """
    Convert the logits of a model of several attributes to their joint reward distributions.

    Args:
        logits (`torch.Tensor` of shape `(B, 2A)`):
            Logits of the model, without an activation: location and raw scale of the A attributes in turn.
        entry (`Mapping`):
            Entry `reward_distribution` of its config.json.

    Returns:
        [`~disco_trl.JointRewardDistribution`]: Location and scale of shape `(B, A)`, in float32. Its `project` with
        the weights of the entry gives the overall reward, unless the entry says that this has a rest.

    Raises:
        `ValueError`: If the number of logits is not that of the entry.
    """
    attributes = entry["attributes"]
    if logits.shape[-1] != 2 * len(attributes):
        raise ValueError(
            f"{logits.shape[-1]} logits and {len(attributes)} attributes, of which each has two; load the model with "
            "the num_labels of its config.json"
        )
    location, raw = logits.double().unflatten(-1, (-1, 2)).unbind(-1)
    scales = [_scale(raw[..., place], constants) for place, constants in enumerate(attributes)]
    return JointRewardDistribution(
        location.float(),
        torch.stack(scales, dim=-1).float(),
        torch.tensor(entry["correlation"], device=logits.device),
        [constants["name"] for constants in attributes],
        entry["reward_family"],
    )
