"""What people said in a whole dataset, and the tensors that a batch's records become; see `disco_trl.data.records`."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from torch import Tensor

from .columns import JUDGEMENT_COLUMNS, RANKING, RATINGS, READINGS, STRENGTH, leave_out
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
    What the judgements of a dataset are like, which decides what there is to learn from them.

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
    """

    has_ties: bool = False
    has_several_ratings: bool = False
    ratings: Counter = field(default_factory=Counter)
    pairs_of_rows: set[int] = field(default_factory=set)
    said: set[str] = field(default_factory=set)
    has_comparisons: bool = False
    strengths: Counter = field(default_factory=Counter)

    @property
    def ratings_on_a_scale(self) -> Counter:
        """The ratings, unless they are not on a scale that thresholds could be learned for."""
        return self.ratings if why_not_a_scale(self.ratings) is None else Counter()

    def add(self, feedback: Feedback) -> None:
        """Take what was said in a row into account."""
        self.has_ties |= feedback.has_tie
        self.pairs_of_rows.add(len(feedback.comparisons))
        self.said |= feedback.said - {"margin"}
        self.has_comparisons |= any(comparison.people for comparison in feedback.comparisons)
        for comparison in feedback.comparisons:
            self.strengths.update(map(abs, comparison.strengths))
            if comparison.ties:
                self.strengths[0] += int(comparison.ties)
        for ratings in feedback.ratings:
            self.has_several_ratings |= len(ratings) >= 2
            self.ratings.update(map(float, ratings))


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


def readings(said: Collection[str], ratings: Mapping[float, int], strength_levels: int) -> dict[Sequence[str], str]:
    """
    What the likelihood takes the columns of a dataset for.

    Args:
        said (`Collection[str]`):
            Columns of judgements that are filled.
        ratings (`Mapping[float, int]`):
            How often each rating was given; empty if they are not read.
        strength_levels (`int`):
            Number of strengths that are told apart; 0 if they are read as votes.

    Returns:
        `dict[Sequence[str], str]`: What columns are read as, for each kind of judgement other than TRL's margin.
    """
    found: dict[Sequence[str], str] = {}
    for columns, meaning in READINGS.items():
        # Answers are no judgement by themselves: `completions` goes with the `ranks` that are said.
        there = columns if columns == RANKING and "ranks" in said else tuple(name for name in columns if name in said)
        if columns == RATINGS:
            values = [f"{value:g}" for value in sorted(ratings)]
            some = values if len(values) <= 12 else [*values[:3], "...", *values[-2:]]
            meaning += f", all on one scale of {len(values)} value{'s' * (len(values) != 1)} ({', '.join(some)})"
            there = there if values else ()
        if columns == (STRENGTH,):
            levels = f"on a scale from -{strength_levels} to {strength_levels}"
            meaning += f", {levels}" if strength_levels > 1 else " (only the sign is read)"
        if there:
            found[there] = meaning
    return found


def log_readings(dataset_name: str, found: Survey, likelihood: dict[str, Any]) -> None:
    """
    Log, once for all processes, what the likelihood takes columns for that TRL does not read, and whether it leaves
    ratings out or reads strengths as votes.

    A dataset may have a column of such a name with a meaning of its own. So that this is seen, it is a warning.

    Args:
        dataset_name (`str`):
            Name of the dataset in the log.
        found ([`Survey`]):
            Survey of the dataset.
        likelihood (`dict`):
            What the model knows of how people answer, as in [`check_answerable`].
    """
    if not PartialState().is_main_process:
        return
    ratings: Mapping[float, int] = found.ratings if "rating_values" in likelihood else {}
    if found.ratings and not ratings:
        unread = [name for name in RATINGS if name in found.said]
        logger.warning(
            f"{dataset_name} dataset, column {' and '.join(map(repr, unread))}: {why_not_a_scale(found.ratings)}; "
            "they are not read as ratings. If they are some, round them to the steps of a scale, or pass "
            f"rating_values; else leave them out: {leave_out(unread)}"
        )
    if read := readings(found.said, ratings, likelihood.get("strength_levels", 0)):
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
    return found


