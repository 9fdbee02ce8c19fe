"""Controls of `disco-trl compare`: labels and ensembles by hand, and real runs of each control."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from test_compare import figures_of
from transformers import AutoTokenizer

from disco_trl.cli.main import main
from disco_trl.distributions.reward_distribution import RewardDistribution
from disco_trl.evaluation import compare_run
from disco_trl.evaluation.compare import Result, Variant, _check_same, launch
from disco_trl.evaluation.compare_run import Run, load_rewards
from disco_trl.evaluation.controls import CONTROLS, ensemble, soft_labels, with_soft_labels
from disco_trl.evaluation.metrics import pair_metrics


# Labels


def test_three_grades_are_one_logit_each():
    assert soft_labels(3) == pytest.approx([1 / (1 + np.exp(-1)), 1 / (1 + np.exp(-2)), 1 / (1 + np.exp(-3))])
    assert soft_labels(1) == pytest.approx([soft_labels(4)[-1]])
    assert soft_labels(20) == sorted(soft_labels(20))


ROWS = [
    {"preference_strength": [3]},
    {"preference_strength": [-1]},
    {"preference_strength": [0], "tie": True},
    {"preference_strength": [2, -1, 0, 0]},
    {"tie": True, "chosen_votes": 0, "rejected_votes": 0},
    {"tie": False},
    {"chosen_votes": 2, "rejected_votes": 1, "weight": 0.5},
    {"preference_probability": 0.3},
]


def labels_of(rows: list[dict], **options) -> list[dict]:
    names = dict.fromkeys(name for row in rows for name in row)
    texts = [
        {"chosen": f"a {number}", "rejected": f"b {number}", **{name: row.get(name) for name in names}}
        for number, row in enumerate(rows)
    ]
    return with_soft_labels(Dataset.from_list(texts), **options).to_list()


@pytest.mark.parametrize(
    ("labels", "one", "two", "three"),
    [("sign", 1.0, 1.0, 1.0), ("grades", *soft_labels(3)), ([0.6, 0.8, 0.9], 0.6, 0.8, 0.9)],
)
def test_strengths_and_ties_become_labels(labels, one, two, three):
    found = labels_of(ROWS, labels=labels)
    several = (two + (1 - one) + 0.5 + 0.5) / 4
    expected = [three, 1 - one, 0.5, several, 0.5, None, None, 0.3]
    assert [row["preference_probability"] for row in found] == [
        value if value is None else pytest.approx(value) for value in expected
    ]
    for row, before in zip(found, ROWS, strict=True):
        assert "tie" not in row and "preference_strength" not in row
        assert row["weight"] == before.get("weight")
    assert [row["chosen_votes"] for row in found] == [None, None, None, None, None, None, 2, None]
    assert found[0]["chosen"] == "a 0"


def test_labels_of_several_people_weigh_as_much_as_they():
    assert [row["weight"] for row in labels_of(ROWS, by_vote=True)] == [1, 1, 1, 4, 1, 1, 0.5, 1]


def test_rankings_and_data_without_ties_are_left_as_they_are():
    rows = [{"prompt": "Say", "completions": ["a", "b"], "ranks": [1, 1], "tie": None}, {"prompt": "Say", "tie": True}]
    found = with_soft_labels(Dataset.from_list(rows)).to_list()
    assert [row["preference_probability"] for row in found] == [None, 0.5] and found[0]["ranks"] == [1, 1]
    plain = Dataset.from_list([{"chosen": "a", "rejected": "b", "chosen_votes": 3, "rejected_votes": 1}])
    assert with_soft_labels(plain) is plain


@pytest.mark.parametrize(
    ("rows", "labels", "message"),
    [
        ([{"tie": True}], "grades", "does not have; leave out the variant"),
        ([{"preference_strength": 1}, {"preference_strength": 4}], [0.6, 0.8, 0.9], "strength 4, .* 3 grades; give"),
        ([{"preference_strength": 1}, {"preference_strength": 0.5}], "sign", "row 1, column 'preference_strength'"),
    ],
)
def test_labels_that_cannot_be_made_are_refused(rows, labels, message):
    with pytest.raises(ValueError, match=message):
        labels_of(rows, labels=labels)


# Ensembles


def members_of(count: int, seed: int = 0, size: int = 6) -> tuple[list[RewardDistribution], torch.Tensor]:
    """Members that differ in shift as well, and their locations without it."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(size, 1, generator=generator)
    location = mean + 0.3 * torch.randn(size, count, generator=generator)
    shift = 5 * torch.randn(count, generator=generator)
    scale = torch.full((size,), 2**-0.5)
    return [RewardDistribution(column + shift[i], scale, "logistic") for i, column in enumerate(location.T)], location


