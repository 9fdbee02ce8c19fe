"""Columns of a preference dataset: those that TRL reads, those that disco-trl adds, and those with the answers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from .values import is_missing


ROW_COLUMN = "row_index"

TOKENIZED_PAIR = ("chosen_ids", "rejected_ids")
LEGACY_TOKENIZED_PAIR = ("chosen_input_ids", "rejected_input_ids")
TEXT_PAIR = ("chosen", "rejected")
PAIRS = (TOKENIZED_PAIR, LEGACY_TOKENIZED_PAIR, TEXT_PAIR)
"""In the order in which TRL looks for them: a dataset with token ids is not tokenized again."""
RANKED_IDS = "completion_ids"
"""Token ids of all answers of a ranking, each with its prompt."""

VOTES = ("chosen_votes", "rejected_votes")
RATINGS = ("chosen_rating", "rejected_rating")
RANKING = ("completions", "ranks")
RANKED_RATINGS = "completion_ratings"
"""Ratings of all answers of a row with `completions`, with an entry for each."""
RATING_COLUMNS = (*RATINGS, RANKED_RATINGS)
SCALES = ("scale_chosen", "scale_rejected")
"""Scales of both answers, as scoring a dataset adds them, which DPO reads."""
STRENGTH = "preference_strength"
ATTRIBUTE = "attribute"
"""What the comparison of a row is about."""
OVERALL = "overall"
"""The attribute that a judgement is about which names none."""
JUDGEMENT_COLUMNS = (
    *(*VOTES, "preference_probability", STRENGTH, "tie", "margin", ATTRIBUTE),
    *(*RATING_COLUMNS, "weight"),
)
READINGS = {
    VOTES: "numbers of votes for each answer",
    ("preference_probability",): "soft labels, P(chosen ≻ rejected)",
    (STRENGTH,): "how much better the chosen answer is, below 0 if it is worse",
    ("tie",): "whether the two were called equal",
    RATING_COLUMNS: "ratings of each answer",
    RANKING: "ranked answers",
    (ATTRIBUTE,): "which attribute the comparison of a row is about",
    ("weight",): "weights of the rows",
}
"""What the likelihood takes each column for that TRL does not read."""
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
"""What a row passes to the chat template."""

# Columns that TRL reads. None of them is taken for a misspelling of another one.
KNOWN_COLUMNS = {
    *(*TOKENIZED_PAIR, *LEGACY_TOKENIZED_PAIR),
    *(*TEXT_PAIR, "prompt", "completion", "messages", *TEMPLATE_COLUMNS, *JUDGEMENT_COLUMNS, *RANKING),
}


@dataclass(frozen=True)
class Layout:
    """
    Which columns of a dataset hold its answers, and how they are written.

    Args:
        columns (`tuple[str, ...]`):
            Columns with one answer each: two for pairs, one for single answers. In any row, a ranking may take their
            place.
        kind (`str`):
            `"tokenized"` (token ids), `"standard"` (text) or `"conversational"` (messages).
        has_prompt (`bool`, *optional*, defaults to `False`):
            Whether the first row has a prompt that its answers follow.
    """

    columns: tuple[str, ...]
    kind: str
    has_prompt: bool = False

    @property
    def is_pair(self) -> bool:
        """Whether a row holds two answers, one of them preferred."""
        return len(self.columns) == 2

    @property
    def takes_prompt(self) -> bool:
        """Whether the answers follow the column `prompt`; token ids and whole conversations or texts do not."""
        return self.kind != "tokenized" and self.columns not in SINGLES[1:]


SINGLES = (("completion",), ("messages",), ("text",))
"""Layouts of single answers, which can be scored but not trained on."""


PREPARED = Layout(TOKENIZED_PAIR, "tokenized")
"""Layout of a dataset that has been tokenized."""


def is_ranking(row: dict[str, Any]) -> bool:
    """Whether the row ranks or rates several answers, rather than holding one or two."""
    if not all(is_missing(row.get(name)) for name in ("ranks", RANKED_RATINGS)):
        return True
    return not is_missing(row.get("completions")) and not holds_pair(row)


def holds_pair(row: dict[str, Any]) -> bool:
    """Whether the row holds a chosen and a rejected answer. Beside them, `completions` without ranks are not read."""
    return not any(is_missing(row.get(side)) for side in TEXT_PAIR)


def leave_out(columns: Iterable[str]) -> str:
    """How to leave columns out of a dataset, in Python and on the command line."""
    names = json.dumps([*columns], ensure_ascii=False)
    return (
        f"dataset.remove_columns({names}), or, for `disco-trl train`, list the other columns as `columns` of the "
        "dataset in a --config file"
    )


def find_layout(row: dict[str, Any], singles: bool = False) -> Layout:
    """
    Infer the layout of a dataset from one of its rows.

    The columns of the layout need not all be there: of a pair with one side missing, the pair that was probably meant
    is returned, and `("chosen", "rejected")` where there is nothing at all.

    Args:
        row (`dict`):
            First row of the dataset.
        singles (`bool`, *optional*, defaults to `False`):
            Whether rows with a single answer are of use: `prompt` and `completion`, `messages`, or `text`.

    Returns:
        [`Layout`]: Layout of the dataset.
    """
    names = row.keys()
    columns: tuple[str, ...] | None = next((pair for pair in PAIRS if names >= {*pair}), None)
    if columns is None and singles:
        # A completion without its prompt is not a dataset type of TRL's.
        columns = next(
            (single for single in SINGLES if names >= {*single, *(("prompt",) * (single == SINGLES[0]))}), None
        )
    if columns is None and not names & {*RANKING}:
        columns = next((pair for pair in reversed(PAIRS) if names & {*pair}), None)
    columns = columns or TEXT_PAIR
    if columns in PAIRS[:2]:
        return Layout(columns, "tokenized")
    answer, ranked = row.get(columns[0]), row.get(RANKING[0])
    if not singles and isinstance(ranked, list) and ranked:
        # (What stands beside a ranking is for the check of the row to refuse.)
        answer = ranked[0] if is_missing(answer) or not is_missing(row.get("ranks")) else answer
    layout = Layout(columns, "conversational" if isinstance(answer, list) else "standard")
    return replace(layout, has_prompt="prompt" in names and layout.takes_prompt)
