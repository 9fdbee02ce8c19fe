"""
Data to evaluate reward models on: from rows of whatever kind to token sequences and comparisons between them.

Rows become [`~disco_trl.evaluation.benchmarks.Item`]s; every different answer is tokenized and kept once; and the
comparisons become arrays of indices into the answers. Rewards of the sequences, from any model, then give
[`~disco_trl.evaluation.forecasts.Forecasts`] of the comparisons.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..data.columns import OVERALL, PAIRS, RANKING
from ..data.curation.convert import Converter, Report, detect_format, why_unsigned
from ..data.curation.formats import FORMATS
from ..data.records import Comparison, Record
from ..data.tokenization import tokenize_record
from ..data.values import BadRow, Row
from ..distributions.reward_distribution import RewardDistribution
from .benchmarks import BENCHMARKS, KINDS, PREFERENCES, Benchmark, Item, read_preference
from .forecasts import Forecasts


def detect_kind(row: Row) -> str:
    """
    Infer which of :data:`KINDS` a row is of.

    Args:
        row (`dict`):
            Row of a dataset.

    Returns:
        `str`: The kind.

    Raises:
        `ValueError`: If it is none of them, or may be several; the message has the columns that were found.
    """
    for name, benchmark in BENCHMARKS.items():
        if benchmark.recognise(row):
            return name
    if FORMATS["hh-rlhf"].recognise(row):
        return "hh-rlhf"
    is_pair = any(row.keys() >= {*pair} for pair in PAIRS)
    if (is_pair and "instruction" not in row) or row.keys() >= {*RANKING}:
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
    A function that reads a row, given its number in the data.

    Args:
        kind (`str`):
            One of :data:`KINDS`.

    Returns:
        `Callable[[dict, int], list[Item]]`: From a row and its number to its items. It raises `ValueError`, with row,
        column and fix, if the row cannot be read.
    """
    if kind in FORMATS:
        converter = Converter(FORMATS[kind].convert, Report(kind))
        return lambda row, number: [read_preference(converted) for converted in converter(row, number)]
    read = BENCHMARKS[kind].read if kind in BENCHMARKS else read_preference

    def read_named(row: Row, number: int) -> list[Item]:
        try:
            return [read(row)]
        except BadRow as error:
            raise ValueError(f"row {number}, {error}") from error

    return read_named


