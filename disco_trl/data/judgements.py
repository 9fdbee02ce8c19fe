"""
What people said about the answers: optional columns of a dataset, and the tensors of a batch that are made of them.

A row of a preference dataset is one person's forced choice of `chosen`, unless columns say more:

- `chosen_votes`, `rejected_votes`: how many people preferred which (0 and 0: nobody compared the two);
- `preference_probability`: a soft label, P(chosen ≻ rejected);
- `tie`: true, the two were called equal; false, they could have been; absent, it was a forced choice;
- `margin`: TRL's, by how much the chosen answer has to be better;
- `chosen_rating`, `rejected_rating`: a number, or a list of several people's numbers;
- `completions` and `ranks`, in place of `chosen` and `rejected`: K answers and the rank of each, 1 the best;
- `weight`: multiplies the row.

Any of them may be missing (None or NaN) in any row.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations, islice
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor

from .columns import JUDGEMENT_COLUMNS, RANKING, RATINGS, VOTES
from .values import Problem, as_number, as_ratings, as_truth, is_missing, shown


MOST_RATING_VALUES = 101
"""Different ratings that are told apart at most: each has a threshold to learn."""
MOST_RANKED = 256
"""Answers of a ranking at most: its 32,640 pairs are a batch's rows and columns, and grow with the square."""


# Rows


def find_problem(row: dict[str, Any]) -> Problem | None:
    """The first thing wrong with the judgements of a row, if there is any."""
    there = {name for name in JUDGEMENT_COLUMNS if not is_missing(row.get(name))}
    votes = [as_number(row[name]) for name in VOTES if name in there]
    for name, number in zip((name for name in VOTES if name in there), votes, strict=True):
        if number is None or number < 0 or number != int(number):
            return Problem(name, f"{shown(row[name])} is not a number of votes", "give a whole number, 0 or more")
    if len(votes) == 1:
        (absent,) = set(VOTES) - there
        return Problem(absent, f"missing where {(set(VOTES) & there).pop()!r} is given", "give both, or neither")
    if "preference_probability" in there:
        number = as_number(row["preference_probability"])
        if number is None or not 0 <= number <= 1:
            wrong = f"{shown(row['preference_probability'])} is not a probability"
            return Problem("preference_probability", wrong, "give P(chosen ≻ rejected), from 0 to 1")
        if votes:
            wrong = "given together with votes, which say the same thing"
            return Problem("preference_probability", wrong, "remove one of the two from this row")
    if "tie" in there:
        tie = as_truth(row["tie"])
        if tie is None:
            wrong = f"{shown(row['tie'])} is not true or false"
            return Problem("tie", wrong, "give true, false, or nothing for a forced choice")
        if tie and any(votes):
            wrong = "true in a row with votes for either side"
            return Problem("tie", wrong, "give the tied votes a row of their own, with a weight")
        if tie and "preference_probability" in there:
            return Problem("tie", "true in a row with a soft label", "remove one of the two from this row")
    for name, fix in (("margin", "0.0 for no margin"), ("weight", "1.0 for an ordinary row")):
        # A margin has to be in every row, as in TRL; a weight need not.
        if name in row and (name in there or name == "margin") and as_number(row[name]) is None:
            return Problem(name, f"{shown(row[name])} is not a finite number", f"give every row a number ({fix})")
    if "weight" in there and row["weight"] < 0:
        return Problem("weight", f"{row['weight']!r} is negative", "give 0 or more; 0 leaves the row out")
    for name in RATINGS:
        for rating in as_ratings(row.get(name)):
            if as_number(rating) is None:
                return Problem(name, f"{shown(rating)} is not a rating", "give a finite number, or a list of them")
    is_ranking = not all(is_missing(row.get(name)) for name in RANKING)
    return _ranking_problem(row) if is_ranking else None


