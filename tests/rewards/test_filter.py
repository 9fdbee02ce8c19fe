"""`disco-trl filter`: which pairs are kept, dropped and flipped, what becomes of their columns, and the report."""

import json
import re

import pytest
from command_line import refusal
from datasets import Dataset, load_dataset
from tiny_training import preferences

from disco_trl import DiscoReward
from disco_trl.cli.main import main
from disco_trl.rewards.filter import PairFilter, Rules


# Eight pairs by (p, larger scale).
PAIRS = [(0.01, 1.0), (0.04, 3.0), (0.05, 1.0), (0.15, 1.0), (0.50, 1.0), (0.80, 2.5), (0.97, 1.0), (0.995, 1.0)]


def scored(pairs=PAIRS) -> list[dict]:
    return [
        {
            "prompt": "How? ",
            "chosen": f"good {number}",
            "rejected": f"bad {number}",
            "chosen_rating": number,
            "score_rejected": -number,
            "location_chosen": prob,
            "location_rejected": 0.0,
            "scale_chosen": scale,
            "scale_rejected": scale / 2,
            "prob_chosen": prob,
            "label": "chosen",
        }
        for number, (prob, scale) in enumerate(pairs)
    ]


def kept(rows, **rules) -> tuple[list[int], PairFilter]:
    pair_filter = PairFilter(Rules(**rules), list(rows[0]))
    return [rows.index(row) for row in pair_filter(rows)], pair_filter


@pytest.mark.parametrize(
    ("rules", "expected", "dropped"),
    [
        ({"min_prob": 0.05}, [2, 3, 4, 5, 6, 7], {"min_prob": 2}),  # a p of 0.05 is not below 0.05
        ({"max_prob": 0.97}, [0, 1, 2, 3, 4, 5, 6], {"max_prob": 1}),
        ({"max_scale": 2.5}, [0, 2, 3, 4, 5, 6, 7], {"max_scale": 1}),
        # Pair 1 has p < 0.1 and a scale above 2: it counts once, under the first rule.
        (
            {"min_prob": 0.1, "max_prob": 0.99, "max_scale": 2},
            [3, 4, 6],
            {"min_prob": 3, "max_prob": 1, "max_scale": 1},
        ),
    ],
)
def test_rules(rules, expected, dropped):
    numbers, pair_filter = kept(scored(), **rules)
    assert numbers == expected
    report = pair_filter.report
    assert (report.read, report.kept, report.flipped, report.dropped) == (8, len(expected), 0, dropped)


def test_the_larger_scale_counts_whichever_side_has_it():
    rows = scored([(0.5, 1.0), (0.5, 1.0)])
    rows[1]["scale_rejected"] = 3.0
    assert kept(rows, max_scale=2)[0] == [0]


def test_flipping_swaps_what_belongs_to_the_answers():
    rows = scored()[:2]
    rows[0]["prob_chosen"] = 0.25
    [flipped, untouched] = PairFilter(Rules(flip_below=0.3), list(rows[0]))([rows[0], rows[1] | {"prob_chosen": 0.9}])
    assert flipped == {
        "prompt": "How? ",
        "chosen": "bad 0",
        "rejected": "good 0",
        "chosen_rating": 0,  # has no partner called rejected_rating
        "score_rejected": 0,
        "location_chosen": 0.0,
        "location_rejected": 0.01,
        "scale_chosen": 0.5,
        "scale_rejected": 1.0,
        "prob_chosen": 0.75,
        "label": "chosen",
        "flipped": True,
    }
    assert untouched == rows[1] | {"prob_chosen": 0.9, "flipped": False}


def test_other_columns_of_the_two_answers_are_swapped_too():
    row = {"chosen_ids": [1], "rejected_ids": [2], "score_chosen": 9, "score_rejected": 3}
    row |= {"scale_chosen": 1.0, "scale_rejected": 2.0, "prob_chosen": 0.0}
    [flipped] = PairFilter(Rules(flip_below=0.5), list(row))([row])
    assert (flipped["chosen_ids"], flipped["rejected_ids"]) == ([2], [1])
    assert (flipped["score_chosen"], flipped["score_rejected"]) == (3, 9)


