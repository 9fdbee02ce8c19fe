"""What people said in a whole dataset, and the tensors that a batch's records become; see `disco_trl.data.records`."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from torch import Tensor

from .columns import (
    ATTRIBUTE,
    JUDGEMENT_COLUMNS,
    OVERALL,
    RANKED_RATINGS,
    RANKING,
    RATING_COLUMNS,
    RATINGS,
    READINGS,
    STRENGTH,
    leave_out,
)
from .records import Comparison, Feedback, Record, read_feedback
from .values import BadRow, Row


logger = logging.getLogger(__name__)

MOST_RATING_VALUES = 101
"""Most ratings that are told apart: each of them has a threshold to learn."""

MOST_UNREPEATED_VALUES = 20
"""Most different ratings that need not recur: above, each has to be given twice on average to be a step of a scale."""

SURVEYED_OF_STREAM = 1000
"""Rows of a stream that are surveyed, since reading a stream to its end may take days."""


# Datasets


@dataclass
class Survey:
    """
    What the judgements of a dataset about one attribute are like, which decides what there is to learn from them.

    Args:
        has_ties (`bool`, *optional*, defaults to `False`):
            Whether some answers were called equal.
        has_several_ratings (`bool`, *optional*, defaults to `False`):
            Whether some answer has several ratings.
        ratings (`Counter`, *optional*):
            How often each rating was given.
        pairs_of_rows (`set[int]`, *optional*):
            How many comparisons a row may stand for: a ranking for those of all pairs of its answers, any other row
            for one.
        said (`set[str]`, *optional*):
            Columns of judgements that are filled in some row, other than TRL's `margin`.
        has_comparisons (`bool`, *optional*, defaults to `False`):
            Whether somebody compared two answers, rather than only rating them.
        strengths (`Counter`, *optional*):
            How often a preference of each strength was given, whatever its direction. 0 stands for a tie.
        attributes (`dict[str, Survey]`, *optional*):
            In the survey of the overall judgements: those about each attribute, in the order of their names.
    """

    has_ties: bool = False
    has_several_ratings: bool = False
    ratings: Counter = field(default_factory=Counter)
    pairs_of_rows: set[int] = field(default_factory=set)
    said: set[str] = field(default_factory=set)
    has_comparisons: bool = False
    strengths: Counter = field(default_factory=Counter)
    attributes: dict[str, Survey] = field(default_factory=dict)

    @property
    def ratings_on_a_scale(self) -> Counter:
        """The ratings, unless they are not on a scale that thresholds could be learned for."""
        return self.ratings if why_not_a_scale(self.ratings) is None else Counter()

    def add(self, feedback: Feedback, attribute: str = OVERALL) -> None:
        """
        Take what was said in a row into account.

        Args:
            feedback ([`~disco_trl.data.records.Feedback`]):
                What was said.
            attribute (`str`, *optional*, defaults to `"overall"`):
                The attribute that this is the survey of. That of the overall judgements surveys the others as well.
        """
        self.pairs_of_rows.add(len(feedback.comparisons))
        self.said |= feedback.said - {"margin"}
        for comparison in feedback.comparisons:
            if comparison.attribute == attribute:
                self.has_ties |= comparison.ties > 0
                self.has_comparisons |= comparison.people > 0
                self.strengths.update(map(abs, comparison.strengths))
                if comparison.ties:
                    self.strengths[0] += int(comparison.ties)
        for ratings in feedback.ratings(attribute):
            self.has_several_ratings |= len(ratings) >= 2
            self.ratings.update(map(float, ratings))
        if attribute == OVERALL:
            for name in feedback.attributes - {OVERALL}:
                self.attributes.setdefault(name, Survey()).add(feedback, name)

    def by_attribute(self) -> dict[str, Survey]:
        """The surveys of all attributes, the overall judgements first."""
        return {OVERALL: self, **self.attributes}


def why_not_a_scale(ratings: Mapping[float, int]) -> str | None:
    """
    Why numbers are no ratings that thresholds could be learned for, if they are not.

    Args:
        ratings (`Mapping[float, int]`):
            How often each was given.

    Returns:
        `str`, *optional*: The reason, or None if they are on a scale, or there are none.
    """
    given = sum(ratings.values())
    if len(ratings) == 1:
        return f"all {given} are {next(iter(ratings)):g}, which tells no answer from another"
    if len(ratings) > MOST_RATING_VALUES or (len(ratings) > MOST_UNREPEATED_VALUES and given < 2 * len(ratings)):
        return (
            f"{len(ratings)} different numbers among {given}, as a reward model's scores are, where a scale has at "
            f"most {MOST_RATING_VALUES} that recur"
        )
    return None


def readings(
    said: Collection[str], scales: Mapping[str, Mapping[float, int]], strength_levels: int
) -> dict[Sequence[str], str]:
    """
    What the likelihood takes the columns of a dataset for.

    Args:
        said (`Collection[str]`):
            Columns of judgements that are filled.
        scales (`Mapping[str, Mapping[float, int]]`):
            How often each rating was given, by attribute, for those whose ratings are read.
        strength_levels (`int`):
            Number of strengths that are told apart; 0 if they are read as votes.

    Returns:
        `dict[Sequence[str], str]`: What columns are read as, for each kind of judgement other than TRL's margin.
    """
    found: dict[Sequence[str], str] = {}
    for columns, meaning in READINGS.items():
        # Answers are no judgement by themselves: `completions` goes with the `ranks` that are said.
        there = columns if columns == RANKING and "ranks" in said else tuple(name for name in columns if name in said)
        if columns == RATING_COLUMNS:
            described = [f"{name} {_scale(ratings)}" for name, ratings in scales.items() if ratings]
            if [*scales] == [OVERALL] and described:
                described = [f"all {_scale(scales[OVERALL])}"]
            meaning += f", {', '.join(described)}"
            there = there if described else ()
        if columns == (STRENGTH,):
            levels = f"on a scale from -{strength_levels} to {strength_levels}"
            meaning += f", {levels}" if strength_levels > 1 else " (only the sign is read)"
        if there:
            found[there] = meaning
    return found


def _scale(ratings: Mapping[float, int]) -> str:
    values = [f"{value:g}" for value in sorted(ratings)]
    some = values if len(values) <= 12 else [*values[:3], "...", *values[-2:]]
    return f"on one scale of {len(values)} value{'s' * (len(values) != 1)} ({', '.join(some)})"


def log_readings(dataset_name: str, found: Survey, likelihoods: Mapping[str, dict[str, Any]]) -> None:
    """
    Log, once for all processes, what the likelihood takes columns for that TRL does not read, and whether it leaves
    ratings out or reads strengths as votes.

    A dataset may have a column of such a name with a meaning of its own. So that this is seen, it is a warning.

    Args:
        dataset_name (`str`):
            Name of the dataset in the log.
        found ([`Survey`]):
            Survey of the dataset.
        likelihoods (`Mapping[str, dict]`):
            What the model knows of how people answer, as in [`check_answerable`].
    """
    if not PartialState().is_main_process:
        return
    surveys = {name: of_name for name, of_name in found.by_attribute().items() if name in likelihoods}
    scales = {name: of_name.ratings for name, of_name in surveys.items() if "rating_values" in likelihoods[name]}
    for name, of_name in surveys.items():
        if of_name.ratings and name not in scales:
            unread = [column for column in RATING_COLUMNS if column in found.said]
            about = "" if name == OVERALL else f", {name!r}"
            logger.warning(
                f"{dataset_name} dataset, column {' and '.join(map(repr, unread))}{about}: "
                f"{why_not_a_scale(of_name.ratings)}; they are not read as ratings. If they are some, round them to "
                f"the steps of a scale, or pass rating_values; else leave them out: {leave_out(unread)}"
            )
    levels = max((of_name.get("strength_levels", 0) for of_name in likelihoods.values()), default=0)
    if read := readings(found.said, scales, levels):
        meanings = "; ".join(f"{', '.join(columns)}: {meaning}" for columns, meaning in read.items())
        logger.warning(
            f"{dataset_name} dataset, columns in the likelihood: {meanings}. If one means something else, leave it "
            f"out: {leave_out(name for columns in read for name in columns)}"
        )


def survey(dataset: Dataset | IterableDataset) -> Survey:
    """
    Survey the judgements of a dataset, or of the first 1,000 rows of a stream.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Preference dataset. A row that is bad is passed over: the check of the rows names it.

    Returns:
        [`Survey`]: What was found.
    """
    found = Survey()
    for _, feedback in _feedback(dataset):
        found.add(feedback)
    if not found.pairs_of_rows:  # no row was read, because there are no judgements
        found.pairs_of_rows.add(1)
    found.attributes = dict(sorted(found.attributes.items()))
    return found


def check_answerable(
    dataset: Dataset | IterableDataset,
    dataset_name: str,
    found: Survey,
    likelihoods: Mapping[str, dict[str, Any]],
    chosen: Collection[str] | None = None,
) -> None:
    """
    Check that a model can have answered as the rows of a dataset say (of a stream, the first 1,000).

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Preference dataset whose rows have been checked.
        dataset_name (`str`):
            Name used in the error.
        found ([`Survey`]):
            Survey of the dataset. Its rows are read again only if one of them is at fault.
        likelihoods (`Mapping[str, dict]`):
            What the model knows of how people answer, by attribute, `"overall"` included: the settings of the
            [`~disco_trl.models.likelihood_head.LikelihoodHead`] of each.
        chosen (`Collection[str]`, *optional*):
            Attributes that the user has chosen. What is said about others is not read then, which is logged.

    Raises:
        `ValueError`: If an attribute, a rating, a strength or a tie is unknown to the model; it names row, column and
            fix.
    """
    unread = [] if chosen is None else [name for name in found.attributes if name not in chosen]
    if unread and PartialState().is_main_process:
        logger.warning(f"{dataset_name} dataset: what is said about {', '.join(unread)} is not read (attributes)")
    for name, of_name in found.by_attribute().items():
        if name not in unread:
            _check_answerable(dataset, dataset_name, name, of_name, likelihoods)


def _check_answerable(
    dataset: Dataset | IterableDataset,
    dataset_name: str,
    attribute: str,
    found: Survey,
    likelihoods: Mapping[str, dict[str, Any]],
) -> None:
    likelihood = likelihoods.get(attribute, {})
    is_unknown = attribute not in likelihoods
    values: list[float] = likelihood.get("rating_values", [])
    strange = found.ratings.keys() - {*values} if values else set()
    has_strange_ties = found.has_ties and "tie_width" not in likelihood
    levels = likelihood.get("strength_levels")
    too_strong = levels is not None and max(found.strengths, default=0) > levels
    about = "" if attribute == OVERALL else f", {attribute!r}"
    # (Preferences of one strength, and ties, are votes anyway.)
    if max(found.strengths, default=0) > 1 and levels is None and PartialState().is_main_process and not is_unknown:
        logger.warning(
            f"{dataset_name} dataset, column {STRENGTH!r}{about}: read as votes, because the model knows no levels of "
            "strength; train it with strength_levels to read how strong they are"
        )
    is_at_fault = is_unknown or strange or has_strange_ties or too_strong
    for index, feedback in _feedback(dataset) if is_at_fault else ():
        where = f"{dataset_name} dataset, row {index}, column"
        if is_unknown and attribute in feedback.attributes:
            column = ATTRIBUTE if ATTRIBUTE in feedback.said else next(n for n in RATING_COLUMNS if n in feedback.said)
            known = ", ".join(repr(name) for name in likelihoods if name != OVERALL) or "none"
            raise ValueError(
                f"{where} {column!r}: the attribute {attribute!r}, which the model does not know (it knows {known}); "
                "correct the name, or leave it out"
            )
        ratings = feedback.ratings(attribute)
        if given := strange & {rating for of_answer in ratings for rating in of_answer}:
            columns = [name for name, of_answer in zip(RATINGS, ratings, strict=False) if {*of_answer} & strange]
            columns = columns if RANKED_RATINGS not in feedback.said else [RANKED_RATINGS]
            raise ValueError(
                f"{where} {' or '.join(map(repr, columns))}{about}: the model, which knows the ratings "
                f"{', '.join(f'{value:g}' for value in values)}, cannot give {min(given):g}; round it, pass "
                "rating_values with all there are, or leave the column out"
            )
        of_attribute = [comparison.about(attribute) for comparison in feedback.comparisons]
        if too_strong and levels is not None:
            try:
                for comparison in of_attribute:
                    _count_strengths(comparison, levels)
            except BadRow as error:
                raise ValueError(f"{dataset_name} dataset, row {index}, {error}") from error
        if has_strange_ties and any(comparison.ties for comparison in of_attribute):
            column = next((name for name in ("ranks", STRENGTH) if name in feedback.said), "tie")
            raise ValueError(
                f"{where} {column!r}: a tie{about}, and the training data have none to learn from; give tie_width, or "
                "leave such rows out"
            )


def _feedback(dataset: Dataset | IterableDataset) -> Iterator[tuple[int, Feedback]]:
    """What was said in each sound row, with the number of the row. Of a `Dataset` no other columns are read."""
    for index, row in enumerate(_judged_rows(dataset)):
        try:
            yield index, read_feedback(row)
        except BadRow:
            continue


def _judged_rows(dataset: Dataset | IterableDataset) -> Iterator[Row]:
    plain = dataset.with_format(None)
    if isinstance(plain, IterableDataset):
        yield from islice(plain, SURVEYED_OF_STREAM)
        return
    names = [name for name in plain.column_names if name in {*JUDGEMENT_COLUMNS, "ranks"} - {"margin"}]
    for batch in plain.select_columns(names).iter(batch_size=1000) if names else ():
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def has_judgements(columns: Iterable[str]) -> bool:
    """Whether a dataset with these columns says more than forced choices and margins."""
    return bool({*columns} & ({*JUDGEMENT_COLUMNS, "ranks"} - {"margin"}))


# Batches


def in_turn(
    record: Record,
    weigh_by: str = "pair",
    are_rated: bool = False,
    pairs_per_row: int | None = None,
    attribute: str = OVERALL,
) -> list[tuple[Comparison, float]]:
    """
    The comparisons of a record as they stand in a batch.

    Args:
        record ([`Record`]):
            Record of a row.
        weigh_by (`str`, *optional*, defaults to `"pair"`):
            `"pair"` if all that is said in a row about an attribute weighs 1 together, `"vote"` if each thing that is
            said weighs 1.
        are_rated (`bool`, *optional*, defaults to `False`):
            Whether the ratings count among what is said.
        pairs_per_row (`int`, *optional*):
            If set, the comparisons are repeated in turn until there are so many, and share their weight.
        attribute (`str`, *optional*, defaults to `"overall"`):
            Attribute that is asked about. Comparisons in others are there without a judgement.

    Returns:
        `list[tuple[Comparison, float]]`: The comparisons, each with its weight in the batch.
    """
    comparisons = [comparison.about(attribute) for comparison in record.comparisons]
    said = sum(one.people for one in comparisons)
    said += sum(map(len, record.ratings(attribute))) if are_rated else 0
    share = max(said, 1) if weigh_by == "pair" else 1
    if not pairs_per_row:
        return [(one, one.weight / share) for one in comparisons]
    batch = []
    for index in range(pairs_per_row):
        turn = index % len(comparisons)
        times = len(range(turn, pairs_per_row, len(comparisons)))
        batch.append((comparisons[turn], comparisons[turn].weight / share / times))
    return batch


def to_tensors(
    records: Sequence[Record],
    comparisons: Sequence[Sequence[tuple[Comparison, float]]],
    rating_values: Sequence[float] | None,
    strength_levels: int | None = None,
    row_numbers: Sequence[int] | None = None,
    attribute: str = OVERALL,
    reads_ties: bool = True,
) -> dict[str, Tensor]:
    """
    The judgements of a batch about one attribute, for [`~disco_trl.distributions.judgements.Judgements`].

    Args:
        records (`Sequence[Record]`):
            Records of the B rows.
        comparisons (`Sequence[Sequence[tuple[Comparison, float]]]`):
            What `in_turn` makes of each, P comparisons in all.
        rating_values (`Sequence[float]`, *optional*):
            The L ratings that the model knows, in order; None if ratings are not read.
        strength_levels (`int`, *optional*):
            Number of levels of strength that the model knows; None if strengths are read as votes.
        row_numbers (`Sequence[int]`, *optional*):
            Numbers of the B rows in the dataset, for the error.
        attribute (`str`, *optional*, defaults to `"overall"`):
            The attribute.
        reads_ties (`bool`, *optional*, defaults to `True`):
            Whether the model has a tie width.

    Returns:
        `dict[str, torch.Tensor]`: `judgements`, of shape `(P, 6)`: wins, losses, ties, whether a tie was allowed,
        margin (in units of reward) and weight. With `rating_values` also `rating_counts`, of shape `(2 * P, L)`: how
        many people gave each rating to the first answers and then to the second ones. (An answer that stands in
        several comparisons has its ratings in the first of them.) With `strength_levels` also `strength_counts`, of
        shape `(P, 2 * strength_levels)`: how many wins are of each strength, and how many losses.

    Raises:
        `ValueError`: If a rating is not among `rating_values`, a strength beyond `strength_levels`, or a tie one that
            the model does not read.
    """
    table: list[tuple[float, ...]] = []
    levels = {value: level for level, value in enumerate(rating_values or ())}
    counts: tuple[list[list[float]], list[list[float]]] = ([], [])
    strength_counts: list[list[float]] = []
    for position, (record, of_record) in enumerate(zip(records, comparisons, strict=True)):
        try:
            of_answers = _count_ratings(record, levels, attribute)
            if strength_levels is not None:
                strength_counts += [_count_strengths(one, strength_levels) for one, _ in of_record]
            if not reads_ties and any(one.ties > 0 for one, _ in of_record):
                raise BadRow("tie", "it is a tie, but there is no tie width to read it by", "set tie_width")
        except BadRow as error:
            where = f"row {position} of the batch" if row_numbers is None else f"row {row_numbers[position]}"
            raise ValueError(f"{where}, {error}") from error
        carrier: dict[int, tuple[int, int]] = {}
        for one, weight in of_record:
            table.append((one.wins, one.losses, one.ties, float(one.tie_allowed), one.margin, weight))
            pair = one.first, one.second
            for side, answer in zip(counts, pair, strict=True):
                is_first = carrier.setdefault(answer, pair) == pair
                side.append(of_answers[answer] if is_first else [0.0] * len(levels))
    tensor = torch.tensor(table, dtype=torch.float32)
    # The loss is a mean over comparisons, and is to be one over rows.
    tensor[:, -1] *= len(table) / len(records)
    tensors = {"judgements": tensor}
    if rating_values is not None:
        tensors["rating_counts"] = torch.tensor([*counts[0], *counts[1]], dtype=torch.float32)
    if strength_levels is not None:
        tensors["strength_counts"] = torch.tensor(strength_counts, dtype=torch.float32)
    return tensors


def ratings_by_rater(
    records: Sequence[Record],
    comparisons: Sequence[Sequence[tuple[Comparison, float]]],
    scales: Mapping[str, Sequence[float]],
) -> Tensor:
    """
    The ratings of a batch, rater by rater, which tell how people's opinions of two attributes go together.

    Args:
        records, comparisons:
            As in [`to_tensors`].
        scales (`Mapping[str, Sequence[float]]`):
            Ratings that the model knows, in order, for each of A attributes.

    Returns:
        `torch.Tensor` of shape `(2 * P, R, A)`: The level, from 0, that each of up to R people gave to the first
        answers and then to the second ones, where an answer first stands in its row; `nan` where there is none.
    """
    levels = {name: {value: level for level, value in enumerate(values)} for name, values in scales.items()}
    sides: tuple[list[Any], list[Any]] = ([], [])
    for record, of_record in zip(records, comparisons, strict=True):
        seen: set[int] = set()
        for one, _ in of_record:
            for side, answer in zip(sides, (one.first, one.second), strict=True):
                side.append([] if answer in seen else _by_rater(record, answer, levels))
                seen.add(answer)
    answers = [*sides[0], *sides[1]]
    most = max(map(len, answers))
    padded = [answer + [[math.nan] * len(scales)] * (most - len(answer)) for answer in answers]
    return torch.tensor(padded, dtype=torch.float32).reshape(len(answers), most, len(scales))


def _by_rater(record: Record, answer: int, levels: Mapping[str, Mapping[float, int]]) -> list[list[float]]:
    """The levels that each person gave to the attributes of an answer."""
    given = [record.rated[name][answer] if name in record.rated else [] for name in levels]
    people = max(map(len, given), default=0)
    # An attribute that nobody rated has no list.
    given = [ratings or [None] * people for ratings in given]
    numbered = [
        [math.nan if rating is None else known.get(rating, math.nan) for rating in ratings]
        for ratings, known in zip(given, levels.values(), strict=True)
    ]
    return [list(of_person) for of_person in zip(*numbered, strict=True)]


def _count_strengths(comparison: Comparison, levels: int) -> list[float]:
    """How often the first answer won by each strength, and how often the second."""
    counts = [0.0] * (2 * levels)
    for strength in comparison.strengths:
        if abs(strength) > levels:
            wrong = f"the strength {strength} is beyond the {levels} level{'s' * (levels != 1)} that the model knows"
            fix = "pass strength_levels with the largest there can be, or leave such rows out"
            raise BadRow(STRENGTH, wrong, fix)
        counts[abs(strength) - 1 + levels * (strength < 0)] += 1
    return counts


def _count_ratings(record: Record, levels: dict[float, int], attribute: str) -> list[list[float]]:
    """How often each level was given to each answer."""
    counts = [[0.0] * len(levels) for _ in record.answers]
    for answer, ratings in enumerate(record.ratings(attribute) if levels else ()):
        for rating in ratings:
            if rating not in levels:
                known = ", ".join(f"{value:g}" for value in levels)
                about = "" if attribute == OVERALL else f" of {attribute!r}"
                wrong = f"the rating {rating!r}{about} is not one of those that the model knows ({known})"
                column = RANKED_RATINGS if RANKED_RATINGS in record.said else RATINGS[answer]
                raise BadRow(column, wrong, "pass rating_values with all of them, or round it")
            counts[answer][levels[rating]] += 1
    return counts
