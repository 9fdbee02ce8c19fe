"""
How other tools and well-known datasets write preferences, and what such a row is in the columns that disco-trl reads.

A [`Format`] recognises its rows by their columns and converts one row at a time. No judgement is invented: somebody
who was not asked to compare two answers has no vote on them. A prompt and its answers stay what they were, texts or
messages; `disco_trl.data.curation.convert` decides whether texts become messages.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from ..columns import STRENGTH, TEXT_PAIR, holds_pair
from ..records import MOST_LEVELS
from ..values import BadRow, Row, as_ratings, is_missing, shown
from .attribute_formats import (
    from_columns,
    from_labels,
    from_long,
    is_labelled,
    is_long,
    is_rated_in_columns,
    level_of,
    with_aspects,
)
from .cells import answer_of, column_of, finite, first_of, list_of, prompt_of
from .strength_words import is_word, strength_of_words
from .transcripts import is_transcript, transcript_messages


PAIRS_OF_ANSWERS = (
    *(("completion_a", "completion_b"), ("response_a", "response_b"), ("answer_a", "answer_b")),
    *(("response_1", "response_2"), ("response1", "response2"), ("output_1", "output_2")),
    *(("completion_1", "completion_2"), ("response_0", "response_1")),
)
"""Answers of which a further column says which is better. (`chosen` and `rejected` say so themselves, and a strength
beside them is how much better `chosen` is.)"""
PROBABILITIES = {"prob_a": False, "prob_b": True, "prob_1": False, "prob_2": True, "preference_probability": False}
"""Columns with a probability, and whether it is that the second answer is preferred."""
STRENGTHS = {
    ("individual_preference",): "score",  # HelpSteer3
    ("all_preferences_unprocessed",): "strength",  # HelpSteer2
    ("three_most_similar_preferences",): "strength",
    ("normal_worker_annotations", "expert_worker_annotations"): "overall_pref",  # MultiPref
    ("preferences",): "score",
    ("preference_strengths",): "score",
    (STRENGTH,): "",
    ("overall_preference",): "",
}
"""Columns with how much each annotator prefers an answer, fullest first, and where a record in them holds it. The last
two hold one number for all annotators, or one annotator's."""
LISTS_OF_ANSWERS = (
    *("completions", "responses", "answers", "candidates", "candidates_completions", "outputs"),
    *("all_generated_responses", "generations"),
)
RANKS = ("ranks", "rank", "rankings")
SCORES = ("scores", "rewards", "all_rm_scores", "overall_scores")
ORDERS = ("order", "best_to_worst")
RATED_TEXTS = ("completion", "response", "answer", "text")

ROLES = {
    **{"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"},
    **{"observation": "tool", "tool": "tool", "function_call": "assistant"},
}


@dataclass(frozen=True)
class Format:
    """
    A way to write preferences.

    Args:
        what (`str`):
            Description of its rows, by which people find the format of theirs.
        recognise (`Callable[[dict], bool]`):
            Whether a row is of this format.
        convert (`Callable[..., list[dict]]`):
            The rows that one row becomes. It raises [`~disco_trl.data.values.BadRow`] if the row cannot be converted.
            Rated answers come out as `answer` and `ratings`, to be paired.
        judged_in (`Callable[[dict], str]`, *optional*):
            Where one of several columns may say which answer is better: which of them does in a row.
    """

    what: str
    recognise: Callable[[Row], bool]
    convert: Callable[..., list[Row]]
    judged_in: Callable[[Row], str] | None = None


# Ratings of single answers


def _is_rated(row: Row) -> bool:
    return "ratings" in row and first_of(row, RATED_TEXTS) is not None


def _from_ratings(row: Row) -> list[Row]:
    name = column_of(row, RATED_TEXTS, "the answer")
    ratings = row.get("ratings")
    ratings = ratings if isinstance(ratings, list) else [ratings]
    numbers = [finite("ratings", rating, "a rating") for rating in ratings if not is_missing(rating)]
    if not numbers:
        raise BadRow("ratings", "nobody has rated the answer", "drop the row")
    return [{**prompt_of(row), "answer": answer_of(name, row[name]), "ratings": numbers}]


