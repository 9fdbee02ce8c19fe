"""`disco-trl data check`: what it counts, what it warns of, what it calls an error, and its exit status."""

import json
import math
import pickle
from pathlib import Path

import pytest
from datasets import Dataset
from preference_rows import CALL, EXPLICIT, IMPLICIT, LEGAL, STANDARD, TOKENIZED, assistant, streamed, user

from disco_trl.cli.main import main
from disco_trl.cli.scale_advice import scale_advice
from disco_trl.data.curation.check import check_dataset
from disco_trl.data.curation.check_report import render
from disco_trl.data.curation.survey import normalize
from disco_trl.data.curation.survey import texts_of as texts_of_record
from disco_trl.data.records import read_answers


def pair(chosen="Four.", rejected="Five.", **judgements):
    return {"prompt": "Two and two? ", "chosen": chosen, "rejected": rejected, **judgements}


def check(rows, tokenizer=None):
    return check_dataset(streamed(rows), tokenizer)[0]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("kind", LEGAL)
def test_what_trains_has_no_errors(kind):
    found = check(LEGAL[kind])
    assert found["errors"] == []
    assert found["terms"]["forced choices"] == len(LEGAL[kind])
    assert json.loads(json.dumps(found)) == found


# Columns


def test_columns_are_read_or_not_and_look_alikes_are_named():
    found = check([pair(subset="maths", chosen_score=2.0, id=1)])
    assert found["columns"]["read"] == ["prompt", "chosen", "rejected"]
    assert found["columns"]["not_read"] == ["subset", "chosen_score", "id"]
    assert found["columns"]["look_alikes"] == {"chosen_score": "chosen_rating"}
    assert found["warnings"] == ["column 'chosen_score' is not read; if it is 'chosen_rating', rename it"]


def test_columns_that_are_no_preferences_are_refused_with_a_fix():
    with pytest.raises(ValueError, match=r'rename_columns\(\{"y_w": "chosen", "y_l": "rejected"\}\)'):
        check([{"y_w": "a", "y_l": "b"}])
    with pytest.raises(ValueError, match="of the format 'ratings', are converted by `disco-trl data convert DATA"):
        check([{"text": "a", "ratings": [1]}])
    with pytest.raises(ValueError, match=r"name the columns 'chosen'.*`disco-trl data convert --help`"):
        check([{"text": "a", "stars": [1]}])
    with pytest.raises(ValueError, match="empty"):
        check([])


def test_a_column_whose_first_rows_are_empty_is_told_by_a_later_one():
    found = check([pair(chosen_score=None), pair(chosen_score=2.0)])
    assert found["columns"]["look_alikes"] == {"chosen_score": "chosen_rating"}


def test_columns_in_the_likelihood_are_shown_with_what_they_are_read_as(tmp_path, capsys):
    rows = [pair(chosen_rating=5.0 + n % 2, rejected_rating=1.5, weight=1.0, margin=0.5) for n in range(3)]
    assert check(rows)["columns"]["likelihood"] == {
        "chosen_rating, rejected_rating": "ratings of each answer, all on one scale of 3 values (1.5, 5, 6)",
        "weight": "weights of the rows",
    }
    main(["data", "check", write(tmp_path / "rated.jsonl", rows)])
    shown = capsys.readouterr().out
    assert "in the likelihood: chosen_rating, rejected_rating: ratings of each answer, all on one scale" in shown
    assert "rating thresholds: 2, between 3 ratings" in shown


def test_numbers_that_are_no_scale_teach_no_thresholds(tmp_path, capsys):
    rows = [pair(f"{n}", chosen_rating=[n / 7, n / 9], rejected_rating=n / 8) for n in range(1, 40)]
    assert check(rows)["columns"]["likelihood"] == {}
    main(["data", "check", write(tmp_path / "scored.jsonl", rows)])
    shown = capsys.readouterr().out
    assert "different numbers among 117, as a reward model's scores are" in shown
    assert "thresholds" not in shown and "apart from disagreement: no" in shown


# Errors


def test_errors_are_all_counted_by_kind():
    rows = [
        pair(),
        *[pair(chosen_votes=-1, rejected_votes=2)] * 7,
        pair(chosen=""),
        pair(rejected=None),
        pair(preference_probability=2.0),
        pair(tie=True, chosen_votes=1, rejected_votes=0),
    ]
    found = check(rows)
    errors = {(error["column"], error["rows"]): error for error in found["errors"]}
    assert set(errors) == {
        ("chosen_votes", 7),
        ("chosen", 1),
        ("rejected", 1),
        ("preference_probability", 1),
        ("tie", 1),
    }
    assert errors["chosen_votes", 7]["first"] == [1, 2, 3, 4, 5]
    assert errors["rejected", 1] | {"fix": None} == {
        **{"column": "rejected", "wrong": "None", "fix": None, "rows": 1, "first": [9]}
    }
    assert found["rows"] == 12 and found["terms"] == {"forced choices": 1}  # figures are of the good rows


