"""Which of a model's rewards a request asks for, and the rewards for all attributes in its answer."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from ..models.reward_view import RewardsByAttribute, RewardView
from .schemas import AttributeResult, RefusalError, ScoreRequest


def requested_view(request: ScoreRequest, default: RewardView, model: Any, nothing: RewardsByAttribute) -> RewardView:
    """Resolves which reward a request asks for.

    `attribute` or `weights` of a request take the place of both of the server's. Of `minimum`, `min_probability` and
    `floor` each takes the place of its own, and an empty `minimum` drops the server's.

    Args:
        request ([`~disco_trl.serving.schemas.ScoreRequest`]):
            The request.
        default ([`~disco_trl.models.reward_view.RewardView`]):
            What the server was started with.
        model ([`~disco_trl.DiscoRewardModel`] or [`~peft.PeftModel`]):
            The model.
        nothing ([`~disco_trl.models.reward_view.RewardsByAttribute`]):
            Its rewards of no answers, on which the view is tried.

    Returns:
        [`~disco_trl.models.reward_view.RewardView`]: The view.

    Raises:
        `RefusalError`: If the model has no such reward (422).
    """
    changes = request.view_changes()
    view = default
    if "attribute" in changes or "weights" in changes:
        name = "weights" if "weights" in changes else "attribute"
        with _refusing(name):
            chosen = RewardView(changes.get("attribute"), changes.get("weights"))
            chosen.read(model, nothing)
        view = dataclasses.replace(view, attribute=chosen.attribute, weights=chosen.weights)
    constraints = {name: value for name, value in changes.items() if name not in ("attribute", "weights")}
    if constraints:
        if constraints.get("minimum") == {}:
            constraints.setdefault("floor", None)
        with _refusing("minimum" if "minimum" in constraints else "floor"):
            view = dataclasses.replace(view, **constraints)
            view.read(model, nothing)
    return view


@contextlib.contextmanager
def _refusing(field: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise RefusalError(422, str(error), field) from None


def attribute_results(rewards: RewardsByAttribute) -> list[dict[str, AttributeResult]]:
    """Makes the part of an answer that holds the rewards for all attributes.

    Args:
        rewards ([`~disco_trl.models.reward_view.RewardsByAttribute`]):
            All rewards of N texts.

    Returns:
        `list[dict[str, AttributeResult]]`: One for each text, empty if the model knows no attributes.
    """
    results: list[dict[str, AttributeResult]] = [{} for _ in range(len(rewards))]
    for name, found in rewards.of_attributes().items():
        tensors = {key: getattr(found, key) for key in ("location", "scale", "shape", "location_error")}
        columns = {key: tensor.tolist() for key, tensor in tensors.items() if tensor is not None}
        for result, row in zip(results, zip(*columns.values(), strict=True), strict=True):
            result[name] = AttributeResult(**dict(zip(columns, row, strict=True)))
    return results