def test_error_of_an_ensemble_is_the_spread_of_its_members():
    members, location = members_of(4)
    found = ensemble(members)
    # The sample covariance over members, without what each is shifted by as a whole
    expected = np.cov((location - location.mean(dim=0)).double().numpy())
    factor = found.error_factor.double().numpy()
    assert found.error_factor.shape == (6, 4)
    assert factor @ factor.T == pytest.approx(expected, abs=1e-6)
    assert found.location_error.square().numpy() == pytest.approx(np.diag(expected), rel=1e-5)
    a, b = torch.triu_indices(6, 6, 1)
    difference = location[a] - location[b]
    error = found[a].error_of_difference(found[b])
    assert error.numpy() == pytest.approx(difference.std(dim=1).numpy(), rel=1e-5)
    shifts = found.location - location.mean(dim=1)
    assert shifts.numpy() == pytest.approx(np.full(6, shifts[0]), abs=1e-5)


def test_probability_of_an_ensemble_is_about_the_mean_of_its_members():
    members, location = members_of(400, seed=1)
    found = ensemble(members)
    a, b = torch.triu_indices(6, 6, 1)
    mean = torch.sigmoid(location[a] - location[b]).mean(dim=1)
    assert found[a].prob_greater(found[b]).numpy() == pytest.approx(mean.numpy(), abs=0.003)
    # It is not the probability at the mean of the locations.
    at_mean = torch.sigmoid((location[a] - location[b]).mean(dim=1))
    assert (at_mean - mean).abs().max() > 0.005
    # Members that agree have no error.
    alike = ensemble([members[0], members[0]])
    assert alike.location_error.max() < 1e-6
    assert alike[a].prob_greater(alike[b]).numpy() == pytest.approx(
        members[0][a].prob_greater(members[0][b]).numpy(), abs=1e-6
    )


# Variants


def test_controls_by_their_names():
    assert Variant.parse("bradley-terry").settings == Variant.parse("bradley-terry").of_control == {}
    assert Variant.parse("bradley-terry-epistemic").settings == {"epistemic": True}
    assert Variant.parse("bradley-terry-ensemble").of_control == {"members": 4}
    both = Variant.parse("bradley-terry-soft:labels=[0.6,0.8,1],members=3,learning_rate=1e-4")
    assert both.of_control == {"labels": [0.6, 0.8, 1], "members": 3}
    assert both.settings == {"learning_rate": 1e-4}
    assert Variant.parse("normal:rating_values=[1,2,3],calibrate=false").settings["rating_values"] == [1, 2, 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bradley-terry:members=2", "give them to a control: bradley-terry-epistemic, "),
        ("bradley-terry-ensemble:members=0", "whole number"),
        ("bradley-terry-ensemble:members=true", "whole number"),
        ("bradley-terry-ensemble:epistemic=true", "leave epistemic out"),
        ("bradley-terry-soft:labels=strong", "must be sign, grades, or a list"),
        ("bradley-terry-soft:labels=[0.9,0.6]", "ascending from 0.5 to 1"),
        ("bradley-terry-soft:labels=[0.4,0.6]", "ascending from 0.5 to 1"),
        ("bradley-terry-soft:fixed_scale=1", "what makes it bradley-terry-soft"),
        ("normal:reward_family=cauchy", "what makes it normal"),
        ("normal:members=2", "no setting"),
    ],
)
def test_variants_that_are_none(text, message):
    with pytest.raises(ValueError, match=message):
        Variant.parse(text)


def test_settings_of_the_distribution_do_not_apply_to_bradley_terry():
    common = {"learning_rate": 1e-4, "epistemic": True, "label_noise": 0.1, "weigh_by": "vote"}
    theirs = {"learning_rate": 1e-4, "weigh_by": "vote"}
    assert Variant.parse("normal").applied(common) == common
    assert Variant.parse("bradley-terry").applied(common) == theirs
    assert Variant.parse("bradley-terry-soft:label_noise=0.2").applied(common) == {**theirs, "label_noise": 0.2}
    assert Variant.parse("bradley-terry-epistemic").applied({}) == {"epistemic": True}