def test_the_examples_of_the_documentation_are_good():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    rows = [json.loads(line) for line in page.split("```json\n")[1].split("```")[0].splitlines()]
    found = check(rows)
    assert len(rows) == 6 and found["errors"] == []


def test_errors_in_rankings():
    rows = [
        {"prompt": "? ", "completions": ["a", "b"], "ranks": [1, 2]},
        {"prompt": "? ", "completions": ["a", " "], "ranks": [1, 2]},
        {"prompt": "? ", "completions": ["a", "b"], "ranks": [1]},
        {"prompt": "? ", "completions": ["a", "b"], "ranks": [1, 2], "chosen": "a"},
    ]
    found = check(rows)
    assert [(error["column"], error["first"]) for error in found["errors"]] == [
        ("completions", [1]),
        ("ranks", [2]),
        ("chosen", [3]),
    ]
    assert found["errors"][0]["wrong"] == "answer 1: an empty string"


def test_a_conversation_among_texts_is_an_error():
    assert check([STANDARD, EXPLICIT])["errors"][0]["first"] == [1]


# What was judged, and what can be learned from it


def test_terms_of_a_mixture():
    rows = [
        pair("a", "b"),
        pair("a", "c", chosen_votes=3, rejected_votes=1),
        pair("a", "d", chosen_votes=1, rejected_votes=0, tie=False),
        pair("a", "e", tie=True, weight=2.0),
        pair("a", "f", preference_probability=0.7),
        pair("a", "g", chosen_votes=0, rejected_votes=0, chosen_rating=[1, 2, 4], rejected_rating=2),
        pair("a", "h", chosen_rating=math.nan, weight=None),
        {"prompt": "? ", "completions": ["a", "b", "c"], "ranks": [1, 2, 2]},
    ]
    found = check(rows)
    assert found["errors"] == [] and found["warnings"] == []
    assert found["terms"] == {
        **{"forced choices": 2, "votes": 2, "pairs with several votes": 1, "ties": 1, "ties refused": 1},
        **{"soft labels": 1, "not compared": 1, "ratings": 1, "rankings": 1, "ranked ties": 1, "weights": 1},
    }
    assert found["votes"]["mean"] == 2.5 and (found["votes"]["several"], found["votes"]["unanimous"]) == (1, 0)
    assert found["ratings"]["values"] == {"1": 1, "2": 2, "4": 1}
    assert (found["ratings"]["answers"], found["ratings"]["answers_with_several"]) == (2, 1)
    assert found["rankings"]["with_ties"] == 1


def test_share_of_variance_between_answers():
    # Within an answer 2 (of 0 and 2) and 2 (of 10 and 12). The means 1 and 11 have variance 50, of which 2/2 = 1 is
    # their error: 49 / (49 + 2).
    rows = [pair("a", "b", chosen_votes=0, rejected_votes=0, chosen_rating=[10, 12], rejected_rating=[0, 2])]
    ratings = check(rows)["ratings"]
    assert ratings["share_of_variance_between_answers"] == pytest.approx(49 / 51)
    assert ratings["standard_deviation_of_an_answer"]["50 %"] == pytest.approx(2**0.5, abs=1e-4)


def test_agreement_and_the_bound_on_accuracy():
    # Two judgements of the first pair agree in (3·2 + 1·0) / (4·3) = 1/2, of the second always: 3/4 on average. The
    # bound is (1 + √(2·3/4 − 1)) / 2.
    rows = [pair("a", "b", chosen_votes=3, rejected_votes=1), pair("c", "d", chosen_votes=2, rejected_votes=0)]
    repeated = check(rows)["repeated_pairs"]
    assert repeated["judged_several_times"] == 2 and repeated["agreement"] == 0.75
    assert repeated["best_accuracy_on_single_judgements"] == pytest.approx((1 + 0.5**0.5) / 2)


