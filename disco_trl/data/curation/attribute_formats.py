"""How well-known datasets write judgements about attributes of an answer, such as helpfulness and verbosity."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from statistics import fmean
from typing import Any

from ..columns import ATTRIBUTE, RANKED_RATINGS
from ..values import BadRow, Row, as_ratings, is_missing, shown
from .cells import answer_of, column_of, finite, first_of, prompt_of


ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
"""Columns with ratings of an answer in HelpSteer and HelpSteer2."""
RATED_TEXTS = ("completion", "response", "answer", "text", "item")
RATERS = ("rater", "annotator", "annotator_id", "rater_id", "worker", "person", "user_id")
LABELS = {"better_response_id": "helpfulness", "safer_response_id": "safety"}
"""Columns of PKU-SafeRLHF that tell the better of two answers, and in what."""


# Ratings of one answer in several columns


def is_rated_in_columns(row: Row) -> bool:
    """Whether a row holds ratings of an answer in columns of HelpSteer2."""
    return first_of(row, RATED_TEXTS) is not None and sum(name in row for name in ATTRIBUTES) >= 2


def from_columns(row: Row, attributes: Sequence[str] = ATTRIBUTES) -> list[Row]:
    """
    An answer with its ratings by attribute, each of which is a number or a list with one a rater.

    Args:
        row (`dict`):
            The row.
        attributes (`Sequence[str]`, *optional*):
            Columns with ratings. By default those of HelpSteer2.

    Returns:
        `list[dict]`: One row of `answer` and `ratings`, with its `prompt`.

    Raises:
        [`~disco_trl.data.values.BadRow`]: If there is no answer, or no rating of it.
    """
    name = column_of(row, RATED_TEXTS, "the answer")
    ratings = {
        attribute: [None if is_missing(value) else finite(attribute, value, "a rating") for value in given]
        for attribute in attributes
        if (given := as_ratings(row.get(attribute)))
    }
    if not any(value is not None for given in ratings.values() for value in given):
        raise BadRow(attributes[0], "nobody has rated the answer", "drop the row")
    return [{**prompt_of(row), "answer": answer_of(name, row[name]), "ratings": ratings}]


def level_of(ratings: Any) -> float:
    """
    How well an answer was rated, to tell a better answer from a worse one.

    Args:
        ratings (`list` or `dict[str, list]`):
            Its ratings, or those by attribute, of which the first counts.

    Returns:
        `float`: Their mean.
    """
    given = next(iter(ratings.values())) if isinstance(ratings, dict) else ratings
    return fmean(value for value in given if value is not None) if any(v is not None for v in given) else 0.0


# One rating a row


def is_long(row: Row) -> bool:
    """Whether a row holds one rating, by one rater, in one attribute."""
    names = row.keys()
    return {ATTRIBUTE, "rating"} <= names and bool(names & {*RATERS}) and first_of(row, RATED_TEXTS) is not None


def answers_of_long_rows(rows: Iterable[tuple[int, Row]]) -> Iterator[tuple[int, Row]]:
    """
    Put ratings that stand in a row each together by the answer that they are of.

    Args:
        rows (`Iterable[tuple[int, dict]]`):
            Rows with an answer, perhaps its prompt, who rated it, in what, and the rating; each with its number.

    Yields:
        `tuple[int, dict]`: Each answer with its `ratings` by attribute, in which the raters stand in the same order,
        and the number of its first row.

    Raises:
        [`~disco_trl.data.values.BadRow`]: If something is missing in a row, or if somebody has rated an answer twice
            in the same attribute.
    """
    found: dict[tuple[str, str], tuple[int, Row, dict[str, dict[str, float]]]] = {}
    for number, row in rows:
        name, rater = column_of(row, RATED_TEXTS, "the answer"), column_of(row, RATERS, "who has rated it")
        attribute, answer = row.get(ATTRIBUTE), answer_of(name, row[name])
        if not isinstance(attribute, str) or not attribute.strip():
            raise BadRow(ATTRIBUTE, f"{shown(attribute)} is not the name of an attribute", "give a text")
        prompt = prompt_of(row)
        key = str(prompt), str(answer)
        _, _, by_attribute = found.setdefault(key, (number, {**prompt, "answer": answer}, {}))
        given = by_attribute.setdefault(attribute, {})
        if str(row[rater]) in given:
            wrong = f"{shown(row[rater])} has rated the same answer in {attribute!r} before"
            raise BadRow(rater, wrong, "keep one of the two rows")
        given[str(row[rater])] = finite("rating", row.get("rating"), "a rating")
    for number, answer, by_attribute in found.values():
        raters = list(dict.fromkeys(rater for given in by_attribute.values() for rater in given))
        ratings = {name: [given.get(rater) for rater in raters] for name, given in by_attribute.items()}
        yield number, {**answer, "ratings": ratings}


def from_long(row: Row) -> list[Row]:
    """Refuse one rating by itself."""
    raise BadRow(ATTRIBUTE, "one rating a row, which make no pair by themselves", "convert the whole file")


# Which of two answers is better, in two respects


def is_labelled(row: Row) -> bool:
    """Whether a row is one of PKU-SafeRLHF."""
    return row.keys() >= {*LABELS, "response_0", "response_1"}


def from_labels(row: Row) -> list[Row]:
    """
    Two rows: which of two answers is more helpful, and which is safer.

    Args:
        row (`dict`):
            Row of PKU-SafeRLHF.

    Returns:
        `list[dict]`: Rows with the column `attribute`.

    Raises:
        [`~disco_trl.data.values.BadRow`]: If an answer is missing, or a label names none of the two.
    """
    rows = []
    for column, attribute in LABELS.items():
        label = row.get(column)
        if isinstance(label, bool) or label not in (0, 1):
            raise BadRow(column, f"{shown(label)} names no answer", "give 0 or 1")
        chosen, rejected = f"response_{int(label)}", f"response_{1 - int(label)}"
        sides = {"chosen": answer_of(chosen, row.get(chosen)), "rejected": answer_of(rejected, row.get(rejected))}
        rows.append({**prompt_of(row), **sides, ATTRIBUTE: attribute})
    return rows


# Several answers with scores of several aspects


def with_aspects(ranked: Row, entries: Sequence[dict[str, Any]]) -> Row:
    """
    A ranking with the scores of the aspects of its answers, as UltraFeedback has them.

    Args:
        ranked (`dict`):
            The ranking.
        entries (`Sequence[dict]`):
            Its answers, with their `annotations`.

    Returns:
        `dict`: The row with the column `completion_ratings`.
    """
    ratings = []
    for entry in entries:
        given: dict[str, float] = {}
        for aspect, annotation in (entry.get("annotations") or {}).items():
            value = annotation.get("Rating") if isinstance(annotation, dict) else annotation
            if not is_missing(value) and value != "N/A":
                given[aspect] = finite("annotations", value, f"a number for {aspect!r}")
        ratings.append(given or None)
    return {**ranked, RANKED_RATINGS: ratings}