# Runs


def write_graded(folder: Path) -> Path:
    """Pairs in which the answer with more of the word "good" is better, by as much as it has more."""
    generator = np.random.default_rng(0)
    folder.mkdir()
    for split, count in (("train", 64), ("test", 30)):
        rows = []
        for _ in range(count):
            words = [" ".join(generator.choice(["good", "bad", "plain"], 5)) for _ in range(2)]
            strength = words[0].count("good") - words[1].count("good")
            said = {"preference_strength": int(np.clip(strength, -3, 3))} if split == "train" else {}
            if split == "test" and strength < 0:
                words.reverse()
            rows.append({"prompt": "Say:", "chosen": f" {words[0]}!", "rejected": f" {words[1]}.", **said})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_llama_dir) -> Run:
    """Specification of a run on graded pairs."""
    folder = tmp_path_factory.mktemp("controls")
    return Run(
        base="bradley-terry",
        bradley_terry="disco",
        settings={"learning_rate": 0.01, "bf16": False, "num_train_epochs": 2},
        seed=0,
        model=str(tiny_llama_dir),
        data=str(write_graded(folder / "data")),
        config=None,
        train_split="train",
        test_split="test",
        max_train=48,
        max_length=None,
        lora_r=4,
        dtype="auto",
        keep_model=False,
        search=0,
        output=str(folder / "bradley-terry-0"),
    )


def execute(run: Run) -> RewardDistribution:
    """Executes a run in this process, as `compare` does in one of its own, and returns its rewards."""
    for member in run.of_members:
        execute(member)
    folder = Path(run.output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(asdict(run)))
    compare_run.main(str(folder / "run.json"))
    return load_rewards(folder, "logistic")


def control(world: Run, text: str, **changes) -> Run:
    variant = Variant.parse(text)
    settings = variant.applied(world.settings)
    output = str(Path(world.output).with_name(f"{variant.folder}-{world.seed}"))
    return replace(world, base=variant.base, settings=settings, output=output, **variant.of_control, **changes)


@pytest.fixture(scope="module")
def plain(world) -> RewardDistribution:
    """Rewards of Bradley–Terry in our trainer."""
    return execute(world)


def test_bradley_terry_with_a_posterior_has_the_same_locations_and_knows_their_error(world, plain):
    found = execute(control(world, "bradley-terry-epistemic"))
    assert torch.equal(found.location, plain.location) and torch.equal(found.scale, plain.scale)
    assert plain.location_error is None and (found.location_error > 0).all()
    half = len(found) // 2
    ours, theirs = (rewards[:half].prob_greater(rewards[half : 2 * half]) for rewards in (found, plain))
    assert ((ours - 0.5).abs() < (theirs - 0.5).abs()).all()


@pytest.fixture(scope="module")
def of_two(world) -> tuple[Run, RewardDistribution]:
    """An ensemble of two, and its rewards."""
    run = control(world, "bradley-terry-ensemble:members=2")
    return run, execute(run)


def test_an_ensemble_is_made_of_runs_that_differ_in_the_seed(of_two, plain):
    run, found = of_two
    folders = [Path(member.output) for member in run.of_members]
    first, second = (load_rewards(folder, "logistic") for folder in folders)
    # The first member of the first seed has that seed, and trains on the same rows.
    assert torch.equal(first.location, plain.location)
    assert not torch.allclose(second.location, first.location, atol=1e-3)
    expected = ensemble([first, second])
    assert torch.equal(found.location, expected.location)
    assert torch.equal(found.error_factor, expected.error_factor)
    figures, of_members = (figures_of(Path(run.output), ""), [figures_of(folder, "") for folder in folders])
    assert figures["minutes"] == sum(one["minutes"] for one in of_members)
    assert figures["pairs"] == 48 and figures["metrics"]["nll"]["value"] > 0
    assert "location error, 50 %" in figures["scale"]
    loaded = Result.load(Variant.parse("bradley-terry-ensemble:members=2"), 0, Path(run.output))
    assert torch.equal(loaded.rewards.location_error, expected.location_error)


