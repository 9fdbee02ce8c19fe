"""
Data to evaluate reward models on: from rows of whatever kind to token sequences and comparisons between them.

rows → `disco_trl.evaluation.benchmarks.Item` each → every different answer once, as tokens → comparisons, as arrays of
indices. Rewards of the sequences, from any model, then give `Forecasts` of the comparisons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..data.curation.convert import Converter, Report, detect_format
from ..data.curation.formats import FORMATS, BadRow
from ..data.files import Row
from ..data.tokenization import chat_template_arguments, tokenize
from ..data.validation import find_layout, find_row_problem
from ..distributions.reward_distribution import RewardDistribution
from .benchmarks import BENCHMARKS, KINDS, PREFERENCES, Benchmark, Item, read_preference
from .metrics import Forecasts


def detect_kind(row: Row) -> str:
    """
    Which of :data:`KINDS` a row is of.

    Raises:
        ValueError: none, or several; with the columns that were found.
    """
    for name, benchmark in BENCHMARKS.items():
        if benchmark.recognise(row):
            return name
    if FORMATS["hh-rlhf"].recognise(row):
        return "hh-rlhf"
    is_pair = any({f"chosen{suffix}", f"rejected{suffix}"} <= row.keys() for suffix in ("", "_ids", "_input_ids"))
    if (is_pair and "instruction" not in row) or {"completions", "ranks"} <= row.keys():
        return PREFERENCES
    kind = detect_format(row)
    if kind not in KINDS:
        raise ValueError(
            f"rows of the format {kind!r} hold one answer each, and nothing to compare it with; make pairs of them "
            "with `disco-trl data convert`"
        )
    return kind


def item_reader(kind: str) -> Callable[[Row, int], list[Item]]:
    """
    A function from a row and its number to its items.

    It raises `ValueError`, with row, column and fix, if the row cannot be read.
    """
    if kind in BENCHMARKS:
        benchmark = BENCHMARKS[kind]

        def read(row: Row, number: int) -> list[Item]:
            try:
                return [benchmark.read(row)]
            except BadRow as error:
                column, wrong, fix = error.problem
                raise ValueError(f"row {number}, column {column!r}: {wrong}; {fix}") from error

        return read
    if kind in FORMATS:
        converter = Converter(FORMATS[kind].convert, Report(kind))
        return lambda row, number: [read_preference(converted) for converted in converter(row, number)]

    def read_checked(row: Row, number: int) -> list[Item]:
        problem = find_row_problem(row, find_layout(row))
        if problem is not None:
            raise ValueError(f"row {number}, column {problem.column!r}: {problem.wrong}; {problem.fix}")
        return [read_preference(row)]

    return read_checked


@dataclass
class HeldOut:
    """
    Items, and the token sequences and comparisons in them.

    Attributes:
        items: the items.
        benchmark: which they are of, if of any.
        sequences: token ids of every different answer, `[S]`.
        answers: for each item the position of its answers among the sequences.
        first, second: `[N]`, positions of the two answers of each comparison.
        target, weight: `[N]`, as in `Forecasts`.
        item: `[N]`, which item a comparison is of.
    """

    items: list[Item] = field(default_factory=list)
    benchmark: Benchmark | None = None
    sequences: list[list[int]] = field(default_factory=list)
    answers: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        of_comparisons = [
            (number, self.answers[number][pair.first], self.answers[number][pair.second], pair.target, pair.people)
            for number, item in enumerate(self.items)
            for pair in item.comparisons
        ]
        columns = np.array(of_comparisons, dtype=float).reshape(-1, 5).T
        self.item, self.first, self.second = columns[:3].astype(int)
        self.target, self.weight = columns[3:]

    @classmethod
    def read(
        cls,
        rows: Iterable[Row],
        processing_class: PreTrainedTokenizerBase,
        kind: str = "auto",
        max_length: int | None = None,
    ) -> HeldOut:
        """
        Read rows.

        Args:
            rows: all of one kind.
            processing_class: the model's tokenizer.
            kind: one of :data:`KINDS`, or `"auto"`: what the first row looks like.
            max_length: leave out items with a longer answer, in tokens, as TRL's trainer does.

        Raises:
            ValueError: a row cannot be read (with row, column and fix), or there are none.
        """
        number_of: dict[tuple[int, ...], int] = {}
        items, answers = [], []
        read = None if kind == "auto" else item_reader(kind)
        for number, row in enumerate(logging.tqdm(rows, desc="Reading", unit="row")):
            if read is None:
                kind = detect_kind(row)
                read = item_reader(kind)
            for item in read(row, number):
                tokens = [_tokens(answer, processing_class, number) for answer in item.answers]
                if max_length is not None and max(map(len, tokens)) > max_length:
                    continue
                items.append(item)
                answers.append(np.array([number_of.setdefault(ids, len(number_of)) for ids in tokens]))
        if not items:
            raise ValueError("there is nothing to evaluate: no rows, or none short enough")
        return cls(items, BENCHMARKS.get(kind), [list(ids) for ids in number_of], answers)

    def forecasts(self, rewards: RewardDistribution) -> Forecasts:
        """What rewards of the sequences, `[S]`, say of the comparisons."""
        return Forecasts.of(rewards[self.first], rewards[self.second], self.target, self.weight)

    @property
    def groups(self) -> np.ndarray:
        """
        `[N, 2]`: what each side of a comparison comes and goes with in a bootstrap
        (`disco_trl.evaluation.metrics.resamples`). That is its item, as comparisons of one are not independent; an
        answer that several items share goes by itself.
        """
        group = np.full(len(self.sequences), -1)
        for number, of_item in enumerate(self.answers):
            is_elsewhere = ~np.isin(group[of_item], (-1, number))
            group[of_item] = np.where(is_elsewhere, len(self.items) + of_item, number)
        return group[np.stack([self.first, self.second], axis=1)]

    def rewards_of_items(self, location: np.ndarray) -> list[np.ndarray]:
        """The locations `[S]`, item by item."""
        return [location[of_item] for of_item in self.answers]

    def ratings(self) -> dict[int, np.ndarray]:
        """People's ratings of the sequences that have any, by position."""
        found: dict[int, list[float]] = {}
        for item, of_item in zip(self.items, self.answers, strict=True):
            for position, ratings in zip(of_item, item.ratings, strict=False):
                if ratings and position not in found:
                    found[int(position)] = ratings
        return {position: np.asarray(ratings, dtype=float) for position, ratings in found.items()}


def _tokens(answer: Row, processing_class: Any, number: int) -> tuple[int, ...]:
    if "ids" in answer:
        ids = answer["ids"]
    else:
        content = answer["content"]
        if isinstance(content, list) and processing_class.chat_template is None:
            raise ValueError(
                f"row {number}: these are conversations, and the model's tokenizer has no chat template; give it that "
                "of its training, or evaluate on plain text"
            )
        try:
            ids = tokenize(processing_class, content, **chat_template_arguments(answer))
        except ValueError as error:
            raise ValueError(f"row {number}: {error}; drop the row, or fix it") from error
    if not ids:
        raise ValueError(f"row {number}: an answer without tokens; drop the row, or check the chat template")
    return tuple(ids)
