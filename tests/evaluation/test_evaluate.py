"""`disco-trl evaluate`: the figures of real checkpoints, in files and on the screen."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from command_line import refusal
from test_held_out_benchmarks import ROWS
from transformers import AutoModelForSequenceClassification

from disco_trl.cli.main import main
from disco_trl.data.tokenization import tokenize
from disco_trl.distributions.reward_distribution import RewardDistribution
from disco_trl.evaluation.bootstrap import resamples
from disco_trl.evaluation.evaluate import evaluate
from disco_trl.evaluation.figures import correlation_of, figure_of
from disco_trl.evaluation.forecasts import Forecasts
from disco_trl.evaluation.held_out import HeldOut
from disco_trl.evaluation.metrics import METRICS, pair_metrics
from disco_trl.models.inference import load_trained, score


def votes(count: int = 40) -> list[dict]:
    generator = np.random.default_rng(0)
    words = ["good", "bad", "fine", "poor", "film", "plot", "end"]
    return [
        {
            **{side: " ".join(generator.choice(words, 4)) for side in ("chosen", "rejected")},
            **{f"{side}_votes": int(generator.integers(0, 4)) for side in ("chosen", "rejected")},
            **{f"{side}_rating": generator.integers(1, 6, 3).tolist() for side in ("chosen", "rejected")},
            "subset": str(generator.choice(["one", "two"])),
        }
        for _ in range(count)
    ]


def words(path, rows, tmp_path, *arguments) -> list[str]:
    """A command line that evaluates a model on rows."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["evaluate", str(path), str(data), str(tmp_path / "out"), "--draws", "50", *arguments]


def run(path, rows, tmp_path, *arguments) -> dict:
    main(words(path, rows, tmp_path, *arguments))
    return json.loads((tmp_path / "out" / "metrics.json").read_text())


def test_figures_are_those_of_the_model(reward_dir, tiny_tokenizer, tmp_path, capsys):
    path = reward_dir()
    rows = votes()
    found = run(path, rows, tmp_path)
    held_out = HeldOut.read(rows, tiny_tokenizer)
    rewards = score(load_trained(path), held_out.sequences)
    expected = pair_metrics(held_out.forecasts(rewards))
    for name, value in expected.items():
        assert found["metrics"][name]["value"] == pytest.approx(value, abs=1e-5), name
        low, high = found["metrics"][name]["low"], found["metrics"][name]["high"]
        assert (low is None and "expected" in name) or low <= found["metrics"][name]["value"] <= high
    assert f"{expected['accuracy']:.4f}" in capsys.readouterr().out
    assert found["family"] == "normal" and found["versions"]["torch"] == torch.__version__
    assert set(found["subsets"]) == {"one", "two"}
    assert "location, with people's mean rating" in found["agreement"]
    assert len(found["agreement"]) == 4

    scores = pq.read_table(tmp_path / "out" / "scores.parquet").to_pydict()
    assert scores["location"] == pytest.approx(rewards.location[np.concatenate(held_out.answers)].tolist(), abs=1e-5)
    assert scores["item"][:4] == [0, 0, 1, 1]


