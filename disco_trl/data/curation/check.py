"""
What a preference dataset holds and what is wrong with it, before anything is trained on it: `disco-trl data check`.

Training stops at the first bad row; here all of them are counted. The figures are `disco_trl.data.curation.survey`'s.
"""

from __future__ import annotations

import difflib
import re
from typing import Any

from datasets import Dataset, IterableDataset
from transformers.utils import logging

from ..columns import (
    JUDGEMENT_COLUMNS,
    KNOWN_COLUMNS,
    LEGACY_TOKENIZED_PAIR,
    RANKING,
    SYNONYMS,
    TEXT_PAIR,
    TOKENIZED_PAIR,
)
from ..files import Row, chunks
from ..judgements import MOST_RATING_VALUES
from ..tokenization import SpecialTokens, chat_template_arguments, tokenize, tokenize_pair
from ..validation import find_layout, find_row_problem, find_special_token
from ..values import Problem, is_missing
from .check_report import rows_of
from .survey import ROWS_NAMED, DataSurvey


READ = {*KNOWN_COLUMNS, *JUDGEMENT_COLUMNS, *RANKING} - {"completion", "messages"}
# Words of column names, and the word that disco-trl has for the same
WORDS = {
    **{"score": "rating", "scores": "rating", "ratings": "rating", "stars": "rating", "grade": "rating"},
    **{"vote": "votes", "count": "votes", "counts": "votes", "wins": "votes", "prob": "probability"},
    **{"accepted": "chosen", "preferred": "chosen", "winner": "chosen", "loser": "rejected", "p": "probability"},
    **{
        "ties": "tie",
        "tied": "tie",
        "draw": "tie",
        "is": "",
        "num": "",
        "n": "",
        "weights": "weight",
        "rank": "ranks",
    },
    **{"ranking": "ranks", "rankings": "ranks", "responses": "completions", "answers": "completions"},
    **{"soft": "preference", "label": "probability", "importance": "weight", "sample": "", "example": ""},
}
LENGTH_BIAS = 0.55
"""From this share of longer answers chosen on, it is worth a warning: on HH-RLHF it is 0.54."""


def find_look_alikes(columns: list[str]) -> dict[str, str]:
    """Columns that are not read, and the ones that they look as if they were meant to be."""
    missing = sorted(READ - {*columns} - {*TOKENIZED_PAIR, *LEGACY_TOKENIZED_PAIR})
    found = {}
    for column in columns:
        if column in READ or column.endswith("_id"):
            continue
        words = [WORDS.get(word, word) for word in re.findall(r"[a-z0-9]+", _snake(column))]
        same = [name for name in missing if sorted(name.split("_")) == sorted(filter(None, words))]
        same = same or [name for name in missing if column in SYNONYMS.get(name, ())]
        same = same or difflib.get_close_matches(column.lower(), missing, n=1, cutoff=0.8)
        if same:
            found[column] = same[0]
    return found


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


