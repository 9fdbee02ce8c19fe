"""Single cells of a row: what counts as missing, as a number or as ratings, and how an error shows a value."""

from __future__ import annotations

import math
from typing import Any, NamedTuple


Row = dict[str, Any]
"""A row of a dataset: its values by the names of their columns."""


def as_list(value: Any) -> Any:
    """A value as a list, where a stream carries an array or a tensor, whose == is elementwise."""
    return value.tolist() if hasattr(value, "tolist") else value


LARGEST = 3.4028234e38
"""The largest number of float32, in which the likelihood is computed: a larger one gives an infinite loss."""


class Problem(NamedTuple):
    """What is wrong with a row: where, what, and how to fix it."""

    column: str
    wrong: str
    fix: str


class BadRow(ValueError):
    """
    A row that cannot be used. Whoever knows the number of the row puts it before this message.

    Args:
        column (`str`):
            Column at fault.
        wrong (`str`):
            What is wrong with it.
        fix (`str`):
            What to do about it.
    """

    def __init__(self, column: str, wrong: str, fix: str):
        super().__init__(column, wrong, fix)
        self.problem = Problem(column, wrong, fix)

    def __str__(self) -> str:
        return f"column {self.problem.column!r}: {self.problem.wrong}; {self.problem.fix}"


def _plain(value: Any) -> Any:
    """The number in an array without dimensions, which a stream formatted for NumPy or torch has in its place."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def is_missing(value: Any) -> bool:
    """Whether a row has nothing in a column: None, NaN, or an empty list or array."""
    value = _plain(value)
    if getattr(value, "shape", None) == (0,):
        return True
    return value is None or (isinstance(value, float) and math.isnan(value)) or (isinstance(value, list) and not value)


def shown(value: Any) -> str:
    """A value as an error shows it: the beginning of its `repr`, because a row may hold a value of any length."""
    try:
        return f"{value!r:.60}"
    except (ValueError, RecursionError):  # an integer of thousands of digits; a list in a list in a list ...
        return f"a value of type {type(value).__name__} that is too large to show"


def as_number(value: Any) -> float | None:
    """The value as a number that float32 can hold, or None if it is not one. True and False are not numbers."""
    value = _plain(value)
    return value if type(value) in (int, float) and abs(value) <= LARGEST else None


def as_truth(value: Any) -> bool | None:
    """The value as true or false (1 and 0 count too), or None if it is neither."""
    value = _plain(value)
    return bool(value) if isinstance(value, int | float) and value in (True, False) else None


def by_attribute(value: Any, default: str) -> dict[str, list[Any]]:
    """
    The ratings of an answer by the attributes that they are about.

    Args:
        value (`Any`):
            Cell of a row: a number, a list with one a rater, or a dict with either for each attribute.
        default (`str`):
            Attribute of ratings that name none.

    Returns:
        `dict[str, list]`: As many for each attribute as there are raters, with None for what one of them did not rate.
    """
    if isinstance(value, dict):
        return {name: as_ratings(given) for name, given in value.items() if not is_missing(given)}
    given = as_ratings(value)
    return {default: given} if given else {}


def as_ratings(value: Any) -> list[Any]:
    """The ratings of an answer, whether the column holds one or a list."""
    if is_missing(value):
        return []
    value = as_list(value)
    return [_plain(rating) for rating in value] if isinstance(value, list) else [value]