def _ranking_problem(row: dict[str, Any]) -> Problem | None:
    for name in RANKING:
        if is_missing(row.get(name)):
            other = RANKING[1 - RANKING.index(name)]
            return Problem(name, f"missing where {other!r} is given", "give both, or neither")
        if not isinstance(row[name], list):
            return Problem(name, f"{shown(row[name])} is not a list", "give a list with an entry for each answer")
    completions, ranks = (row[name] for name in RANKING)
    if len(completions) != len(ranks):
        wrong = f"{len(ranks)} ranks of {len(completions)} completions"
        return Problem("ranks", wrong, "give each completion its rank")
    if len(completions) < 2:
        return Problem("completions", "one answer alone cannot be ranked", "drop the row, or give two or more")
    if len(completions) > MOST_RANKED:
        wrong = f"{len(completions)} answers, whose pairs are too many for a batch"
        return Problem("completions", wrong, f"give at most {MOST_RANKED}, or cut the ranking into several rows")
    bad = [rank for rank in ranks if as_number(rank) is None]
    if bad:
        return Problem("ranks", f"{shown(bad[0])} is not a rank", "give finite numbers, 1 for the best")
    given = [name for name in (*VOTES, "preference_probability", "tie", *RATINGS) if not is_missing(row.get(name))]
    if given:
        wrong = "speaks of a chosen and a rejected answer in a row of ranked ones"
        return Problem(given[0], wrong, "put pairs and rankings into different rows")
    return None


def ranked_pairs(ranks: Sequence[float]) -> list[tuple[int, int]]:
    """All pairs of ranked answers, by index, the better first; of equal ones that which stands first."""
    return [(a, b) if ranks[a] <= ranks[b] else (b, a) for a, b in combinations(range(len(ranks)), 2)]


def are_some_tied(ranks: Sequence[Any]) -> bool:
    """Whether some answers of a ranking are equal. (What is no number is for `find_problem` to refuse.)"""
    return len({as_number(rank) for rank in ranks}) < len(ranks)


# Datasets


@dataclass
class Survey:
    """
    What the judgements of a dataset are like, which decides what there is to learn from them.

    Attributes:
        has_ties: some answers were called equal.
        has_several_ratings: of one answer.
        ratings: how often each rating was given.
        ranking_sizes: how many answers are ranked in a row.
        has_pairs: there are rows that are no rankings.
    """

    has_ties: bool = False
    has_several_ratings: bool = False
    ratings: Counter = field(default_factory=Counter)
    ranking_sizes: set[int] = field(default_factory=set)
    has_pairs: bool = False

    @property
    def pairs_of_rows(self) -> set[int]:
        """How many pairs a row may stand for: a ranking for all of its answers', any other for one."""
        pairs = {math.comb(size, 2) for size in self.ranking_sizes}
        return pairs | {1} if self.has_pairs else pairs

    def add(self, row: dict[str, Any]) -> None:
        """Take a row into account; what is wrong with it is for `find_problem` to say."""
        ranks = row.get("ranks")
        if isinstance(ranks, list) and ranks:
            self.ranking_sizes.add(len(ranks))
            self.has_ties |= are_some_tied(ranks)
            return
        self.has_pairs = True
        self.has_ties |= as_truth(row.get("tie")) is True
        for name in RATINGS:
            ratings = [rating for rating in as_ratings(row.get(name)) if as_number(rating) is not None]
            self.has_several_ratings |= len(ratings) >= 2
            self.ratings.update(float(rating) for rating in ratings)


SURVEYED_OF_STREAM = 1000


def survey(dataset: Dataset | IterableDataset) -> Survey:
    """Go through the judgements of a dataset, of a stream through those of its first 1,000 rows."""
    found = Survey()
    for row in _judged_rows(dataset):
        found.add(row)
    # Of a dataset without judgements no row was looked at.
    found.has_pairs |= not found.ranking_sizes
    return found


def check_answerable(
    dataset: Dataset | IterableDataset, dataset_name: str, found: Survey, likelihood: dict[str, Any]
) -> None:
    """
    Raise `ValueError` if a model cannot have answered as a row of a dataset (of a stream, the first 1,000) says.

    Args:
        dataset: with judgements in which `find_problem` finds nothing.
        dataset_name: for the message.
        found: the survey of the dataset; its rows are gone through only if one of them is at fault.
        likelihood: what the model knows of how people answer, the settings of a
        `disco_trl.models.heads.LikelihoodHead`.
    """
    values: list[float] = likelihood.get("rating_values", [])
    strange = found.ratings.keys() - {*values} if values else set()
    has_strange_ties = found.has_ties and "tie_width" not in likelihood
    for index, row in enumerate(_judged_rows(dataset) if strange or has_strange_ties else ()):
        of_row = Survey()
        of_row.add(row)
        given = of_row.ratings.keys() & strange
        if given:
            columns = " or ".join(f"{name!r}" for name in RATINGS if {*as_ratings(row.get(name))} & given)
            raise ValueError(
                f"{dataset_name} dataset, row {index}, column {columns}: the model, which knows the ratings "
                f"{', '.join(f'{value:g}' for value in values)}, cannot give {min(given):g}; round it, or pass "
                "rating_values with all there are"
            )
        if of_row.has_ties and has_strange_ties:
            raise ValueError(
                f"{dataset_name} dataset, row {index}, column {'ranks' if of_row.ranking_sizes else 'tie'!r}: a tie, "
                "and the training data have none to learn from; give tie_width, or leave such rows out"
            )


