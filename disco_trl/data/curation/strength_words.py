"""Strengths of preference in words: "slightly better", "A-is-clearly-better", "tie"."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..values import BadRow, as_number, shown


VOCABULARIES = (
    ("slightly", "clearly"),  # MultiPref
    ("slightly", "clearly", "much"),
    ("slightly", "better", "much"),  # HelpSteer3
    ("slightly", "better", "significantly"),
    ("negligibly", "slightly", "better", "significantly"),  # Llama 2
    ("marginally", "slightly", "better", "significantly"),  # Llama 3
)
"""How people are asked how much better an answer is, from the least to the most; each without a further "better"."""
EQUAL = {"tie", "equal", "the same", "about the same", "equally good", "no preference"}
"""What says that two answers are equal, whatever the other words are."""
SIDE = re.compile(
    r"(?:(?:response|answer|completion|output) )?(a|1|first|b|2|second)(?: (?:response|answer))?(?: is)? "
)
FIRST = ("a", "1", "first")


def is_word(value: Any) -> bool:
    """Whether a strength is written in words rather than as a number, or as a number in a string."""
    if not isinstance(value, str):
        return False
    try:
        return as_number(float(value)) is None
    except ValueError:
        return True


def degree_of(words: str) -> tuple[str, str]:
    """
    Take words apart.

    Args:
        words (`str`):
            Words, such as `"A-is-slightly-better"`. Case, hyphens and underscores do not count, nor does what follows
            a slash (`"negligibly better / unsure"`).

    Returns:
        `tuple[str, str]`: Which answer is better (`"first"`, `"second"`, or `""` if the words do not say), and by how
        much, without a further "better": `"slightly"`.
    """
    plain = " ".join(re.sub(r"[-_\s@.]+", " ", words.split("/")[0]).lower().split())
    found = SIDE.match(plain)
    side = "" if found is None else "first" if found[1] in FIRST else "second"
    degree = plain if found is None else plain[found.end() :]
    return side, degree.removesuffix(" better")


def strength_of_words(column: str, words: str, levels: Mapping[str, int], names: Sequence[str]) -> int:
    """
    Read how much better an answer is from words.

    Args:
        column (`str`):
            Column of the words, for the error.
        words (`str`):
            The words.
        levels (`Mapping[str, int]`):
            Level of each degree.
        names (`Sequence[str]`):
            Columns of the two answers. Beside `chosen` and `rejected`, words that name no side speak of `chosen`.

    Returns:
        `int`: The strength: below 0 the first answer is better, above 0 the second.

    Raises:
        [`~disco_trl.data.values.BadRow`]: If the words are not known, or do not say which answer is better.
    """
    side, degree = degree_of(words)
    level = levels.get(degree, 0 if degree in EQUAL else None)
    if level is None:
        known = ", ".join(f"{name!r}={number}" for name, number in levels.items()) or "none"
        wrong = f"{shown(words)} is none of the words that are read ({known})"
        raise BadRow(column, wrong, "give the level of each with --strength_words")
    are_ordered = names[0] == "chosen"
    if level and are_ordered == bool(side):
        wrong = f"{shown(words)} " + ("names a side" if side else "does not say which answer is better")
        fix = "name the answers 'response_a' and 'response_b'" if side else 'write it as "A is slightly better"'
        raise BadRow(column, wrong, fix)
    return level if side == "second" else -level


def parse_levels(argument: str) -> dict[str, int]:
    """
    Read the levels of words from the command line.

    Args:
        argument (`str`):
            The words with their levels, such as `"slightly better=1,better=2"`.

    Returns:
        `dict[str, int]`: Level of each degree, as in [`degree_of`].

    Raises:
        `ValueError`: If it is written otherwise.
    """
    levels: dict[str, int] = {}
    for part in argument.split(","):
        words, _, level = part.rpartition("=")
        side, degree = degree_of(words)
        if not degree or side or not level.strip().isdigit():
            raise ValueError(
                f'--strength_words {argument!r}: write it as "slightly better=1,better=2", with a level from 0 '
                '(a tie) up for what may follow "A is"'
            )
        levels[degree] = int(level)
    return levels


def detect_levels(given: Iterable[str]) -> dict[str, int]:
    """
    Infer the levels of all words of a dataset from the usual ways to ask.

    Args:
        given (`Iterable[str]`):
            The words of all rows.

    Returns:
        `dict[str, int]`: Level of each degree, as in [`degree_of`].

    Raises:
        `ValueError`: If no way has all of them, or if several have that number them differently.
    """
    found = {degree_of(words)[1] for words in given} - EQUAL
    fitting = {
        tuple((degree, level) for level, degree in enumerate(words, start=1) if degree in found)
        for words in VOCABULARIES
        if found <= {*words}
    }
    if len(fitting) != 1:
        order = "whose order is not known" if not fitting else "which may be of several scales"
        example = ",".join(f"{degree}={level}" for level, degree in enumerate(sorted(found), start=1))
        raise ValueError(
            f"strengths of preference in the words {', '.join(map(repr, sorted(found)))}, {order}; give the level of "
            f'each, the weakest first, such as --strength_words "{example}"'
        )
    (levels,) = fitting
    return dict(levels)