def check_answerable(
    dataset: Dataset | IterableDataset, dataset_name: str, found: Survey, likelihood: dict[str, Any]
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
        likelihood (`dict`):
            What the model knows of how people answer: the settings of its
            [`~disco_trl.models.likelihood_head.LikelihoodHead`].

    Raises:
        `ValueError`: If a rating, a strength or a tie is unknown to the model; it names row, column and fix.
    """
    values: list[float] = likelihood.get("rating_values", [])
    strange = found.ratings.keys() - {*values} if values else set()
    has_strange_ties = found.has_ties and "tie_width" not in likelihood
    levels = likelihood.get("strength_levels")
    too_strong = levels is not None and max(found.strengths, default=0) > levels
    # (Preferences of one strength, and ties, are votes anyway.)
    if max(found.strengths, default=0) > 1 and levels is None and PartialState().is_main_process:
        logger.warning(
            f"{dataset_name} dataset, column {STRENGTH!r}: read as votes, because the model knows no levels of "
            "strength; train it with strength_levels to read how strong they are"
        )
    for index, feedback in _feedback(dataset) if strange or has_strange_ties or too_strong else ():
        columns = [name for name, given in zip(RATINGS, feedback.ratings, strict=False) if {*given} & strange]
        if columns:
            given = min(strange & {rating for ratings in feedback.ratings for rating in ratings})
            raise ValueError(
                f"{dataset_name} dataset, row {index}, column {' or '.join(map(repr, columns))}: the model, which "
                f"knows the ratings {', '.join(f'{value:g}' for value in values)}, cannot give {given:g}; round it, "
                "pass rating_values with all there are, or leave the column out"
            )
        if too_strong and levels is not None:
            try:
                for comparison in feedback.comparisons:
                    _count_strengths(comparison, levels)
            except BadRow as error:
                raise ValueError(f"{dataset_name} dataset, row {index}, {error}") from error
        if feedback.has_tie and has_strange_ties:
            column = next((name for name in ("ranks", STRENGTH) if name in feedback.said), "tie")
            raise ValueError(
                f"{dataset_name} dataset, row {index}, column {column!r}: a tie, and the training data have none to "
                "learn from; give tie_width, or leave such rows out"
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
    record: Record, weigh_by: str = "pair", are_rated: bool = False, pairs_per_row: int | None = None
) -> list[tuple[Comparison, float]]:
    """
    The comparisons of a record as they stand in a batch.

    Args:
        record ([`Record`]):
            Record of a row.
        weigh_by (`str`, *optional*, defaults to `"pair"`):
            `"pair"` if all that is said in a row weighs 1 together, `"vote"` if each thing that is said weighs 1.
        are_rated (`bool`, *optional*, defaults to `False`):
            Whether the ratings count among what is said.
        pairs_per_row (`int`, *optional*):
            If set, the comparisons are repeated in turn until there are so many, and share their weight.

    Returns:
        `list[tuple[Comparison, float]]`: The comparisons, each with its weight in the batch.
    """
    comparisons = record.comparisons
    said = sum(sum((one.wins, one.losses, one.ties)) for one in comparisons)
    said += sum(map(len, record.ratings)) if are_rated else 0
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
) -> dict[str, Tensor]:
    """
    The judgements of a batch, for [`~disco_trl.distributions.judgements.Judgements`].

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

    Returns:
        `dict[str, torch.Tensor]`: `judgements`, of shape `(P, 6)`: wins, losses, ties, whether a tie was allowed,
        margin (in units of reward) and weight. With `rating_values` also `rating_counts`, of shape `(2 * P, L)`: how
        many people gave each rating to the first answers and then to the second ones. With `strength_levels` also
        `strength_counts`, of shape `(P, 2 * strength_levels)`: how many wins are of each strength, and how many
        losses.

    Raises:
        `ValueError`: If a rating is not among `rating_values`, or a strength beyond `strength_levels`.
    """
    table: list[tuple[float, ...]] = []
    levels = {value: level for level, value in enumerate(rating_values or ())}
    counts: tuple[list[list[float]], list[list[float]]] = ([], [])
    strength_counts: list[list[float]] = []
    for position, (record, of_record) in enumerate(zip(records, comparisons, strict=True)):
        try:
            of_answers = _count_ratings(record, levels)
            if strength_levels is not None:
                strength_counts += [_count_strengths(one, strength_levels) for one, _ in of_record]
        except BadRow as error:
            where = f"row {position} of the batch" if row_numbers is None else f"row {row_numbers[position]}"
            raise ValueError(f"{where}, {error}") from error
        for one, weight in of_record:
            table.append((one.wins, one.losses, one.ties, float(one.tie_allowed), one.margin, weight))
            for side, answer in zip(counts, (one.first, one.second), strict=True):
                side.append(of_answers[answer])
    tensor = torch.tensor(table, dtype=torch.float32)
    # The loss is a mean over comparisons, and is to be one over rows.
    tensor[:, -1] *= len(table) / len(records)
    tensors = {"judgements": tensor}
    if rating_values is not None:
        tensors["rating_counts"] = torch.tensor([*counts[0], *counts[1]], dtype=torch.float32)
    if strength_levels is not None:
        tensors["strength_counts"] = torch.tensor(strength_counts, dtype=torch.float32)
    return tensors


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


def _count_ratings(record: Record, levels: dict[float, int]) -> list[list[float]]:
    """How often each level was given to each answer."""
    counts = [[0.0] * len(levels) for _ in record.answers]
    for answer, ratings in enumerate(record.ratings if levels else ()):
        for rating in ratings:
            if rating not in levels:
                known = ", ".join(f"{value:g}" for value in levels)
                wrong = f"the rating {rating!r} is not one of those that the model knows ({known})"
                raise BadRow(RATINGS[answer], wrong, "pass rating_values with all of them, or round it")
            counts[answer][levels[rating]] += 1
    return counts
