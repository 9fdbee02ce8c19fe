"""
What of a dataset is probably not read as it was meant, although every row of it is sound.

The trainer logs what it finds in some rows, spread over the dataset or the first of a stream, and `disco-trl data
check` what it finds in all of them.
"""

from __future__ import annotations

import contextlib
import json
from array import array
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset

from .columns import RATINGS, STRENGTH, Layout, holds_pair, leave_out
from .contents import text_of
from .records import MOST_LEVELS, Record, read_record
from .values import BadRow, Row, is_missing


MEDIA = ("image", "images", "picture", "pictures", "video", "videos", "audio", "audios")
SYSTEMS = ("system", "system_prompt", "system_message")
SOURCES = ("source", "dataset", "data_source", "dataset_name", "origin", "subset")
ROWS_NAMED = 5
ROWS_SAMPLED = 32
MOST_SOURCES = 100
SCALED = {"ratings": (RATINGS, 4), "strengths": ((STRENGTH,), 20)}
"""What is given on a scale: its columns, and the fewest rows of a source whose scale is compared with that of others.
Most ratings are high, most strengths low."""
TWO_SCALES = 1.5
"""Ratio of two sources' highest ratings from which a warning is shown: scales of 5 and of 10 have 2."""


def named(numbers: Sequence[int]) -> str:
    """The numbers of some rows, in words: of many, the first."""
    first = ", ".join(map(str, numbers[:ROWS_NAMED]))
    return f"row{'s' * (len(numbers) > 1)} {first}{', ...' * (len(numbers) >= ROWS_NAMED)}"


class Findings:
    """Takes in the rows of a dataset, and says what is probably not read as it was meant."""

    def __init__(self) -> None:
        self.rows = 0
        self._kind = "standard"
        # Numbers of rows, by column
        self._media: defaultdict[str, array[int]] = defaultdict(lambda: array("Q"))
        self._systems: defaultdict[str, array[int]] = defaultdict(lambda: array("Q"))
        self._json: defaultdict[str, array[int]] = defaultdict(lambda: array("Q"))
        self._repeated, self._unranked = array("Q"), array("Q")
        # Of ratings and strengths: number of rows and the highest, by the column that names their source and by it
        self._scaled: dict[str, defaultdict[str, dict[str, tuple[int, float]]]] = {
            what: defaultdict(dict) for what in SCALED
        }
        self._margins: set[float] = set()

    def add(self, row: Row, record: Record, number: int) -> None:
        """
        Take in a row.

        Args:
            row (`dict`):
                The row, with all its columns.
            record ([`~disco_trl.data.records.Record`]):
                Its record.
            number (`int`):
                Its number in the dataset.
        """
        self.rows += 1
        self._kind = record.kind
        for name in media_of(row):
            self._media[name].append(number)
        if record.kind != "tokenized":
            self._add_texts(row, record, number)
        if not record.is_ranking and holds_pair(row) and _is_filled(row.get("completions")):
            self._unranked.append(number)
        said: dict[str, list[float]] = {
            "ratings": [rating for ratings in record.ratings() for rating in ratings],
            "strengths": [abs(strength) for comparison in record.comparisons for strength in comparison.strengths],
        }
        for what, given in said.items():
            for name in row.keys() & {*SOURCES} if given else ():
                source, of_sources = str(row[name]), self._scaled[what][name]
                if source in of_sources or len(of_sources) < MOST_SOURCES:
                    count, highest = of_sources.get(source, (0, -np.inf))
                    of_sources[source] = count + 1, max(highest, *given)
        if "margin" in record.said and STRENGTH not in record.said and len(self._margins) <= MOST_LEVELS:
            self._margins.add(record.comparisons[0].margin)

    def _add_texts(self, row: Row, record: Record, number: int) -> None:
        for name in row.keys() & {*SYSTEMS}:
            system = row[name]
            said = "\n".join(map(_text, [record.prompt, record.answers[0]]))
            if isinstance(system, str) and system.strip() and system.strip() not in said:
                self._systems[name].append(number)
        for column, content in record.parts():
            if _is_json_of_messages(content):
                self._json[column].append(number)
        if repeats_prompt(record):
            self._repeated.append(number)

    def messages(self) -> list[str]:
        """What was found: the column, what is wrong with it, in which rows, and the fix."""
        found = [
            f"column {name!r}: pictures, sound or video ({named(rows)}) are not read, and the model learns from the "
            f"texts alone; drop the rows that need them, or, if none does, leave the column out: {leave_out([name])}"
            for name, rows in self._media.items()
        ]
        found += [
            f"column {name!r}: not read ({named(rows)}), so the model does not see it; {self._system_fix(name)}"
            for name, rows in self._systems.items()
        ]
        if self._json:
            columns, rows = [*self._json], sorted(set().union(*self._json.values()))
            decoded = ", ".join(f'"{name}": json.loads(row["{name}"])' for name in columns)
            found.append(
                f"column {' and '.join(map(repr, columns))}: messages as JSON in a string ({named(rows)}) are read as "
                f"plain text; dataset.map(lambda row: {{{decoded}}}), or write them into the file as they are, not as "
                "a string"
            )
        # A short prompt may begin an answer by chance, a conversation does not.
        if self._repeated and (self._kind == "conversational" or len(self._repeated) > self.rows / 2):
            is_all = len(self._repeated) == self.rows
            fix = f"leave it out: {leave_out(['prompt'])}" if is_all else "cut it off the answers of these rows"
            found.append(
                f"column 'prompt': the answers begin with it already ({named(self._repeated)}), so the model sees it "
                f"twice; {fix}"
            )
        if self._unranked:
            found.append(
                f"column 'completions': not read beside 'chosen' and 'rejected' ({named(self._unranked)}), as there "
                f"are no 'ranks'; to silence this, leave it out: {leave_out(['completions'])}"
            )
        if are_grades(self._margins):
            values = ", ".join(f"{margin:g}" for margin in sorted(self._margins))
            found.append(
                f"column 'margin': the whole numbers {values}, as strengths of preference are, and a margin is in "
                "units of reward (about one logit each); if they are how much better 'chosen' is, rename the column: "
                f'dataset.rename_column("margin", "{STRENGTH}")'
            )
        return found + self._scales()

    def _system_fix(self, name: str) -> str:
        if self._kind == "conversational":
            return 'make it the first message of the prompt: {"role": "system", "content": ...}'
        renamed = "prompt=instruction" + f" {name}=system" * (name != "system")
        return (
            f"put it before the prompt, or make messages of all: `disco-trl data convert DATA OUT.jsonl --rename "
            f"{renamed}`"
        )

    def _scales(self) -> list[str]:
        """Two sources whose ratings or strengths reach to different heights. Without a source none of this is seen."""
        found = []
        for what, (names, fewest) in SCALED.items():
            for column, of_sources in self._scaled[what].items():
                reached = sorted((high, source) for source, (count, high) in of_sources.items() if count >= fewest)
                if reached and 0 < reached[0][0] * TWO_SCALES <= reached[-1][0]:
                    (low, one), (high, other) = reached[0], reached[-1]
                    found.append(
                        f"column {' and '.join(map(repr, names))}: {what} reach {low:g} where {column!r} is {one!r}, "
                        f"and {high:g} where it is {other!r}; if these are two scales, bring them to one, or leave "
                        f"the {what} out: {leave_out(names)}"
                    )
        return found


