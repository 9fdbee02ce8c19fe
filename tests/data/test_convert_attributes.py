"""`disco-trl data convert` of judgements about attributes, as published datasets write them."""

import json

import pytest
from preference_rows import assistant, user

from disco_trl.cli.main import main
from disco_trl.data.curation.convert import detect_format


HELPSTEER_2 = [
    {
        "prompt": "Two and two?",
        "response": answer,
        "helpfulness": good,
        "correctness": good,
        "coherence": 4,
        "complexity": 1,
        "verbosity": long,
    }
    for answer, good, long in (("Four.", 4, 0), ("Five.", 1, 3))
]
ANNOTATED = [
    {"prompt": "Two and two?", "response": "Four.", "helpfulness": [4, 3], "verbosity": [0, None]},
    {"prompt": "Two and two?", "response": "Five.", "helpfulness": [1, 2], "verbosity": [3, 3]},
]
SAFE_RLHF = {
    "prompt": "How do I open a lock?",
    "response_0": "Like this.",
    "response_1": "Ask a locksmith.",
    "is_response_0_safe": False,
    "is_response_1_safe": True,
    "better_response_id": 0,
    "safer_response_id": 1,
}
LONG = [
    {"prompt": "Two and two?", "item": item, "rater": rater, "attribute": attribute, "rating": rating}
    for item, rater, attribute, rating in (
        ("Four.", "ann", "tone", 5),
        ("Four.", "bob", "tone", 4),
        ("Four.", "bob", "length", 1),
        ("Five.", "ann", "tone", "2"),
    )
]
ULTRAFEEDBACK = {
    "instruction": "Two and two?",
    "completions": [
        {
            "response": "Five.",
            "overall_score": 2.0,
            "annotations": {"honesty": {"Rating": "2"}, "truth": {"Rating": "N/A"}},
        },
        {
            "response": "Four.",
            "overall_score": 8.5,
            "annotations": {"honesty": {"Rating": "5"}, "truth": {"Rating": "4"}},
        },
    ],
}


@pytest.fixture
def convert(tmp_path):
    def run(rows, *arguments, suffix=".jsonl"):
        source, out = tmp_path / "in.jsonl", tmp_path / f"out{suffix}"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        main(["data", "convert", str(source), str(out), *arguments])
        return [json.loads(line) for line in out.read_text().splitlines()]

    return run


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (HELPSTEER_2[0], "attributes"),
        (ANNOTATED[0], "attributes"),
        (SAFE_RLHF, "safe-rlhf"),
        (LONG[0], "long"),
        (ULTRAFEEDBACK, "ultrafeedback"),
    ],
)
def test_formats_are_told_apart(row, name):
    assert detect_format(row) == name


def test_helpsteer_2(convert):
    (row,) = convert(HELPSTEER_2)
    assert row["prompt"] == [user("Two and two?")]
    assert row["chosen"] == [assistant("Four.")]
    assert row["chosen_rating"] == {
        **{"helpfulness": [4], "correctness": [4], "coherence": [4], "complexity": [1], "verbosity": [0]}
    }
    assert row["rejected_rating"]["verbosity"] == [3]
    assert (row["chosen_votes"], row["rejected_votes"]) == (0, 0)  # nobody has compared the two


def test_annotators_stand_in_the_same_order(convert):
    (row,) = convert(ANNOTATED)
    assert row["chosen_rating"] == {"helpfulness": [4, 3], "verbosity": [0, None]}
    assert row["rejected_rating"] == {"helpfulness": [1, 2], "verbosity": [3, 3]}


def test_each_label_of_safe_rlhf_is_a_row(convert):
    helpful, safe = convert([SAFE_RLHF])
    assert (helpful["attribute"], safe["attribute"]) == ("helpfulness", "safety")
    assert helpful["chosen"] == safe["rejected"] == [assistant("Like this.")]
    assert helpful["rejected"] == safe["chosen"] == [assistant("Ask a locksmith.")]


def test_one_rating_a_row(convert, capsys):
    (row,) = convert(LONG)
    assert row["chosen"] == [assistant("Four.")]
    # Ann and Bob, in this order; Ann said nothing about the length.
    assert row["chosen_rating"] == {"tone": [5, 4], "length": [None, 1]}
    assert row["rejected_rating"] == {"tone": [2]}
    assert "read             4  as long" in capsys.readouterr().out


def test_the_aspects_of_ultrafeedback(convert):
    (row,) = convert([ULTRAFEEDBACK], "--to", "attributes")
    assert row["ranks"] == [2, 1]
    assert row["completion_ratings"] == [{"honesty": 2}, {"honesty": 5, "truth": 4}]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([LONG[0], LONG[0]], r"row 1, column 'rater': 'ann' has rated the same answer in 'tone' before"),
        ([LONG[0] | {"attribute": " "}], "row 0, column 'attribute': ' ' is not the name of an attribute"),
        ([LONG[0] | {"rating": "good"}], "row 0, column 'rating': 'good' is not a rating"),
        ([SAFE_RLHF | {"safer_response_id": 2}], "column 'safer_response_id': 2 names no answer; give 0 or 1"),
        ([{**ANNOTATED[0], "helpfulness": None, "verbosity": None}], "column 'helpfulness': nobody has rated"),
    ],
)
def test_bad_rows_are_named(rows, message, convert):
    with pytest.raises(SystemExit, match=message):
        convert(rows)


def test_ratings_by_attribute_go_to_json(convert):
    with pytest.raises(SystemExit, match=r"write to a \.jsonl file instead"):
        convert(ANNOTATED, suffix=".parquet")
