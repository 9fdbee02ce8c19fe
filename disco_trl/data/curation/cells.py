"""Cells of rows that others wrote: an answer, a prompt, a number, a list, under one of the names that they give it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..values import BadRow, Row, as_number, is_missing, shown


PROMPTS = ("prompt", "instruction", "question", "query", "context")
ANSWER_TEXTS = ("completion", "response", "answer", "text", "content", "output", "value")


def first_of(row: Row, names: Iterable[str]) -> str | None:
    """The first of these columns that is filled in the row, or None."""
    return next((name for name in names if not is_missing(row.get(name))), None)


def column_of(row: Row, names: Iterable[str], what: str) -> str:
    """The first of these columns that is filled; raises [`~disco_trl.data.values.BadRow`] if `what` is missing."""
    names = tuple(names)
    found = first_of(row, names)
    if found is None:
        there = next((name for name in names if name in row), names[0])
        raise BadRow(there, f"{what} is missing", f"fill it in; it may be called {', '.join(map(repr, names))}")
    return found


def prompt_of(row: Row) -> dict[str, Any]:
    """The prompt of a row under our name for it; nothing if there is none."""
    name = first_of(row, PROMPTS)
    return {} if name is None else {"prompt": row[name]}


def answer_of(column: str, value: Any) -> Any:
    """The text, or the messages, of an answer that may stand in a record."""
    if isinstance(value, dict):
        value = next((value[name] for name in ANSWER_TEXTS if value.get(name) is not None), None)
    if isinstance(value, str | list) and value:
        return value
    raise BadRow(column, f"{shown(value)} where an answer should be", "give a text, or a list of messages")


def finite(column: str, value: Any, what: str) -> float:
    """The value as a number; raises [`~disco_trl.data.values.BadRow`] if it is not `what`."""
    try:
        number = as_number(float(value) if isinstance(value, str) else value)
    except (ValueError, OverflowError):
        number = None
    if number is None:
        raise BadRow(column, f"{shown(value)} is not {what}", "give a finite number")
    return int(number) if number == int(number) else number


def list_of(column: str, value: Any) -> list[Any]:
    """The value as a list; raises [`~disco_trl.data.values.BadRow`] if it is none."""
    if not isinstance(value, list):
        raise BadRow(column, f"{shown(value)} is not a list", "give a list with an entry for each answer")
    return value