def test_an_ensemble_counts_ties_by_the_mean_of_its_members_tie_widths(world, tmp_path):
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        answers = [[" ".join(generator.choice(["good", "bad"], 3)) + f" {side}" for side in "ab"] for _ in range(24)]
        rows = [
            {"prompt": "Say:", "completions": row, "ranks": [2 - text.count("good") // 2 for text in row]}
            for row in answers
        ]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = control(world, "bradley-terry-ensemble:members=2", data=str(tmp_path))
    run = replace(run, output=str(tmp_path / "run"))
    rewards = execute(run)
    widths = [figures_of(Path(member.output), "")["tie_width"] for member in run.of_members]
    figures = figures_of(Path(run.output), "")
    assert figures["tie_width"] == pytest.approx(np.mean(widths)) and widths[0] != widths[1]
    held_out = compare_run.read_data(run, AutoTokenizer.from_pretrained(run.model))[1]
    nll = {width: pair_metrics(held_out.forecasts(rewards, width))["nll"] for width in (figures["tie_width"], None)}
    assert figures["metrics"]["nll"]["value"] == pytest.approx(nll[figures["tie_width"]])
    assert nll[None] != pytest.approx(nll[figures["tie_width"]])


def test_seeds_of_members_do_not_recur(world):
    runs = [replace(world, seed=seed, members=3) for seed in range(4)]
    assert [one.training_seed for run in runs for one in run.of_members] == list(range(12))
    assert {one.seed for one in runs[2].of_members} == {2}  # so that all train on the same rows
    assert [replace(world, members=3, search=2).of_members, world.of_members] == [[], []]


def test_soft_labels_are_what_is_trained_on(world, plain):
    found = execute(control(world, "bradley-terry-soft"))
    assert not torch.allclose(found.location, plain.location, atol=1e-3)
    # Certain labels pull the locations further apart.
    assert found.location.std() < plain.location.std()
    # Grades that are all certain are the signs.
    certain = execute(control(world, "bradley-terry-soft:labels=[1,1,1]"))
    assert torch.equal(certain.location, plain.location)


def test_a_run_of_before_there_were_controls_is_still_the_same(world, plain):
    specification = Path(world.output) / "run.json"
    before = json.loads(specification.read_text())
    older = {name: value for name, value in before.items() if name not in ("labels", "members", "member")}
    specification.write_text(json.dumps(older))
    try:
        _check_same(world)
        assert launch(world) is None
        with pytest.raises(ValueError, match="another members"):
            _check_same(replace(world, members=2))
    finally:
        specification.write_text(json.dumps(before))


def test_a_member_with_other_settings_is_found_before_anything_is_trained(of_two):
    run, _ = of_two
    (Path(run.output) / "metrics.json").unlink()
    _check_same(run)
    with pytest.raises(ValueError, match="member-0 holds a run with another lora_r"):
        _check_same(replace(run, lora_r=8))


@pytest.mark.slow
def test_controls_on_the_command_line(world, tmp_path, capsys, runs_in_this_process):
    arguments = ["compare", world.model, world.data, str(tmp_path), "--lora_r", "4", "--variants", "bradley-terry"]
    arguments += [name for name in CONTROLS if name not in ("bradley-terry", "bradley-terry-ensemble")]
    arguments += ["bradley-terry-ensemble:members=2", "--set", "learning_rate=0.01", "bf16=false", "epistemic=true"]
    main([*arguments, "num_train_epochs=1"])
    table = (tmp_path / "table.md").read_text()
    for name in ("bradley-terry-epistemic", "bradley-terry-soft", "bradley-terry-ensemble:members=2"):
        assert table.count(f"| {name} | 1 |") == 2, name
    member = tmp_path / "bradley-terry-ensemble_members=2-0" / "member-1"
    before = (member / "metrics.json").stat().st_mtime_ns
    # Continued where it was: the other member is missing.
    (member.with_name("member-0") / "metrics.json").unlink()
    (member.parent / "metrics.json").unlink()
    capsys.readouterr()
    main([*arguments, "num_train_epochs=1"])
    assert (member / "metrics.json").stat().st_mtime_ns == before
    assert (tmp_path / "table.md").read_text().splitlines()[0] == table.splitlines()[0]
    assert figures_of(tmp_path, "bradley-terry-ensemble_members=2-0")["counts"]["comparisons"] == 30


def test_grades_that_are_not_there_are_named_before_training(tiny_llama_dir, tmp_path):
    data = write_graded(tmp_path / "data")
    rows = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit, match="'preference_strength', which it does not have"):
        main(["compare", tiny_llama_dir, str(data), str(tmp_path / "out"), "--variants", "bradley-terry-soft"])
    assert not (tmp_path / "out").exists()
