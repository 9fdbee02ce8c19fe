"""
What a preference dataset holds and what is wrong with it, before anything is trained on it: `disco-trl data check`.

Training stops at the first bad row. Here all of them are counted. The figures come from
`disco_trl.data.curation.survey`.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset, IterableDataset
from transformers.utils import logging

from ..columns import (
    JUDGEMENT_COLUMNS,
    KNOWN_COLUMNS,
    OVERALL,
    PAIRS,
    RANKING,
    RATINGS,
    STRENGTH,
    find_layout,
)
from ..files import chunks
from ..findings import ROWS_NAMED, Findings, named
from ..judgements import readings, why_not_a_scale
from ..look_alikes import conversion_of, find_look_alikes, fix_of_answers, unconverted_side
from ..records import Record, read_record
from ..tokenization import SpecialTokens, tokenize_record
from ..validation import find_special_token
from ..values import BadRow, Problem, Row, is_missing
from .check_report import rows_of
from .survey import DataSurvey


READ = {*KNOWN_COLUMNS, *JUDGEMENT_COLUMNS, *RANKING} - {"completion", "messages"}
LENGTH_BIAS = 0.55
"""Share of longer answers among the preferred ones above which a warning is shown: on HH-RLHF it is 0.54."""


class ErrorCounts:
    """Problems of the rows of a dataset, by kind: all are counted, and the first rows of each kind are named."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[str, str], dict[str, Any]] = {}

    def add(self, problem: Problem, number: int) -> None:
        """
        Count a problem. Two problems are of one kind if they have the same column and the same fix.

        Args:
            problem ([`~disco_trl.data.values.Problem`]):
                What is wrong.
            number (`int`):
                Number of the row.
        """
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
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Preference dataset of any type that [`~disco_trl.data.validation.check_preferences`] takes.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            If given, lengths are measured in tokens too.

    Returns:
        `tuple[dict, DataSurvey]`: The figures, in types that JSON has (`warnings`, `errors` and `columns`, and those
        of [`DataSurvey.figures`]), and the survey that they come from.

    Raises:
        `ValueError`: If the dataset is empty, or its columns are not those of preferences.
    """
    columns: Row = {}  # each with its first value that is not missing
    errors = ErrorCounts()
    survey = DataSurvey()
    special = None if tokenizer is None else SpecialTokens(tokenizer)
    with_special_tokens: list[int] = []
    said: set[str] = set()
    findings = Findings()
    layout = None
    read = 0
    with logging.tqdm(desc="checking", unit="row") as bar:
        for rows in chunks(dataset):
            for row in rows:
                columns |= {name: value for name, value in row.items() if is_missing(columns.get(name))}
                if layout is None:
                    require_answers(row)
                    layout = find_layout(row)
                try:
                    record = read_record(row, layout)
                    said |= record.said
                    findings.add(row, record, read)
                    survey.add(record, read, None if tokenizer is None else _token_counts(record, tokenizer))
                    if special is not None and layout.kind != "tokenized" and find_special_token(record, special):
                        with_special_tokens.append(read)
                except BadRow as error:
                    errors.add(error.problem, read)
                read += 1
            bar.update(len(rows))
    if layout is None:
        raise ValueError("the data is empty; check its path and split")
    figures = survey.figures()
    by_attribute = {OVERALL: survey.ratings} | {name: of.ratings for name, of in survey.attributes.items()}
    scales = {name: of.values for name, of in by_attribute.items() if why_not_a_scale(of.values) is None and of.values}
    read_as = readings(said, scales, figures.get("strengths", {}).get("levels", 0))
    found = {
        "rows": read,
        "errors": errors.figures(),
        "columns": {
            "read": [name for name in columns if name in READ],
            "not_read": [name for name in columns if name not in READ],
            "look_alikes": find_look_alikes(columns),
            "conversion": conversion_of(columns),
            "likelihood": {", ".join(names): meaning for names, meaning in read_as.items()},
        },
        **{name: value for name, value in figures.items() if name != "rows"},
    }
    if with_special_tokens:
        found["special_tokens"] = {"rows": len(with_special_tokens), "first": with_special_tokens[:ROWS_NAMED]}
    return {"warnings": [*findings.messages(), *_warnings(found)], **found}, survey


def require_answers(row: Row) -> None:
    """Raise `ValueError`, with the fix, if a row has no answers to compare."""
    if wrong := unconverted_side(row):
        raise ValueError(wrong)
    if any(row.keys() >= {*names} for names in (*PAIRS, RANKING)):
        return
    raise ValueError(
        f"the rows have neither 'chosen' and 'rejected' nor 'completions' and 'ranks' (there are "
        f"{', '.join(map(repr, row))}); {fix_of_answers(row)}"
    )


def _token_counts(record: Record, tokenizer: Any) -> list[int]:
    try:
        return list(map(len, tokenize_record(record, tokenizer)))
    except ValueError as error:
        raise BadRow(record.columns[0], str(error), "drop the row, or fix it") from error


def _warnings(found: dict[str, Any]) -> list[str]:
    """What is not an error, but probably not intended."""
    terms, repeated = found["terms"], found["repeated_pairs"]
    conversion = found["columns"]["conversion"]
    warnings = [
        f"column {old!r} is not read; "
        + (conversion if conversion and new == "prompt" else f"if it is {new!r}, rename it")
        for old, new in found["columns"]["look_alikes"].items()
    ]
    if count := found["identical_sides"]["rows"]:
        warnings.append(
            f"{rows_of(count)} with the same answer on both sides, which teaches nothing; training leaves them out "
            f"({named(found['identical_sides']['first'])})"
        )
    if repeated.get("judged_both_ways"):
        warnings.append(
            f"{repeated['judged_both_ways']:,} pairs are judged both ways in different rows "
            f"({named(repeated['judged_both_ways_first'])}); if these are several people's judgements, make them one "
            "row with chosen_votes and rejected_votes: only then can the model's error be told from disagreement"
        )
    elif repeated["rows"]:
        warnings.append(
            f"{rows_of(repeated['rows'])} with the pair of an earlier row ({named(repeated['first'])}); drop them if "
            "they are copies, or count them in chosen_votes and rejected_votes if they are several people's"
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
    if why := found.get("ratings", {}).get("why_not_read"):
        warnings.append(
            f"column {' and '.join(map(repr, RATINGS))}: {why}; training does not read them as ratings. If they are "
            "some, round them to the steps of a scale, or pass rating_values in training"
        )
    if count := found.get("soft_labels", {}).get("below_half"):
        warnings.append(
            f"{count:,} soft labels are below ½, for the rejected side; the likelihood takes them as they are, but "
            "the logged accuracy calls 'chosen' right"
        )
    strengths = found.get("strengths")
    if strengths and "0" not in strengths["values"] and (terms.get("ties") or terms.get("ranked ties")):
        warnings.append(
            f"column {STRENGTH!r}: never 0, as where no tie was on offer, but there are ties in other rows; training "
            "takes a tie to be possible in all of them. If it was not, train on the two apart"
        )
    if special := found.get("special_tokens"):
        warnings.append(
            f"{rows_of(special['rows'])} with a special token of the model in a text ({named(special['first'])}), "
            "which the tokenizer takes for a real one: whoever wrote it can end a turn, or begin another; take it "
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
