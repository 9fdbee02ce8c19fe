"""`benchmarks/human_ratings.py`: reading the archive, splitting, and the protocol of a vote."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from benchmarks import human_ratings
from benchmarks.human_ratings import (
    RatedText,
    draw_judged_pairs,
    draw_votes,
    flip_some,
    grade_some,
    parse_ratings,
    randomize_strengths,
    rate_some,
    reverse_some,
    split_by_text,
    strength_of,
    win_probability,
)
from disco_trl.data.columns import find_layout
from disco_trl.data.records import read_record


# Reading


def make_archive(members: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content.encode())
            tar.addfile(member, io.BytesIO(content.encode()))
    return buffer.getvalue()


def test_texts_and_ratings_are_joined_by_id():
    archive = make_archive(
        {
            "folder/films_GroundTruth.txt": "1\t1.5\tGood, really\r\n2\t-2\tBad\twith a tab\r\n",
            "folder/films_anonDataRatings.txt": "\ufeff2\t-2\t0.0\t[-2, -2]\r\n1\t1.5\t0.5\t[1, 2]\r\n",
            "../../outside.txt": "nobody unpacks this",
        }
    )
    rated = {row.text: row.ratings.tolist() for row in parse_ratings(archive, "folder/films")}
    assert rated == {"Good, really": [1, 2], "Bad\twith a tab": [-2, -2]}


def test_rows_with_the_same_text_become_one():
    archive = make_archive(
        {
            "films_GroundTruth.txt": "1\t1\tSame\r\n2\t2\tSame\r\n",
            "films_anonDataRatings.txt": "1\t1\t0\t[1]\r\n2\t2\t0\t[2, 2]\r\n",
        }
    )
    (row,) = parse_ratings(archive, "films")
    assert row.ratings.tolist() == [1, 2, 2]


def test_ratings_are_data_and_not_code():
    archive = make_archive(
        {
            "films_GroundTruth.txt": "1\t1\tText\r\n",
            "films_anonDataRatings.txt": "1\t1\t0\t__import__('os').getpid()\r\n",
        }
    )
    with pytest.raises(ValueError, match="malformed"):
        parse_ratings(archive, "films")


def test_ratings_without_a_text_are_an_error():
    archive = make_archive({"films_GroundTruth.txt": "", "films_anonDataRatings.txt": "7\t1\t0\t[1]\r\n"})
    with pytest.raises(ValueError, match="row '7' has ratings but no text"):
        parse_ratings(archive, "films")


# Splitting

TABLE = [RatedText(f"text number {number}", np.array([number % 5 - 2, 1])) for number in range(1000)]


def texts(rated: list[RatedText]) -> set[str]:
    return {row.text for row in rated}


def test_no_test_text_is_in_train():
    train, test = split_by_text(TABLE)
    assert texts(train) | texts(test) == texts(TABLE)
    assert not texts(train) & texts(test)
    # 1,000 draws with probability 0.2: 200 ± 13
    assert 160 < len(test) < 240


def test_the_side_of_a_text_does_not_depend_on_the_rest_of_the_table():
    _, test = split_by_text(TABLE)
    _, test_of_half = split_by_text(TABLE[::-2])
    assert texts(test_of_half) == texts(test) & texts(TABLE[::-2])


def test_variants_of_a_text_are_on_the_same_side():
    variants = [row.text.upper().replace(" ", "  ") + "!!!" for row in TABLE]
    _, test = split_by_text(TABLE + [RatedText(text, np.array([1])) for text in variants])
    assert len(test) % 2 == 0
    assert {text.lower().replace("  ", " ").rstrip("!") for text in texts(test)} == texts(test) & texts(TABLE)


def test_another_seed_is_another_split():
    assert texts(split_by_text(TABLE, seed=0)[1]) != texts(split_by_text(TABLE, seed=1)[1])


# Votes


def test_the_higher_rating_wins():
    rated = [RatedText("low", np.array([-1])), RatedText("high", np.array([3]))]
    assert (draw_votes(rated, 50, seed=0) == [1, 0]).all()


def test_equal_draws_are_dropped_and_not_counted():
    # "a" and "b" always tie, so each of the 500 votes has "c" in it.
    rated = [RatedText("a", np.array([1])), RatedText("b", np.array([1])), RatedText("c", np.array([0, 2]))]
    votes = draw_votes(rated, 500, seed=0)
    assert votes.shape == (500, 2)
    assert (votes == 2).any(axis=1).all()


def test_ratings_without_any_difference_are_an_error_and_not_an_endless_loop():
    with pytest.raises(ValueError, match="every rating is the same"):
        draw_votes([RatedText("a", np.array([1, 1])), RatedText("b", np.array([1]))], 5, seed=0)


def test_a_seed_gives_the_same_votes_and_fewer_are_the_first_of_more():
    votes = draw_votes(TABLE, 6000, seed=3)
    assert (votes == draw_votes(TABLE, 6000, seed=3)).all()
    assert (votes[:100] == draw_votes(TABLE, 100, seed=3)).all()
    assert (votes[:100] != draw_votes(TABLE, 100, seed=4)).any()


def test_a_text_does_not_vote_against_itself():
    votes = draw_votes(TABLE[:3], 1000, seed=0)
    assert (votes[:, 0] != votes[:, 1]).all()


def test_texts_are_drawn_evenly_however_many_ratings_they_have():
    rated = [RatedText("a", np.array([0])), RatedText("b", np.array([1] * 97)), RatedText("c", np.array([2]))]
    votes = draw_votes(rated, 20_000, seed=0)
    # Each text is in two thirds of the votes: 0.667 ± 0.003.
    assert np.bincount(votes.ravel()) / len(votes) == pytest.approx([2 / 3] * 3, abs=0.015)


def test_votes_come_out_as_often_as_the_ratings_say():
    # "a" draws 2, 2 or -1 and "b" draws 0, 0 or 2: of nine draws "a" wins 4, "b" wins 3 and 2 are ties: 4 / (4 + 3).
    # "c" draws 1: "a" beats it in 2 of 3 draws, and it beats "b" in 2 of 3.
    rated = [
        RatedText("a", np.array([2, 2, -1])),
        RatedText("b", np.array([0, 0, 2])),
        RatedText("c", np.array([1])),
    ]
    pairs = np.array([[0, 1], [0, 2], [2, 1]])
    assert win_probability(rated, pairs) == pytest.approx([4 / 7, 2 / 3, 2 / 3])

    votes = draw_votes(rated, 40_000, seed=0)
    for (first, second), expected in zip(pairs, win_probability(rated, pairs), strict=True):
        wins = (votes == [first, second]).all(axis=1).sum()
        losses = (votes == [second, first]).all(axis=1).sum()
        assert wins / (wins + losses) == pytest.approx(expected, abs=0.015)


def test_votes_become_rows_of_a_preference_dataset():
    rated = [RatedText("low", np.array([-1])), RatedText("high", np.array([3]))]
    rows = human_ratings.as_preferences(rated, draw_votes(rated, 2, seed=0))
    assert rows == [{"chosen": "high", "rejected": "low"}] * 2


# Judged pairs


def rated_texts(count: int) -> list[RatedText]:
    generator = np.random.default_rng(0)
    return [RatedText(f"text {index}", generator.integers(-4, 5, 20)) for index in range(count)]


@pytest.mark.parametrize("kind", ["choices", "votes", "ratings"])
def test_judged_pairs(kind):
    rated = rated_texts(12)
    ratings = {text.text: text.ratings for text in rated}
    rows = draw_judged_pairs(rated, 200, kind, seed=0, judgements=6)
    assert len(rows) == 200
    assert rows == draw_judged_pairs(rated, 200, kind, seed=0, judgements=6)
    assert rows != draw_judged_pairs(rated, 200, kind, seed=1, judgements=6)
    for row in rows:
        assert row["chosen"] != row["rejected"]
        if kind == "choices":
            assert row.keys() == {"chosen", "rejected"}
            assert ratings[row["chosen"]].max() > ratings[row["rejected"]].min()
        elif kind == "votes":
            assert row["chosen_votes"] + row["rejected_votes"] == 6
        else:
            assert row["chosen_votes"] == row["rejected_votes"] == 0
            for side in ("chosen", "rejected"):
                drawn, given = (
                    np.bincount(np.array(numbers) + 4, minlength=9)
                    for numbers in (row[f"{side}_rating"], ratings[row[side]])
                )
                assert drawn.sum() == 6
                assert (drawn <= given).all()


def test_choices_are_votes_of_one():
    rated = rated_texts(2)
    chance = win_probability(rated, np.array([[0, 1]]))[0]
    rows = draw_judged_pairs(rated, 4000, "choices", seed=0)
    wins = np.mean([row["chosen"] == "text 0" for row in rows])
    assert abs(wins - chance) < 4 * (chance * (1 - chance) / 4000) ** 0.5


def test_strengths_by_points():
    assert [strength_of(points) for points in range(9)] == [0, 1, 2, 2, 3, 3, 3, 3, 3]


def test_grades_come_out_as_the_ratings_say():
    # Differences of the nine draws, a − b: 2 − {0, 0, −2} = 2, 2, 4 twice, and −1 − {0, 0, −2} = −1, −1, 1.
    rated = [RatedText("a", np.array([2, 2, -1])), RatedText("b", np.array([0, 0, -2]))]
    rows = draw_judged_pairs(rated, 9000, "grades", seed=0)
    signed = [row["preference_strength"] * (1 if row["chosen"] == "a" else -1) for row in rows]
    for strength, share in {-1: 2 / 9, 1: 1 / 9, 2: 4 / 9, 3: 2 / 9}.items():
        assert signed.count(strength) / 9000 == pytest.approx(share, abs=0.02)
    assert rows[:50] == draw_judged_pairs(rated, 50, "grades", seed=0)


def test_ties_are_counted_and_their_sides_are_in_random_order():
    rated = [RatedText("a", np.array([1])), RatedText("b", np.array([1])), RatedText("c", np.array([3]))]
    rows = draw_judged_pairs(rated, 3000, "grades", seed=0)
    ties = [row["chosen"] for row in rows if row["preference_strength"] == 0]
    assert len(ties) / 3000 == pytest.approx(1 / 3, abs=0.03)
    assert ties.count("a") / len(ties) == pytest.approx(0.5, abs=0.06)
    assert {row["chosen"] for row in rows if row["preference_strength"]} == {"c"}


def graded_rows(count: int, texts: int = 60) -> list[dict]:
    return draw_judged_pairs(rated_texts(texts), count, "grades", seed=0)


def test_some_texts_are_rated_once():
    rated = {row.text: row.ratings.tolist() for row in rated_texts(60)}
    before = graded_rows(200)
    rows = rate_some(before, rated_texts(60), 0.2, seed=1)
    assert rows == rate_some(before, rated_texts(60), 0.2, seed=1) != rate_some(before, rated_texts(60), 0.2, seed=2)
    found = [(row[side], row[f"{side}_rating"]) for row in rows for side in ("chosen", "rejected")]
    ratings = [(text, values) for text, values in found if values is not None]
    assert len({text for text, _ in ratings}) == len(ratings)
    total = sum(len(values) for _, values in ratings)
    # A fifth of the reading: 400 texts are read to compare them, and 100 to rate them.
    assert 100 - 3 < total <= 100
    assert {len(values) for _, values in ratings} <= {3, 4, 5}
    for text, values in ratings:
        given = rated[text]
        assert all(values.count(value) <= given.count(value) for value in values)
    sides = ("chosen_rating", "rejected_rating")
    assert [{name: value for name, value in row.items() if name not in sides} for row in rows] == before
    record = next(read_record(row, find_layout(row)) for row in rows if row["chosen_rating"])
    assert len(record.ratings()[0]) >= 3 and record.comparisons[0].tie_allowed


def test_more_ratings_than_texts_are_an_error():
    with pytest.raises(ValueError, match="have 4 texts, too few to spend 50% of the reading"):
        rate_some(graded_rows(50, texts=4), rated_texts(4), 0.5)
    with pytest.raises(ValueError, match=r"a share of 1.0 of the reading"):
        rate_some(graded_rows(5), rated_texts(60), 1.0)


def test_strengths_at_random_keep_who_wins():
    rows = graded_rows(900)
    changed = randomize_strengths(rows, 1.0, seed=3)
    strengths = [row["preference_strength"] for row in changed]
    assert [strength == 0 for strength in strengths] == [row["preference_strength"] == 0 for row in rows]
    wins = [strength for strength in strengths if strength]
    for strength in (1, 2, 3):
        assert wins.count(strength) / len(wins) == pytest.approx(1 / 3, abs=0.06)
    quarter = randomize_strengths(rows, 0.25, seed=3)
    assert 0 < sum(row != before for row, before in zip(quarter, rows, strict=True)) <= 225
    assert [row["chosen"] for row in quarter] == [row["chosen"] for row in rows]


def test_some_comparisons_are_graded():
    rows = graded_rows(200)
    some = grade_some(rows, 0.1)
    assert sum(row["preference_strength"] is not None for row in some) == 20
    for row, before in zip(some, rows, strict=True):
        assert (row["tie"] is None) == (row["preference_strength"] is not None)
        said, meant = (read_record(one, find_layout(one)).comparisons[0] for one in (row, before))
        assert (said.wins, said.losses, said.ties) == (meant.wins, meant.losses, meant.ties)
        assert said.tie_allowed


def test_blocks_hold_few_texts():
    rows = draw_judged_pairs(rated_texts(12), 100, "choices", seed=0, block=(4, 16))
    blocks = [{text for row in rows[start : start + 16] for text in row.values()} for start in range(0, 100, 16)]
    assert len(rows) == 100
    assert max(map(len, blocks)) == 4
    # All texts, before any comes again
    assert len(set.union(*blocks[:3])) == len(set.union(*blocks[3:6])) == 12


def test_an_audience_is_divided():
    rated = rated_texts(30)
    half = reverse_some(rated, 0.5)
    for row, divided in zip(rated, half, strict=True):
        assert row.text == divided.text
        assert (np.abs(row.ratings) == np.abs(divided.ratings)).all()
        is_reversed = divided.ratings != row.ratings
        assert is_reversed.sum() <= 10 and (divided.ratings[is_reversed] == -row.ratings[is_reversed]).all()
    assert sum((row.ratings != divided.ratings).sum() for row, divided in zip(rated, half, strict=True)) > 230
    assert all((row.ratings == same.ratings).all() for row, same in zip(rated, reverse_some(rated, 0.0), strict=True))


def test_choices_are_flipped():
    rows = [{"chosen": f"a{i}", "rejected": f"b{i}", "source": "x"} for i in range(100)]
    flipped = flip_some(rows, 0.3)
    other = {"chosen": "rejected", "rejected": "chosen", "source": "source"}
    turned = [{other[name]: value for name, value in row.items()} for row in rows]
    found = [
        0 if row == before else 1 if row == after else 2
        for row, before, after in zip(flipped, rows, turned, strict=True)
    ]
    assert found.count(1) == 30 and 2 not in found


# Files


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("said", ["choices", "votes", "ratings"])
def test_files(said, tmp_path, monkeypatch):
    rated = rated_texts(60)
    monkeypatch.setattr(human_ratings, "load_ratings", lambda source: rated)
    human_ratings.main(["--votes", "40", "--said", said, "--test_votes", "25", "--output", str(tmp_path)])
    train, test = (read_lines(tmp_path / f"{name}.jsonl") for name in ("train", "test"))
    assert len(train) == 40 and len(test) == 25
    assert ("chosen_votes" in train[0]) == (said != "choices") and ("chosen_rating" in train[0]) == (said == "ratings")
    ratings = {row.text: row.ratings.tolist() for row in rated}
    for row in test:
        assert all(row[f"{side}_rating"] == ratings[row[side]] for side in ("chosen", "rejected"))
    assert not {row["chosen"] for row in train} & {row["chosen"] for row in test}


def test_files_of_grades_and_ratings(tmp_path, monkeypatch):
    rated = rated_texts(200)
    monkeypatch.setattr(human_ratings, "load_ratings", lambda source: rated)
    options = ["--said", "grades", "--rated", "0.1", "--votes", "64", "--block", "8", "16", "--test_votes", "25"]
    human_ratings.main([*options, "--output", str(tmp_path / "study")])
    human_ratings.main([*options, "--development", "--graded", "0.5", "--output", str(tmp_path / "tuning")])
    study, tuning = (read_lines(tmp_path / name / "train.jsonl") for name in ("study", "tuning"))
    assert len(study) == len(tuning) == 64
    assert {row["preference_strength"] for row in study} == {0, 1, 2, 3}
    assert sum(row["preference_strength"] is None for row in tuning) == 32
    assert sum(len(row[f"{side}_rating"] or []) for row in study for side in ("chosen", "rejected")) in (12, 13, 14)
    train, test = ({row.text for row in rows} for rows in split_by_text(rated))
    held_out = {row["chosen"] for row in read_lines(tmp_path / "tuning" / "test.jsonl")}
    assert held_out <= train and not held_out & {row["chosen"] for row in tuning}
    assert {row["chosen"] for row in read_lines(tmp_path / "study" / "test.jsonl")} <= test


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--graded", "0.5"], "--graded and --random_strengths are about strengths"),
        (["--said", "votes", "--random_strengths", "0.5"], "--graded and --random_strengths are about strengths"),
        (["--said", "ratings", "--rated", "0.1"], "--rated goes beside comparisons"),
    ],
)
def test_options_that_do_not_fit(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        human_ratings.main([*options, "--output", str(tmp_path)])
    assert message in capsys.readouterr().err


def test_flipping_is_for_choices(tmp_path, capsys):
    with pytest.raises(SystemExit):
        human_ratings.main(["--said", "votes", "--flipped", "0.1", "--output", str(tmp_path)])
    assert "--flipped exchanges the sides of forced choices" in capsys.readouterr().err