def test_repetitions_and_contradictions():
    rows = [pair("a", "b"), pair("b", "a"), pair("a", "b"), pair("c", "d"), pair("c", "d"), pair("a", "b", prompt="?")]
    found = check(rows)
    repeated = found["repeated_pairs"]
    assert (repeated["pairs"], repeated["rows"], repeated["first"]) == (2, 3, [1, 2, 4])
    assert (repeated["judged_both_ways"], repeated["judged_both_ways_first"]) == (1, [0, 1, 2])
    # Of a and b: 2 to 1, agreement 2/6; of c and d: 1
    assert repeated["agreement"] == pytest.approx((1 / 3 + 1) / 2)
    assert any(
        "1 pairs are judged both ways in different rows (rows 0, 1, 2)" in warning for warning in found["warnings"]
    )


def test_votes_for_the_rejected_side_contradict_the_chosen_one():
    rows = [pair("a", "b", chosen_votes=1, rejected_votes=4), pair("a", "b", chosen_votes=3, rejected_votes=2)]
    assert check(rows)["repeated_pairs"]["judged_both_ways"] == 1
    rows[0] |= {"chosen": "b", "rejected": "a"}
    assert check(rows)["repeated_pairs"]["judged_both_ways"] == 0


def test_soft_labels_and_identical_sides_do_not_tell_how_often_people_agree():
    rows = [pair("a", "b", preference_probability=1.0)] * 2 + [pair("c", "c")] * 2
    repeated = check(rows)["repeated_pairs"]
    assert repeated["rows"] == 1 and "agreement" not in repeated


def test_identical_sides():
    found = check([pair(), pair("same", "same")])
    assert found["identical_sides"] == {"rows": 1, "first": [1]}
    assert any("1 row with the same answer on both sides" in warning for warning in found["warnings"])


@pytest.mark.parametrize(
    ("rows", "warning"),
    [
        ([pair(chosen_rating=3, rejected_rating=1)], "1 row with ratings and no votes, which also count as"),
        ([pair(tie=True)], "no row says that a tie was possible"),
        ([pair(chosen_votes=1, rejected_votes=0, tie=False)], "the width of the tie band goes to 0"),
        ([pair(preference_probability=0.1)], "1 soft labels are below ½"),
        (
            [pair(chosen_votes=0, rejected_votes=0, chosen_rating=list(range(102)))],
            "column 'chosen_rating' and 'rejected_rating': 102 different numbers among 102",
        ),
        ([pair(chosen_votes=0, rejected_votes=0, chosen_rating=[3, 3])], "all 2 are 3, which tells no answer"),
        ([pair("long " * 9 + str(n), f"{n}") for n in range(40)], "the longer answer is preferred in 100.0%"),
        ([pair(f"{n}", "long " * 9 + str(n)) for n in range(40)], "the shorter answer is preferred in 100.0%"),
    ],
)
def test_warnings(rows, warning):
    found = check(rows)
    assert found["errors"] == []
    assert [text for text in found["warnings"] if warning in text], found["warnings"]


def test_longer_is_chosen_counts_preferences_and_not_columns():
    rows = [
        pair("longer one", "short"),
        pair("short", "longer one!", chosen_votes=1, rejected_votes=5),  # the longer one is preferred
        pair("x", "yyy", preference_probability=0.9),  # the shorter one
        pair("equal", "lengt"),  # says nothing of lengths
        pair("a", "bbb", chosen_votes=0, rejected_votes=0),  # nor does this
    ]
    longer = check(rows)["longer_is_chosen"]
    assert (longer["pairs"], longer["share"]) == (3, pytest.approx(2 / 3))
    assert longer["standard_error"] == pytest.approx((2 / 9 / 3) ** 0.5)


# Texts


def texts_of(row):
    return texts_of_record(read_answers(row))


def test_texts_of_every_type_of_row():
    assert texts_of(STANDARD) == ("Two and two? ", ["Four.", "Five."])
    assert texts_of(EXPLICIT) == texts_of(IMPLICIT) == ("What is two and two?", ["Four.", "Five."])
    assert texts_of({"chosen": "a b", "rejected": "a c"}) == ("", ["a b", "a c"])
    assert texts_of(TOKENIZED) == ("", ["1 2 3", "1 2"])
    assert texts_of({"prompt": "?", "completions": ["a", [assistant("b")]]}) == ("?", ["a", "b"])
    same = {"chosen": [user(), assistant()], "rejected": [user(), assistant()]}
    assert texts_of(same) == ("What is two and two?", ["Four.", "Four."])
    assert "add" in texts_of({"prompt": [user()], "chosen": [CALL], "rejected": [assistant()]})[1][0]


