"""
Columns that were probably meant to be ones that are read: misspelt, in another case, or by another tool's name.

Following a wrong suggestion trains on something else, which is worse than none. So a name has to be nearly the same,
what the column holds has to be of the right type, and where a format is known, its converter is named instead.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from .columns import KNOWN_COLUMNS, STRENGTH, TEXT_PAIR, TOKENIZED_PAIR
from .curation.formats import fitting_formats
from .records import MOST_LEVELS
from .values import Row, as_number, as_ratings


CLOSE = 0.85
"""Least similarity of two spellings, as `difflib` measures it: `rejcted` has 0.93, `height` for `weight` 0.83."""

PAIRS_OF_OTHERS = (
    *(("accepted", "rejected"), ("preferred", "rejected"), ("preferred", "dispreferred")),
    *(("preferred", "non_preferred"), ("preferred_response", "non_preferred_response")),
    *(("preferred_response", "dispreferred_response"), ("better", "worse"), ("better_response", "worse_response")),
    *(("response_j", "response_k"), ("y_w", "y_l"), ("positive", "negative")),
    ("messages", "rejected_messages"),
)
"""Names of `chosen` and `rejected` in other tools and well-known datasets. One of them alone may be anything: `winner`
is a text in few datasets, and the name of a side or of a model in the others."""

STRENGTHS_OF_OTHERS = (
    *("strength", "overall_preference", "preference_degree", "degree_of_preference", "preference_margin"),
    *("score_diff", "score_difference", "rating_diff", "rating_difference"),
)
"""Names by which other tools and well-known datasets call how much better the chosen answer is."""

# Words in names of columns, and the word that disco-trl has for the same thing; nothing for words that add nothing
WORDS = {
    **{"score": "rating", "scores": "rating", "ratings": "rating", "stars": "rating", "grade": "rating"},
    **{"vote": "votes", "count": "votes", "counts": "votes", "wins": "votes", "prob": "probability"},
    **{"p": "probability", "soft": "preference", "label": "probability"},
    **{"ties": "tie", "tied": "tie", "draw": "tie", "weights": "weight", "importance": "weight"},
    **{"rank": "ranks", "ranking": "ranks", "rankings": "ranks", "responses": "completions"},
    **{"answers": "completions", "prompts": "prompt", "question": "prompt", "instruction": "prompt"},
    **{"query": "prompt", "input": "prompt", "token": "ids", "tokens": "ids", "strengths": "strength"},
    **dict.fromkeys(("is", "num", "n", "sample", "example", "user"), ""),
}
OF_ANSWERS = {"response", "answer", "text", "completion", "output", "reply", "message", "messages"}
"""Words that add nothing to the name of a column that holds an answer or a prompt."""


def _is_content(value: Any) -> bool:
    is_list = isinstance(value, list) and bool(value)
    return isinstance(value, str) or (is_list and all(isinstance(turn, dict) and "role" in turn for turn in value))


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(as_number(number) is not None for number in value)


def _are_ids(value: Any) -> bool:
    # (A mask, of ones and zeros, has a name that is not near.)
    return _are_numbers(value) and all(isinstance(number, int) for number in value)


def _is_number(value: Any) -> bool:
    return as_number(value) is not None


def are_strengths(value: Any) -> bool:
    """Whether it is a whole number that may say how much better an answer is, or a list of them."""
    values = [as_number(number) for number in as_ratings(value)]
    return bool(values) and all(n is not None and n == int(n) and abs(n) <= MOST_LEVELS for n in values)


HOLDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys((*TEXT_PAIR, "prompt"), _is_content),
    **dict.fromkeys(TOKENIZED_PAIR, _are_ids),
    **dict.fromkeys(("chosen_votes", "rejected_votes", "weight", "margin"), _is_number),
    **dict.fromkeys(("chosen_rating", "rejected_rating"), lambda value: _is_number(value) or _are_numbers(value)),
    "preference_probability": lambda value: isinstance(value, float) and 0 <= value <= 1,
    STRENGTH: are_strengths,
    "tie": lambda value: isinstance(value, bool),
    "completions": lambda value: isinstance(value, list) and all(map(_is_content, value)),
    "ranks": _are_numbers,
}
"""Whether a column of this name could hold such a value."""


def _words(name: str) -> list[str]:
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    return re.findall(r"[a-z0-9]+", snake)


def _similarity(name: str, wanted: str) -> float:
    return difflib.SequenceMatcher(None, "_".join(_words(name)), wanted).ratio()


def _is_near(name: str, wanted: str) -> bool:
    words = _words(name)
    if "id" in words:
        return False
    if "ids" in words:
        words = [word for word in words if word != "input"]
    meant = {WORDS.get(word, word) for word in words} - {""}
    if wanted in (*TEXT_PAIR, "prompt"):
        meant -= OF_ANSWERS
    if wanted == STRENGTH and "_".join(words) in STRENGTHS_OF_OTHERS:
        return True
    return meant == {*_words(wanted)} or _similarity(name, wanted) >= CLOSE


def find_look_alikes(row: Row) -> dict[str, str]:
    """
    Columns that are not read but look like one that is.

    Args:
        row (`dict`):
            A value of each column, such as those of the first row.

    Returns:
        `dict[str, str]`: The column that each was probably meant to be.
    """
    found = {}
    for column, value in row.items():
        if column in KNOWN_COLUMNS:
            continue
        near = [name for name, holds in HOLDS.items() if name not in row and _is_near(column, name) and holds(value)]
        if near:
            found[column] = max(near, key=partial(_similarity, column))
    return found


def find_renames(row: Row) -> dict[str, str]:
    """
    Columns by whose new names a row becomes a pair that can be trained on.

    Args:
        row (`dict`):
            Row of a dataset.

    Returns:
        `dict[str, str]`: New names by the old ones; empty unless both sides were found and hold the same type.
    """
    near: dict[str, str] = {meant: column for column, meant in find_look_alikes(row).items()}
    spelled = {"_".join(_words(column)): column for column in row}
    candidates: list[tuple[tuple[str, str], list[str | None]]]
    candidates = [
        (pair, [name if name in row else near.get(name) for name in pair]) for pair in (TOKENIZED_PAIR, TEXT_PAIR)
    ]
    candidates += [(TEXT_PAIR, [spelled.get(name) for name in pair]) for pair in PAIRS_OF_OTHERS]
    for pair, columns in candidates:
        renames = {column: name for column, name in zip(columns, pair, strict=True) if column is not None}
        values = [row[column] for column in renames]
        if len(values) == 2 and type(values[0]) is type(values[1]) and all(map(HOLDS[pair[0]], values)):
            if pair == TEXT_PAIR and "prompt" not in row and "prompt" in near:
                renames[near["prompt"]] = "prompt"
            return {old: new for old, new in renames.items() if old != new}
    return {}


def conversion_of(row: Row) -> str | None:
    """How to convert a row of a known format, or None if it is of none."""
    formats = fitting_formats(row)
    if not formats:
        return None
    options = "" if len(formats) == 1 else f" --format {'|'.join(formats)}"
    known = " or ".join(map(repr, formats))
    return f"rows like these, of the format {known}, are converted by `disco-trl data convert DATA OUT.jsonl{options}`"


def unconverted_side(row: Row) -> str | None:
    """What is wrong with sides that are one message each, as in a known format, and the fix; None if they are not."""
    column = next((side for side in TEXT_PAIR if isinstance(row.get(side), dict)), None)
    conversion = None if column is None else conversion_of(row)
    return conversion and f"column '{column}': one message, where a list of them should be; {conversion}"


def fix_of_answers(row: Row) -> str:
    """
    What to do about rows without answers to compare.

    Args:
        row (`dict`):
            Row of a dataset.

    Returns:
        `str`: The fix: a conversion if the format is known, else new names if there are columns that are nearly
        right, else which columns there have to be.
    """
    if conversion := conversion_of(row):
        return conversion
    renames = find_renames(row)
    if len(renames) == 1:
        ((old, new),) = renames.items()
        return f"dataset.rename_column({json.dumps(old, ensure_ascii=False)}, {json.dumps(new)})"
    if renames:
        return f"dataset.rename_columns({json.dumps(renames, ensure_ascii=False)})"
    return (
        "name the columns 'chosen' and 'rejected' (and 'prompt'), or 'chosen_ids' and 'rejected_ids'; "
        "`disco-trl data convert --help` lists the formats that can be converted"
    )