def test_the_other_rules_see_the_pair_as_flipped():
    # Below 0.05: pairs 0 and 1, whose p becomes 0.99 and 0.96. Then min_prob drops 0.05 and 0.15, and max_prob drops
    # 0.99, 0.97 and 0.995, all above 0.965.
    rows = scored()
    pair_filter = PairFilter(Rules(flip_below=0.05, min_prob=0.2, max_prob=0.965), list(rows[0]))
    assert [(row["prob_chosen"], row["flipped"]) for row in pair_filter(rows)] == [
        (0.96, True),
        (0.5, False),
        (0.8, False),
    ]
    report = pair_filter.report
    assert (report.read, report.kept, report.flipped) == (8, 3, 1)
    assert report.dropped == {"min_prob": 2, "max_prob": 3}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({}, "no rule is given"),
        ({"flip_below": 0.6}, r"flip_below=0\.6 must be above 0 and at most 0\.5"),
        ({"min_prob": 0.0}, r"min_prob=0\.0 must be above 0"),
        ({"min_prob": float("nan")}, r"min_prob=nan must be"),
        ({"max_prob": 1.5}, r"max_prob=1\.5 must be"),
        ({"max_scale": -1.0}, r"max_scale=-1\.0 must be above 0"),
        ({"min_prob": 0.9, "max_prob": 0.9}, r"min_prob=0\.9 must be below max_prob=0\.9"),
    ],
)
def test_rules_that_are_wrong(rules, message):
    with pytest.raises(ValueError, match=message):
        Rules(**rules)


def test_pairs_that_cannot_be_filtered():
    columns = list(scored()[0])
    with pytest.raises(ValueError, match=r"columns 'chosen' and 'rejected': missing .*only pairs can be filtered"):
        PairFilter(Rules(min_prob=0.1), ["prompt", "completion"])
    with pytest.raises(
        ValueError, match=r"column 'prob_chosen' and 'scale_chosen': missing, the pairs are not scored"
    ):
        PairFilter(Rules(min_prob=0.1), ["chosen", "rejected", "scale_rejected"])
    for sided in ("margin", "chosen_votes", "preference_probability", "tie"):
        with pytest.raises(ValueError, match=f"column '{sided}': .* remove it, or leave out flip_below"):
            PairFilter(Rules(flip_below=0.1), [*columns, sided])
    PairFilter(Rules(min_prob=0.1), [*columns, "margin"])
    with pytest.raises(ValueError, match=r"column 'flipped': the data has one of this name already"):
        PairFilter(Rules(flip_below=0.1), [*columns, "flipped"])
    rows = scored()
    rows[3]["prob_chosen"] = None
    with pytest.raises(ValueError, match=r"row 13, column 'prob_chosen': None is not a finite number"):
        PairFilter(Rules(min_prob=0.1), columns)(rows, first=10)


# The command


def read(path) -> list[dict]:
    kind = {".parquet": "parquet", ".jsonl": "json"}[path.suffix]
    return load_dataset(kind, data_files=str(path), split="train").to_list()


@pytest.mark.parametrize("kind_in", ["jsonl", "parquet"])
@pytest.mark.parametrize("kind_out", ["jsonl", "parquet"])
def test_the_command_and_its_report(kind_in, kind_out, tmp_path, capsys):
    dataset = Dataset.from_list(scored())
    data, out, report = tmp_path / f"in.{kind_in}", tmp_path / f"out.{kind_out}", tmp_path / "report.json"
    dataset.to_parquet(data) if kind_in == "parquet" else dataset.to_json(data)
    arguments = ["--flip_below", "0.05", "--max_prob", "0.98", "--max_scale", "2.75", "--report", str(report)]
    main(["filter", str(data), str(out), *arguments])
    # Flipped: 0 (p = 0.99, dropped by max_prob) and 1 (p = 0.96, dropped by its scale of 3). Dropped: 7 (0.995).
    assert [row["chosen"] for row in read(out)] == ["good 2", "good 3", "good 4", "good 5", "good 6"]
    assert json.loads(report.read_text()) == {
        "rules": {"flip_below": 0.05, "min_prob": None, "max_prob": 0.98, "max_scale": 2.75},
        "read": 8,
        "kept": 5,
        "flipped": 0,
        "dropped": {"max_prob": 2, "max_scale": 1},
    }
    shown = capsys.readouterr().out.split("\n")
    assert [line.split() for line in shown[:4]] == [
        ["read", "8"],
        ["dropped", "2", "by", "max_prob"],
        ["dropped", "1", "by", "max_scale"],
        ["kept", "5", "(0", "of", "them", "flipped)"],
    ]