@pytest.mark.parametrize(
    ("one", "other"), [("Hello,  World!", "hello world"), ("ﬁne", "FINE"), ("Straße", "STRASSE"), ("a-b_c", "a b c")]
)
def test_normalize(one, other):
    assert normalize(one) == normalize(other)


def test_normalize_keeps_letters_of_every_script():
    assert normalize("Привет, 世界!") == "привет 世界"


def test_tokens_are_those_of_training(tiny_tokenizer):
    tokens = check([STANDARD], tiny_tokenizer)["tokens"]
    longest = max(
        len(tiny_tokenizer(STANDARD["prompt"] + STANDARD[side])["input_ids"]) for side in ("chosen", "rejected")
    )
    assert tokens["of a prompt with an answer"]["max"] == longest + 1  # with the end of text
    assert tokens["rows_above_max_length"] == 0
    found = check([pair("long " * 1200)], tiny_tokenizer)
    assert found["tokens"]["rows_above_max_length"] == 1
    assert any("1 row with a side above 1024 tokens" in warning for warning in found["warnings"])


# The command

LONG_ANSWER = "This is an answer of more than twenty characters."


def test_leaks_between_splits_are_found_in_spite_of_case_and_punctuation(tmp_path, capsys):
    train = [pair("a", "b"), pair(LONG_ANSWER, "b", prompt="Other?"), pair("e", "f", prompt="Third?")]
    test = [
        pair("c", "d", prompt="TWO and two"),
        pair("x", LONG_ANSWER.upper(), prompt="New?"),
        pair("b", "x", prompt="Unseen?"),  # a short answer is no leak
        pair("F", "e!", prompt="third"),
    ]
    data, report = write(tmp_path / "test.jsonl", test), tmp_path / "report.json"
    other = write(tmp_path / "train.jsonl", train)
    main(["data", "check", data, "--against", other, "--json", str(report)])
    found = json.loads(report.read_text())
    assert found["in_common"] == {
        "with": other,
        "prompt": {"rows": 2, "first": [0, 3]},
        "answer": {"rows": 1, "first": [1]},
        "row": {"rows": 1, "first": [3]},
    }
    # As splits of a folder
    main(["data", "check", str(tmp_path), "--dataset_split", "test", "--against", "train"])
    assert "the same prompt: 2 rows" in capsys.readouterr().out


def test_exit_status_and_what_is_shown(tmp_path, capsys):
    warned = write(tmp_path / "warned.jsonl", [pair("a", "a"), pair()])
    assert main(["data", "check", warned]) == 0  # warnings alone
    shown = capsys.readouterr().out
    assert "2 rows  forced choices" in shown and "\nWarnings\n" in shown and shown.endswith("No errors.\n")
    assert main(["data", "check", write(tmp_path / "bad.jsonl", [pair(), pair(tie="maybe")])]) == 1
    shown = capsys.readouterr().out
    assert "Errors: 1 row\n  - 1 row, column 'tie': 'maybe' is not true or false; give true" in shown


def test_figures_of_every_kind_are_shown(tmp_path, capsys):
    rows = [
        pair("a", "c", chosen_votes=3, rejected_votes=1),
        pair("a", "e", tie=True, weight=2.0),
        pair("a", "f", preference_probability=0.7),
        pair("a", "g", chosen_votes=0, rejected_votes=0, chosen_rating=[1, 2, 4], rejected_rating=[2, 2]),
        {"prompt": "? ", "completions": ["a", "b", "c"], "ranks": [1, 2, 2]},
    ]
    picture = tmp_path / "picture.png"
    main(["data", "check", write(tmp_path / "all.jsonl", rows), "--plot", str(picture)])
    shown = capsys.readouterr().out
    for part in [
        "1 rows  votes",
        "votes of a pair: 4.0 on average",
        "rankings: of 3 to 3 answers, 1 with equal ranks",
        "yes, by 2 answers with several ratings",
        "rating thresholds: 2, between 3 ratings",
        "tie band (tie_width)",
        "two judgements of one pair agree in 50.0%",
    ]:
        assert part in shown
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_strengths_are_counted_and_shown(tmp_path, capsys):
    rows = [
        pair("a", "b", preference_strength=[2, -1, 0]),
        pair("a", "c", preference_strength=3),
        pair("a", "d", preference_strength=None, chosen_rating=[1, 2], rejected_rating=3),
    ]
    found = check(rows)
    assert found["terms"]["strengths"] == 2 and found["terms"]["forced choices"] == 1
    assert found["strengths"] == {
        "of a pair": found["strengths"]["of a pair"],
        **{"given": 4, "values": {"-1": 1, "0": 1, "2": 1, "3": 1}, "levels": 3},
    }
    assert found["asked"] == {"votes": {"1": 1}, "grades": {"1": 1, "3": 1}, "ratings": {"1": 1, "2": 1}}
    assert found["columns"]["likelihood"]["preference_strength"].endswith(", on a scale from -3 to 3")
    assert main(["data", "check", write(tmp_path / "graded.jsonl", rows), "--json", str(tmp_path / "x.json")]) == 0
    shown = capsys.readouterr().out
    for part in [
        "2 rows  strengths of preference",
        "strengths of a pair: 1 to 3 people; -1 25%, 0 25%, 2 25%, 3 25%",
        "boundaries between 3 strengths of preference (strength_levels)",
        "the width of the tie band (tie_width)",
        "4 graded comparisons and 1 answers with several ratings: too few for a scale",
    ]:
        assert part in shown
    scale = json.loads((tmp_path / "x.json").read_text())["scale"]
    assert scale["expected"]["rank_correlation"] < 0.3
    ranks = [row["rank_correlation"] for row in scale["next"]]
    assert len(ranks) == 8 and ranks == sorted(ranks)