def pair_of(one: Row, other: Row, first_only: bool = False) -> Row:
    """
    Two rated answers as one row in which nobody has compared them.

    The answer with the higher mean rating becomes `chosen`. It makes no difference to the likelihood which side is
    which, but it does to the accuracy that the trainer logs.

    Args:
        one, other (`dict`):
            The answers, with `answer` and `ratings`.
        first_only (`bool`, *optional*, defaults to `False`):
            Whether to leave out the ratings of `other`, which count in another row.

    Returns:
        `dict`: The row.
    """
    sides = [(one, one["ratings"]), (other, None if first_only else other["ratings"])]
    if level_of(one["ratings"]) < level_of(other["ratings"]):
        sides.reverse()
    (chosen, chosen_rating), (rejected, rejected_rating) = sides
    return {
        **({"prompt": one["prompt"]} if "prompt" in one else {}),
        **{"chosen": chosen["answer"], "rejected": rejected["answer"], "chosen_votes": 0, "rejected_votes": 0},
        **{"chosen_rating": chosen_rating, "rejected_rating": rejected_rating},
    }


# Several answers to a prompt


def _ranked(row: Row, answers: list[Any], ranks: Sequence[float]) -> list[Row]:
    return [{**prompt_of(row), "completions": answers, "ranks": list(ranks)}]


def ranks_of_scores(scores: list[float]) -> list[int]:
    """Rank of each score, 1 for the highest. Equal scores share the best of their ranks."""
    rank_of: dict[float, int] = {}
    for rank, score in enumerate(sorted(scores, reverse=True), start=1):
        rank_of.setdefault(score, rank)
    return [rank_of[score] for score in scores]


def _has_list(row: Row, of: type | tuple[type, ...] = (str, list, dict)) -> str | None:
    return next(
        (name for name in LISTS_OF_ANSWERS if isinstance(v := row.get(name), list) and v and isinstance(v[0], of)),
        None,
    )


def _is_ranking(row: Row) -> bool:
    name = _has_list(row)
    # Beside a pair, such lists are those that it was made from: distilabel's `generations`, and Snorkel's
    # `all_generated_responses` with their `all_rm_scores`.
    if name is None or _is_ultrafeedback(row) or holds_pair(row):
        return False
    ranked_inside = isinstance(row[name][0], dict) and first_of(row[name][0], ("rank", "score")) is not None
    return ranked_inside or any(column in row for column in (*RANKS, *SCORES, *ORDERS))


def _from_ranking(row: Row) -> list[Row]:
    name = _has_list(row) or column_of(row, LISTS_OF_ANSWERS, "the list of answers")
    entries = list_of(name, row[name])
    answers = [answer_of(name, entry) for entry in entries]
    if isinstance(entries[0], dict) and (inside := first_of(entries[0], ("rank", "score"))):
        inner = [finite(name, isinstance(entry, dict) and entry.get(inside), f"a {inside}") for entry in entries]
        return _ranked(row, answers, inner if inside == "rank" else ranks_of_scores(inner))
    column = column_of(row, (*RANKS, *SCORES, *ORDERS), "what says which answer is better")
    values = list_of(column, row[column])
    if len(values) != len(answers):
        raise BadRow(column, f"{len(values)} entries for {len(answers)} answers", "give each answer one")
    numbers = [finite(column, value, "a number") for value in values]
    if column in SCORES:
        return _ranked(row, answers, ranks_of_scores(numbers))
    if column in ORDERS:
        if sorted(numbers) != list(range(len(answers))):
            wrong = f"{shown(values)} is not an order of the answers 0 to {len(answers) - 1}"
            raise BadRow(column, wrong, "give each answer's position in the list once, the best first")
        rank_of = {position: rank for rank, position in enumerate(numbers, start=1)}
        numbers = [rank_of[position] for position in range(len(answers))]
    return _ranked(row, answers, numbers)


def _is_ultrafeedback(row: Row) -> bool:
    name = None if holds_pair(row) else _has_list(row, dict)
    return name is not None and bool({"annotations", "overall_score", "fine-grained_score"} & row[name][0].keys())


def rated_answers_of_ultrafeedback(row: Row, score: str = "overall_score") -> list[Row]:
    """
    Each answer of a row with its score as its rating.

    Args:
        row (`dict`):
            Row of the format `ultrafeedback`.
        score (`str`, *optional*, defaults to `"overall_score"`):
            Name of a score of the completions, or of an aspect of their annotations.

    Returns:
        `list[dict]`: Rows of `answer` and `ratings` (with one rating), with their `prompt`. Answers whose judge could
        not tell are left out.

    Raises:
        [`~disco_trl.data.values.BadRow`]: If fewer than two answers have the score.
    """
    name = _has_list(row, dict) or column_of(row, LISTS_OF_ANSWERS, "the list of answers")
    scored = [(entry, _ultrafeedback_score(name, entry, score)) for entry in list_of(name, row[name])]
    rated = [
        {**prompt_of(row), "answer": answer_of(name, entry), "ratings": ratings}
        for entry, ratings in scored
        if ratings
    ]
    if len(rated) < 2:
        raise BadRow(name, f"{len(rated)} of {len(scored)} answers have a {score!r}", "drop the row")
    return rated


