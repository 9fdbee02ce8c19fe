"""The quickstart from end to end, and the figures of its report that are worked out on the way."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


sys.path.append(str(Path(__file__).parents[1] / "scripts"))
import quickstart


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
        "32 pairs",
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
