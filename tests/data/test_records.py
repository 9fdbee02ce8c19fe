"""`disco_trl.data.records`: whichever way a row is written, its record is the same."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from preference_rows import EXPLICIT, IMPLICIT, LEGACY, STANDARD, TOKENIZED, assistant, streamed, user

from disco_trl.data.columns import Layout, find_layout
from disco_trl.data.preparation import finish_preferences, prepare_preferences
from disco_trl.data.records import Comparison, read_record
from disco_trl.data.tokenization import tokenize, tokenize_record
from disco_trl.data.values import BadRow


def record_of(row):
    return read_record(row, find_layout(row))


@pytest.mark.parametrize(
    ("row", "layout"),
    [
        (STANDARD, Layout(("chosen", "rejected"), "standard", True)),
        (EXPLICIT, Layout(("chosen", "rejected"), "conversational", True)),
        (IMPLICIT, Layout(("chosen", "rejected"), "conversational")),
        (TOKENIZED, Layout(("chosen_ids", "rejected_ids"), "tokenized")),
        (STANDARD | LEGACY, Layout(("chosen_input_ids", "rejected_input_ids"), "tokenized")),
        ({"prompt": "a", "completions": ["b"], "ranks": [1]}, Layout(("chosen", "rejected"), "standard", True)),
        ({"completions": [[user()]], "ranks": [1], "chosen": None}, Layout(("chosen", "rejected"), "conversational")),
        ({"chosen_ids": [1]}, Layout(("chosen_ids", "rejected_ids"), "tokenized")),
    ],
    ids=str,
)
def test_layouts(row, layout):
    assert find_layout(row) == layout


def test_a_pair_is_a_ranking_of_two():
    said = {"weight": 2.0, "margin": 0.5}
    pair = record_of(STANDARD | {"tie": False} | said)
    ranking = record_of({"prompt": STANDARD["prompt"], "completions": ["Four.", "Five."], "ranks": [1, 2]} | said)
    assert pair.contents == ranking.contents == ["Two and two? Four.", "Two and two? Five."]
    assert [*pair.comparisons] == [Comparison(0, 1, tie_allowed=True, margin=0.5, weight=2.0)]
    # Without equal ranks nobody can say whether a tie was on offer.
    assert [*ranking.comparisons] == [Comparison(0, 1, margin=0.5, weight=2.0)]


@pytest.mark.parametrize(
    ("given", "wins", "losses", "ties", "strengths"),
    [
        (2, 1, 0, 0, (2,)),
        (-3.0, 0, 1, 0, (-3,)),
        (0, 0, 0, 1, ()),
        ([3, -1, 0, 0, 1], 2, 1, 2, (3, -1, 1)),
        (np.array([1, -2]), 1, 1, 0, (1, -2)),
        ([np.int64(2), np.float32(-1)], 1, 1, 0, (2, -1)),
        (torch.tensor(-20), 0, 1, 0, (-20,)),
    ],
    ids=str,
)
def test_strengths_are_wins_losses_and_ties_by_their_sign(given, wins, losses, ties, strengths):
    record = record_of(STANDARD | {"preference_strength": given, "margin": 0.5})
    expected = Comparison(0, 1, wins, losses, ties, tie_allowed=True, margin=0.5, strengths=strengths)
    assert [*record.comparisons] == [expected]
    assert record.said >= {"preference_strength"} and record.has_tie == bool(ties)
    assert all(type(strength) is int for strength in record.comparisons[0].strengths)


@pytest.mark.parametrize("nothing", [None, math.nan, [], np.array([]), torch.tensor([]), np.float64("nan")], ids=repr)
def test_a_row_without_a_strength_is_what_the_rest_of_it_says(nothing):
    row = STANDARD | {"preference_strength": nothing}
    assert [*record_of(row).comparisons] == [Comparison(0, 1)]
    votes = {"chosen_votes": 3, "rejected_votes": 1}
    assert [*record_of(row | votes).comparisons] == [Comparison(0, 1, wins=3.0, losses=1.0)]


def test_strengths_in_arrow_are_read_row_by_row():
    rows = [STANDARD | {"preference_strength": given} for given in ([1, -2], None, [0], [])]
    dataset = Dataset.from_list(rows)
    for of in (dataset, dataset.to_iterable_dataset(), dataset.with_format("numpy"), dataset.with_format("torch")):
        read = [record_of(dict(row) | STANDARD).comparisons[0] for row in of]
        assert [one.strengths for one in read] == [(1, -2), (), (), ()]
        assert [(one.wins, one.losses, one.ties) for one in read] == [(1, 1, 0), (1, 0, 0), (0, 0, 1), (1, 0, 0)]


def test_a_tie_that_agrees_with_the_strengths_says_nothing_new():
    for given, tie in ((0, True), ([0, 2], True), (2, False), ([2, -1], False)):
        row = STANDARD | {"preference_strength": given}
        assert record_of(row | {"tie": tie}).comparisons == record_of(row).comparisons


def test_a_missing_prompt_is_no_prompt():
    ranking = {"completions": ["a", "b"], "ranks": [1, 2]}
    for prompt in (None, float("nan")):
        assert record_of({**ranking, "prompt": prompt}).contents == ["a", "b"]
        with pytest.raises(BadRow, match="column 'prompt'"):  # TRL reads it
            record_of({**STANDARD, "prompt": prompt})


@pytest.mark.parametrize("make", [Dataset.from_list, streamed])
def test_rankings_without_prompt_among_pairs_are_prepared(make, tiny_tokenizer):
    talks = [[user(), assistant(text)] for text in ("Four.", "Five.", "Cats.")]
    said = {"prompt": None, "chosen": None, "rejected": None, "completions": talks, "ranks": [3, 1, 2]}
    rows = [EXPLICIT | {"completions": None, "ranks": None}, said]
    prepared = list(finish_preferences(prepare_preferences(make(rows), tiny_tokenizer, "train"), "train", 99))
    expected = [tokenize(tiny_tokenizer, talk) for talk in talks]
    assert prepared[0]["completion_ids"] is None
    assert prepared[1]["completion_ids"] == expected
    assert (prepared[1]["chosen_ids"], prepared[1]["rejected_ids"]) == (expected[1], expected[0])
    assert [prepared[0]["chosen_ids"], prepared[0]["rejected_ids"]] == tokenize_record(
        record_of(EXPLICIT), tiny_tokenizer
    )
    with pytest.raises(ValueError, match="no pair is left of 2: 2 have a side of more than max_length=3 tokens"):
        list(finish_preferences(streamed(prepared), "train", max_length=3))
