"""
From how others write preferences (`disco_trl.data.curation.formats`) to a file that disco-trl reads: `disco-trl data
convert`.

Rows are converted one by one in the order of the input, and each row that is written has passed the checks of
training. Answers that were rated and not compared need a second one to share a row with. Each is put into one pair
with another answer to its prompt, drawn at random, so that every rating counts once.
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset, List, Value
from transformers.utils import logging

from ..columns import STRENGTH, Layout, find_layout, holds_pair
from ..files import chunks
from ..findings import Findings, media_of, repeats_prompt
from ..look_alikes import find_look_alikes
from ..records import Record, read_record
from ..values import BadRow, Row
from .attribute_formats import answers_of_long_rows, level_of
from .check import ErrorCounts
from .formats import FORMATS, as_strength, fitting_formats, pair_of, strengths_of
from .strength_words import detect_levels, is_word
from .transcripts import prompt_messages


MESSAGES = List({"role": Value("string"), "content": Value("string")})
TYPES = {
    **{"chosen_votes": Value("int64"), "rejected_votes": Value("int64"), "preference_probability": Value("float64")},
    **{"tie": Value("bool"), "weight": Value("float64"), "ranks": List(Value("float64")), "tools": Value("string")},
    **{"preference_strength": List(Value("int64"))},
    **{"chosen_rating": List(Value("float64")), "rejected_rating": List(Value("float64"))},
    "attribute": Value("string"),
}


@dataclass
class Report:
    """
    How many rows were read and written, and why others were skipped.

    Args:
        format (`str`):
            What the rows were read as.
        read, written (`int`, *optional*, defaults to `0`):
            Numbers of rows.
        bad ([`ErrorCounts`], *optional*):
            Rows that could not be converted.
        alone (`int`, *optional*, defaults to `0`):
            Rated answers without a second answer to their prompt.
        findings ([`~disco_trl.data.findings.Findings`], *optional*):
            What is probably not meant as it is, of the rows that were converted.
        judged_in (`Counter[str]`, *optional*):
            How many rows had their judgement in which column, where it may be in several.
        strengths (`Counter[int]`, *optional*):
            How often each strength of preference is in what was written, below 0 for the rejected side.
        words (`dict[str, int]`, *optional*):
            What strengths in words were read as.
    """

    format: str
    read: int = 0
    written: int = 0
    bad: ErrorCounts = field(default_factory=ErrorCounts)
    alone: int = 0
    findings: Findings = field(default_factory=Findings)
    judged_in: Counter[str] = field(default_factory=Counter)
    strengths: Counter[int] = field(default_factory=Counter)
    words: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"read     {self.read:9,}  as {self.format}"]
        lines += [f"judged   {rows:9,}  in {column!r}" for column, rows in self.judged_in.most_common()]
        if self.words:
            levels = ", ".join(f"{words!r} {level}" for words, level in self.words.items())
            lines.append(f"words              {levels}; equal ones 0")
        if given := self.strengths.total():
            ties = self.strengths[0]
            lines.append(
                f"given    {given:9,}  strengths from {min(self.strengths)} to {max(self.strengths)}, above 0 for "
                f"'chosen'; " + (f"{ties:,} are 0, a tie" if ties else "none is 0: no tie was on offer")
            )
        lines += [
            f"skipped  {kind['rows']:9,}  column {kind['column']!r}, such as row {kind['first'][0]}: {kind['wrong']}"
            for kind in self.bad.figures()
        ]
        if self.alone:
            lines.append(f"skipped  {self.alone:9,}  the only answer to its prompt, which nothing can be paired with")
        lines += [f"written  {self.written:9,}", *(f"warning: {message}" for message in self.findings.messages())]
        return "\n".join(lines)


def detect_format(row: Row) -> str:
    """
    Infer the format of a row.

    Args:
        row (`dict`):
            Row of the data.

    Returns:
        `str`: Name of the format.

    Raises:
        `ValueError`: If none fits, or several do; it names the columns that were found and the formats there are.
    """
    fitting = fitting_formats(row)
    if len(fitting) == 1:
        return fitting[0]
    there = ", ".join(map(repr, row))
    if fitting:
        raise ValueError(
            f"--format auto: the columns {there} may be any of {', '.join(fitting)}; choose with --format"
        )
    if holds_pair(row):
        raise ValueError(f"--format auto: {_why_nothing_to_convert(row)}")
    known = "\n".join(f"  {name}: {known.what}" for name, known in FORMATS.items())
    raise ValueError(
        f"--format auto: no format has the columns {there}; rename them with --rename OLD=NEW to those of one of "
        f"these\n{known}"
    )


def _why_nothing_to_convert(row: Row) -> str:
    """What to do with rows that hold chosen and rejected answers already."""
    layout = find_layout(row)
    try:
        record = read_record(row, layout)
    except BadRow as error:
        return f"'chosen' and 'rejected' are there already, but in row 0, {error}"
    what = (
        "'chosen' and 'rejected' are there already, and training reads them as they are (see `disco-trl data check`)"
    )
    near = {meant: column for column, meant in find_look_alikes(row).items()}
    prompt = "prompt" if "prompt" in row else near.get("prompt")
    if record.kind != "standard" or prompt is None:
        return what
    return f"{what}; to make messages of the texts, and of a column 'system', pass --rename {prompt}=instruction"


def levels_of_words(rows: Iterable[Row]) -> dict[str, int]:
    """
    Infer what the words of the format `strengths` stand for, if it has some.

    Args:
        rows (`Iterable[dict]`):
            Rows of the format. Only the first ones are read if the strengths are numbers there.

    Returns:
        `dict[str, int]`: As [`~disco_trl.data.curation.strength_words.detect_levels`]; empty if there are no words.

    Raises:
        `ValueError`: If the words are not known.
    """
    words: set[str] = set()
    for row in rows:
        with contextlib.suppress(BadRow):
            _, strengths = strengths_of(row)
            words.update(filter(is_word, strengths))
            if strengths and not words:
                return {}
    return detect_levels(words) if words else {}


def why_unsigned(rows: Iterable[Row]) -> str | None:
    """
    Why the strengths of preference of the format `strengths` may not say which answer is better: none is negative.

    A file of sizes, such as absolute values, would otherwise be read as "the second answer is better" in every row.

    Args:
        rows (`Iterable[dict]`):
            Rows of the format. No more of them are read than up to the first negative strength.

    Returns:
        `str`, *optional*: The reason, or None if some strength is negative, or none is positive.
    """
    positive: Counter[str] = Counter()
    for row in rows:
        with contextlib.suppress(BadRow):
            column, strengths = strengths_of(row)
            if holds_pair(row) or any(map(is_word, strengths)):  # which say themselves which answer is better
                return None
            numbers = [as_strength(column, number) for number in strengths]
            if min(numbers, default=0) < 0:
                return None
            positive[column] += sum(number > 0 for number in numbers)
    if not positive.total():
        return None
    return (
        f"column {next(iter(positive))!r}: none of {positive.total():,} strengths of preference is below 0, which "
        "stands for the first answer, so the second one is the better in every row"
    )


def rename(row: Row, renamed: dict[str, str]) -> Row:
    """
    Rename columns of a row.

    Args:
        row (`dict`):
            Row of the data.
        renamed (`dict[str, str]`):
            New names of columns by their old ones.

    Returns:
        `dict`: The row with the new names.

    Raises:
        `ValueError`: If two columns would have one name.
    """
    for old, new in renamed.items():
        if old in row and ((new in row and new not in renamed) or list(renamed.values()).count(new) > 1):
            raise ValueError(
                f"--rename {old}={new}: another column is called {new!r} then; rename that one too, or leave this out"
            )
    return {renamed.get(name, name): value for name, value in row.items()}


class Converter:
    """
    Converts rows, checks what comes out, and counts.

    Args:
        convert (`Callable[[dict], list[dict]]`):
            As [`Format.convert`].
        report ([`Report`]):
            Where the rows are counted.
        plain_text (`bool`, *optional*, defaults to `False`):
            Whether texts stay as they are rather than become messages.
        renamed (`dict[str, str]`, *optional*):
            New names of columns by their old ones.
        skip_bad (`bool`, *optional*, defaults to `False`):
            Whether rows that cannot be converted are skipped and counted rather than raise an error.
        flat (`bool`, *optional*, defaults to `False`):
            Whether messages may hold only a role and a text.
        judged_in (`Callable[[dict], str]`, *optional*):
            As [`Format.judged_in`].
    """

    def __init__(
        self,
        convert: Callable[[Row], list[Row]],
        report: Report,
        plain_text: bool = False,
        renamed: dict[str, str] | None = None,
        skip_bad: bool = False,
        flat: bool = False,
        judged_in: Callable[[Row], str] | None = None,
    ):
        self.convert = convert
        self.report = report
        self.plain_text = plain_text
        self.renamed = renamed or {}
        self.skip_bad = skip_bad
        self.flat = flat
        self.judged_in = judged_in
        self.first: tuple[set[str], Layout] | None = None  # columns and layout of the first row that came out

    def __call__(self, row: Row, number: int) -> list[Row]:
        """
        Convert a row.

        Args:
            row (`dict`):
                The row.
            number (`int`):
                Its number, for the error.

        Returns:
            `list[dict]`: The checked rows that it becomes, none if it is skipped. Rated answers are neither pairs nor
            checked yet.

        Raises:
            `ValueError`: If the row cannot be converted; it names row, column and fix.
        """
        row = rename(row, self.renamed)
        try:
            for name in media_of(row):
                wrong = "pictures, sound or video, without which the texts would be written"
                raise BadRow(name, wrong, "drop the row, or, if the answers do not depend on it, the column")
            rows = [self._checked(self.finished(converted), row, number) for converted in self.convert(row)]
            if self.judged_in is not None:
                self.report.judged_in[self.judged_in(row)] += 1
            return rows
        except BadRow as error:
            self._refuse(error, number)
            return []

    def pair(self, one: tuple[int, Row], other: tuple[int, Row], first_only: bool) -> list[Row]:
        """
        Make a row of two rated answers.

        Args:
            one, other (`tuple[int, dict]`):
                The answers, each with the number of its row.
            first_only (`bool`):
                Whether to leave out the ratings of the other one, which count elsewhere.

        Returns:
            `list[dict]`: The checked row, none if it is skipped.
        """
        try:
            return [self._checked(pair_of(one[1], other[1], first_only), {}, one[0])]
        except BadRow as error:
            self._refuse(error, one[0])
            return []

    def _refuse(self, error: BadRow, number: int) -> None:
        if not self.skip_bad:
            raise ValueError(f"row {number}, {error} (or skip all such rows with --skip_bad)") from error
        self.report.bad.add(error.problem, number)

    def finished(self, row: Row) -> Row:
        """The row with its texts as messages, unless they are to stay texts or have no prompt to answer."""
        prompt = row.get("prompt")
        if self.plain_text and isinstance(prompt, list):
            raise BadRow("prompt", "a conversation, which is no plain text", "leave out --plain_text")
        if self.plain_text or prompt is None:
            return row
        if isinstance(prompt, str):
            row = row | {"prompt": prompt_messages("prompt", prompt)}
        for name in ("chosen", "rejected", "answer"):
            if name in row:
                row[name] = _as_messages(row[name])
        if "completions" in row:
            row["completions"] = list(map(_as_messages, row["completions"]))
        return row

    def _checked(self, row: Row, source: Row, number: int) -> Row:
        if "answer" in row:
            return row
        self.first = self.first or ({*row}, find_layout(row))
        columns, layout = self.first
        for name in columns ^ {*row}:
            wrong = "missing" if name in columns else "given"
            raise BadRow(name, f"{wrong}, unlike in the first row", "convert rows with it and without it apart")
        try:
            record = read_record(row, layout)
        except BadRow as error:
            column, wrong, fix = error.problem
            raise BadRow(column, f"once converted, {wrong}", fix) from error
        if self.flat and any(len(message) > 2 for message in _all_messages(record)):
            raise BadRow("prompt", "a tool call, for which Parquet has no type", "write to a .jsonl file instead")
        if record.kind == "conversational" and repeats_prompt(record):
            fix = "cut it off them, or leave the prompt's column out of the data"
            raise BadRow("prompt", "the answers begin with it already", fix)
        self.report.findings.add({**source, **row}, record, number)
        if STRENGTH in record.said:
            (comparison,) = record.comparisons
            self.report.strengths.update([*comparison.strengths, *[0] * int(comparison.ties)])
        return row


def _as_messages(answer: Any) -> Any:
    return [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer


def _all_messages(record: Record) -> Iterator[dict[str, Any]]:
    for _, content in record.parts():
        if isinstance(content, list):
            yield from content


# Pairs of rated answers


def draw_pairs(groups: list[list[int]], count: int | None, seed: int) -> Iterator[tuple[int, int, bool]]:
    """
    Draw pairs of answers to the same prompt at random.

    Args:
        groups (`list[list[int]]`):
            Positions of the answers to each prompt.
        count (`int`, *optional*):
            Number of pairs. By default each answer is put into one pair, and one that is left over beside an answer
            that has a pair already.
        seed (`int`):
            Seed of the draws.

    Yields:
        `tuple[int, int, bool]`: Two positions, and whether the ratings of the second one are left out because they are
        in another pair. Pairs beyond the default number are new ones, whose ratings count again.

    Raises:
        `ValueError`: If there are not that many pairs.
    """
    generator = np.random.default_rng(seed)
    pairs: list[tuple[int, int, bool]] = []
    groups = [group for group in groups if len(group) > 1]
    for group in groups:
        order = [group[index] for index in generator.permutation(len(group))]
        pairs += [(one, other, False) for one, other in zip(order[::2], order[1::2], strict=False)]
        if len(order) % 2:
            pairs.append((order[-1], order[0], True))
    pairs = [pairs[index] for index in generator.permutation(len(pairs))]
    count = len(pairs) if count is None else count
    yield from pairs[:count]
    possible = np.array([len(group) * (len(group) - 1) // 2 for group in groups])
    if count > possible.sum():
        raise ValueError(
            f"--pairs {count}: {sum(map(len, groups))} answers make {possible.sum()} pairs of the same prompt"
        )
    seen = {frozenset(pair[:2]) for pair in pairs}
    while len(seen) < count:
        group = groups[generator.choice(len(groups), p=possible / possible.sum())]
        one, other = (group[index] for index in generator.choice(len(group), 2, replace=False))
        if frozenset((one, other)) not in seen:
            seen.add(frozenset((one, other)))
            yield one, other, False


def convert_long(dataset: Dataset, converter: Converter, count: int | None, seed: int) -> Iterator[list[Row]]:
    """Rows of a dataset with one rating a row: the answers with all of their ratings, in pairs."""

    def rows() -> Iterator[tuple[int, Row]]:
        for part in logging.tqdm(chunks(dataset), desc="reading"):
            for row in part:
                yield converter.report.read, rename(row, converter.renamed)
                converter.report.read += 1

    try:
        answers = list(answers_of_long_rows(rows()))
    except BadRow as error:
        raise ValueError(f"row {converter.report.read}, {error}") from error
    answers = [(number, converter.finished(answer)) for number, answer in answers]
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for place, (_, answer) in enumerate(answers):
        groups[str(answer.get("prompt"))].append(place)
    converter.report.alone = sum(len(group) == 1 for group in groups.values())
    for one, other, first_only in draw_pairs(list(groups.values()), count, seed):
        yield converter.pair(answers[one], answers[other], first_only)


def convert_pairs(dataset: Dataset, converter: Converter, count: int | None, seed: int) -> Iterator[list[Row]]:
    """Rows of a dataset of rated answers, in pairs. Until an answer is drawn, only the hash of its prompt is kept."""
    groups: defaultdict[int, list[int]] = defaultdict(list)
    with logging.tqdm(desc="reading", total=len(dataset), unit="row") as bar:
        for rows in chunks(dataset):
            for row in rows:
                for answer in converter(row, converter.report.read):
                    groups[hash(str(answer.get("prompt")))].append(converter.report.read)
                converter.report.read += 1
            bar.update(len(rows))
    converter.report.alone = sum(len(group) == 1 for group in groups.values())
    for one, other, first_only in draw_pairs(list(groups.values()), count, seed):
        answers = [(number, answer) for number in (one, other) for answer in converter(dataset[number], number)]
        yield converter.pair(answers[0], answers[1], first_only)


def convert_rows(dataset: Dataset | IterableDataset, converter: Converter, rated: bool) -> Iterator[list[Row]]:
    """Rows of a dataset that are converted one by one. Rated answers of one row are paired with each other."""
    with logging.tqdm(desc="converting", unit="row") as bar:
        for rows in chunks(dataset):
            for row in rows:
                number = converter.report.read
                converted = converter(row, number)
                if rated:
                    # The best with the worst, and so on inwards: the ratings say most about where they differ.
                    ordered = sorted(converted, key=lambda answer: level_of(answer["ratings"]), reverse=True)
                    pairs = [(index, len(ordered) - 1 - index) for index in range((len(ordered) + 1) // 2)]
                    converted = [
                        pair
                        for high, low in pairs
                        for pair in converter.pair(
                            (number, ordered[high]), (number, ordered[low if high != low else 0]), high == low
                        )
                    ]
                converter.report.read += 1
                yield converted
            bar.update(len(rows))
