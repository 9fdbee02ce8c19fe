"""`benchmarks/studies.py`: choosing among N against brute force, and the studies with controls from end to end."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks import studies
from disco_trl.distributions.reward_distribution import RewardDistribution


def test_mean_over_seeds_has_students_interval():
    # 0.2 ± t(2) · 0.1 / √3 = 0.2 ± 4.303 · 0.0577
    assert studies.mean_over_seeds(np.array([0.1, 0.2, 0.3])) == "+0.20 (-0.05 to +0.45)"
    assert stats.t.ppf(0.975, 2) * 0.1 / 3**0.5 == pytest.approx(0.2484, abs=1e-4)
    assert studies.mean_over_seeds(np.array([-0.1])) == "-0.10"


def test_the_choice_of_a_rule_is_that_of_brute_force(monkeypatch):
    monkeypatch.setattr(studies, "SIZES", (2, 5))
    monkeypatch.setattr(studies, "GROUPS", 40)
    generator = torch.Generator().manual_seed(0)
    location, scale, error = (torch.rand(12, generator=generator, dtype=torch.float64) for _ in range(3))
    rewards = RewardDistribution(location, scale + 0.1, "normal", location_error=error)
    gold = np.random.default_rng(1).normal(size=(12, 2))
    name, options = studies.RULES["μ − total σ"]
    found = studies._choose(rewards, gold, name, options)
    lower = (location - torch.hypot(scale + 0.1, error)).numpy()
    draws = np.random.default_rng(0)
    for size, of_size in zip((2, 5), found, strict=True):
        groups = [draws.choice(12, size, replace=False) for _ in range(40)]
        best = [max(group, key=lambda text: lower[text]) for group in groups]
        regret = np.mean([gold[group, 0].max() - gold[text, 0] for group, text in zip(groups, best, strict=True)])
        assert of_size == pytest.approx([*gold[best].mean(axis=0), regret])


def write_world(folder: Path) -> None:
    """Votes on texts in which "good" is better, with the ratings that held-out votes come from."""
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(["good", "bad", "fine", "poor", "film", "plot"], 4)) for _ in range(300)]
    texts = [f"{text} {number}" for number, text in enumerate(texts)]
    worth = np.array([text.count("good") - text.count("bad") for text in texts])
    ratings = [np.clip(value + generator.integers(-1, 2, 5), -4, 4).tolist() for value in worth]
    folder.mkdir(parents=True)
    rows: dict[str, list[dict]] = {"train": [], "test": []}
    for split, count in (("train", 32), ("test", 300)):
        for first in range(count):
            second = (first + 7) % 300
            sides = (first, second) if worth[first] >= worth[second] else (second, first)
            row = {side: texts[text] for side, text in zip(("chosen", "rejected"), sides, strict=True)}
            if split == "test":
                row |= {f"{side}_rating": ratings[text] for side, text in zip(row, sides, strict=True)}
            rows[split].append(row)
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[split]))


@pytest.mark.slow
def test_best_of_n_and_routing_with_controls(tiny_llama_dir, tmp_path, capsys, monkeypatch, runs_in_this_process):
    monkeypatch.setattr(studies, "GROUPS", 100)
    pair = f"{studies.ENSEMBLE}:members=2"
    for name in ("RULES_OF", "SENT_BY_OF", "TITLES", "COLORS"):
        table = getattr(studies, name)
        monkeypatch.setattr(studies, name, {pair if key == studies.ENSEMBLE else key: table[key] for key in table})
    write_world(tmp_path / "250-votes" / "data-0")
    arguments = ["--model", tiny_llama_dir, "--seeds", "0", "--most-votes", "250", "--output", str(tmp_path)]
    studies.main(["best-of-n", "routing", *arguments])
    best, routing = ((tmp_path / f"{name}.md").read_text().splitlines() for name in ("best-of-n", "routing"))
    assert len(best) == 2 + sum(map(len, studies.RULES_OF.values()))
    assert len(routing) == 2 + sum(map(len, studies.SENT_BY_OF.values()))
    for table in (best, routing):
        assert len({line.count(" | ") for line in table[:1] + table[2:]}) == 1
        for title in ("Bradley–Terry, posterior", "Bradley–Terry, ensemble of 4", "disco, normal"):
            assert any(title in line for line in table)
    for name in ("best-of-n", "routing"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    cells = [line.strip("| ").split(" | ") for line in routing[2:]]
    for variant in ("Bradley–Terry", "disco, normal"):
        ends = {(row[3], row[7]) for row in cells if row[1] == variant}
        assert len(ends) == 1  # The ends of the curves are the accuracies of model and judge.
    # Both studies look at the same runs.
    assert sum(path.is_dir() for path in (tmp_path / "250-votes").glob("*-0")) == 5
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.json")}
    assert len(before) == 6
    studies.main(["routing", *arguments])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.json")} == before


def test_no_budget_left(tmp_path):
    with pytest.raises(ValueError, match="--most-votes 100 leaves nothing to do; pass 250 or more"):
        studies.main(["routing", "--model", "none", "--most-votes", "100", "--output", str(tmp_path)])
