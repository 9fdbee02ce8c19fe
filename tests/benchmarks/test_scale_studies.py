"""`benchmarks/scale_studies.py`: the ceiling against closed forms, the tables, and a study from end to end."""

from pathlib import Path

import numpy as np
import pytest
from test_argument_votes import write_votes

from benchmarks import human_ratings, scale_studies
from benchmarks.human_ratings import RatedText
from benchmarks.scale_studies import BRADLEY_TERRY, NORMAL, SOFT, STUDIES, Arm, Study
from disco_trl.evaluation.compare import Variant


def test_the_ridge_is_chosen_by_leaving_out_one():
    generator = np.random.default_rng(0)
    states = generator.normal(size=(40, 6)) * [1, 2, 3, 1, 1, 0]  # The last one is constant.
    target = states @ [1.0, 0, 0.5, 0, 0, 0] + generator.normal(size=40)
    new = generator.normal(size=(5, 6))
    mean, deviation = states.mean(axis=0), np.where(states.std(axis=0) > 0, states.std(axis=0), 1)
    columns = np.hstack([(states - mean) / deviation, np.ones((40, 1))])

    def fit(ridge: float, kept: np.ndarray) -> np.ndarray:
        penalty = np.diag([ridge] * 6 + [0.0])
        return np.linalg.solve(columns[kept].T @ columns[kept] + penalty, columns[kept].T @ target[kept])

    def error(ridge: float) -> float:
        every = np.arange(40)
        return sum((target[row] - columns[row] @ fit(ridge, every != row)) ** 2 for row in every)

    best = min(scale_studies.RIDGES, key=error)
    expected = np.hstack([(new - mean) / deviation, np.ones((5, 1))]) @ fit(best, np.arange(40) >= 0)
    assert scale_studies.ridge_predictions(states, target, new) == pytest.approx(expected)
    # Not the first, which is the least: something is chosen.
    assert best != scale_studies.RIDGES[0]


def test_arms_have_different_titles_and_folders():
    for study in STUDIES.values():
        titles = [arm.title for arm in study.arms]
        assert len({*titles}) == len(titles)
        assert Arm(BRADLEY_TERRY) in study.arms and Arm(NORMAL) in study.arms
    variants = [Variant.parse(text) for text in (SOFT, f"{SOFT}:labels=[0.75,0.95,1]", NORMAL)]
    assert len({variant.folder for variant in variants}) == 3


def world(count: int = 260) -> list[RatedText]:
    """Texts in which "good" is better, and people disagree about "film"."""
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(["good", "bad", "fine", "poor", "film", "plot"], 4)) for _ in range(count)]
    return [
        RatedText(
            f"{text} {number}",
            np.rint(generator.normal(text.count("good") - text.count("bad"), 0.5 + text.count("film"), 12))
            .clip(-4, 4)
            .astype(int),
        )
        for number, text in enumerate(texts)
    ]


@pytest.mark.slow
def test_studies_from_end_to_end(tiny_llama_dir, tmp_path, monkeypatch, capsys, runs_in_this_process):
    rated = world()
    monkeypatch.setattr(human_ratings, "load_ratings", lambda source: rated)
    arms = (Arm(BRADLEY_TERRY), Arm(SOFT), Arm(NORMAL))
    graded = Study(
        {"32 graded": "--said grades --votes 32 --rated 0.1 --test_votes 300"},
        arms,
        scale_studies.OF_SCALE + scale_studies.OF_VOTES,
    )
    arguments = Study(
        {"32 pairs": "--pairs 32"}, (Arm(NORMAL, 4),), scale_studies.OF_SHARES, STUDIES["arguments"].draw
    )
    monkeypatch.setattr(scale_studies, "STUDIES", {"graded": graded, "arguments": arguments})
    options = ["--model", tiny_llama_dir, "--seeds", "0", "--output", str(tmp_path)]
    votes = str(write_votes(tmp_path / "votes"))
    scale_studies.main(["graded", "arguments", "--argument_votes", votes, *options])

    lines = (tmp_path / "graded.md").read_text().splitlines()
    assert len({line.count(" | ") for line in (lines[0], *lines[2:])}) == 1
    heads, *rows = ([cell.strip() for cell in line.split(" | ")] for line in (lines[0], *lines[2:]))
    assert [row[1] for row in rows] == [arm.title for arm in graded.arms]
    column = heads.index("ceiling")
    assert [row[column] == "–" for row in rows] == [True, True, False]
    assert sum("accuracy less that of" in head for head in heads) == 2
    assert rows[0][-4:-2] == ["–", "–"] and " to " in rows[2][-4]

    lines = (tmp_path / "arguments.md").read_text().splitlines()
    assert len(lines) == 3 and "cross-entropy" in lines[0] and "disco, normal, rank 4" in lines[2]

    # What is finished is not repeated.
    capsys.readouterr()
    files = ("metrics.json", scale_studies.CEILING_FILE, "train.jsonl")
    before = {path: path.stat().st_mtime_ns for name in files for path in tmp_path.rglob(name)}
    assert len(before) == (3 + 1) + 1 + 2
    scale_studies.main(["graded", *options])
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_arguments_need_their_folder(tmp_path, capsys):
    with pytest.raises(SystemExit):
        scale_studies.main(["arguments", "--model", "none", "--output", str(tmp_path)])
    assert "needs --argument_votes FOLDER" in capsys.readouterr().err


def test_each_level_has_a_folder_of_its_own():
    args = type("Args", (), {"output": Path("runs")})()
    words = [words for study in STUDIES.values() for words in study.levels.values()]
    folders = {scale_studies.folder_of(one, args) for one in words}  # type: ignore[arg-type]
    assert len(folders) == len({*words})
    assert Path("runs/said-grades-votes-2400-rated-0.1") in folders
