"""
What may stand in a row's answers, prompt and chat template arguments, and the checks of it.

A chat template renders almost anything: a turn without text, an answer before its question, a message under other
keys. Nothing fails then, and the model learns from texts that nobody meant. These checks find such rows by their
contents alone, before anything is rendered.

A message's content is a text or a list of text parts, as VLMs and OpenAI's API write it. A part that is anything else
(a picture, audio, a file) is refused. How parts reach the chat template is `rendering`'s matter.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from .columns import TEMPLATE_COLUMNS, leave_out
from .values import BadRow, Problem, as_list, is_missing, shown


ROLES_AT_THE_FRONT = ("system", "developer")

Part = tuple[str, Any]
"""A column and what it holds."""


def check_contents(answers: Sequence[Part], row: dict[str, Any], kind: str, takes_prompt: bool = True) -> None:
    """
    Raise [`BadRow`] for the first thing wrong with the contents of a row.

    Args:
        answers (`Sequence[tuple[str, Any]]`):
            The answers that belong together, each with its column.
        row (`dict`):
            What else is read of the row: `prompt`, `tools` and `chat_template_kwargs`. A column that is there has to
            be filled, because TRL reads it.
        kind (`str`):
            How the dataset writes its answers, see [`Layout`].
        takes_prompt (`bool`, *optional*, defaults to `True`):
            Whether the answers follow the column `prompt`.
    """
    problems: Iterator[Problem | None]
    if kind == "tokenized":
        problems = (_token_problem(column, ids) for column, ids in answers)
    else:
        prompt = [("prompt", row["prompt"])] if takes_prompt and "prompt" in row else []
        find = _text_problems if kind == "standard" else _conversation_problems
        problems = find(answers, prompt)
    for problem in problems:
        if problem is not None:
            raise BadRow(*problem)
    if kind != "tokenized" and not row.keys().isdisjoint(TEMPLATE_COLUMNS):
        _check_template_columns(row)


def format_of(value: Any) -> str:
    """How an error calls a value that is of the wrong type."""
    if value is None:
        return "None"
    if isinstance(value, str):
        return "a string"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "a list of messages"
    return f"a value of type {type(value).__name__}"


# Token ids


def _token_problem(column: str, ids: Any) -> Problem | None:
    ids = as_list(ids)
    if not isinstance(ids, list):
        return Problem(column, f"{format_of(ids)} where token ids should be", "give a list of integers")
    if not ids:
        return Problem(column, "no tokens", "drop the row")
    types = set(map(type, ids))
    if types != {int}:
        names = ", ".join(sorted(kind.__name__ for kind in types))
        return Problem(column, f"token ids must be integers, but these are of type {names}", "give a list of integers")
    if min(ids) < 0:
        return Problem(column, f"token id {min(ids)} is negative", "remove padding and label masks: give plain ids")
    return None


# Plain text


def _text_problems(answers: Sequence[Part], prompt: Sequence[Part]) -> Iterator[Problem | None]:
    for column, text in (*answers, *prompt):
        if text is None:
            yield Problem(column, "None", "drop the row or fill in the text")
        elif not isinstance(text, str):
            first = f"{answers[0][0]!r} of row 0"
            fix = f"write every row and column the same way as {first}: a string, or a list of messages"
            yield Problem(column, f"{format_of(text)} in a dataset of plain text", fix)
        elif column != "prompt" and (not text or text.isspace()):
            yield Problem(column, "an empty string", "drop the row or fill in the text")
        else:
            yield _unicode_problem(column, text)


def _unicode_problem(column: str, text: str) -> Problem | None:
    # A lone surrogate has no encoding, so no tokenizer can read it.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        wrong = f"{shown(text[error.start])} at character {error.start} is half a character"
        return Problem(column, wrong, "read the text anew with its right encoding, or drop the row")
    return None


# Conversations


def text_of(content: Any) -> str:
    """
    The text of a message.

    Args:
        content (`str`, `list[dict]` or `None`):
            Content of a message that has been checked.

    Returns:
        `str`: The text, or the texts of the parts one after the other, which is how chat templates that take parts
        render them.
    """
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content or ""


def without_nulls(value: Any) -> Any:
    """
    A value without the keys of dicts that hold None, at any depth.

    Arrow gives a dict in a row the keys of all other rows, and None for those that it lacks. A chat template would
    render them. Nobody can tell them from a null that was meant, so that such a null is removed as well. The items of
    a list are all its own, and stay.

    Args:
        value (`Any`):
            Tools, messages, or arguments of a chat template.

    Returns:
        `Any`: The value. What holds no dict is returned as it is.
    """
    if isinstance(value, dict):
        return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [without_nulls(entry) for entry in value] if isinstance(value, list) else value


def message_problem(column: str, turn: int, message: Any, needs_content: bool = True) -> Problem | None:
    """
    What is wrong with a message by itself.

    Args:
        column (`str`):
            Column that it stands in.
        turn (`int`):
            Position in the conversation.
        message (`Any`):
            The message. Arrow gives all messages the same keys, so a key may hold None.
        needs_content (`bool`, *optional*, defaults to `True`):
            Whether a turn that calls no tools, and answers no call, has to have content.

    Returns:
        [`Problem`] or `None`: The problem.
    """
    shape = 'write each turn as {"role": ..., "content": ...}'
    if not isinstance(message, dict):
        wrong = f"turn {turn} is {format_of(message)}, not a message"
        return Problem(column, wrong, shape)
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role.strip():
        keys = ", ".join(shown(key) for key, value in list(message.items())[:20] if value is not None)
        return Problem(column, f"turn {turn} has no 'role' that is a string (its keys: {keys})", shape)
    if content is None:
        if not needs_content or role == "tool" or (role == "assistant" and message.get("tool_calls")):
            return None
        fix = "fill it in (only a tool's turn, and an assistant's with tool_calls, may go without), or drop the row"
        return Problem(column, f"turn {turn} ({shown(role)}) has no content", fix)
    if not isinstance(content, str | list):
        wrong = f"turn {turn} ({shown(role)}) has content that is {format_of(content)}, not a text"
        return Problem(column, wrong, "write it as a string")
    for part in content if isinstance(content, list) else ():
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            kind = shown(part["type"]) if isinstance(part, dict) and part.get("type") else format_of(part)
            wrong = f"turn {turn} ({shown(role)}) holds a part that is not text ({kind}), and reward models read text"
            return Problem(column, wrong, 'drop the row, or keep its parts {"type": "text", "text": ...} only')
    return _unicode_problem(column, role) or _unicode_problem(column, text_of(content))


def _conversation_problems(answers: Sequence[Part], prompt: Sequence[Part]) -> Iterator[Problem | None]:
    for column, messages in (*answers, *prompt):
        if messages is None:
            yield Problem(column, "None", "drop the row or fill in the messages")
        elif not isinstance(messages, list):
            wrong = f"{format_of(messages)} in a dataset of conversations"
            role = "user" if column == "prompt" else "assistant"
            fix = f'make it [{{"role": "{role}", "content": ...}}], or every row and column a string'
            if column == "prompt" and isinstance(messages, str):
                fix += "; `disco-trl data convert DATA OUT.jsonl --rename prompt=instruction` does that"
                # HuggingFaceH4/ultrafeedback_binarized is written like this. (The answers have been checked by now.)
                if any(text_of(turn.get("content")) == messages for turn in answers[0][1]):
                    wrong = f"{wrong} that hold it already"
                    fix = f"leave the column out, as the sides are whole conversations: {leave_out(['prompt'])}"
            yield Problem(column, wrong, fix)
        elif not messages:
            fix = "put the user's turn there" if column == "prompt" else "put the answer there, or drop the row"
            yield Problem(column, "no messages", fix)
        else:
            for turn, message in enumerate(messages):
                yield message_problem(column, turn, message)
    asked = [(column, turn, message) for column, messages in prompt for turn, message in enumerate(messages)]
    for column, messages in answers:
        yield _order_problem(column, asked + [(column, turn, message) for turn, message in enumerate(messages)])


def _order_problem(side: str, turns: list[tuple[str, int, dict[str, Any]]]) -> Problem | None:
    """What is wrong with the order of a conversation: the turns of the prompt, if any, and those of an answer."""
    roles = [message["role"] for _, _, message in turns]
    if "assistant" not in roles:
        wrong = f"no assistant turn, so there is no answer to reward (roles: {', '.join(map(shown, roles[:20]))})"
        fix = 'end it with {"role": "assistant", "content": ...}, or rename the role that answers to \'assistant\''
        return Problem(side, wrong, fix)
    previous = None
    for (column, turn, _), role in zip(turns, roles, strict=True):
        at_the_front = previous is None or previous in ROLES_AT_THE_FRONT
        if role in ROLES_AT_THE_FRONT and not at_the_front:
            return Problem(
                column, f"turn {turn} is '{role}' after {shown(previous)}", f"move the {role} turn to the front"
            )
        if role in ("assistant", "tool") and at_the_front:
            wrong = f"turn {turn} is '{role}', but nobody has asked anything yet"
            return Problem(column, wrong, "put the user's turn before it, or into a column 'prompt'")
        if role == "tool" and previous not in ("assistant", "tool"):
            fix = "put the assistant's tool call before it"
            return Problem(column, f"turn {turn} is 'tool' after {shown(previous)}", fix)
        previous = role
    column, turn, answer = turns[-1]
    if answer["role"] != "assistant":
        fix = "cut the conversation after the assistant's answer"
        return Problem(column, f"the last turn is {shown(answer['role'])}, not 'assistant'", fix)
    if not answer.get("tool_calls") and not text_of(answer["content"]).strip():
        return Problem(column, f"turn {turn}, the assistant's answer, is empty", "drop the row or fill in the answer")
    return None


# What goes to the chat template beside the messages


def _check_template_columns(row: dict[str, Any]) -> None:
    tools = row.get("tools")
    fix = "write it with json.dumps, or give a list"
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:  # also of numbers too long, or nested too deeply
            raise BadRow("tools", f"a string that is not JSON ({error})", fix) from error
    if not is_missing(tools) and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise BadRow("tools", f"{shown(tools)} where a list of tools should be", fix)
    if "chat_template_kwargs" in row and not isinstance(row["chat_template_kwargs"], dict):
        wrong = f"{format_of(row['chat_template_kwargs'])} where a dict should be"
        raise BadRow("chat_template_kwargs", wrong, "give every row a dict ({} for none)")
