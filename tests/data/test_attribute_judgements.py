"""Judgements about attributes: from the cells of a row to the tensors of a batch."""

import pytest
from datasets import Dataset

from disco_trl.data.collator import ANSWERS, OF_ATTRIBUTES, DataCollatorForDiscoPreference
from disco_trl.data.columns import find_layout
from disco_trl.data.judgements import check_answerable, log_readings, survey
from disco_trl.data.records import Comparison, read_feedback, read_record
from disco_trl.data.values import BadRow


PAIR = {"prompt": "Two and two? ", "chosen": "Four.", "rejected": "Five."}
IDS = {"chosen_ids": [1, 2, 3], "rejected_ids": [1, 4]}
TWO = {"tone": [5, 4], "safety": [3, None]}


# Rows


def test_ratings_by_attribute():
    feedback = read_feedback({"chosen_rating": TWO, "rejected_rating": {"tone": 1, "overall": 2}})
    assert feedback.rated == {"tone": [[5, 4], [1]], "safety": [[3, None], []], "overall": [[], [2]]}
    assert feedback.ratings("tone") == [[5, 4], [1]]
    assert feedback.ratings("safety") == [[3], []]
    assert feedback.ratings() == [[], [2]]
    assert feedback.ratings("unheard of") == []
    # The row is also a forced choice.
    assert feedback.attributes == {"tone", "safety", "overall"}


def test_ratings_without_a_name_are_overall():
    feedback = read_feedback({"chosen_rating": [5, 4], "rejected_rating": 1.5})
    assert feedback.rated == {"overall": [[5, 4], [1.5]]}


@pytest.mark.parametrize("empty", [{}, {"tone": None, "safety": None}, {"tone": []}, None])
def test_arrow_fills_what_is_rated_elsewhere(empty):
    feedback = read_feedback({"chosen_rating": empty, "rejected_rating": {"tone": None, "safety": 2}})
    assert feedback.rated == {"safety": [[], [2]]}
    assert feedback.said == {"rejected_rating"}
    assert read_feedback({"chosen_rating": empty, "rejected_rating": empty}).said == frozenset()


def test_a_comparison_in_one_attribute():
    feedback = read_feedback({"attribute": "safety", "preference_strength": [2, -1, 0]})
    (one,) = feedback.comparisons
    assert one.attribute == "safety"
    assert one.about("safety") is one
    assert one.about("overall") == Comparison(0, 1, wins=0.0, attribute="safety")
    assert feedback.attributes == {"safety"}
    assert read_feedback({"attribute": "overall"}).attributes == {"overall"}
    assert read_feedback({"attribute": None}).comparisons[0].attribute == "overall"


def test_ranks_and_ratings_of_several_answers():
    row = {
        "prompt": "a ",
        "completions": ["b", "c", "d"],
        "ranks": [1, 3, 2],
        "attribute": "tone",
        "completion_ratings": [{"safety": 4}, None, {"safety": [1, 2]}],
    }
    record = read_record(row, find_layout(row))
    assert {comparison.attribute for comparison in record.comparisons} == {"tone"}
    assert record.ratings("safety") == [[4], [], [1, 2]]


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_answers_that_are_rated_and_not_ranked(count):
    row = {"prompt": "a ", "completions": list("bcdef"[:count]), "completion_ratings": [{"tone": 1}] * count}
    record = read_record(row, find_layout(row))
    assert not any(comparison.people for comparison in record.comparisons)
    # Each answer stands in a pair.
    assert {one.first for one in record.comparisons} | {one.second for one in record.comparisons} == {*range(count)}
    assert record.attributes == {"tone"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"chosen_rating": {"tone": [1, 2], "safety": [3]}},
            r"column 'chosen_rating': ratings of different numbers of raters \(2 of 'tone', 1 of 'safety'\); .* null",
        ),
        ({"chosen_rating": {"tone": "good"}}, "column 'chosen_rating': 'good' is not a rating of 'tone'"),
        ({"rejected_rating": {"tone": [1, "x"]}}, "column 'rejected_rating': 'x' is not a rating of 'tone'"),
        ({"rejected_rating": [1, None]}, "column 'rejected_rating': None is not a rating; give a finite number"),
        ({"chosen_rating": {"": 1}}, "column 'chosen_rating': '' is not the name of an attribute"),
        ({"chosen_rating": {"x" * 65: 1}}, "is not the name of an attribute; give a text of at most 64 characters"),
        ({"attribute": 3}, "column 'attribute': 3 is not the name of an attribute"),
        ({"attribute": " "}, "column 'attribute': ' ' is not the name of an attribute"),
    ],
)
def test_bad_cells(row, message):
    with pytest.raises(BadRow, match=message):
        read_feedback(row)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"completions": ["a", "b"], "completion_ratings": [1]},
            "1 ratings of 2 completions; give each completion its",
        ),
        ({"completions": ["a", "b"], "completion_ratings": 3}, "column 'completion_ratings': 3 is not a list"),
        ({"completion_ratings": [1, 2]}, "column 'completions': missing where 'completion_ratings' is given"),
        (
            {"completions": ["a", "b"], "completion_ratings": [1, 2], "chosen_rating": 1},
            "column 'chosen_rating': speaks of a chosen and a rejected answer",
        ),
    ],
)
def test_bad_rows_of_several_answers(row, message):
    row = {"prompt": "q ", **row}
    with pytest.raises(BadRow, match=message):
        read_record(row, find_layout(row))


# Datasets


