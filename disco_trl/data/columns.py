"""The names of a preference dataset's columns, those that TRL reads and those that disco-trl adds."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass


ROW_COLUMN = "row_index"

TOKENIZED_PAIR = ("chosen_ids", "rejected_ids")
LEGACY_TOKENIZED_PAIR = ("chosen_input_ids", "rejected_input_ids")
TEXT_PAIR = ("chosen", "rejected")
RANKED_IDS = "completion_ids"
"""Token ids of all answers of a ranking, each after the prompt."""

VOTES = ("chosen_votes", "rejected_votes")
RATINGS = ("chosen_rating", "rejected_rating")
RANKING = ("completions", "ranks")
JUDGEMENT_COLUMNS = (*VOTES, "preference_probability", "tie", "margin", *RATINGS, "weight")

# Columns that TRL reads: never taken for a misspelling of another one.
KNOWN_COLUMNS = {
    *(*TOKENIZED_PAIR, *LEGACY_TOKENIZED_PAIR),
    *(*TEXT_PAIR, "prompt", "completion", "messages", "tools", "chat_template_kwargs", *JUDGEMENT_COLUMNS, *RANKING),
}

# What other tools and well-known datasets call TRL's columns, most telling first.
SYNONYMS = {
    "chosen": (
        *("accepted", "preferred", "response_chosen", "chosen_response", "response_j", "winner", "preferred_response"),
        *("better", "better_response", "positive", "y_w"),
    ),
    "rejected": (
        *("response_rejected", "rejected_response", "response_k", "loser", "dispreferred", "non_preferred"),
        *("declined", "worse", "worse_response", "negative", "y_l"),
    ),
    "prompt": ("prompts", "question", "instruction", "query", "input", "user_prompt"),
}


@dataclass(frozen=True)
class Layout:
    """How a dataset writes its pairs: the columns of the two sides, and what stands in them."""

    pair: tuple[str, str]
    kind: str  # "tokenized", "standard" or "conversational"


def tokenized_pair(names: Container[str]) -> tuple[str, str] | None:
    """The two columns of token ids, if both of a pair are among the columns: TRL reads these and no text then."""
    pairs = (TOKENIZED_PAIR, LEGACY_TOKENIZED_PAIR)
    return next((pair for pair in pairs if pair[0] in names and pair[1] in names), None)