def test_a_quantile_of_the_scales(tmp_path):
    # Larger scales 1 to 10: a share of 0.7 is not above 7.
    Dataset.from_list(scored([(0.5, float(scale)) for scale in range(10, 0, -1)])).to_json(tmp_path / "in.jsonl")
    report = tmp_path / "report.json"
    arguments = ["--max_scale_quantile", "0.7", "--report", str(report)]
    main(["filter", str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), *arguments])
    assert [row["scale_chosen"] for row in read(tmp_path / "out.jsonl")] == [7, 6, 5, 4, 3, 2, 1]
    assert json.loads(report.read_text())["rules"]["max_scale"] == 7.0


def test_scored_on_the_way(reward_dir, tmp_path):
    raw = preferences("conversational", rows=40)
    raw.to_json(tmp_path / "raw.jsonl")
    rows = DiscoReward(reward_dir(), device="cpu").map(raw, prefix="my_").to_list()
    threshold = sorted(row["my_prob_chosen"] for row in rows)[19] + 1e-4
    out = tmp_path / "out.parquet"
    arguments = [
        "--model_name_or_path",
        reward_dir(),
        "--device",
        "cpu",
        "--prefix",
        "my_",
        "--min_prob",
        str(threshold),
    ]
    main(["filter", str(tmp_path / "raw.jsonl"), str(out), *arguments])
    expected = [row for row in rows if row["my_prob_chosen"] >= threshold]
    got = read(out)
    assert 10 < len(expected) < 21
    assert [row["chosen"] for row in got] == [row["chosen"] for row in expected]
    assert [row["my_prob_chosen"] for row in got] == pytest.approx(
        [row["my_prob_chosen"] for row in expected], abs=1e-5
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "disco-trl filter: no rule is given"),
        (["--min_prob", "0.999"], r"no pair is left, so .*out\.jsonl is not written"),
        (
            ["--max_scale_quantile", "0.9", "--max_scale", "2"],
            r"--max_scale and --max_scale_quantile exclude each other",
        ),
        (["--max_scale_quantile", "1"], r"--max_scale_quantile 1\.0 must be strictly between 0 and 1"),
        (
            ["--max_scale_quantile", "0.9", "--model_name_or_path", "m"],
            r"reads the scores twice; run `disco-trl score` first",
        ),
        (
            ["--min_prob", "0.1", "--prefix", "my_"],
            r"column 'my_prob_chosen' and .* missing, the pairs are not scored",
        ),
    ],
)
def test_arguments_that_are_wrong(arguments, message, tmp_path, capsys):
    Dataset.from_list(scored()).to_json(tmp_path / "in.jsonl")
    said = refusal(capsys, "filter", str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), *arguments)
    assert re.search(message, said)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_scoring_what_is_scored_is_refused(reward_dir, tmp_path):
    Dataset.from_list(scored()).to_json(tmp_path / "in.jsonl")
    arguments = ["--model_name_or_path", reward_dir(), "--device", "cpu", "--min_prob", "0.1"]
    with pytest.raises(
        SystemExit, match=r"column 'location_chosen' .* leave out --model_name_or_path to filter by it"
    ):
        main(["filter", str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), *arguments])


def test_answers_of_different_types_cannot_be_swapped_in_parquet(tmp_path):
    rows = [row | {"score_chosen": 1.5, "score_rejected": 1} for row in scored()]
    for row in rows:
        del row["chosen_rating"]
    Dataset.from_list(rows).to_json(tmp_path / "in.jsonl")
    arguments = ["filter", str(tmp_path / "in.jsonl"), "--flip_below", "0.1", "--output_file"]
    with pytest.raises(SystemExit, match=r"'score_chosen' and 'score_rejected' are of different types.*\.jsonl file"):
        main([*arguments, str(tmp_path / "out.parquet")])
    main([*arguments, str(tmp_path / "out.jsonl")])
    assert read(tmp_path / "out.jsonl")[0]["score_chosen"] == 1