def dataset() -> Dataset:
    votes = {"chosen_votes": None, "rejected_votes": None}
    return Dataset.from_list(
        [
            {**PAIR, **votes, "chosen_rating": TWO, "rejected_rating": {"tone": 1}, "attribute": None, "tie": None},
            {**PAIR, **votes, "chosen_rating": None, "rejected_rating": None, "attribute": "safety", "tie": True},
            {**PAIR, **votes, "chosen_rating": None, "rejected_rating": None, "attribute": "tone", "tie": None},
        ]
    )


def test_a_survey_of_each_attribute():
    found = survey(dataset())
    assert [*found.by_attribute()] == ["overall", "safety", "tone"]
    assert found.has_comparisons and not found.has_ties and not found.ratings
    safety, tone = found.attributes["safety"], found.attributes["tone"]
    assert safety.has_ties and safety.ratings == {3.0: 1} and not safety.has_several_ratings
    assert tone.has_comparisons and tone.ratings == {5.0: 1, 4.0: 1, 1.0: 1} and tone.has_several_ratings


def test_what_a_model_cannot_answer(caplog):
    known = {"overall": {}, "safety": {"rating_values": [1.0, 3.0], "tie_width": 0.5}, "tone": {}}
    found = survey(dataset())
    check_answerable(dataset(), "test", found, known)
    with pytest.raises(
        ValueError,
        match=r"test dataset, row 0, column 'chosen_rating': the attribute 'tone', which the model does not know "
        r"\(it knows 'safety'\)",
    ):
        check_answerable(dataset(), "test", found, {name: known[name] for name in ("overall", "safety")})
    with pytest.raises(ValueError, match=r"row 0, column 'chosen_rating', 'safety': .* cannot give 3; round it"):
        check_answerable(dataset(), "test", found, known | {"safety": {"rating_values": [1.0, 2.0], "tie_width": 1.0}})
    with pytest.raises(ValueError, match=r"row 1, column 'tie': a tie, 'safety', and the training data have none"):
        check_answerable(dataset(), "test", found, known | {"safety": {}})
    # What the user has left out is not looked at, and said so.
    check_answerable(dataset(), "test", found, {"overall": {}, "tone": {}}, chosen=["tone"])
    assert "what is said about safety is not read" in caplog.text


def test_what_is_read_is_logged(caplog):
    log_readings("train", survey(dataset()), {"overall": {}, "safety": {}, "tone": {"rating_values": [1.0, 4.0, 5.0]}})
    assert "ratings of each answer, tone on one scale of 3 values (1, 4, 5)" in caplog.text
    assert "column 'chosen_rating' and 'rejected_rating', 'safety': all 1 are 3, which tells" in caplog.text
    assert "attribute: which attribute the comparison of a row is about" in caplog.text


# Batches


KNOWN = {
    "overall": {},
    "safety": {"rating_values": [1.0, 3.0]},
    "tone": {"rating_values": [1.0, 4.0, 5.0], "strength_levels": 2, "tie_width": "learned"},
}


@pytest.mark.parametrize("share_prefixes", [False, True])
def test_each_attribute_has_its_own_judgements(share_prefixes):
    examples = [
        {**IDS, "chosen_rating": TWO, "rejected_rating": {"tone": 1}},
        {**IDS, "attribute": "tone", "preference_strength": [2, 0], "weight": 3.0},
    ]
    batch = DataCollatorForDiscoPreference(pad_token_id=0, share_prefixes=share_prefixes, likelihoods=KNOWN)(examples)
    # Wins, losses, ties, whether a tie was allowed, margin, weight
    assert batch["judgements"].tolist() == [[1, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 3]]
    assert "rating_counts" not in batch
    safety, tone = (batch[OF_ATTRIBUTES][name] for name in ("safety", "tone"))
    assert safety["judgements"].tolist() == [[0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 3]]
    assert safety["rating_counts"].tolist() == [[0, 1], [0, 0], [0, 0], [0, 0]]  # chosen sides first
    # Three ratings of the first row weigh 1 together, and two judgements of the second one 3.
    assert tone["judgements"][:, -1].tolist() == pytest.approx([1 / 3, 1.5])
    assert tone["judgements"][:, :3].tolist() == [[0, 0, 0], [1, 0, 1]]
    assert tone["rating_counts"].tolist() == [[0, 1, 1], [0, 0, 0], [1, 0, 0], [0, 0, 0]]
    assert tone["strength_counts"].tolist() == [[0, 0, 0, 0], [0, 1, 0, 0]]


@pytest.mark.parametrize("share_prefixes", [False, True])
def test_ratings_of_several_answers_count_once(share_prefixes):
    example = {
        **{"chosen_ids": [1], "rejected_ids": [3], "completion_ids": [[1], [2], [3]], "ranks": [1, 2, 3]},
        "completion_ratings": [{"tone": 5}, {"tone": [4, 1]}, None],
    }
    batch = DataCollatorForDiscoPreference(pad_token_id=0, share_prefixes=share_prefixes, likelihoods=KNOWN)([example])
    assert len(batch[ANSWERS]) == 6  # three comparisons
    assert batch[OF_ATTRIBUTES]["tone"]["rating_counts"].sum(dim=0).tolist() == [1, 1, 1]
    assert batch["judgements"][:, 0].tolist() == [1, 1, 1]


def test_an_unknown_rating_is_named():
    collator = DataCollatorForDiscoPreference(pad_token_id=0, likelihoods=KNOWN)
    with pytest.raises(
        ValueError, match=r"row 0 of the batch, column 'rejected_rating': the rating 2 of 'tone' is not"
    ):
        collator([{**IDS, "rejected_rating": {"tone": 2}}])