def test_card(reward_dir, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(reward_dir(), path)
    (path / "README.md").write_text("# Mine\n")
    found = run(path, votes(), tmp_path, "--card")
    card = (path / "README.md").read_text()
    assert f"| Accuracy | {found['metrics']['accuracy']['value']:.4f} |" in card and "`data.jsonl`" in card
    for name in ("reliability.png", "risk-coverage.png"):
        assert f"]({name})" in card and (path / name).stat().st_size > 1000


def test_a_scalar_model_is_bradley_terry(scalar_dir, tiny_tokenizer, tmp_path):
    path = tmp_path / "scalar"
    shutil.copytree(scalar_dir("llama"), path)
    tiny_tokenizer.save_pretrained(path)
    found = run(path, [{"chosen_ids": [5, 6, 7], "rejected_ids": [5, 8, 9]}] * 3, tmp_path)
    assert found["family"] == "logistic"
    assert found["scale"]["scale, 5 %"] == pytest.approx(2**-0.5)


def test_the_plain_view_is_that_of_the_stock_class(reward_dir, tiny_tokenizer, tmp_path):
    path, rows = reward_dir(), votes(12)
    found = run(path, rows, tmp_path, "--plain")
    stock = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
    chosen, rejected = (
        torch.cat([stock(torch.tensor([tokenize(tiny_tokenizer, row[side])])).logits[0] for row in rows])
        for side in ("chosen", "rejected")
    )
    wins, losses = (torch.tensor([row[f"{side}_votes"] for row in rows]) for side in ("chosen", "rejected"))
    log_prob, log_prob_reverse = (torch.nn.functional.logsigmoid(way * (chosen - rejected)) for way in (1, -1))
    expected = -((wins * log_prob + losses * log_prob_reverse).sum() / (wins + losses).sum())
    assert found["metrics"]["nll"]["value"] == pytest.approx(expected.item(), abs=1e-5)
    assert found["family"] == "logistic"


@pytest.mark.parametrize("name", ROWS)
def test_benchmarks(name, reward_dir, tmp_path):
    found = run(reward_dir(), [ROWS[name]] * 2, tmp_path)
    assert 0 <= found["benchmark"]["score"]["value"] <= 1


def read_pairs(pairs, targets) -> HeldOut:
    """Comparisons of texts that are one token each, their own number."""
    rows = [
        {"chosen_ids": [int(first)], "rejected_ids": [int(second)], "preference_probability": float(target)}
        for (first, second), target in zip(pairs, targets, strict=True)
    ]
    return HeldOut.read(rows, None)


def rewards_of(held_out: HeldOut, location: np.ndarray, scale: float) -> RewardDistribution:
    numbers = [sequence[0] for sequence in held_out.sequences]
    return RewardDistribution(torch.from_numpy(location[numbers]), torch.full((len(numbers),), scale), "normal")


def test_a_calibrated_model_is_told_from_one_that_is_sure_of_too_much():
    generator = np.random.default_rng(0)
    location = generator.normal(size=200)
    pairs = generator.integers(200, size=(4000, 2))
    margin = location[pairs[:, 0]] - location[pairs[:, 1]]
    people = generator.normal(scale=0.7, size=(4000, 2))
    held_out = read_pairs(pairs, margin + people[:, 0] > people[:, 1])
    honest, sure = (pair_metrics(held_out.forecasts(rewards_of(held_out, location, scale))) for scale in (0.7, 0.2))
    assert honest["accuracy"] == sure["accuracy"] > 0.7
    assert honest["calibration_error"] < 0.02 < 0.08 < sure["calibration_error"]
    assert honest["nll"] < sure["nll"]


def test_bootstrap_draws_items(tiny_tokenizer):
    """The pairs of a ranking come and go together, so that more of them do not narrow the interval by themselves."""

    def width(copies: int) -> float:
        rows = [{"completions": [f"a {i}"] + [f"b {i}"] * copies, "ranks": [1] + [2] * copies} for i in range(30)]
        held_out = HeldOut.read(rows, tiny_tokenizer)
        location = torch.from_numpy(np.random.default_rng(1).normal(size=len(held_out.sequences)))
        rewards = RewardDistribution(location, torch.ones(len(location)), "normal")
        found = evaluate(rewards, held_out, draws=300).metrics["accuracy"]
        return found.high - found.low

    assert width(4) == pytest.approx(width(1), rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--draws", "0"], "--draws 0"),
        (["--kind", "rm-bench"], "row 0, column 'chosen'"),
        (["--max_length", "1"], "nothing to evaluate"),
    ],
)
def test_errors_are_one_line(arguments, message, reward_dir, tmp_path, capsys):
    assert message in refusal(capsys, *words(reward_dir(), votes(3), tmp_path, *arguments))


def test_without_a_folder_the_figures_are_printed(reward_dir, tmp_path, capsys):
    main([*words(reward_dir(), votes(), tmp_path)[:3], "--draws", "50"])
    assert "accuracy" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]
    assert "give --output_dir" in refusal(capsys, "evaluate", reward_dir(), "data.jsonl", "--card")


def test_every_interval_contains_its_figure():
    """Also of few comparisons, equal confidences, shared answers, ties and votes."""
    generator = np.random.default_rng(0)
    seen = set()
    for count in (1, 2, 5, 12, 40, 40, 150):
        for groups in (
            np.arange(count),
            np.arange(count) // 4,
            generator.integers(max(2, count // 4), size=(count, 2)),
        ):
            margin = np.round(generator.normal(scale=2, size=count), int(generator.integers(3)))
            people = generator.integers(1, 5, count)
            said = generator.binomial(people, 1 / (1 + np.exp(-margin))) / people
            prob = 1 / (1 + np.exp(-generator.choice([0.4, 1, 3]) * margin))
            given = Forecasts.of_probabilities(prob, said, people, groups)
            counts = resamples(groups, 100, seed=count)
            for name in METRICS:
                figure = figure_of(name, given, counts)
                if not np.isnan(figure.low):
                    seen.add(name)
                    assert figure.low <= figure.value <= figure.high, (name, count, figure)
            correlation = correlation_of(prob, said, draws=100, seed=count)
            assert np.isnan(correlation.low) or correlation.low <= correlation.value <= correlation.high
    assert seen == METRICS.keys() - {"expected_calibration_error", "expected_calibration_error_by_chance"}


def test_chance_is_shown_beside_what_it_is_part_of(reward_dir, tmp_path, capsys):
    found = run(reward_dir(), votes(), tmp_path)["metrics"]
    printed = capsys.readouterr().out
    for name in ("expected_calibration_error", "expected_calibration_error_by_chance"):
        assert found[name]["low"] is None and found[name]["value"] > 0
        (line,) = [line.split() for line in printed.splitlines() if line.split()[:1] == [name]]
        assert line[1:] == [f"{found[name]['value']:.4f}"]
    assert '<th scope="row">ECE by chance' in (tmp_path / "out" / "report.html").read_text()