@dataclass
class HeldOut:
    """
    Items, the token sequences and comparisons in them, and what people said about one attribute.

    That is the overall judgement at first, and [`HeldOut.about`] gives the same data with what was said about another
    attribute.

    The N comparisons of all items come with the attributes `first` and `second`, of shape `(N,)`, which are the
    positions of their answers among the sequences; `target`, `weight` and `minority`, of shape `(N,)`, as in
    [`~disco_trl.evaluation.forecasts.Forecasts`]; `tie_allowed`, of shape `(N,)`, whether people could call the two
    equal; and `item`, of shape `(N,)`, the item that each is of. If people
    said how much better an answer is, `grades`, of shape `(G, 3)`, holds the number of a comparison, a strength from
    −L to L (positive: the first answer is better; 0: a tie), and how many people gave it.

    Args:
        items (`list[Item]`):
            The items.
        benchmark ([`Benchmark`], *optional*):
            The benchmark that they are of.
        sequences (`list[list[int]]`):
            Token ids of every different answer, S in all.
        answers (`list[np.ndarray]`):
            For each item, the positions of its answers among the sequences, of shape `(K,)`.
        attribute (`str`, *optional*, defaults to `"overall"`):
            What the judgements are about. A comparison about another attribute has the weight 0.
    """

    items: list[Item] = field(default_factory=list)
    benchmark: Benchmark | None = None
    sequences: list[list[int]] = field(default_factory=list)
    answers: list[np.ndarray] = field(default_factory=list)
    attribute: str = OVERALL

    def __post_init__(self) -> None:
        of_comparisons: list[Any] = []
        grades: list[Any] = []
        for number, (item, of_item) in enumerate(zip(self.items, self.answers, strict=True)):
            is_soft = "preference_probability" in item.said
            for comparison in item.comparisons:
                said = comparison.about(self.attribute)
                # In the order of the answers, not of their ranks. The comparisons of an item weigh as much as one.
                ahead = said.first < said.second
                first, second = of_item[[said.first, said.second] if ahead else [said.second, said.first]]
                target = said.target if ahead else 1 - said.target
                counts = Counter(strength if ahead else -strength for strength in said.strengths)
                if said.tie_allowed and said.ties:
                    counts[0] = int(said.ties)
                grades += [(len(of_comparisons), strength, count) for strength, count in sorted(counts.items())]
                weight = said.people / len(item.comparisons)
                minority = _minority(said, is_soft)
                of_comparisons.append((number, first, second, target, weight, minority, said.tie_allowed, said.ties))
        columns = np.array(of_comparisons, dtype=float).reshape(-1, 8).T
        self.item, self.first, self.second = columns[:3].astype(int)
        self.target, self.weight, self.minority, tie_allowed, ties = columns[3:]
        # Whether a scale of strengths has a 0 shows only in the data as a whole.
        self.tie_allowed = (tie_allowed > 0) & bool(ties.any())
        self.grades = np.array(grades, dtype=int).reshape(-1, 3)
        if not self.grades[:, 1].any():
            # Ties alone are no grades.
            self.grades = self.grades[:0]

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
            rows (`Iterable[dict]`):
                Rows, all of one kind.
            processing_class ([`~transformers.PreTrainedTokenizerBase`]):
                Tokenizer of the model.
            kind (`str`, *optional*, defaults to `"auto"`):
                One of :data:`KINDS`, or `"auto"` to infer it from the first row.
            max_length (`int`, *optional*):
                Leave out items with an answer of more tokens, as TRL's trainer does.

        Returns:
            [`HeldOut`]: The data.

        Raises:
            `ValueError`: If a row cannot be read (it names row, column and fix), or if there are none.
        """
        number_of: dict[tuple[int, ...], int] = {}
        items, answers = [], []
        read = None if kind == "auto" else item_reader(kind)
        inferred: list[Row] = []
        for number, row in enumerate(logging.tqdm(rows, desc="Reading", unit="row")):
            if read is None:
                kind = detect_kind(row)
                read = item_reader(kind)
                inferred.append(row)
            elif inferred and kind == "strengths":
                inferred.append(row)
            for item in read(row, number):
                tokens = _tokens(item, processing_class, number)
                if max_length is not None and max(map(len, tokens)) > max_length:
                    continue
                items.append(item)
                answers.append(np.array([number_of.setdefault(ids, len(number_of)) for ids in tokens]))
        if kind == "strengths" and (unsigned := why_unsigned(inferred)) is not None:
            raise ValueError(f"{unsigned}; if that is right, pass --kind strengths")
        if not items:
            raise ValueError("there is nothing to evaluate: no rows, or none short enough")
        return cls(items, BENCHMARKS.get(kind), [list(ids) for ids in number_of], answers)

    @property
    def attributes(self) -> list[str]:
        """The attributes that something was said about beside the overall judgement, in alphabetical order."""
        return sorted(set().union(*(item.attributes for item in self.items)) - {OVERALL})

    def about(self, attribute: str) -> HeldOut:
        """
        The same sequences and comparisons, with what people said about one attribute.

        Args:
            attribute (`str`):
                The attribute, or `"overall"`.

        Returns:
            [`HeldOut`]: The data.

        Raises:
            `ValueError`: If nothing was said about it.
        """
        if attribute != OVERALL and attribute not in self.attributes:
            there = ", ".join(map(repr, self.attributes)) or "no attribute"
            raise ValueError(
                f"the data say nothing about {attribute!r}, but about {there}; correct the name, or rate or compare "
                "answers in it (chosen_rating as a dict, or a column 'attribute')"
            )
        return replace(self, attribute=attribute)

    def forecasts(self, rewards: RewardDistribution, tie_width: float | None = None) -> Forecasts:
        """
        What a model says about the comparisons.

        Args:
            rewards ([`RewardDistribution`]):
                Rewards of the sequences, of shape `(S,)`.
            tie_width (`float`, *optional*):
                Half-width of the band in which two rewards count as a tie, if the model knows it, in units of the
                reward.

        Returns:
            [`Forecasts`]: N forecasts.
        """
        sides = (rewards[self.first], rewards[self.second])
        widths = None if tie_width is None else torch.tensor(tie_width * self.tie_allowed)
        return Forecasts.of(*sides, self.target, self.weight, self.groups, self.minority, widths)

    @property
    def groups(self) -> np.ndarray:
        """
        What each side of a comparison has in common with others, and is drawn with in a bootstrap
        ([`~disco_trl.evaluation.bootstrap.resamples`]).

        That is its item, because comparisons of one item are not independent. An answer that several items share is
        drawn by itself.

        Returns:
            `np.ndarray` of shape `(N, 2)`: A number for each side.
        """
        return self.groups_of_sequences[np.stack([self.first, self.second], axis=1)]

    @property
    def groups_of_sequences(self) -> np.ndarray:
        """The same for each sequence, of shape `(S,)`."""
        group = np.full(len(self.sequences), -1)
        for number, of_item in enumerate(self.answers):
            is_elsewhere = ~np.isin(group[of_item], (-1, number))
            group[of_item] = np.where(is_elsewhere, len(self.items) + of_item, number)
        return group

    def rewards_of_items(self, location: np.ndarray) -> list[np.ndarray]:
        """The locations, of shape `(S,)`, item by item."""
        return [location[of_item] for of_item in self.answers]

    def ratings(self) -> dict[int, np.ndarray]:
        """People's ratings of the sequences that have any, by position."""
        found: dict[int, list[float]] = {}
        for item, of_item in zip(self.items, self.answers, strict=True):
            for position, ratings in zip(of_item, item.ratings(self.attribute), strict=False):
                if ratings and position not in found:
                    found[int(position)] = ratings
        return {position: np.asarray(ratings, dtype=float) for position, ratings in found.items()}

    def ratings_by_rater(self, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """
        People's ratings of several attributes, person by person.

        Args:
            names (`Sequence[str]`):
                A attributes.

        Returns:
            `tuple[np.ndarray, np.ndarray]`: The positions of the N sequences that two people or more rated, of shape
            `(N,)`, and the ratings of up to R people, of shape `(N, R, A)`; `nan` where there is none.
        """
        found: dict[int, list[list[float]]] = {}
        for item, of_item in zip(self.items, self.answers, strict=True):
            for answer, position in enumerate(of_item.tolist()):
                given = [item.rated[name][answer] if name in item.rated else [] for name in names]
                people = max(map(len, given), default=0)
                if people > 1 and position not in found:
                    # An attribute that nobody rated has no list.
                    found[position] = [ratings or [None] * people for ratings in given]  # type: ignore[misc]
        ratings = np.full((len(found), max((len(of[0]) for of in found.values()), default=0), len(names)), np.nan)
        for number, of_answer in enumerate(found.values()):
            ratings[number, : len(of_answer[0])] = np.array(of_answer, dtype=float).T
        return np.fromiter(found, dtype=int), ratings


def _minority(said: Comparison, is_soft: bool) -> float:
    """The share of people who preferred the less popular answer; `nan` if it is one person's judgement."""
    is_known = said.people > 1 or (is_soft and said.people > 0)
    return min(said.wins, said.losses) / said.people if is_known else math.nan


def _tokens(record: Record, processing_class: Any, number: int) -> list[tuple[int, ...]]:
    if record.kind == "conversational" and processing_class.chat_template is None:
        raise ValueError(
            f"row {number}: these are conversations, and the model's tokenizer has no chat template; give it that of "
            "its training, or evaluate on plain text"
        )
    try:
        tokens = list(map(tuple, tokenize_record(record, processing_class)))
    except ValueError as error:
        raise ValueError(f"row {number}: {error}; drop the row, or fix it") from error
    if () in tokens:
        raise ValueError(f"row {number}: an answer without tokens; drop the row, or check the chat template")
    return tokens