def test_strengths_without_a_tie_beside_ties_are_warned_of():
    graded, tied = pair("a", "b", preference_strength=[2, 1]), pair("a", "c", tie=True)
    named = "column 'preference_strength': never 0, as where no tie was on offer"
    assert [named in warning for warning in check([graded, tied])["warnings"]].count(True) == 1
    for rows in ([graded], [graded, tied, pair("a", "d", preference_strength=0)]):
        assert not any(named in warning for warning in check(rows)["warnings"])


def test_a_row_of_nothing_but_ties_is_no_error():
    assert check([pair(preference_strength=[0, 0])])["strengths"]["levels"] == 0


@pytest.mark.parametrize(
    ("asked", "advice"),
    [
        ({"votes": {"1": 30_000}}, "votes alone: the scale will very probably be constant. Ask how much better"),
        ({"votes": {"1": 2400}, "ratings": {"1": 500}}, "votes alone"),
        ({"votes": {}, "grades": {"1": 2400}}, "a scale can be learned, from 2,400 graded comparisons"),
        (
            {"votes": {"1": 9000}, "ratings": {"4": 800}},
            "a scale can be learned, from 800 answers with several",
        ),
        ({"grades": {"7": 10}}, "70 graded comparisons: too few for a scale that can be relied on"),
    ],
)
def test_what_to_ask_people(asked, advice):
    assert scale_advice(asked)["advice"][0].startswith(advice)


@pytest.mark.parametrize("kind", ["tokenized", "implicit prompt", "rankings"])
def test_a_picture_of_anything(kind, tmp_path):
    rankings = [{"prompt": "? ", "completions": ["a", "b"], "ranks": [1, 2]}]
    data = write(tmp_path / "rows.jsonl", rankings if kind == "rankings" else LEGAL[kind])
    picture = tmp_path / "picture.png"
    main(["data", "check", data, "--plot", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_memory_holds_numbers_and_no_texts():
    rows = [pair(f"{n} " + "x" * 5000, f"{n}", chosen_rating=[1, 2]) for n in range(300)]
    _, survey = check_dataset(Dataset.from_list(rows))
    assert len(pickle.dumps(vars(survey))) / len(rows) < 200  # bytes; a row has more than 5,000


def test_attributes_are_reported_one_by_one():
    rows = [
        pair(chosen_rating={"tone": [1, 3], "length": [2, None]}, rejected_rating={"tone": 2}, attribute=None),
        pair(chosen_rating={"tone": [2, 2], "length": None}, rejected_rating=None, attribute="safety"),
    ]
    found = check(rows)
    tone = found["attributes"]["tone"]
    assert tone["compared_pairs"] == 0
    assert (tone["ratings"]["answers"], tone["ratings"]["answers_with_several"]) == (3, 2)
    assert found["attributes"]["safety"] == {"compared_pairs": 1}
    assert "ratings" not in found  # nobody has rated the whole
    shown = render(found, "data")
    assert "tone: 3 answers rated, 2 of them by several people, with 1, 2, 3; people's standard deviation" in shown
    assert "length: 1 answers rated, 0 of them by several people, with 2; not read (all 1 are 2, which tells" in shown
    assert "safety: 1 pairs compared" in shown
    assert "chosen_rating, rejected_rating: ratings of each answer, tone on one scale of 3 values (1, 2, 3)" in shown
