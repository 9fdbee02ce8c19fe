"""The quickstart from end to end, and the figures of its report that are worked out on the way."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from disco_trl import RewardDistribution


sys.path.append(str(Path(__file__).parents[1] / "scripts"))
import quickstart
import quickstart_report

from benchmarks import human_ratings
from benchmarks.human_ratings import RatedText


ROOT = Path(__file__).parents[1]


def test_both_trainers_compute_in_the_same_type_on_a_busy_machine(monkeypatch):
    # By the clock of the first measurement bfloat16 is fast, by that of a second one it would not be.
    steps = iter([0, 1, 0, 2] * 5 + [0, 2, 0, 1] * 5)
    monkeypatch.setattr(quickstart.time, "perf_counter", lambda: next(steps))
    quickstart.bfloat16_is_fast.cache_clear()
    try:
        first, second = (quickstart.training_settings(0, 16, by_length) for by_length in (False, True))
        assert first["bf16"] == second["bf16"]
    finally:
        quickstart.bfloat16_is_fast.cache_clear()


# The chart


def make_report(scale: list[float] | None = None, count: int = 120) -> quickstart_report.Report:
    """A report on texts of which the later ones are more disputed."""
    generator = np.random.default_rng(0)
    spread = np.arange(count) / count
    rated = [
        RatedText(f"text {index}", np.rint(generator.normal(0, 0.3 + 2 * wide, 20)).clip(-4, 4).astype(int))
        for index, wide in enumerate(spread)
    ]
    location = torch.tensor(generator.normal(size=count), dtype=torch.float32)
    rewards = RewardDistribution(
        location, torch.tensor(np.array(scale or 0.5 + spread), dtype=torch.float32), "normal"
    )
    held_out = quickstart.HeldOut([], human_ratings.draw_votes(rated, 500, seed=0), rated)
    disco = quickstart.evaluate(rewards, held_out)
    results = {"Bradley–Terry": disco, "disco": disco, "people": quickstart.evaluate_raters(held_out)}
    return quickstart_report.Report(
        model="a model",
        asked="some comparisons",
        family="normal",
        test_pairs=500,
        seed=0,
        results=results,
        rewards=rewards,
        rated=rated,
        checkpoint=Path("disco"),
        proofs=[],
        seconds={},
        training_seconds={},
        peak_bytes={},
        setup="here",
    )


def titles_of(report: quickstart_report.Report, path: Path, monkeypatch) -> list[str]:
    from matplotlib.axes import Axes

    titles: list[str] = []
    set_title = Axes.set_title

    def record(axes, label, **options):
        titles.append(label)
        return set_title(axes, label, **options)

    monkeypatch.setattr(Axes, "set_title", record)
    quickstart_report.plot(report, path)
    assert is_png(path)
    return titles


def test_the_titles_of_the_chart_follow_from_the_figures(tmp_path, monkeypatch):
    report = make_report()
    assert report.scale_vs_deviation > 0.8
    scales, _, largest, smallest = titles_of(report, tmp_path / "chart.png", monkeypatch)
    assert scales.startswith("σ ranks texts by how much people disagree")
    assert f"rank correlation {report.scale_vs_deviation:.2f}" in scales
    contested, agreed = quickstart_report.contested_and_agreed(report)
    assert f"“text {contested}”" in largest and f"“text {agreed}”" in smallest

    upside_down = make_report(scale=(1.5 - np.arange(120) / 120).tolist())
    assert "smaller where people disagree more" in titles_of(upside_down, tmp_path / "down.png", monkeypatch)[0]
    at_random = make_report(scale=(1.5 - np.arange(120) * 7 % 120 / 120).tolist())
    assert "says nothing" in titles_of(at_random, tmp_path / "random.png", monkeypatch)[0]


def test_a_constant_scale_is_not_drawn_as_one_that_varies(tmp_path, monkeypatch):
    report = make_report(scale=[1.2] * 120)
    titles = titles_of(report, tmp_path / "chart.png", monkeypatch)
    assert len(titles) == 2 and titles[0].startswith("The scale is the same for every text")
    assert "The scale is the same for every text." in quickstart_report.render(report, "chart.png")


def test_the_two_texts_are_of_about_the_same_location():
    report = make_report()
    contested, agreed = quickstart_report.contested_and_agreed(report)
    location, scale = report.rewards.location, report.rewards.scale
    distance = (location - location.numpy().mean()).abs()
    assert max(distance[contested], distance[agreed]) < 0.3
    near = (location - float(np.median(location))).abs().argsort()[:12]
    assert scale[contested] == scale[near].max() and scale[agreed] == scale[near].min()


def test_what_people_are_asked_is_counted():
    rows = [
        {
            "chosen": "a",
            "rejected": "b",
            "preference_strength": 0,
            "chosen_rating": [1, 2, 3],
            "rejected_rating": None,
        },
        {
            "chosen": "a",
            "rejected": "c",
            "preference_strength": 3,
            "chosen_rating": None,
            "rejected_rating": [0, 0, 1, 4],
        },
    ]
    text = quickstart.describe(rows)
    assert text.startswith("2 comparisons (1 ties) of 3 tweets, each by one person")
    assert "7 ratings of 2 of the tweets (64% of the reading)" in text  # 7 of 4 + 7 texts that are read


def run_quickstart(*arguments: str) -> str:
    # The tests' setting of one thread is for tiny matrices.
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    process = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "quickstart.py"), *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-5000:]
    return process.stdout


def plain_loading_differences(report: str) -> list[float]:
    return [float(number) for number in re.findall(r"max \|logit − location\| = (\S+) in float32", report)]


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


@pytest.mark.slow
def test_quickstart_on_the_real_model_and_ratings(tmp_path):
    output = run_quickstart("--fast", "--votes", "32", "--output", str(tmp_path))
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert report in output
    for expected in (
        "32 comparisons",
        "of the reading",
        "30,000 held-out pairs",
        "most disputed",
        "± ",
        "rank correlation: scale, raters' SD",
    ):
        assert expected in report
    assert is_png(tmp_path / "quickstart.png")

    # Adapter and merged checkpoint, both loaded without disco-trl.
    differences = plain_loading_differences(report)
    assert len(differences) == 2
    assert max(differences) < 1e-5

    metrics = json.loads((tmp_path / "metrics.json").read_text())
    # Even 32 votes teach something, and nobody forecasts votes better than the ratings that they are drawn from.
    assert 0.5 < metrics["disco"]["accuracy"] < metrics["people"]["accuracy"] < 1
    assert metrics["people"]["nll"] < min(metrics["disco"]["nll"], metrics["Bradley–Terry"]["nll"])
    assert metrics["people"]["expected_calibration_error"] < 0.012
    assert metrics["people"]["location_vs_mean"] > 0.9


@pytest.mark.slow
def test_quickstart_on_a_model_and_pairs_of_ones_own(tiny_llama_dir, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    with pairs.open("w") as file:
        for number in range(40):
            row = {
                "prompt": [{"role": "user", "content": f"What is {number} and {number}?"}],
                "chosen": [{"role": "assistant", "content": f"It is {2 * number}."}],
                "rejected": [{"role": "assistant", "content": "No idea at all."}],
            }
            file.write(json.dumps(row) + "\n")
    arguments = ["--model", tiny_llama_dir, "--dataset", str(pairs), "--family", "cauchy", "--votes", "32"]
    run_quickstart(*arguments, "--output", str(tmp_path / "run"))
    report = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert "disco, cauchy" in report
    assert "4 held-out pairs" in report  # a tenth
    assert "rater" not in report
    assert max(plain_loading_differences(report)) < 1e-5
    assert is_png(tmp_path / "run" / "quickstart.png")


def test_the_shell_script_says_what_it_needs():
    process = subprocess.run(
        ["bash", str(ROOT / "scripts" / "quickstart.sh")],
        env={**os.environ, "PYTHON": "false"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 1
    assert "false is not a Python of at least 3.11" in process.stderr
    assert process.stdout == ""
