"""The reward settings of a checkpoint (`config.disco`): validation, and the merge with what a caller asks for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..data.columns import OVERALL
from ..data.judgements import MOST_RATING_VALUES
from ..data.records import LONGEST_NAME, MOST_LEVELS
from ..data.values import as_number, shown
from ..distributions.reward_distribution import get_family


MOST_ATTRIBUTES = 64
"""Most attributes of a model: their correlation has a number for each pair of them."""
ATTRIBUTE_SETTINGS = ("names", "weights", "likelihoods", "are_learned", "has_rest")
"""Settings of `disco_trl.models.heads.AttributeHeads`, and the settings of the likelihood of each."""
# Settings that a checkpoint has only where there is something to say
_FURTHER = ("likelihood", "epistemic", "scale_layer", "attributes")


def resolve_settings(
    stored: dict[str, Any] | None, reward_family: str | None = None, fixed_scale: float | None = None, where: str = ""
) -> dict[str, Any]:
    """
    Combine the settings of a checkpoint with those that a caller asks for.

    Args:
        stored (`dict`, *optional*):
            `config.disco` of a disco checkpoint. `None` for any other model.
        reward_family (`str`, *optional*):
            Family that was asked for. By default that of the checkpoint, or `"normal"`.
        fixed_scale (`float`, *optional*):
            Scale that was asked for, in reward units. By default the setting of the checkpoint.
        where (`str`, *optional*, defaults to `""`):
            Path of the checkpoint, for error messages.

    Returns:
        `dict`: `"reward_family"` and `"fixed_scale"`; and, if the checkpoint has them, `"likelihood"`, `"epistemic"`,
        `"scale_layer"` and `"attributes"`.

    Raises:
        `ValueError`: If the two contradict each other, the family is unknown, the scale is not positive and finite, or
            `stored` does not hold valid settings.
    """
    asked: dict[str, Any] = {"reward_family": reward_family, "fixed_scale": fixed_scale}
    if stored is None:
        settings: dict[str, Any] = {"reward_family": reward_family or "normal", "fixed_scale": fixed_scale}
    else:
        _check_stored(stored, where)
        settings = {name: stored[name] for name in (*asked, *_FURTHER) if name in stored}
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


def _check_stored(stored: Any, where: str) -> None:
    """Raise a `ValueError` if the settings in the files of a checkpoint are not valid, before a model is built."""

    def is_number(value: Any) -> bool:
        return as_number(value) is not None

    def are_likelihood(value: Any) -> bool:
        ratings = value.get("rating_values", [0.0, 1.0]) if isinstance(value, dict) else None
        return (
            isinstance(ratings, list)
            and 2 <= len(ratings) <= MOST_RATING_VALUES
            and all(map(is_number, ratings))
            and ratings == sorted({*ratings})
            and value.keys() <= {"location_error", "tie_width", "label_noise", "rating_values", "strength_levels"}
            and value.get("strength_levels", 2) in range(2, MOST_LEVELS + 1)
            and type(value.get("strength_levels", 2)) is int
            and value.get("location_error", True) is True
            and all(is_number(value.get(name, 0)) or value[name] == "learned" for name in ("tie_width", "label_noise"))
        )

    def are_attributes(value: Any) -> bool:
        if not isinstance(value, dict) or value.keys() != {*ATTRIBUTE_SETTINGS}:
            return False
        names, weights, likelihoods = (value[name] for name in ("names", "weights", "likelihoods"))
        return (
            all(isinstance(part, list) and len(part) == len(names) for part in (names, weights, likelihoods))
            and 0 < len(names) <= MOST_ATTRIBUTES
            and len({*map(str, names)} - {OVERALL}) == len(names)
            and all(isinstance(name, str) and 0 < len(name) <= LONGEST_NAME for name in names)
            and all(is_number(weight) for weight in weights)
            and all(are_likelihood(one) for one in likelihoods)
            and all(isinstance(value[name], bool) for name in ("are_learned", "has_rest"))
        )

    domains: dict[str, tuple[Callable[[Any], bool], str]] = {
        "reward_family": (lambda value: isinstance(value, str), "the name of a family"),
        "fixed_scale": (lambda value: value is None or is_number(value), "null or a number"),
        "likelihood": (are_likelihood, "settings as training writes them"),
        # There are never more directions than dimensions of the hidden state, of which some models have 16,384.
        "epistemic": (lambda value: type(value) is int and 0 < value <= 2**16, "a number of directions"),
        "attributes": (are_attributes, "settings as training writes them"),
        "scale_layer": (lambda value: type(value) is int and 0 < value, "the number of a layer, from 1"),
    }
    if not isinstance(stored, dict):
        raise ValueError(f"{where}: its reward settings are {shown(stored)}, and have to be an object; save it again")
    for name, (is_valid, wanted) in domains.items():
        if name not in stored and name in ("reward_family", "fixed_scale"):
            raise ValueError(f"{where}: its reward settings lack {name!r}; save it again")
        if name in stored and not is_valid(stored[name]):
            raise ValueError(
                f"{where}: its reward settings say {name}={shown(stored[name])}, which has to be {wanted}; save it "
                "again"
            )
    if stored["fixed_scale"] is not None and "scale_layer" in stored:
        raise ValueError(
            f"{where}: its reward settings say scale_layer={stored['scale_layer']} and "
            f"fixed_scale={stored['fixed_scale']:g}, and a fixed scale reads no layer; save it again"
        )


def attribute_likelihoods(settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """
    Read what a model knows of how people answer about each attribute, the overall judgement aside.

    Args:
        settings (`dict`):
            `config.disco` of the model.

    Returns:
        `dict[str, dict]`: Settings of a [`~disco_trl.models.likelihood_head.LikelihoodHead`] by attribute.
    """
    attributes = settings.get("attributes", {"names": [], "likelihoods": []})
    return dict(zip(attributes["names"], attributes["likelihoods"], strict=True))


def merge_likelihood(stored: dict[str, Any], asked: dict[str, Any], where: str) -> dict[str, Any]:
    """
    Combine the likelihood settings of a checkpoint with those that training asks for.

    Args:
        stored (`dict`):
            Settings of the [`~disco_trl.models.likelihood_head.LikelihoodHead`] of the checkpoint.
        asked (`dict`):
            Settings that training asks for. They take precedence, except for the rating values and the strengths.
        where (`str`):
            Path of the checkpoint, for error messages.

    Returns:
        `dict`: Settings of a [`~disco_trl.models.likelihood_head.LikelihoodHead`].

    Raises:
        `ValueError`: If `asked` has a rating value or a strength that the checkpoint does not know.
    """
    merged = stored | asked
    known = stored.get("rating_values")
    if known is not None:
        merged["rating_values"] = known
        if strange := sorted({*asked.get("rating_values", ())} - {*known}):
            raise ValueError(
                f"{where}: the data have the rating {strange[0]:g}, but the checkpoint knows only "
                f"{', '.join(f'{value:g}' for value in known)}; convert the ratings to these"
            )
    levels, asked_levels = stored.get("strength_levels"), asked.get("strength_levels", 0)
    if levels is not None:
        merged["strength_levels"] = levels
        if asked_levels > levels:
            raise ValueError(
                f"{where}: the data have preferences of the strength {asked_levels}, but the checkpoint knows only "
                f"strengths up to {levels}; map preference_strength to these"
            )
    return merged