def ultrafeedback_with_aspects(row: Row, score: str = "overall_score") -> list[Row]:
    """
    A ranking of the answers of a row, with the scores of their aspects as ratings.

    Args:
        row (`dict`):
            Row of the format `ultrafeedback`.
        score (`str`, *optional*, defaults to `"overall_score"`):
            Name of the score that they are ranked by.

    Returns:
        `list[dict]`: One row with the columns `completions`, `ranks` and `completion_ratings`.

    Raises:
        [`~disco_trl.data.values.BadRow`]: If fewer than two answers have the score, or an aspect is not a number.
    """
    name = _has_list(row, dict) or column_of(row, LISTS_OF_ANSWERS, "the list of answers")
    entries = [entry for entry in list_of(name, row[name]) if _ultrafeedback_score(name, entry, score)]
    return [with_aspects(ranked, entries) for ranked in _from_ultrafeedback(row, score)]


def _from_ultrafeedback(row: Row, score: str = "overall_score") -> list[Row]:
    rated = rated_answers_of_ultrafeedback(row, score)
    return _ranked(row, [one["answer"] for one in rated], ranks_of_scores([one["ratings"][0] for one in rated]))


def _ultrafeedback_score(column: str, completion: Any, score: str) -> list[float]:
    """The score as a list of one, or an empty list if the judge could not tell."""
    if not isinstance(completion, dict):
        raise BadRow(column, f"{shown(completion)} is no answer with its scores", "drop the row")
    value = completion.get(score)
    if value is None and isinstance(annotations := completion.get("annotations"), dict):
        value = annotations.get(score)
        value = value.get("Rating") if isinstance(value, dict) else value
        if value is None and score not in annotations:
            there = ", ".join(map(repr, [*annotations, *(key for key in completion if key.endswith("score"))]))
            raise BadRow(column, f"an answer without {score!r}", f"choose another with --score: {there}")
    if value is None or value == "N/A":
        return []
    return [finite(column, value, f"a number for {score!r}")]


# Two answers, and how much better one of them is


def _two_answers(row: Row) -> tuple[str, str] | None:
    return next((pair for pair in PAIRS_OF_ANSWERS if all(not is_missing(row.get(n)) for n in pair)), None)


def _is_graded(row: Row) -> bool:
    columns = {name for names in STRENGTHS for name in names} & {*row}
    # Training reads the strengths of a pair as they are, but no words.
    return bool(columns) and (
        _two_answers(row) is not None or (holds_pair(row) and any(map(is_word, as_ratings(row.get(STRENGTH)))))
    )


def strengths_of(row: Row) -> tuple[str, list[Any]]:
    """
    How much each annotator prefers an answer of a row of the format `strengths`.

    Args:
        row (`dict`):
            The row.

    Returns:
        `tuple[str, list]`: The columns, and the strengths as they are written: numbers, or words.

    Raises:
        [`~disco_trl.data.values.BadRow`]: If there are none.
    """
    column = column_of(row, (name for names in STRENGTHS for name in names), "how much better an answer is")
    columns, key = next((names, key) for names, key in STRENGTHS.items() if column in names)
    filled = [name for name in columns if not is_missing(row.get(name))]
    strengths = []
    for name in filled:
        for record in as_ratings(row[name]):
            strength = record.get(key) if isinstance(record, dict) else record
            if is_missing(strength):
                raise BadRow(name, f"{shown(record)} without a strength of preference", "drop it, or fill it in")
            strengths.append(strength)
    return " and ".join(filled), strengths


def as_strength(column: str, value: Any) -> int:
    """The value as a strength of preference; raises [`~disco_trl.data.values.BadRow`] if it is none."""
    number = finite(column, value, "a strength of preference")
    if number != int(number) or abs(number) > MOST_LEVELS:
        wrong = f"{shown(value)} is not a strength of preference"
        raise BadRow(column, wrong, f"give a whole number from -{MOST_LEVELS} to {MOST_LEVELS}")
    return int(number)


