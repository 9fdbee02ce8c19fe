"""What goes over the wire: the server's requests and answers, and the words in which it refuses.

A request is checked whole before anything is scored. A refusal is a status, a reason, and the field that it is about,
written as one would in Python: ``items[3].completion[0].role``.
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
    """The server's answer to a request that it does not serve."""

    def __init__(self, status: int, reason: str, field: str | None = None, headers: Mapping[str, str] | None = None):
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.field = field
        self.headers = headers

    def content(self) -> dict[str, str | None]:
        """The body of the answer."""
        return {"error": self.reason, "field": self.field}


def field_name(location: Sequence[int | str]) -> str | None:
    """`("body", "items", 3, "<answer>", "prompt")`, as pydantic puts it, to `items[3].prompt`; None for the body."""
    name = ""
    for part in location:
        if isinstance(part, int):
            name += f"[{part}]"
        elif part != "body" and not part.startswith("<"):  # <...> is the kind of an item and not a field
            name += f".{part}" if name else part
    return name or None


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class Message(BaseModel):
    """A message of a conversation. Further keys (`tool_calls`, `name`) go to the chat template as they are."""

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
_Messages = Annotated[list[Message], Field(min_length=1), Tag("<messages>")]
Content = Annotated[
    _Text | _Messages,
    Discriminator(
        lambda content: None if isinstance(content, dict) else _kind(content),
        custom_error_type="content",
        custom_error_message="must be a text or a list of messages",
    ),
]


class Answer(_Strict):
    """An answer with what goes with it; `completion` holds the whole conversation where there is no `prompt`."""

    completion: Content
    prompt: Content | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    group: str | None = Field(None, description="equal for answers to one prompt; by default the prompt itself is")

    @field_validator("chat_template_kwargs")
    @classmethod
    def _only_what_templates_read(cls, kwargs: dict[str, Any] | None, info: ValidationInfo) -> dict[str, Any] | None:
        # A template of the client's own could loop for ever, and `tokenize` or `truncation` would change the answer.
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


class ScoreRequest(_Strict):
    """POST /score."""

    items: list[Item] = Field(min_length=1)
    pairs: list[Annotated[list[int], Field(min_length=2, max_length=2)]] = Field(
        [], description="indices of two items each, to compare the first with the second"
    )
    transform: str | None = Field(None, description="by default the one that the server was started with")
    k: float | None = None
    q: float | None = None
    beta: float | None = None
    seed: int | None = None
    total: bool | None = Field(None, description="whether the scale counts the error of the location too")

    @field_validator("pairs")
    @classmethod
    def _pairs_of_items(cls, pairs: list[list[int]], info: ValidationInfo) -> list[list[int]]:
        count = len(info.data.get("items", ()))
        for row, pair in enumerate(pairs):
            if count and not all(0 <= index < count for index in pair):
                raise PydanticCustomError("pairs", f"pair {row}: {pair} must hold two of the indices 0 to {count - 1}")
        return pairs

    def options(self) -> dict[str, float | int]:
        """The transform's options that the request gives."""
        return self.model_dump(include={"k", "q", "beta", "seed", "total"}, exclude_none=True)


class Result(BaseModel):
    """The reward of one item."""

    location: float
    scale: float
    reward: float = Field(description="the transformed reward")
    shape: list[float] | None = Field(None, description="the family's shape parameters, if it has any")
    location_error: float | None = Field(None, description="the model's own error of the location, if it learned one")


class ScoreResponse(BaseModel):
    """The rewards of the items, in their order, and P(first > second) of the pairs, in theirs."""

    family: str
    transform: str
    results: list[Result]
    prob_greater: list[float]


class RewardRequest(BaseModel):
    """POST /get_reward, OpenRLHF's remote reward contract: prompts with their answers, rendered to text."""

    model_config = ConfigDict(strict=True)  # what else an engine sends is not for us

    query: list[str] = Field(min_length=1)
    prompts: list[Any] | None = None
    labels: list[Any] | None = None

    @field_validator("prompts")
    @classmethod
    def _one_each(cls, prompts: list[Any] | None, info: ValidationInfo) -> list[Any] | None:
        if prompts is not None and "query" in info.data and len(prompts) != len(info.data["query"]):
            raise PydanticCustomError("prompts", f"{len(prompts)} prompts for {len(info.data['query'])} queries")
        return prompts


class RewardResponse(BaseModel):
    """OpenRLHF's: a number for each query, in their order."""

    rewards: list[float]
    scores: list[float]
    extra_logs: dict[str, list[float]]
