"""`disco_trl.evaluation.held_out`: rows of every kind become sequences and comparisons."""

import json

import numpy as np
import pytest
import torch
from test_held_out_benchmarks import ROWS

from disco_trl.data.tokenization import tokenize, tokenize_answers
from disco_trl.distributions.reward_distribution import RewardDistribution
from disco_trl.evaluation.held_out import KINDS, HeldOut, detect_kind


USER = [{"role": "user", "content": "How is the film?"}]
GOOD, BAD = [{"role": "assistant", "content": "Good."}], [{"role": "assistant", "content": "Bad, all of it."}]
PREFERENCES = [
    {"prompt": "How? ", "chosen": "Good.", "rejected": "Bad."},
    {"chosen": "How? Good.", "rejected": "How? Bad."},
    {"prompt": USER, "chosen": GOOD, "rejected": BAD},
    {"chosen": USER + GOOD, "rejected": USER + BAD},
    {"chosen_ids": [5, 6, 7, 2], "rejected_ids": [5, 8, 2]},
    {"prompt": USER, "chosen": GOOD, "rejected": BAD, "tools": json.dumps([{"type": "function"}])},
]
TRANSCRIPT = {"chosen": "\n\nHuman: Hi\n\nAssistant: Good.", "rejected": "\n\nHuman: Hi\n\nAssistant: Bad."}
HELPSTEER = {"prompt": "Why?", "response_1": "So.", "response_2": "No.", "preference_strength": 2}


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        *((row, "preferences") for row in PREFERENCES),
        ({"prompt": "a", "completions": ["b", "c"], "ranks": [1, 2]}, "preferences"),
        *((row, name) for name, row in ROWS.items()),
        (TRANSCRIPT, "hh-rlhf"),
        (HELPSTEER, "strengths"),
        ({"instruction": "a", "chosen": "b", "rejected": "c"}, "alpaca"),
        ({"prompt": "a", "completion_a": "b", "completion_b": "c", "prob_b": 0.3}, "soft"),
    ],
)
def test_detect_kind(row, kind):
    assert detect_kind(row) == kind and kind in KINDS


def test_an_unknown_row_is_refused_with_what_there_is():
    with pytest.raises(ValueError, match="no format has the columns 'question', 'answer'"):
        detect_kind({"question": "a", "answer": "b"})


def test_strengths_that_are_never_negative_are_evaluated_only_if_named(tiny_tokenizer):
    sizes = [HELPSTEER, {**HELPSTEER, "response_1": "Thus.", "preference_strength": 1}]
    with pytest.raises(ValueError, match=r"none of 2 strengths of preference is below 0.*pass --kind strengths"):
        HeldOut.read(sizes, tiny_tokenizer)
    assert len(HeldOut.read(sizes, tiny_tokenizer, "strengths").items) == 2
    assert len(HeldOut.read([*sizes, {**HELPSTEER, "preference_strength": -1}], tiny_tokenizer).items) == 3


@pytest.mark.parametrize("row", PREFERENCES)
def test_preferences_are_tokenized_as_in_training(row, tiny_tokenizer):
    held_out = HeldOut.read([row], tiny_tokenizer)
    assert held_out.sequences == list(map(list, tokenize_answers(row, tiny_tokenizer)))
    assert (held_out.first[0], held_out.second[0], held_out.target[0], held_out.weight[0]) == (0, 1, 1, 1)


def test_equal_answers_are_scored_once(tiny_tokenizer):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "c", "rejected": "d"}]
    held_out = HeldOut.read(rows, tiny_tokenizer)
    assert held_out.sequences == [tokenize(tiny_tokenizer, text) for text in ("ab", "ac", "ad")]
    assert held_out.first.tolist() == [0, 1] and held_out.second.tolist() == [1, 2]
    assert held_out.item.tolist() == [0, 1]


def test_a_bootstrap_draws_items_and_shared_answers(tiny_tokenizer):
    ranked = {"prompt": "x", "completions": ["a", "b", "c"], "ranks": [1, 2, 3]}
    assert np.ptp(HeldOut.read([ranked], tiny_tokenizer).groups) == 0
    pairs = [("a", "b"), ("c", "d"), ("e", "a"), ("f", "g"), ("a", "h")]
    held_out = HeldOut.read([{"prompt": "x ", "chosen": y, "rejected": z} for y, z in pairs], tiny_tokenizer)
    shared = len(pairs) + held_out.first[0]
    assert held_out.groups.tolist() == [[shared, 0], [1, 1], [2, shared], [3, 3], [shared, 4]]


def test_converted_formats(tiny_tokenizer):
    held_out = HeldOut.read([HELPSTEER], tiny_tokenizer, "strengths")
    better = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "No."}]
    assert held_out.sequences[held_out.first[0]] == tokenize(tiny_tokenizer, better)


def test_benchmarks_keep_their_items(tiny_tokenizer):
    held_out = HeldOut.read([ROWS["rm-bench"]] * 2, tiny_tokenizer)
    assert held_out.benchmark.title == "RM-Bench"
    assert len(held_out.sequences) == 6 and len(held_out.item) == 18
    assert held_out.weight.sum() == pytest.approx(2)


