"""`disco_trl.data.records`: whichever way a row is written, its record is the same."""

import pytest
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