def _judged_rows(dataset: Dataset | IterableDataset) -> Iterator[dict[str, Any]]:
    plain = dataset.with_format(None)
    if isinstance(plain, IterableDataset):
        yield from islice(plain, SURVEYED_OF_STREAM)
        return
    names = [name for name in plain.column_names if name in {*JUDGEMENT_COLUMNS, "ranks"} - {"margin", "weight"}]
    for batch in plain.select_columns(names).iter(batch_size=1000) if names else ():
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def has_judgements(columns: Iterable[str]) -> bool:
    """Whether a dataset says more than forced choices and margins."""
    return bool({*columns} & ({*JUDGEMENT_COLUMNS, "ranks"} - {"margin"}))


def to_tensors(
    examples: Sequence[dict[str, Any]],
    weigh_by: str,
    rating_values: Sequence[float] | None,
    pairs_per_row: int | None = None,
) -> dict[str, Tensor]:
    """
    The judgements of a batch's rows, for `Judgements.of_batch`.

    Args:
        examples: rows that have passed `find_problem`. A row with `ranks` stands for all pairs of its answers, in the
            order of `ranked_pairs`; any other row for one comparison.
        weigh_by: `"pair"`, all that is said in a row weighs 1 together; `"vote"`, each thing that is said weighs 1.
        rating_values: the L ratings there are, in order; None if none is read.
        pairs_per_row: if set, the comparisons of a row are gone through again until there are so many, and share its
            weight.

    Raises:
        ValueError: a rating is not among `rating_values`.
    """
    table: list[tuple[float, ...]] = []
    levels = {value: level for level, value in enumerate(rating_values or ())}
    counts: tuple[list[list[float]], list[list[float]]] = ([], [])
    for example in examples:
        weight = 1.0 if is_missing(example.get("weight")) else float(example["weight"])
        margin = 0.0 if is_missing(example.get("margin")) else float(example["margin"])
        sides = [_count(example.get(name), levels, name) for name in RATINGS]
        if not is_missing(example.get("ranks")):
            ranks = example["ranks"]
            pairs = ranked_pairs(ranks)
            allowed = float(are_some_tied(ranks))
            said = [(0.0, 0.0, 1.0) if ranks[a] == ranks[b] else (1.0, 0.0, 0.0) for a, b in pairs]
        else:
            allowed = float(not is_missing(example.get("tie")))
            said = [_compared(example)]
        number = sum(map(sum, said)) + sum(map(sum, sides))
        if weigh_by == "pair":
            weight /= max(number, 1)
        count = pairs_per_row or len(said)
        for index in range(count):
            # Of `count` comparisons in turn, this one is `times` of them.
            times = len(range(index % len(said), count, len(said)))
            table.append((*said[index % len(said)], allowed, margin, weight / times))
            for side, ratings in zip(counts, sides, strict=True):
                side.append(ratings)
    tensor = torch.tensor(table, dtype=torch.float32)
    # The loss is a mean over comparisons, and shall be one over rows.
    tensor[:, -1] *= len(table) / len(examples)
    tensors = {"judgements": tensor}
    if rating_values is not None:
        tensors["rating_counts"] = torch.tensor([*counts[0], *counts[1]], dtype=torch.float32)
    return tensors


def _compared(example: dict[str, Any]) -> tuple[float, float, float]:
    """Wins, losses and ties of the chosen side."""
    if not is_missing(example.get("tie")) and example["tie"]:
        return 0.0, 0.0, 1.0
    if not is_missing(example.get("chosen_votes")):
        return float(example["chosen_votes"]), float(example["rejected_votes"]), 0.0
    if not is_missing(example.get("preference_probability")):
        probability = float(example["preference_probability"])
        return probability, 1 - probability, 0.0
    return 1.0, 0.0, 0.0


def _count(value: Any, levels: dict[float, int], column: str) -> list[float]:
    counts = [0.0] * len(levels)
    for rating in as_ratings(value) if levels else ():
        if rating not in levels:
            raise ValueError(
                f"column {column!r}: the rating {rating!r} is not one of those that the model knows "
                f"({', '.join(f'{value:g}' for value in levels)}); pass rating_values= with all of them, or round it"
            )
        counts[levels[rating]] += 1
    return counts