def find_in_some_rows(dataset: Dataset | IterableDataset, layout: Layout) -> list[str]:
    """
    What is probably not read as it was meant, judged by some rows of a dataset.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Preference dataset. Its bad rows are passed over.
        layout ([`~disco_trl.data.columns.Layout`]):
            Its layout.

    Returns:
        `list[str]`: As [`Findings.messages`].
    """
    findings = Findings()
    for number, row in _some_rows(dataset.with_format(None)):
        with contextlib.suppress(BadRow):
            findings.add(row, read_record(row, layout), number)
    return findings.messages()


def _some_rows(dataset: Dataset | IterableDataset) -> Iterator[tuple[int, Row]]:
    if isinstance(dataset, IterableDataset):
        return enumerate(islice(dataset, ROWS_SAMPLED))
    # Spread, because a mixture often has its sources one after the other.
    positions = np.unique(np.linspace(0, len(dataset) - 1, ROWS_SAMPLED).astype(int)).tolist()
    return zip(positions, dataset.select(positions), strict=True)


def are_grades(margins: set[float]) -> bool:
    """Whether these margins of a dataset look like a few grades: whole numbers, of which several are not 0."""
    several = len(margins - {0}) >= 2
    return several and all(margin == int(margin) and abs(margin) <= MOST_LEVELS for margin in margins)


def media_of(row: Row) -> list[str]:
    """The columns of a row with pictures, sound or video."""
    return [name for name in MEDIA if _is_filled(row.get(name))]


def repeats_prompt(record: Record) -> bool:
    """Whether all answers of a record begin with its prompt, in a column of its own, once more."""
    prompt: Any = record.prompt
    if isinstance(prompt, str):
        prompt = prompt.strip()
        return bool(prompt) and all(
            isinstance(text, str) and text.lstrip().startswith(prompt) for text in record.answers
        )
    if not prompt or record.kind != "conversational":
        return False
    asked = [_said(turn) for turn in prompt]
    return all([_said(turn) for turn in answer[: len(asked)]] == asked for answer in record.answers)


def _is_filled(value: Any) -> bool:
    return not is_missing(value) and not (isinstance(value, str | dict) and not value)


def _said(turn: Any) -> tuple[Any, str]:
    return turn.get("role"), text_of(turn.get("content"))


def _text(content: Any) -> str:
    return "\n".join(text_of(turn.get("content")) for turn in content) if isinstance(content, list) else str(content)


def _is_json_of_messages(content: Any) -> bool:
    if not isinstance(content, str) or not content.lstrip().startswith("["):
        return False
    try:
        turns = json.loads(content)
    except (ValueError, RecursionError):
        return False
    return bool(turns) and all(isinstance(turn, dict) and turn.keys() & {"role", "from"} for turn in turns)
