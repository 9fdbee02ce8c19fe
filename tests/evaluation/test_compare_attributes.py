"""`disco-trl compare` on data about several attributes, and what is made of its runs."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import refusal
from datasets import Dataset
from safetensors.torch import load_file
from scipy import stats
from test_attributes import NOBODY, people, sentences, write
from test_compare import figures_of

from disco_trl.cli.main import main
from disco_trl.distributions.likelihood import Responses
from disco_trl.distributions.reward_distribution import RewardDistribution
from disco_trl.evaluation.compare import RUN_FILE, Result, Variant, parse_settings
from disco_trl.evaluation.compare_run import FIGURES_FILE, Run
from disco_trl.evaluation.compare_run import main as run_once
from disco_trl.evaluation.controls import check_judged, with_soft_labels
from disco_trl.evaluation.held_out import HeldOut
from disco_trl.evaluation.ratings import rating_losses
from disco_trl.evaluation.scored import Scored
from disco_trl.evaluation.verdicts import attribute_tables, compare, compare_attributes, mean_over_seeds, verdict_table


VARIANTS = ["bradley-terry", "normal", 'normal:attributes=["tone"]']


@pytest.fixture(scope="module")
def compared(tiny_llama_dir, tmp_path_factory) -> tuple[list[str], Path]:
    """A comparison in which two of three variants know attributes, as its command line and its folder."""
    data = tmp_path_factory.mktemp("compare") / "data"
    data.mkdir()
    write(sentences(), data / "train.jsonl")
    write(sentences(seed=1), data / "test.jsonl")
    out = data.parent / "out"
    settings = ["max_steps=4", "learning_rate=0.01", "bf16=false"]
    # The runs are done here, one after another in this process, and the command continues where they have ended.
    for variant in map(Variant.parse, VARIANTS):
        run = Run(
            variant.base, "trl", variant.applied(parse_settings(settings, "--set")), 0, tiny_llama_dir, str(data),
            None, "train", "test", None, None, 0, "auto", False, 0, str(out / f"{variant.folder}-0"),
        )  # fmt: skip
        Path(run.output).mkdir(parents=True)
        specification = Path(run.output) / RUN_FILE
        specification.write_text(json.dumps(asdict(run)))
        run_once(str(specification))
    arguments = ["compare", tiny_llama_dir, str(data), str(out), "--lora_r", "0", "--variants", *VARIANTS]
    arguments += ["--set", *settings]
    main(arguments)
    return arguments, out


def test_each_variant_is_evaluated_in_what_it_knows(compared):
    _, out = compared
    theirs, whole, part = (
        figures_of(out, run) for run in ("bradley-terry-0", "normal-0", "normal_attributes=__tone__-0")
    )
    assert theirs["attributes"] == theirs["known"] == {}
    assert "The data say something about 'tone', which the model does not know." in theirs["remarks"]
    assert whole["attributes"].keys() == whole["known"].keys() == {"length", "safety", "tone"}
    assert whole["remarks"] == [] and part["known"].keys() == {"tone"}
    assert whole["known"]["tone"]["rating_values"] == [1, 2, 3] and len(whole["known"]["tone"]["thresholds"]) == 2
    assert whole["known"]["safety"] == {
        "file": "rewards-1.safetensors", "tie_width": None, "thresholds": None, "rating_values": [],
    }  # fmt: skip
    assert load_file(out / "normal-0" / "rewards-2.safetensors")["location"].shape == (72,)
    # Bradley–Terry reads what was said overall: two rows of three.
    assert theirs["counts"]["comparisons"] == 24


def test_tables_and_report_have_the_attributes(compared):
    _, out = compared
    tables, page = (out / "table.md").read_text(), (out / "report.html").read_text()
    of_tone = tables.split("| tone | seeds | NLL of ratings |")[1].split("\n\n")[0].splitlines()
    value = figures_of(out, "normal-0")["attributes"]["tone"]["rating_nll"]["value"]
    assert of_tone[2].startswith("| bradley-terry | 1 | – | – |")
    assert of_tone[3].startswith(f"| normal | 1 | {value:.3f} |")
    difference = tables.split("| tone, less normal | seeds |")[1].splitlines()[2]
    assert difference.startswith('| normal:attributes=["tone"] | 1 | ') and f"{value:.4f}" in page
    assert "| safety, less" not in tables  # a single variant knows it
    assert "bradley-terry: The data say something about 'safety'" in tables
    assert "<h2>Attribute: tone</h2>" in page and "<h2>Differences in tone, less normal</h2>" in page


def test_runs_of_an_earlier_version_are_refused(compared, tmp_path):
    arguments, out = compared
    file = out / "normal-0" / FIGURES_FILE
    before = file.read_text()
    try:
        for name in ("tie_width", "known"):
            figures = json.loads(before)
            del figures[name]
            file.write_text(json.dumps(figures))
            with pytest.raises(
                SystemExit, match=f"normal-0/metrics.json has no '{name}', as an earlier .*; remove the"
            ):
                main(arguments)
    finally:
        file.write_text(before)


def result(name: str, seed: int, model: Scored, figures: dict | None = None) -> Result:
    empty = {group: {} for group in ("metrics", "benchmark", "agreement", "attributes", "correlations")}
    return Result(
        Variant.parse(name), seed, {"tie_width": None} | empty | (figures or {}), model.rewards, model.attributes
    )


def test_the_difference_in_ratings_is_that_of_their_likelihoods():
    held_out, truth = people(400, 0.3)
    generator = torch.Generator().manual_seed(1)

    known = truth.attributes["tone"]
    location = known.rewards.location + 0.7 * torch.randn(400, generator=generator, dtype=torch.float64)
    blurred = replace(known, rewards=known.rewards.replace(location=location))
    worse = Scored(truth.rewards, attributes={"tone": blurred})
    models = {"bradley-terry": Scored(truth.rewards), "cauchy": worse, "normal": truth}
    runs = [result(name, seed, model) for name, model in models.items() for seed in (0, 1)]
    # Nobody compared two answers.
    assert compare(runs, held_out) == {}
    found = compare_attributes(runs, held_out)
    assert [*found] == ["tone, less cauchy"] and found["tone, less cauchy"].keys() == {"normal"}
    verdict = found["tone, less cauchy"]["normal"]["rating_nll"]
    ours, theirs = (rating_losses(one, held_out.about("tone"))[1] for one in (known, blurred))
    assert verdict.word == "better" and verdict.seeds == 2
    assert verdict.mean == pytest.approx((ours - theirs).mean())
    assert verdict.low < verdict.mean < verdict.high < 0
    table = verdict_table(found["tone, less cauchy"], "tone, less cauchy").splitlines()
    assert table[0] == "| tone, less cauchy | seeds | NLL of ratings |" and table[2].startswith(
        "| normal | 2 | better: −"
    )


def test_the_difference_in_comparisons_has_the_tie_width_of_the_attribute():
    rows = [
        {"chosen_ids": [2 * i], "rejected_ids": [2 * i + 1], "attribute": "safety", "tie": i % 5 == 0}
        for i in range(30)
    ]
    held_out = HeldOut.read(rows, None)
    rewards = RewardDistribution(torch.linspace(1, 0, 60).double(), torch.ones(60).double(), "normal")

    def knows(width: float) -> Scored:
        responses = Responses(tie_width=torch.tensor(width, dtype=torch.float64))
        return Scored(rewards, attributes={"safety": Scored(rewards, responses)})

    def nll(width: float) -> float:
        """A share of the first answer of P(D > δ) + ½ P(|D| < δ), with D ~ N(1 / 59, 2)."""
        cdf = stats.norm(0, np.sqrt(2)).cdf
        first, second = ((cdf(margin - width) + cdf(margin + width)) / 2 for margin in (1 / 59, -1 / 59))
        return -(24 * np.log(first) + 6 * (np.log(first) + np.log(second)) / 2) / 30

    found = compare_attributes([result("normal", 0, knows(0.5)), result("cauchy", 0, knows(2.0))], held_out)
    assert found["safety, less normal"]["cauchy"]["nll"].mean == pytest.approx(nll(2.0) - nll(0.5), abs=1e-9)


def test_means_over_seeds_of_each_attribute():
    held_out, truth = people(40, 0.3)
    assert held_out.attributes == ["length", "tone"]

    def figures(value: float) -> dict:
        number = {"value": value, "low": None, "high": None}
        return {"attributes": {"tone": {"rating_nll": number}}, "correlations": {"length and tone: model": number}}

    runs = [result("normal", seed, truth, figures(value)) for seed, value in enumerate((1.25, 1.75))]
    merged = mean_over_seeds(runs)
    assert merged["attributes"]["tone"]["rating_nll"] == {"value": 1.5, "low": 1.25, "high": 1.75}
    assert merged["correlations"]["length and tone: model"]["value"] == 1.5
    assert runs[0].figures["attributes"]["tone"]["rating_nll"]["value"] == 1.25
    of_tone, of_pairs = attribute_tables([*runs, result("bradley-terry", 0, Scored(truth.rewards))])
    assert of_tone.splitlines()[0] == "| tone | seeds | NLL of ratings |"
    assert of_tone.splitlines()[2:] == ["| normal | 2 | 1.500 (1.250 to 1.750) |", "| bradley-terry | 1 | – |"]
    assert of_pairs.splitlines()[0] == "| correlation | seeds | length and tone: model |"


# Bradley–Terry reads overall judgements


def test_bradley_terry_needs_overall_judgements(tiny_llama_dir, tmp_path, capsys):
    rows = Dataset.from_list([row | NOBODY for row in sentences(6)])
    with pytest.raises(
        ValueError, match=r"bradley-terry-soft learns from overall judgements, .* 'length', 'tone'; leave"
    ):
        check_judged(rows, "bradley-terry-soft")
    check_judged(rows, "normal")
    check_judged(Dataset.from_list(sentences(6)), "bradley-terry")
    check_judged(Dataset.from_list([{"chosen": "a", "rejected": "b"}]), "bradley-terry")
    for name in ("train", "test"):
        write(sentences(6, overall=False), tmp_path / f"{name}.jsonl")
    said = refusal(capsys, "compare", tiny_llama_dir, str(tmp_path), str(tmp_path / "out"))
    assert "leave it out of --variants" in said and not (tmp_path / "out").exists()


def test_attributes_are_no_setting_of_a_control():
    with pytest.raises(ValueError, match="attributes is what makes it bradley-terry-epistemic"):
        Variant.parse('bradley-terry-epistemic:attributes=["tone"]')
    assert Variant.parse('normal:attributes=["tone","length"]').settings == {"attributes": ["tone", "length"]}


def test_strengths_in_an_attribute_are_no_labels_of_the_overall_judgement():
    rows = [
        {"chosen": "a", "rejected": "b", "preference_strength": 1, "attribute": None},
        {"chosen": "c", "rejected": "d", "preference_strength": 3, "attribute": "safety"},
    ]
    found = with_soft_labels(Dataset.from_list(rows), "grades").to_list()
    assert found[0]["preference_probability"] == pytest.approx(1 / (1 + np.exp(-3)))
    assert found[1]["preference_probability"] is None and found[1]["attribute"] == "safety"
