"""
How messages reach a chat template, so that it renders all their text.

Some templates take a message's content as a text, some as a list of parts, some either, and it may depend on the role.
What a template does not take, it leaves out, or prints as Python would, without an error. So each kind of conversation
is tried once with a template: marks stand in the place of its texts, and the rendered text shows which of them arrive.

What flows: checked messages → messages without Arrow's nulls, each with its content in a form that arrives → the
template's text.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

from .contents import text_of, without_nulls
from .values import shown


Messages = list[dict[str, Any]]

# Of apply_chat_template's parameters, those that make the text. Any other acts on the tokens or on their container.
TEXT_PARAMETERS = {"tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message", "kwargs"}
TOKEN_PARAMETERS = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.keys() - TEXT_PARAMETERS

MOST_KINDS = 4096
"""Kinds of conversations whose forms are remembered. A server's clients can send any number of kinds."""

LEAK = "LeakedKey"


class LeftOutError(ValueError):
    """A turn whose text the chat template leaves out, so that a model would read, and be paid for, nothing."""


def render(processing_class: PreTrainedTokenizerBase, conversation: Any, **arguments: Any) -> Any:
    """
    Text that the chat template makes of messages as they are.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer with the chat template.
        conversation (`list[dict]` or `list[list[dict]]`):
            Messages of a conversation, or of several.
        **arguments:
            Arguments of the chat template. Those that act on tokens are ignored.

    Returns:
        `str` or `list[str]`: The text of the conversation, or of each.
    """
    arguments = {name: value for name, value in arguments.items() if name not in TOKEN_PARAMETERS}
    return processing_class.apply_chat_template(conversation, tokenize=False, **arguments)


def fit_to_template(processing_class: PreTrainedTokenizerBase, messages: Messages, **arguments: Any) -> Messages:
    """
    Write messages in a form of which the chat template renders all texts.

    A content that the template renders as it is stays as it is, so that the text is the one that TRL trains on. The
    parts of any other content are joined. A template that takes nothing but parts is given a text as a part.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer with the chat template.
        messages (`list[dict]`):
            Messages that have been checked, see [`~disco_trl.data.contents.message_problem`].
        **arguments:
            Arguments of the chat template.

    Returns:
        `list[dict]`: The messages, without the keys that hold None. One that calls tools keeps its `content` even so,
        because templates ask for it.

    Raises:
        [`LeftOutError`]: If the template leaves out the text of a turn. What a turn with `tool_calls` says beside them
            may be missing: some templates render the calls alone.
    """
    messages = [_cleaned(message) for message in messages]
    template, tools = processing_class.chat_template, arguments.get("tools")
    rest = repr({name: value for name, value in arguments.items() if name != "tools"})
    key = (
        type(processing_class),
        tuple(template.items()) if isinstance(template, dict) else template,
        (bool(tools), rest),
        tuple(
            (message["role"], _kind(message.get("content")), *((name, bool(value)) for name, value in message.items()))
            for message in messages
        ),
    )
    found = _found.get(key)
    if found is None:
        if len(_found) >= MOST_KINDS:
            _found.clear()
        found = _found[key] = _find_forms(processing_class, messages, arguments)
    forms, left_out = found
    if left_out is not None:
        raise LeftOutError(
            f"the chat template leaves out the text of turn {left_out} ({shown(messages[left_out]['role'])}); give "
            "the turn a role that the template knows, or use a template that renders it"
        )
    return [
        message if form is None else {**message, "content": form(message["content"])}
        for message, form in zip(messages, forms, strict=True)
    ]


_found: dict[Any, tuple[list[Form | None], int | None]] = {}
"""For each kind of conversation the form of each turn, and the first turn that is left out in all of them."""


def _cleaned(message: dict[str, Any]) -> dict[str, Any]:
    cleaned = without_nulls(message)
    return {"content": None, **cleaned} if cleaned.get("tool_calls") and "content" not in cleaned else cleaned


def _kind(content: Any) -> str:
    """What about a content may decide whether it is rendered, its words aside."""
    if content is None:
        return "nothing"
    kind = "parts" if isinstance(content, list) else "text"
    return kind if text_of(content).strip() else f"empty {kind}"


# Forms of a content. A turn without content has none.

Form = Callable[[Any], Any]


def _as_it_is(content: Any) -> Any:
    # What else a part holds (a cache's mark, a null picture of Arrow's) some templates take for a picture.
    return [_part(part["text"]) for part in content] if isinstance(content, list) else content


def _in_one_part(content: Any) -> Any:
    return [_part(text_of(content))]


def _part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _find_forms(
    processing_class: PreTrainedTokenizerBase, messages: Messages, arguments: dict[str, Any]
) -> tuple[list[Form | None], int | None]:
    """For each turn the first form that arrives, and the first turn of which none does."""
    kinds = [_kind(message.get("content")) for message in messages]
    missing = [turn for turn, kind in enumerate(kinds) if kind != "nothing"]
    forms: list[Form | None] = [None] * len(messages)
    is_rendered = False
    for form in (_as_it_is, text_of, _in_one_part):
        for turn in missing:
            forms[turn] = form
        marked = [
            message if forms[turn] is None else {**message, "content": _marked(forms[turn], kinds[turn], turn)}
            for turn, message in enumerate(messages)
        ]
        try:
            text = render(processing_class, marked, **arguments)
        except Exception:  # a template raises what it likes at a form that it does not take
            continue
        is_rendered = True
        missing = [turn for turn in missing if not _arrives(text, turn)]
        if not missing:
            break
    for turn in missing:  # the calls of tools are rendered beside it, or an error of the template's is to come
        forms[turn] = text_of
    left_out = [turn for turn in missing if "empty" not in kinds[turn] and not messages[turn].get("tool_calls")]
    return forms, left_out[0] if left_out and is_rendered else None


def _marks(turn: int) -> tuple[str, str]:
    return f"Turn{turn}Begins", f"Turn{turn}Ends"


def _marked(form: Form | None, kind: str, turn: int) -> Any:
    """A content in a form, with marks for its words."""
    if form is _as_it_is and "parts" in kind:
        # Whoever prints a part, rather than its text, prints this key too.
        return [{**_part(mark), LEAK: f"{LEAK}{turn}."} for mark in _marks(turn)]
    text = " ".join(_marks(turn))
    return [_part(text)] if form is _in_one_part else text


def _arrives(text: str, turn: int) -> bool:
    return all(mark in text for mark in _marks(turn)) and f"{LEAK}{turn}." not in text


def is_left_out(
    processing_class: PreTrainedTokenizerBase, messages: Messages, text: str, arguments: dict[str, Any]
) -> bool:
    """
    Whether nothing of an answer is in the text that the chat template made of a conversation.

    Some templates take the reasoning out of an answer, and with it all of an answer that is reasoning alone.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer with the chat template.
        messages (`list[dict]`):
            Messages as [`fit_to_template`] writes them. The last one is the answer.
        text (`str`):
            What the template made of them.
        arguments (`dict`):
            Arguments of the chat template.

    Returns:
        `bool`: Whether the answer has a text, and the template renders the same without it.
    """
    answer = messages[-1]
    words = text_of(answer.get("content")).strip()
    if not words or answer.get("tool_calls") or words[-40:] in text:
        return False
    without = {**answer, "content": [_part("")] if isinstance(answer["content"], list) else ""}
    try:
        return render(processing_class, [*messages[:-1], without], **arguments) == text
    except Exception:  # the template asks for a text, so it does not leave it out
        return False