class ErrorCounts:
    """What is wrong with the rows of a dataset, by kind: all are counted, the first of each are named."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[str, str], dict[str, Any]] = {}

    def add(self, problem: Problem, number: int) -> None:
        """Count what is wrong with row `number`. The fix of two problems is the same if they are of one kind."""
        kind = self._kinds.setdefault((problem.column, problem.fix), {**problem._asdict(), "rows": 0, "first": []})
        kind["rows"] += 1
        if len(kind["first"]) < ROWS_NAMED:
            kind["first"].append(number)

    def figures(self) -> list[dict[str, Any]]:
        """The kinds, the most frequent first: `column`, `wrong` (of the first such row), `fix`, `rows`, `first`."""
        return sorted(self._kinds.values(), key=lambda kind: -kind["rows"])


def check_dataset(dataset: Dataset | IterableDataset, tokenizer: Any = None) -> tuple[dict[str, Any], DataSurvey]:
    """
    Check every row of a preference dataset.

    Args:
        dataset: its rows; see `disco_trl.data.validation.check_preferences` for the types.
        tokenizer: measures lengths in tokens, if given.

    Returns:
        The figures, JSON's types throughout (`errors`, `warnings` and `columns` first, then those of
        `DataSurvey.figures`), and the survey that they are of.

    Raises:
        ValueError: the dataset is empty, or its columns are not those of preferences.
    """
    columns: dict[str, None] = {}
    errors = ErrorCounts()
    counts: list[int] = []
    survey = DataSurvey(None if tokenizer is None else lambda row: counts)
    special = None if tokenizer is None else SpecialTokens(tokenizer)
    with_special_tokens: list[int] = []
    layout = None
    read = 0
    with logging.tqdm(desc="checking", unit="row") as bar:
        for rows in chunks(dataset):
            for row in rows:
                columns |= dict.fromkeys(row)
                if layout is None:
                    require_answers(row)
                    layout = find_layout(row)
                problem = find_row_problem(row, layout)
                if problem is None and tokenizer is not None:
                    try:
                        counts[:] = _token_counts(row, tokenizer)
                    except ValueError as error:
                        column = layout.pair[0] if is_missing(row.get("completions")) else "completions"
                        problem = Problem(column, str(error), "drop the row, or fix it")
                if problem is None:
                    survey.add(row, read)
                    if special is not None and layout.kind != "tokenized" and find_special_token(row, special):
                        with_special_tokens.append(read)
                else:
                    errors.add(problem, read)
                read += 1
            bar.update(len(rows))
    if layout is None:
        raise ValueError("the data is empty; check its path and split")
    found = {
        "rows": read,
        "errors": errors.figures(),
        "columns": {
            "read": [name for name in columns if name in READ],
            "not_read": [name for name in columns if name not in READ],
            "look_alikes": find_look_alikes(list(columns)),
        },
        **{name: value for name, value in survey.figures().items() if name != "rows"},
    }
    if with_special_tokens:
        found["special_tokens"] = {"rows": len(with_special_tokens), "first": with_special_tokens[:ROWS_NAMED]}
    return {"warnings": _warnings(found), **found}, survey


def require_answers(row: Row) -> None:
    """Raise a `ValueError` with the fix unless the row has the columns of a pair or of a ranking."""
    if any(row.keys() >= set(pair) for pair in (TEXT_PAIR, TOKENIZED_PAIR, LEGACY_TOKENIZED_PAIR, RANKING)):
        return
    renames = [f"{old!r} to {new!r}" for old, new in find_look_alikes(list(row)).items()]
    fix = f"rename {', '.join(renames)}" if renames else "convert them with `disco-trl data convert`"
    raise ValueError(
        f"the rows have neither 'chosen' and 'rejected' nor 'completions' and 'ranks' (there are "
        f"{', '.join(map(repr, row))}); {fix}"
    )


def _token_counts(row: Row, tokenizer: Any) -> list[int]:
    if is_missing(row.get("completions")):
        there = {name: value for name, value in row.items() if value is not None}
        return list(map(len, tokenize_pair(there, tokenizer)))
    arguments = chat_template_arguments(row)
    prompt = row.get("prompt")
    contents = [answer if is_missing(prompt) else prompt + answer for answer in row["completions"]]
    return [len(tokenize(tokenizer, content, **arguments)) for content in contents]


def _warnings(found: dict[str, Any]) -> list[str]:
    """What is no error, and yet probably not meant."""
    terms, repeated = found["terms"], found["repeated_pairs"]
    warnings = [
        f"column {old!r} is not read; if it is {new!r}, rename it"
        for old, new in found["columns"]["look_alikes"].items()
    ]
    if count := found["identical_sides"]["rows"]:
        warnings.append(
            f"{rows_of(count)} with the same answer on both sides, which teaches nothing; training leaves them out "
            f"({row_numbers(found['identical_sides']['first'])})"
        )
    if repeated.get("judged_both_ways"):
        warnings.append(
            f"{repeated['judged_both_ways']:,} pairs are judged both ways in different rows "
            f"({row_numbers(repeated['judged_both_ways_first'])}); if these are several people's judgements, make "
            "them one row with chosen_votes and rejected_votes: only then can the model's error be told from "
            "disagreement"
        )
    elif repeated["rows"]:
        warnings.append(
            f"{rows_of(repeated['rows'])} with the pair of an earlier row ({row_numbers(repeated['first'])}); drop "
            "them if they are copies, or count them in chosen_votes and rejected_votes if they are several people's"
        )
    if count := terms.get("ratings with a forced choice"):
        warnings.append(
            f"{rows_of(count)} with ratings and no votes, which also count as a forced choice of 'chosen'; where "
            "nobody compared the two, set chosen_votes and rejected_votes to 0"
        )
    if terms.get("ties") and not terms.get("ties refused"):
        warnings.append(
            "there are ties, but no row says that a tie was possible and refused (tie: false), so the width of the "
            "tie band is not bounded by the data"
        )
    if terms.get("ties refused") and not terms.get("ties") and not terms.get("ranked ties"):
        warnings.append("ties were possible (tie: false), but there is none: the width of the tie band goes to 0")
    values = found.get("ratings", {}).get("values", {})
    if len(values) > MOST_RATING_VALUES:
        warnings.append(
            f"{len(values)} different ratings, more than the {MOST_RATING_VALUES} that can each have a threshold; "
            "round them"
        )
    if len(values) == 1:
        warnings.append("all ratings are the same, which teaches nothing")
    if count := found.get("soft_labels", {}).get("below_half"):
        warnings.append(
            f"{count:,} soft labels are below ½, for the rejected side; the likelihood takes them as they are, but "
            "the logged accuracy calls 'chosen' right"
        )
    if special := found.get("special_tokens"):
        warnings.append(
            f"{rows_of(special['rows'])} with a special token of the model in a text ({row_numbers(special['first'])})"
            ", which the tokenizer takes for a real one: whoever wrote it can end a turn, or begin another; take it "
            "out, unless you rendered the texts yourself"
        )
    longer = found.get("longer_is_chosen")
    if longer and abs(longer["share"] - 0.5) > max(LENGTH_BIAS - 0.5, 3 * longer["standard_error"]):
        word = "longer" if longer["share"] > 0.5 else "shorter"
        warnings.append(
            f"the {word} answer is preferred in {max(longer['share'], 1 - longer['share']):.1%} of pairs: that is the "
            "accuracy of counting characters, and what a reward model has to beat"
        )
    tokens = found.get("tokens")
    if tokens and tokens["rows_above_max_length"]:
        warnings.append(
            f"{rows_of(tokens['rows_above_max_length'])} with a side above {tokens['max_length']} tokens, the default "
            "max_length: left out of training"
        )
    return warnings


def row_numbers(numbers: list[int]) -> str:
    """The first rows of some kind, for a message."""
    return f"row{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}{', ...' * (len(numbers) == ROWS_NAMED)}"
