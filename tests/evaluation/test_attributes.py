"""Evaluation of models that know several attributes: by hand, against the overall judgement, and by the commands."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import refusal
from datasets import Dataset
from scipy import stats
from tiny_training import WORDS, disco_trainer

from disco_trl import DiscoReward
from disco_trl.cli.main import main
from disco_trl.distributions.likelihood import Responses
from disco_trl.distributions.reward_distribution import RewardDistribution
from disco_trl.evaluation.attributes import OF_COMPARISONS, of_correlations
from disco_trl.evaluation.evaluate import as_json, as_markdown, as_text, evaluate
from disco_trl.evaluation.held_out import HeldOut
from disco_trl.evaluation.ratings import rating_losses, with_ratings
from disco_trl.evaluation.report import Model, write_report
from disco_trl.evaluation.scored import Scored, score_held_out


NOBODY = {"chosen_votes": 0, "rejected_votes": 0}
RATED = "chosen_rating", "rejected_rating"


def pairs(count: int = 40, seed: int = 0) -> list[dict]:
    """Pairs of texts of one token each. A third are compared in safety, the others overall; tone is rated, and so is
    length, of one side, by the same people."""
    generator = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        tone = [generator.integers(1, 4, 4).tolist() for _ in range(2)]
        rows.append(
            {
                "chosen_ids": [2 * i],
                "rejected_ids": [2 * i + 1],
                "attribute": "safety" if i % 3 == 0 else None,
                "chosen_votes": int(generator.integers(0, 4)),
                "rejected_votes": int(generator.integers(0, 4)),
                "chosen_rating": {"tone": tone[0], "length": generator.integers(1, 6, 4).tolist()},
                "rejected_rating": {"tone": tone[1]},
            }
        )
    return rows


def only(rows: list[dict], attribute: str) -> list[dict]:
    """The same rows with what was said about an attribute as overall judgements, and nothing else."""
    kept = []
    for row in rows:
        votes = {} if (row["attribute"] or "overall") == attribute else NOBODY
        ratings = {side: row[side].get(attribute) for side in RATED}
        kept.append({**row, **votes, **ratings, "attribute": None})
    return kept


def rewards(count: int, seed: int, error: float | None = None) -> RewardDistribution:
    generator = torch.Generator().manual_seed(seed)
    location, scale = torch.randn(2, count, generator=generator, dtype=torch.float64)
    errors = None if error is None else torch.full((count,), error, dtype=torch.float64)
    return RewardDistribution(location, (scale / 2).exp(), "normal", location_error=errors)


def thresholds(*values: float) -> Responses:
    return Responses(thresholds=torch.tensor(values, dtype=torch.float64))


def scored(count: int = 80, correlation: float = 0.5) -> Scored:
    """What a model of tone, length and safety says."""
    return Scored(
        rewards(count, 0),
        attributes={
            "length": Scored(rewards(count, 1), thresholds(-1.5, -0.5, 0.5, 1.5), (1.0, 2.0, 3.0, 4.0, 5.0)),
            "safety": Scored(rewards(count, 2), Responses(tie_width=torch.tensor(0.4))),
            "tone": Scored(rewards(count, 3, error=0.3), thresholds(-0.6, 0.7), (1.0, 2.0, 3.0)),
        },
        correlation=torch.eye(3) + correlation * torch.tensor([[0.0, 0, 1], [0, 0, 0], [1, 0, 0]]),
    )


# Held-out data


@pytest.mark.parametrize("attribute", ["overall", "safety", "tone", "length"])
def test_an_attribute_is_evaluated_as_if_it_were_the_overall_judgement(attribute):
    rows = pairs()
    held_out, alone = HeldOut.read(rows, None), HeldOut.read(only(rows, attribute), None)
    assert held_out.attributes == ["length", "safety", "tone"]
    assert alone.attributes == []
    view = held_out.about(attribute)
    for name in ("first", "second", "target", "weight", "minority", "tie_allowed", "groups", "item"):
        np.testing.assert_array_equal(getattr(view, name), getattr(alone, name), err_msg=name)
    assert {at: values.tolist() for at, values in view.ratings().items()} == {
        at: values.tolist() for at, values in alone.ratings().items()
    }
    whole = scored()
    of_attribute = whole.attributes.get(attribute, whole)
    expected = evaluate(Scored(of_attribute.rewards, of_attribute.responses, of_attribute.rating_values), alone, 50)
    found = as_json(evaluate(of_attribute, view, 50))
    own = {"attribute", "attributes", "correlations", "remarks"}
    assert {name: found[name] for name in found.keys() - own} == {
        name: value for name, value in as_json(expected).items() if name not in own
    }
    if attribute != "overall":
        block = as_json(evaluate(whole, held_out, 50))["attributes"][attribute]
        assert block == {name: (found["metrics"] | found["agreement"])[name] for name in block}
        assert ({*OF_COMPARISONS} <= block.keys()) == (attribute == "safety")
        assert ("rating_nll" in block) == (attribute != "safety")


def test_a_comparison_about_an_attribute_is_no_overall_judgement():
    rows = [{"chosen_ids": [1], "rejected_ids": [2], "attribute": name} for name in ("safety", None)]
    held_out = HeldOut.read(rows, None)
    assert held_out.weight.tolist() == [0, 1]
    assert held_out.about("safety").weight.tolist() == [1, 0]
    # A soft label says how many would agree, about its own attribute only.
    soft = HeldOut.read([rows[0] | {"preference_probability": 0.75}], None)
    assert np.isnan(soft.minority[0]) and soft.about("safety").minority.tolist() == [0.25]


def test_an_attribute_that_nobody_judged():
    with pytest.raises(ValueError, match="the data say nothing about 'tome', but about 'length', 'safety', 'tone'"):
        HeldOut.read(pairs(), None).about("tome")
    plain = HeldOut.read([{"chosen_ids": [1], "rejected_ids": [2]}], None)
    with pytest.raises(ValueError, match="nothing about 'tone', but about no attribute"):
        plain.about("tone")


def test_ratings_of_each_person():
    held_out = HeldOut.read(
        [
            {
                "chosen_ids": [1],
                "rejected_ids": [2],
                "chosen_rating": {"tone": [1, 2, None], "length": [5, None, 3]},
                "rejected_rating": {"tone": [1, 3], "length": None},
            },
            # One rater alone says nothing about how opinions go together.
            {"chosen_ids": [3], "rejected_ids": [1], "chosen_rating": {"tone": [2]}, "rejected_rating": {"tone": [9]}},
        ],
        None,
    )
    positions, ratings = held_out.ratings_by_rater(["length", "tone"])
    assert positions.tolist() == [0, 1]
    nan = np.nan
    np.testing.assert_array_equal(ratings, [[[5, 1], [nan, 2], [3, nan]], [[nan, 1], [nan, 3], [nan, nan]]])


# The likelihood of ratings


@pytest.mark.parametrize("error", [None, 0.8])
def test_the_likelihood_of_a_rating_is_the_probability_of_its_interval(error):
    """P(2) = Φ((0.7 − μ) / s) − Φ((−0.6 − μ) / s), where s² = σ² + τ²: each rating has an error of its own."""
    rows = only(pairs(12), "tone")
    held_out = HeldOut.read(rows, None)
    of_tone = Scored(rewards(24, 3, error), thresholds(-0.6, 0.7), (1.0, 2.0, 3.0))
    ends = [-np.inf, -0.6, 0.7, np.inf]
    expected = []
    for row in rows:
        for ids, side in (("chosen_ids", RATED[0]), ("rejected_ids", RATED[1])):
            (number,) = row[ids]
            width = np.hypot(of_tone.rewards.scale[number].item(), error or 0)
            cdf = stats.norm(of_tone.rewards.location[number].item(), width).cdf
            expected.append([-np.log(cdf(ends[rating]) - cdf(ends[rating - 1])) for rating in row[side]])
    positions, losses, people = rating_losses(of_tone, held_out)
    assert positions.tolist() == [*range(24)] and people.tolist() == [4] * 24
    assert losses == pytest.approx(np.mean(expected, axis=1), abs=1e-8)
    found = with_ratings(of_tone, held_out, 50, 0)["rating_nll"]
    assert found.value == pytest.approx(np.mean(expected), abs=1e-8)
    assert found.low < found.value < found.high


def test_ratings_that_a_model_does_not_know():
    held_out = HeldOut.read(only(pairs(12), "tone"), None)
    known = Scored(rewards(24, 3), thresholds(0.7), (1.0, 2.0))
    assert with_ratings(known, held_out, 5, 0)["rating_nll"].note == "none: the model does not know the rating 3"
    nothing = with_ratings(Scored(rewards(24, 3)), held_out, 5, 0)["rating_nll"]
    assert nothing.note == "none: the model knows no ratings"


# How opinions go together


def people(count: int, correlation: float, seed: int = 0) -> tuple[HeldOut, Scored]:
    """Answers whose tone and length five people rated, and a model that knows everything about them."""
    generator = torch.Generator().manual_seed(seed)
    location = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    draws = torch.randn(count, 5, 2, generator=generator, dtype=torch.float64)
    draws[..., 1] = correlation * draws[..., 0] + (1 - correlation**2) ** 0.5 * draws[..., 1]
    ratings = 1 + torch.searchsorted(torch.tensor([-1.0, 0, 1]).double(), (location[:, None] + draws).contiguous())
    rows = []
    for i in range(0, count, 2):
        sides = {
            side: {"length": ratings[j, :, 0].tolist(), "tone": ratings[j, :, 1].tolist()}
            for side, j in zip(RATED, (i, i + 1), strict=True)
        }
        rows.append({"chosen_ids": [i], "rejected_ids": [i + 1], **sides, **NOBODY})
    one = torch.ones(count, dtype=torch.float64)
    of_each = {
        name: Scored(RewardDistribution(location[:, place], one, "normal"), thresholds(-1, 0, 1), (1.0, 2.0, 3.0, 4.0))
        for place, name in enumerate(("length", "tone"))
    }
    return HeldOut.read(rows, None), Scored(
        of_each["tone"].rewards, attributes=of_each, correlation=torch.tensor([[1.0, 0.25], [0.25, 1.0]])
    )


def test_the_correlation_of_people_is_found_and_that_of_their_numbers_is_smaller():
    held_out, model = people(1200, 0.6)
    found = of_correlations(model, held_out, 40, 0)
    assert [*found] == [f"length and tone: {what}" for what in ("model", "people", "people, ratings as numbers")]
    of_model, of_people, of_numbers = found.values()
    assert of_model.value == 0.25 and np.isnan(of_model.low)
    assert of_people.low < 0.6 < of_people.high and 0.02 < of_people.high - of_people.low < 0.15
    _, ratings = held_out.ratings_by_rater(["length", "tone"])
    centred = (ratings - ratings.mean(axis=1, keepdims=True)).reshape(-1, 2)
    assert of_numbers.value == pytest.approx(np.corrcoef(centred.T)[0, 1])
    assert of_numbers.low < of_numbers.value < of_people.value - 0.05


def test_correlations_that_nobody_knows():
    held_out, model = people(40, 0.3)
    independent = replace(model, correlation=torch.eye(2))
    found = of_correlations(independent, held_out, 5, 0)
    assert found["length and tone: model"].note == "none: it takes the attributes for independent"
    short = Scored(model.attributes["tone"].rewards, thresholds(0, 1), (1.0, 2.0, 3.0))
    unknown = replace(model, attributes=model.attributes | {"tone": short})
    assert (
        "does not know the rating 4 (tone)" in of_correlations(unknown, held_out, 5, 0)["length and tone: people"].note
    )
    wide = Scored(RewardDistribution(torch.zeros(40), torch.ones(40), "cauchy"), thresholds(-1, 0, 1), (1.0, 2, 3, 4))
    other = Scored(wide.rewards, attributes=dict.fromkeys(("length", "tone"), wide), correlation=model.correlation)
    assert "these are cauchy" in of_correlations(other, held_out, 5, 0)["length and tone: people"].note
    # Nobody rated safety, and one attribute alone does not correlate.
    alone = replace(model, attributes={"safety": short, "tone": model.attributes["tone"]})
    assert of_correlations(alone, held_out, 5, 0) == {}


# Texts and report


def test_every_form_of_the_results_has_the_attributes(tmp_path):
    rows = pairs()
    rows[0]["chosen_rating"]["a | b\n<i>"] = [1, 2, 3, 4]
    held_out, model = HeldOut.read(rows, None), scored()
    model = replace(
        model,
        attributes=model.attributes | {"depth": model.attributes["tone"]},
        correlation=torch.block_diag(model.correlation, torch.eye(1)),
    )
    found = evaluate(model, held_out, 20)
    assert found.remarks == [
        "The data say something about 'a | b\\n<i>', which the model does not know.",
        "The model knows 'depth', about which the data say nothing.",
    ]
    text, card = as_text(found, "title"), as_markdown(found, "data.jsonl")
    value = found.attributes["tone"]["rating_nll"].value
    assert "\n  attribute tone\n" in text and "\n  correlation of attributes\n" in text
    assert f"{value:.4f}" in text.split("attribute tone")[1]
    assert f"| tone: NLL of ratings | {value:.4f} |" in card
    assert "| Correlation: length and tone: model | 0.5000 | – |" in card
    page = write_report(tmp_path, "Title", [Model("ours", as_json(found))], model.rewards, held_out).read_text()
    assert "<h2>Attribute: tone</h2>" in page and f"{value:.4f}" in page.split("<h2>Attribute: tone</h2>")[1]
    assert "How opinions of attributes go together" in page and "length and tone: people, ratings as numbers" in page
    assert "<i>" not in page and "ours: The model knows &#39;depth&#39;" in page
    for words in (text, card):
        assert "which the model does not know" in words


def test_data_in_which_nobody_compared_anything(tmp_path):
    held_out, model = people(40, 0.3)
    found = evaluate(model, held_out, 10)
    assert found.metrics == {} and found.counts["comparisons"] == 0
    assert found.remarks == ["Nobody compared two answers overall."]
    assert {*found.attributes} == {"length", "tone"}
    page = write_report(tmp_path, "Title", [Model("ours", as_json(found))], model.rewards, held_out).read_text()
    assert "Attribute: length" in page and "Nobody compared two answers" in page
    assert not (tmp_path / "reliability.png").exists()


# The commands


def sentences(count: int = 36, seed: int = 0, overall: bool = True) -> list[dict]:
    rng = np.random.default_rng(seed)

    def rating() -> dict[str, list[int]]:
        return {"tone": rng.integers(1, 4, 3).tolist(), "length": rng.integers(1, 6, 3).tolist()}

    return [
        {
            "chosen": " ".join(rng.choice(WORDS, 5)),
            "rejected": " ".join(rng.choice(WORDS, 5)),
            "chosen_rating": rating(),
            "rejected_rating": rating(),
            "attribute": "safety" if number % 3 == 0 else None,
            **({} if overall else NOBODY),
        }
        for number in range(count)
    ]


def write(rows: list[dict], path: Path) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def trained(tiny_llama_dir, tmp_path_factory) -> str:
    """A model of length, safety and tone."""
    folder = tmp_path_factory.mktemp("attributes")
    trainer = disco_trainer(folder, model=tiny_llama_dir, train_dataset=Dataset.from_list(sentences()))
    trainer.train()
    with torch.no_grad():
        trainer.model.reward_head.attributes.correlation[0, 2] = 0.5
        trainer.model.reward_head.attributes.correlation[2, 0] = 0.5
    trainer.save_model(str(folder / "saved"))
    return str(folder / "saved")


def evaluated(*words: str, out: Path) -> dict:
    main(["evaluate", *words, "--output_dir", str(out), "--draws", "20"])
    return json.loads((out / "metrics.json").read_text())


def test_the_command_evaluates_every_attribute(trained, tmp_path, capsys):
    data = write(sentences(seed=1), tmp_path / "data.jsonl")
    found = evaluated(trained, data, out=tmp_path / "out")
    assert found["attributes"].keys() == {"length", "safety", "tone"} and found["attribute"] == "overall"
    assert found["correlations"]["length and tone: model"]["value"] == 0.5
    assert found["counts"]["comparisons"] == 24
    printed = capsys.readouterr().out
    alone = evaluated(trained, data, "--attribute", "tone", out=tmp_path / "tone")
    assert alone["attribute"] == "tone" and alone["attributes"] == {}
    assert alone["agreement"]["rating_nll"] == found["attributes"]["tone"]["rating_nll"]
    assert f"{alone['agreement']['rating_nll']['value']:.4f}" in printed.split("attribute tone")[1]
    assert "(attribute tone)" in capsys.readouterr().out
    held_out = HeldOut.read(sentences(seed=1), DiscoReward(trained).processing_class)
    reward = DiscoReward(trained, attribute="tone")
    whole = score_held_out(reward.model, held_out.sequences)
    locations = reward.distribution([""] * len(held_out.sequences), _texts(held_out)).location
    torch.testing.assert_close(whole.attributes["tone"].rewards.location, locations, rtol=1e-5, atol=1e-5)
    assert whole.attributes["tone"].rating_values == [1.0, 2.0, 3.0]
    assert whole.attributes["tone"].responses.thresholds.shape == (2,)


def _texts(held_out: HeldOut) -> list[str]:
    found = {}
    for item, of_item in zip(held_out.items, held_out.answers, strict=True):
        found |= dict(zip(of_item.tolist(), item.answers, strict=True))
    return [found[position] for position in range(len(held_out.sequences))]


def test_weights_are_evaluated_against_overall_judgements(trained, tmp_path):
    data = write(sentences(seed=1), tmp_path / "data.jsonl")
    weights = {"tone": 1.0, "length": -0.5}
    found = evaluated(trained, data, "--weights", json.dumps(weights), out=tmp_path / "out")
    assert found["weights"] == weights and found["attribute"] == "overall"
    held_out = HeldOut.read(sentences(seed=1), DiscoReward(trained).processing_class)
    summed = DiscoReward(trained, weights=weights).distribution([""] * len(held_out.sequences), _texts(held_out))
    margin = (summed.location[held_out.first] - summed.location[held_out.second]).numpy()
    right = (0.5 + np.sign(margin) * 0.5)[held_out.weight > 0].mean()
    assert found["metrics"]["accuracy"]["value"] == pytest.approx(right)


def test_what_cannot_be_evaluated_is_refused(trained, reward_dir, tmp_path, capsys):
    data = write(sentences(seed=1), tmp_path / "data.jsonl")
    plain = write([{"chosen": "a film", "rejected": "a day"}] * 3, tmp_path / "plain.jsonl")
    assert "the data say nothing about 'tone'" in refusal(capsys, "evaluate", trained, plain, "--attribute", "tone")
    assert "does not know the attribute 'tone'" in refusal(
        capsys, "evaluate", reward_dir(), data, "--attribute", "tone"
    )
    assert "leave out --attribute" in refusal(capsys, "evaluate", trained, data, "--attribute", "tone", "--plain")
    main(["evaluate", reward_dir(), data, "--draws", "5"])
    assert "The data say something about 'tone', which the model does not know." in capsys.readouterr().out


def test_the_card_says_what_it_is_about(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("# Mine\n")
    data = write(sentences(seed=1, overall=False), tmp_path / "data.jsonl")
    evaluated(str(tmp_path / "model"), data, "--card", out=tmp_path / "out")
    card = (tmp_path / "model" / "README.md").read_text()
    assert "| tone: NLL of ratings |" in card and "Nobody compared two answers overall." in card
    assert ".png" not in card
    evaluated(str(tmp_path / "model"), data, "--card", "--attribute", "tone", out=tmp_path / "out")
    card = (tmp_path / "model" / "README.md").read_text()
    assert "of `data.jsonl` (attribute tone)" in card and "| NLL of ratings |" in card