def test_forecasts_follow_the_sequences(tiny_tokenizer):
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "c", "chosen_votes": 1, "rejected_votes": 3},
        {"prompt": "a", "chosen": "d", "rejected": "b", "chosen_votes": 2, "rejected_votes": 0},
    ]
    held_out = HeldOut.read(rows, tiny_tokenizer)
    rewards = RewardDistribution(torch.tensor([1.0, 0.0, 3.0]), torch.ones(3), "normal")
    found = held_out.forecasts(rewards)
    assert found.margin.tolist() == [1, 2]
    assert found.target.tolist() == [0.25, 1] and found.weight.tolist() == [4, 2]


def test_what_several_people_said_of_a_pair(tiny_tokenizer):
    """Its minority, which a single judgement does not tell, and the strengths, ties among them."""
    said = [
        {"preference_strength": [2, -1, 0, 2, 0]},  # two, one and two of five: the minority is one
        {"preference_strength": [1, 1]},
        {"preference_strength": -3},
        {"preference_probability": 0.8},
        {"preference_probability": 1.0},
        {"chosen_votes": 3, "rejected_votes": 1},
        {"tie": True},
        {},
    ]
    rows = [{"chosen": f"a {i}", "rejected": f"b {i}", **one} for i, one in enumerate(said)]
    # A dataset has the same columns in each row.
    columns = dict.fromkeys(name for one in said for name in one)
    held_out = HeldOut.read([{**columns, **row} for row in rows], tiny_tokenizer)
    expected = [0.2, 0, np.nan, 0.2, 0, 0.25, np.nan, np.nan]
    assert held_out.minority == pytest.approx(expected, nan_ok=True)
    assert held_out.target == pytest.approx([0.6, 1, 0, 0.8, 1, 0.75, 0.5, 1])
    assert held_out.grades.tolist() == [[0, -1, 1], [0, 0, 2], [0, 2, 2], [1, 1, 2], [2, -3, 1], [6, 0, 1]]


def test_ties_are_expected_where_they_were_on_offer(tiny_tokenizer):
    pair = {"chosen": "the answer", "rejected": "a piano day"}
    forced, graded, tied = pair, pair | {"preference_strength": 1}, pair | {"preference_strength": [0, 1]}
    data = HeldOut.read([forced, graded, tied], tiny_tokenizer)
    assert data.tie_allowed.tolist() == [False, True, True]
    # Nobody has called a tie, so that one was hardly on offer.
    assert not HeldOut.read([forced, graded], tiny_tokenizer).tie_allowed.any()
    rewards = RewardDistribution(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0]), "normal")
    plain, with_ties = data.forecasts(rewards).prob, data.forecasts(rewards, tie_width=1.0).prob
    assert with_ties[0] == pytest.approx(plain[0])
    assert 0.5 < with_ties[1] == with_ties[2] < plain[1] - 0.01


def test_ties_alone_are_no_grades(tiny_tokenizer):
    rows = [{"chosen": "a", "rejected": "b", "tie": True}, {"chosen": "c", "rejected": "d", "tie": False}]
    assert HeldOut.read(rows, tiny_tokenizer).grades.shape == (0, 3)


def test_ratings_by_sequence(tiny_tokenizer):
    row = {"chosen": "a", "rejected": "b", "chosen_rating": [1, 2], "rejected_rating": None}
    found = HeldOut.read([row | {"chosen_votes": 0, "rejected_votes": 0}], tiny_tokenizer).ratings()
    assert {position: values.tolist() for position, values in found.items()} == {0: [1, 2]}


def test_long_items_are_left_out(tiny_tokenizer):
    rows = [{"chosen": "a b c d e f g h", "rejected": "a"}, {"chosen": "b", "rejected": "a"}]
    assert len(HeldOut.read(rows, tiny_tokenizer, max_length=4).items) == 1
    with pytest.raises(ValueError, match="nothing to evaluate"):
        HeldOut.read(rows, tiny_tokenizer, max_length=1)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"chosen": "a", "rejected": "b"}, {"chosen": "a", "rejected": None}], "row 1, column 'rejected'"),
        ([{"chosen": "a", "rejected": "b", "chosen_votes": -1, "rejected_votes": 2}], "row 0, column 'chosen_votes'"),
        ([ROWS["llm-bar"], ROWS["llm-bar"] | {"label": None}], "row 1, column 'label'"),
        ([HELPSTEER, HELPSTEER | {"preference_strength": "x"}], "row 1, column 'preference_strength'"),
    ],
)
def test_a_bad_row_is_named(rows, message, tiny_tokenizer):
    with pytest.raises(ValueError, match=message):
        HeldOut.read(rows, tiny_tokenizer)


def test_conversations_without_a_chat_template(tiny_tokenizer):
    tiny_tokenizer.chat_template = None
    with pytest.raises(ValueError, match="row 0: these are conversations"):
        HeldOut.read([ROWS["reward-bench"]], tiny_tokenizer)
