"""`disco-trl evaluate`: the figures of real checkpoints, in files and on the screen."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from command_line import refusal
from scipy import stats
from test_held_out_benchmarks import ROWS
from transformers import AutoModelForSequenceClassification

from disco_trl.cli.main import main
from disco_trl.data.tokenization import tokenize
from disco_trl.distributions.likelihood import Responses
from disco_trl.distributions.reward_distribution import RewardDistribution
from disco_trl.evaluation.agreement import with_shares
from disco_trl.evaluation.bootstrap import resamples
from disco_trl.evaluation.evaluate import as_markdown, as_text, evaluate
from disco_trl.evaluation.figures import correlation_of, figure_of
from disco_trl.evaluation.forecasts import Forecasts
from disco_trl.evaluation.held_out import HeldOut
from disco_trl.evaluation.metrics import METRICS, pair_metrics
from disco_trl.evaluation.report import EXPLAINED, SECTIONS
from disco_trl.evaluation.scored import Scored
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
    assert found["agreement"].keys() <= {name for names in SECTIONS.values() for name in names} <= EXPLAINED.keys()
    assert {"entropy", "divided_matched", "probability, with people's share"} <= found["agreement"].keys()
    corrected = found["agreement"]["scale, with people's standard deviation, corrected"]
    assert corrected["value"] is None and corrected["note"] == "none: it takes 10 answers with 4 raters or more"

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
        found = evaluate(Scored(rewards), held_out, draws=300).metrics["accuracy"]
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


# What needs more of people than one judgement each


def test_shares_by_hand():
    """Votes of 4 : 0 and 1 : 3, and P = 0.8 of both; the single vote has no share."""
    given = Forecasts.of_probabilities(
        [0.8, 0.8, 0.5] * 6, [1, 0.25, 1] * 6, [4, 4, 1] * 6, minority=[0, 0.25, np.nan] * 6
    )
    found = with_shares(given, resamples(given.groups, 20), 20, 0)
    cross_entropy = -(np.log(0.8) + 0.25 * np.log(0.8) + 0.75 * np.log(0.2)) / 2
    assert found["cross_entropy"].value == pytest.approx(cross_entropy)
    assert found["entropy"].value == pytest.approx(-(0.25 * np.log(0.25) + 0.75 * np.log(0.75)) / 2)
    assert found["squared_error"].value == pytest.approx((0.2**2 + 0.55**2) / 2)
    # Six divided pairs are too few to tell them apart.
    assert not any(name.startswith("divided") for name in found)


def graded(count: int, seed: int = 0) -> tuple[HeldOut, RewardDistribution]:
    """Strengths from five people each, of pairs of texts that are one token each, and rewards."""
    generator = np.random.default_rng(seed)
    rows = [
        {
            "chosen_ids": [2 * i],
            "rejected_ids": [2 * i + 1],
            "preference_strength": generator.integers(-2, 3, 5).tolist(),
        }
        for i in range(count)
    ]
    location, scale = generator.normal(size=(2, 2 * count))
    rewards = RewardDistribution(torch.from_numpy(location), torch.from_numpy(np.exp(scale)), "normal")
    return HeldOut.read(rows, None), rewards


def test_strengths_have_the_probabilities_of_their_intervals():
    held_out, rewards = graded(30)
    responses = Responses(tie_width=torch.tensor(0.3), strength_boundaries=torch.tensor([1.1]))
    found = evaluate(Scored(rewards, responses), held_out, 20).agreement
    location, scale = rewards.location.numpy(), rewards.scale.numpy()
    losses, losses_of_signs = [], []
    for item, (first, second) in zip(held_out.items, zip(held_out.first, held_out.second, strict=True), strict=True):
        cdf = stats.norm(location[first] - location[second], np.hypot(scale[first], scale[second])).cdf
        bounds = {-2: (-np.inf, -1.1), -1: (-1.1, -0.3), 0: (-0.3, 0.3), 1: (0.3, 1.1), 2: (1.1, np.inf)}
        signs = {-1: (-np.inf, -0.3), 0: (-0.3, 0.3), 1: (0.3, np.inf)}
        (said,) = item.comparisons
        grades = [*said.strengths, *[0] * int(said.ties)]
        assert len(grades) == 5
        losses += [-np.log(cdf(bounds[grade][1]) - cdf(bounds[grade][0])) for grade in grades]
        losses_of_signs += [-np.log(cdf(signs[grade][1]) - cdf(signs[grade][0])) for grade in np.sign(grades)]
    assert found["grade_nll"].value == pytest.approx(np.mean(losses))
    assert found["sign_nll"].value == pytest.approx(np.mean(losses_of_signs))
    assert found["grade_nll"].low < found["grade_nll"].value < found["grade_nll"].high


def test_the_votes_of_a_pair_do_not_share_an_error_in_the_likelihood_of_one():
    """One person a row, so that the error of the locations widens each by itself."""
    held_out, rewards = graded(12)
    unsure = RewardDistribution(
        rewards.location, rewards.scale, "normal", location_error=torch.full((24,), 0.7).double()
    )
    wider = RewardDistribution(rewards.location, (rewards.scale**2 + 0.7**2).sqrt(), "normal")
    responses = Responses(tie_width=torch.tensor(0.3), strength_boundaries=torch.tensor([1.1]))
    found, expected = (evaluate(Scored(given, responses), held_out, 2).agreement for given in (unsure, wider))
    for name in ("grade_nll", "sign_nll"):
        assert found[name].value == pytest.approx(expected[name].value, abs=1e-8)


def test_strengths_that_a_model_does_not_know_are_votes():
    held_out, rewards = graded(12)
    found = evaluate(Scored(rewards), held_out, 2)
    assert found.agreement["grade_nll"].note == "none: the model knows no strengths of preference"
    assert found.agreement["sign_nll"].note == "none: the model knows no ties"
    said = [
        (len([s for s in c.strengths if s > 0]) + c.ties / 2) / 5 for item in held_out.items for c in item.comparisons
    ]
    prob = rewards[held_out.first].prob_greater(rewards[held_out.second]).numpy()
    expected = -np.mean(said * np.log(prob) + (1 - np.array(said)) * np.log1p(-prob))
    assert found.metrics["nll"].value == pytest.approx(expected)
    known = Responses(tie_width=torch.tensor(0.3), strength_boundaries=torch.zeros(0))
    with pytest.raises(ValueError, match=r"item 0, column 'preference_strength': a strength of -?2 is beyond the 1"):
        evaluate(Scored(rewards, known), held_out, 2)


def rated(scale: np.ndarray, ratings: int) -> tuple[HeldOut, RewardDistribution]:
    """Answers in pairs, with ratings whose spread is the scale."""
    generator = np.random.default_rng(0)
    rows = []
    for i in range(0, len(scale), 2):
        of_sides = [(scale[j] * generator.normal(size=ratings)).tolist() for j in (i, i + 1)]
        rows.append(
            dict(zip(("chosen_rating", "rejected_rating"), of_sides, strict=True))
            | {"chosen_ids": [i], "rejected_ids": [i + 1]}
        )
    location = torch.from_numpy(generator.normal(size=len(scale)))
    return HeldOut.read(rows, None), RewardDistribution(location, torch.from_numpy(scale), "normal")


def test_scales_that_are_known_exactly_correlate_by_one_if_all_people_were_asked():
    held_out, rewards = rated(np.exp(np.random.default_rng(1).normal(scale=0.5, size=400)), 8)
    found = evaluate(Scored(rewards), held_out, 60)
    raw, corrected = (found.agreement[f"scale, with people's standard deviation{end}"] for end in ("", ", corrected"))
    assert raw.high < 0.95 < corrected.high and corrected.value == pytest.approx(1, abs=0.07)
    assert corrected.low < corrected.value < corrected.high
    baseline = found.agreement["−|location − median|, with people's standard deviation, corrected"]
    assert baseline.low < 0 < baseline.high
    assert found.spread_by_scale["deviation"][-1] > 2 * found.spread_by_scale["deviation"][0]


def test_a_constant_scale_is_said_to_be_one():
    held_out, rewards = rated(np.ones(60), 6)
    found = evaluate(Scored(rewards), held_out, 20)
    for end in ("", ", corrected"):
        assert str(found.agreement[f"scale, with people's standard deviation{end}"]) == "none: the scale is constant"
    assert found.spread_by_scale == {} and "none: the scale is constant" in as_text(found, "")
    assert "| none: the scale is constant | – |" in as_markdown(found, "data")
    # Raters who do not differ in how much they disagree do not agree on it either.
    note = found.agreement["−|location − median|, with people's standard deviation, corrected"].note
    assert note.startswith(("none: the raters do not agree", "without an interval"))


def test_divided_pairs_of_a_constant_scale():
    """Doubt is nothing but the distance then, so that it has an AUROC of ½ among pairs of equal distance."""
    held_out, rewards = graded(60)
    constant = RewardDistribution(rewards.location, torch.ones(120).double(), "normal")
    found = evaluate(Scored(constant), held_out, 2).agreement
    assert found["divided"].value == pytest.approx(found["divided_by_distance"].value)
    assert found["divided_matched"].value == pytest.approx(0.5, abs=1e-12)
    assert found["divided_by_scale"].note == found["divided_by_scale_matched"].note == "none: the scale is constant"