def _from_graded(row: Row, words: Mapping[str, int] | None = None) -> list[Row]:
    names, sign = _two_answers(row), 1
    if names is None and holds_pair(row):
        # A number beside these says how much better `chosen` is, and beside two answers how much better the second.
        names, sign = TEXT_PAIR, -1
    if names is None:
        raise BadRow("response_1", "two answers are missing", "name them 'response_1' and 'response_2'")
    column, given = strengths_of(row)
    strengths = [
        strength_of_words(column, value, words or {}, names) if is_word(value) else sign * as_strength(column, value)
        for value in given
    ]
    # What TRL reads of the row is which side is `chosen`: the majority's, and of as many people the more decided's.
    by_people = sum((strength > 0) - (strength < 0) for strength in strengths)
    if (by_people or sum(strengths)) > 0:
        names = names[::-1]
    else:
        strengths = [-strength for strength in strengths]
    chosen, rejected = names
    pair = {"chosen": answer_of(chosen, row[chosen]), "rejected": answer_of(rejected, row[rejected])}
    # MultiPref has its prompts in `text`.
    prompt = prompt_of(row) or ({} if is_missing(row.get("text")) else {"prompt": row["text"]})
    return [{**prompt, **pair, STRENGTH: strengths}]


def _kept_strength(row: Row) -> Row:
    """The strength of a row that holds `chosen` and `rejected` already, which is what training reads."""
    if STRENGTH not in row:
        return {}
    given = [as_strength(STRENGTH, value) for value in as_ratings(row[STRENGTH])]
    return {STRENGTH: given or None}


def _is_soft(row: Row) -> bool:
    return _two_answers(row) is not None and any(name in row for name in PROBABILITIES)


def _from_soft(row: Row) -> list[Row]:
    names = _two_answers(row)
    if names is None:
        raise BadRow("completion_a", "two answers are missing", "name them 'completion_a' and 'completion_b'")
    column = column_of(row, PROBABILITIES, "the probability")
    probability = finite(column, row[column], "a probability")
    if not 0 <= probability <= 1:
        raise BadRow(column, f"{probability} is not a probability", "give a number from 0 to 1")
    if PROBABILITIES[column]:
        names = names[::-1]
    if probability < 0.5:
        names, probability = names[::-1], 1 - probability
    chosen, rejected = names
    pair = {"chosen": answer_of(chosen, row[chosen]), "rejected": answer_of(rejected, row[rejected])}
    return [{**prompt_of(row), **pair, "preference_probability": float(probability)}]


# Files of LLaMA-Factory


def _is_alpaca(row: Row) -> bool:
    return "instruction" in row and ({"chosen", "rejected"} <= row.keys() or isinstance(row.get("output"), list))


def _from_alpaca(row: Row) -> list[Row]:
    instruction = column_of(row, ["instruction"], "the instruction")
    prompt = row[instruction] if is_missing(row.get("input")) else f"{row[instruction]}\n{row['input']}".rstrip("\n")
    history = [] if is_missing(row.get("history")) else row["history"]
    if not isinstance(history, list):
        raise BadRow("history", f"{shown(history)} is not a list", "give pairs of texts")
    system = row.get("system")
    if not is_missing(system) or history:
        messages = [] if is_missing(system) or system == "" else [{"role": "system", "content": system}]
        for turn in history:
            if not isinstance(turn, list) or len(turn) != 2:
                raise BadRow("history", f"{shown(turn)} is not a question and its answer", "give pairs of texts")
            messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
        prompt = [*messages, {"role": "user", "content": prompt}]
    sides = row["output"] if isinstance(row.get("output"), list) else [row.get("chosen"), row.get("rejected")]
    if len(sides) != 2:
        raise BadRow("output", f"{len(sides)} answers, not two", "give the better and then the worse")
    pair = {"chosen": answer_of("chosen", sides[0]), "rejected": answer_of("rejected", sides[1])}
    return [{"prompt": prompt, **pair, **_kept_strength(row)}]


def _is_sharegpt(row: Row) -> bool:
    turns = row.get("conversations", row.get("messages"))
    return isinstance(turns, list) and all(isinstance(row.get(side), dict) for side in ("chosen", "rejected"))


def _from_sharegpt(row: Row) -> list[Row]:
    column = column_of(row, ["conversations", "messages"], "the conversation")
    messages = [_message(column, turn) for turn in list_of(column, row[column])]
    system = row.get("system")
    if not is_missing(system) and system != "" and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    converted: Row = {"prompt": messages, **_kept_strength(row)}
    for side in ("chosen", "rejected"):
        converted[side] = [_message(side, row.get(side))]
    if "tools" in row:
        tools = row["tools"]
        is_empty = is_missing(tools) or (isinstance(tools, str | dict) and not tools)
        converted["tools"] = None if is_empty else tools
    return [converted]


