"""Schemas of the server's requests and answers, and of its refusals.

A request is validated completely before anything is scored. Validation stops at the first error of a list, because an
error takes a hundred times the memory of the value that it is about. A refusal consists of a status, a reason and the
field that it concerns, written as in Python: `items[3].completion[0].role`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError
from transformers import PreTrainedTokenizerBase


class RefusalError(Exception):
    """Raised for a request that the server does not serve.

    Args:
        status (`int`):
            HTTP status of the answer.
        reason (`str`):
            Explanation for the client.
        field (`str`, *optional*, defaults to `None`):
            Field of the request that the refusal concerns.
        headers (`Mapping[str, str]`, *optional*, defaults to `None`):
            Headers of the answer.
    """

    def __init__(self, status: int, reason: str, field: str | None = None, headers: Mapping[str, str] | None = None):
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.field = field
        self.headers = headers

    def content(self) -> dict[str, str | None]:
        """The body of the answer.

        Returns:
            `dict`: `error`, the reason, and `field`, the field or `None`.
        """
        return {"error": self.reason, "field": self.field}


def field_name(location: Sequence[int | str]) -> str | None:
    """Writes the location of a validation error as a path.

    Args:
        location (`Sequence[int | str]`):
            Location as pydantic reports it, such as `("items", 3, "<answer>", "prompt")`.

    Returns:
        `str` or `None`: The path, such as `items[3].prompt`; `None` for the request itself.
    """
    name = ""
    for part in location:
        if isinstance(part, int):
            name += f"[{part}]"
        elif not part.startswith("<"):  # <...> is the tag of a union member, not a field
            name += f".{part}" if name else part
    return name or None


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _at_most_one_unknown_field(cls, values: Any) -> Any:
        # pydantic has no `fail_fast` for unknown fields, each of which is an error.
        if isinstance(values, dict):
            unknown = [name for name in values if name not in cls.model_fields]
            dropped = set(unknown[1:])
            values = {name: value for name, value in values.items() if name not in dropped}
        return values


class Message(BaseModel):
    """Message of a conversation. Further keys, such as `tool_calls` and `name`, are passed to the chat template
    unchanged.
    """

    model_config = ConfigDict(strict=True, extra="allow")

    role: str
    content: Any = None

    @field_validator("content")
    @classmethod
    def _is_text(cls, content: Any) -> Any:
        blocks = content if isinstance(content, list) else []
        if not all(isinstance(block, dict) and isinstance(block.get("text"), str) for block in blocks):
            raise PydanticCustomError("content", "must hold text only: a list of {'type': 'text', 'text': ...}")
        if content is not None and not isinstance(content, str | list):
            raise PydanticCustomError("content", "must be a text, a list of text blocks, or null")
        return content


def _kind(content: Any) -> str | None:
    for kind, tag in ((str, "<text>"), (list, "<messages>"), ((dict, Answer), "<answer>")):
        if isinstance(content, kind):
            return tag
    return None


_Text = Annotated[str, Tag("<text>")]
_Messages = Annotated[list[Message], Field(min_length=1, fail_fast=True), Tag("<messages>")]
Content = Annotated[
    _Text | _Messages,
    Discriminator(
        lambda content: None if isinstance(content, dict) else _kind(content),
        custom_error_type="content",
        custom_error_message="must be a text or a list of messages",
    ),
]


class Answer(_Strict):
    """Answer to score, with the prompt, the tools and the template arguments that belong to it.

    Without a `prompt`, `completion` is the whole text or conversation.
    """

    completion: Content
    prompt: Content | None = None
    tools: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    group: str | None = Field(
        None, description="Identifier that the answers to one prompt share. By default the prompt identifies them."
    )

    @field_validator("chat_template_kwargs")
    @classmethod
    def _only_what_templates_read(cls, kwargs: dict[str, Any] | None, info: ValidationInfo) -> dict[str, Any] | None:
        # A chat template from the client could loop for ever, and `tokenize` or `truncation` would change the result.
        for name in set(kwargs or ()) & _OTHER_ARGUMENTS:
            raise PydanticCustomError(
                "chat_template_kwargs", f"{name!r} is no variable of the chat template and cannot be set here"
            )
        return kwargs

    @model_validator(mode="after")
    def _one_kind(self) -> Answer:
        if self.prompt is not None and type(self.prompt) is not type(self.completion):
            raise PydanticCustomError("kind", "prompt and completion must both be texts, or both lists of messages")
        return self


# Arguments of `apply_chat_template` that are not variables of the template, as of the installed transformers.
_OTHER_ARGUMENTS = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {
    "add_generation_prompt",
    "continue_final_message",
    "documents",
}

Item = Annotated[
    _Text | _Messages | Annotated[Answer, Tag("<answer>")],
    Discriminator(
        _kind,
        custom_error_type="item",
        custom_error_message="must be a text, a list of messages, or an object with 'completion' and maybe 'prompt'",
    ),
]


_Finite = Annotated[float, Field(allow_inf_nan=False)]


class ScoreRequest(_Strict):
    """Body of `POST /score`."""

    items: list[Item] = Field(min_length=1, fail_fast=True)
    pairs: list[Annotated[list[int], Field(min_length=2, max_length=2, fail_fast=True)]] = Field(
        [],
        fail_fast=True,
        description="Pairs of item indices. For each, the probability that the first is better is returned.",
    )
    transform: str | None = Field(
        None, description="Name of the transform. By default, the one that the server was started with."
    )
    k: float | None = None
    q: float | None = None
    beta: float | None = None
    seed: int | None = None
    total: bool | None = Field(
        None, description="Whether the scale includes the epistemic uncertainty of the location."
    )
    attribute: str | None = Field(
        None,
        description="Attribute whose reward is taken, or 'overall'. By default the one that the server was started "
        "with.",
    )
    weights: dict[str, _Finite] | None = Field(
        None, description="Weights of attributes, of whose rewards the weighted sum is taken in its place."
    )
    minimum: dict[str, _Finite] | None = Field(
        None, description="Smallest rating that an item should get, by attribute. An item that fails gets the floor."
    )
    min_probability: float | None = Field(
        None, gt=0, lt=1, description="Share of people who have to give an item the minimum."
    )
    floor: _Finite | None = Field(None, description="Largest reward of an item that fails the minimum.")

    @field_validator("pairs")
    @classmethod
    def _pairs_of_items(cls, pairs: list[list[int]], info: ValidationInfo) -> list[list[int]]:
        count = len(info.data.get("items", ()))
        for row, pair in enumerate(pairs):
            if count and not all(0 <= index < count for index in pair):
                raise PydanticCustomError("pairs", f"pair {row}: {pair} must hold two of the indices 0 to {count - 1}")
        return pairs

    def options(self) -> dict[str, float | int]:
        """Options of the transform that the request contains.

        Returns:
            `dict[str, float | int]`: Values by name, without those that are absent.
        """
        return self.model_dump(include={"k", "q", "beta", "seed", "total"}, exclude_none=True)

    def view_changes(self) -> dict[str, Any]:
        """What the request says of which reward is taken.

        Returns:
            `dict[str, Any]`: Arguments of [`~disco_trl.models.reward_view.RewardView`], without those that are absent.
        """
        names = {"attribute", "weights", "minimum", "min_probability", "floor"}
        return self.model_dump(include=names, exclude_none=True)


class AttributeResult(BaseModel):
    """Distribution of a reward of one item: the one that is asked for, or that for an attribute."""

    location: float
    scale: float
    shape: list[float] | None = Field(None, description="Shape parameters of the family, if it has any.")
    location_error: float | None = Field(
        None, description="Epistemic uncertainty of the location (a standard deviation), if the model has one."
    )


class Result(AttributeResult):
    """Reward of one item."""

    reward: float = Field(description="Transformed reward.")
    cap: float | None = Field(None, description="Largest reward of an item that fails the minimum: the floor.")
    attributes: dict[str, AttributeResult] | None = Field(
        None, description="Its reward for each attribute, if the model knows any."
    )


class ScoreResponse(BaseModel):
    """Answer of `POST /score`: the rewards of the items and `P(first > second)` of the pairs, both in the order of the
    request.
    """

    family: str
    transform: str
    results: list[Result]
    prob_greater: list[float]


class RewardRequest(BaseModel):
    """Body of `POST /get_reward`, OpenRLHF's contract for remote rewards: prompts with their answers, rendered to
    text.
    """

    model_config = ConfigDict(strict=True)  # Unknown fields are allowed: engines send more than the server needs.

    query: list[str] = Field(min_length=1, fail_fast=True)
    prompts: list[Any] | None = None
    labels: list[Any] | None = None

    @field_validator("prompts")
    @classmethod
    def _one_each(cls, prompts: list[Any] | None, info: ValidationInfo) -> list[Any] | None:
        if prompts is not None and "query" in info.data and len(prompts) != len(info.data["query"]):
            raise PydanticCustomError("prompts", f"{len(prompts)} prompts for {len(info.data['query'])} queries")
        return prompts


class RewardResponse(BaseModel):
    """Answer of `POST /get_reward`, in OpenRLHF's form: one number for each query, in the order of the request."""

    rewards: list[float]
    scores: list[float]
    extra_logs: dict[str, list[float]]