def _message(column: str, turn: Any) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise BadRow(column, f"{shown(turn)} is not a message", 'write it as {"from": ..., "value": ...}')
    role, content = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if not isinstance(role, str) or role not in ROLES or not isinstance(content, str):
        wrong = f"a message from {shown(role)} with {type(content).__name__} as its text"
        raise BadRow(column, wrong, f"it has to be a text from one of {', '.join(map(repr, ROLES))}")
    if role != "function_call":
        return {"role": ROLES[role], "content": content}
    try:
        calls = json.loads(content)
    except (ValueError, RecursionError) as error:  # also of numbers too long, or nested too deeply
        raise BadRow(column, f"a function_call that is not JSON ({error})", "write it with json.dumps") from error
    calls = calls if isinstance(calls, list) else [calls]
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": call} for call in calls],
    }


# Transcripts


def _is_transcripts(row: Row) -> bool:
    return all(is_transcript(row.get(side)) for side in ("chosen", "rejected"))


def _from_transcripts(row: Row) -> list[Row]:
    sides = []
    for side in ("chosen", "rejected"):
        if not isinstance(row.get(side), str):
            raise BadRow(side, f"{shown(row.get(side))} is no text", "drop the row, or fill in the transcript")
        sides.append(transcript_messages(side, row[side]))
    same = len(list(takewhile(lambda turns: turns[0] == turns[1], zip(*sides, strict=False))))
    # The answer that is judged is the last turn, even where both sides have the same.
    shared = min(same, len(sides[0]) - 1, len(sides[1]) - 1)
    pair = {"chosen": sides[0][shared:], "rejected": sides[1][shared:]}
    return [{"prompt": sides[0][:shared], **pair, **_kept_strength(row)}]


FORMATS = {
    "ratings": Format(
        "`ratings` (a list of several people's) of a `completion` or `text`, with or without `prompt`",
        _is_rated,
        _from_ratings,
    ),
    "rankings": Format(
        "a list of answers with their `ranks` (1 is best), `scores`, or `order` (positions, best first)",
        _is_ranking,
        _from_ranking,
    ),
    "ultrafeedback": Format(
        "`instruction` and `completions`, each with `response` and `overall_score` or `annotations`",
        _is_ultrafeedback,
        _from_ultrafeedback,
    ),
    "attributes": Format(
        "HelpSteer2: an answer in `response`, and its ratings (numbers or lists) in `helpfulness`, `correctness`, "
        "`coherence`, `complexity` and `verbosity`",
        is_rated_in_columns,
        from_columns,
    ),
    "long": Format(
        "one rating a row: an answer in `item` or `response`, with or without `prompt`, and `rater`, `attribute` and "
        "`rating`",
        is_long,
        from_long,
    ),
    "safe-rlhf": Format(
        "PKU-SafeRLHF: `response_0`, `response_1`, `better_response_id` and `safer_response_id`",
        is_labelled,
        from_labels,
    ),
    "strengths": Format(
        "HelpSteer, MultiPref: two responses and how much better each annotator finds one, in numbers (negative for "
        "the first) or words",
        _is_graded,
        _from_graded,
        judged_in=lambda row: strengths_of(row)[0],
    ),
    "soft": Format(
        "two completions and the probability of one, such as `completion_a`, `completion_b`, `prob_b`",
        _is_soft,
        _from_soft,
    ),
    "alpaca": Format(
        "LLaMA-Factory: `instruction`, `input`, `chosen`, `rejected`, with or without `system` and `history`",
        _is_alpaca,
        _from_alpaca,
    ),
    "sharegpt": Format(
        "LLaMA-Factory: `conversations`, and `chosen` and `rejected` as one message each",
        _is_sharegpt,
        _from_sharegpt,
    ),
    "hh-rlhf": Format(
        "`chosen` and `rejected` as transcripts with `Human:` and `Assistant:`",
        _is_transcripts,
        _from_transcripts,
    ),
}


def fitting_formats(row: Row) -> list[str]:
    """
    Infer the format of a row.

    Args:
        row (`dict`):
            Row of the data.

    Returns:
        `list[str]`: Names of the formats that it may be of.
    """
    return [name for name, known in FORMATS.items() if known.recognise(row)]
