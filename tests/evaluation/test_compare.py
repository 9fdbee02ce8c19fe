"""`disco-trl compare`: real runs by TRL's trainer and ours in processes of their own, and what is made of them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_evaluate import read_pairs, rewards_of

from disco_trl.cli.main import main
from disco_trl.evaluation.compare import Result, Variant
from disco_trl.evaluation.verdicts import compare, mean_over_seeds, verdict_table


def write_data(folder: Path, graded: bool = False) -> Path:
    """Pairs in which the answer with more of the word "good" is preferred."""
    generator = np.random.default_rng(0)
    folder.mkdir()
    for split, count in (("train", 64), ("test", 30)):
        rows = []
        for _ in range(count):
            words = [" ".join(generator.choice(["good", "bad", "plain"], 5)) for _ in range(2)]
            chosen, rejected = sorted(words, key=lambda text: -text.count("good"))
            row: dict[str, Any] = {"prompt": "Say:", "chosen": f" {chosen}!", "rejected": f" {rejected}."}
            if graded:
                row["preference_strength"] = min(chosen.count("good") - rejected.count("good"), 2)
            rows.append(json.dumps(row) + "\n")
        (folder / f"{split}.jsonl").write_text("".join(rows))
    return folder


@pytest.fixture(scope="module")
def compared(tmp_path_factory, tiny_llama_dir) -> tuple[list[str], Path]:
    """A comparison that was made, as its command line and its folder."""
    data = write_data(tmp_path_factory.mktemp("compare") / "data")
    out = data.parent / "out"
    arguments = ["compare", tiny_llama_dir, str(data), str(out), "--lora_r", "4"]
    arguments += ["--variants", "bradley-terry", "normal"]
    arguments += ["--set", "learning_rate=0.01", "logging_steps=2", "bf16=false"]
    main(arguments)
    return arguments, out


def figures_of(out: Path, run: str) -> dict:
    return json.loads((out / run / "metrics.json").read_text())


def test_each_is_trained_by_whom_it_should_be(compared):
    _, out = compared
    theirs, ours = (figures_of(out, run) for run in ("bradley-terry-0", "normal-0"))
    assert (theirs["trainer"], ours["trainer"]) == ("trl.RewardTrainer", "disco_trl.DiscoRewardTrainer")
    assert (theirs["family"], ours["family"]) == ("logistic", "normal")
    for figures in (theirs, ours):
        assert figures["pairs"] == 64 and figures["counts"]["comparisons"] == 30
        losses = [loss for _, loss in figures["history"]]
        assert len(losses) == 12 and losses[-1] < losses[0]
        assert figures["minutes"] > 0 and 0.1 < figures["peak_gib"] < 8
    scales = load_file(out / "bradley-terry-0" / "rewards.safetensors")["scale"]
    assert scales == pytest.approx(2**-0.5)


def test_table_and_report(compared):
    _, out = compared
    table = (out / "table.md").read_text().splitlines()
    assert table[0].startswith("| | seeds | Accuracy |") and table[0].endswith("| minutes | peak GiB |")
    accuracy = figures_of(out, "normal-0")["metrics"]["accuracy"]["value"]
    assert table[3].startswith(f"| normal | 1 | {accuracy:.3f} |")
    assert table[5].startswith("| less Bradley–Terry | seeds | NLL | Accuracy |")
    assert table[7].startswith("| normal | 1 | ")
    assert table[9].startswith("With one seed, the verdicts are about these runs, not about the methods")
    page = (out / "report.html").read_text()
    assert "2 runs compared" in page and f"{accuracy:.4f}" in page
    for cell in table[7].split(" | ")[2:]:
        word, said = cell.removesuffix(" |").split(": ")
        assert word in ("better", "worse", "undecided") and said in page
    assert {path.name for path in out.glob("*.png")} == {"reliability.png", "risk-coverage.png", "learning.png"}


def test_goes_on_where_it_was_and_outlives_a_failure(compared, capsys):
    arguments, out = compared
    before = (out / "normal-0" / "metrics.json").stat().st_mtime_ns
    at = arguments.index("normal") + 1
    main([*arguments[:at], "normal:max_length=1", *arguments[at:]])
    assert (out / "normal-0" / "metrics.json").stat().st_mtime_ns == before
    printed = capsys.readouterr()
    assert "normal:max_length=1, seed 0 failed:" in printed.err and "max_length" in printed.err.split("failed:")[1]
    assert "| normal | " in printed.out and "normal:max_length=1" not in printed.out
    assert "normal:max_length=1, seed 0 failed" in (out / "report.html").read_text()


def test_a_finished_run_with_other_settings_is_not_taken_for_this_one(compared):
    arguments, _ = compared
    other = [word.replace("learning_rate=0.01", "learning_rate=0.02") for word in arguments]
    with pytest.raises(SystemExit, match="another settings; remove it, or choose another --output_dir"):
        main(other)


def test_a_model_that_knows_strengths_is_evaluated_on_them(tmp_path, tiny_llama_dir, runs_in_this_process):
    data = write_data(tmp_path / "data", graded=True)
    arguments = ["compare", tiny_llama_dir, str(data), str(tmp_path / "out"), "--lora_r", "4"]
    main([*arguments, "--variants", "bradley-terry", "normal", "--set", "learning_rate=0.01", "bf16=false"])
    theirs, ours = (figures_of(tmp_path / "out", run)["agreement"] for run in ("bradley-terry-0", "normal-0"))
    assert theirs["grade_nll"]["note"] == "none: the model knows no strengths of preference"
    # Five strengths from −2 to 2 that are equally probable
    assert 0 < ours["sign_nll"]["value"] < ours["grade_nll"]["value"] < np.log(5)


def test_bradley_terry_in_our_trainer_is_that_of_trls(compared, tmp_path):
    arguments, out = compared
    again = [*arguments[:3], str(tmp_path), *arguments[4:]]
    again.remove("normal")
    main([*again, "--bradley_terry", "disco"])
    ours = figures_of(tmp_path, "bradley-terry-0")
    assert ours["trainer"] == "disco_trl.DiscoRewardTrainer"
    theirs = load_file(out / "bradley-terry-0" / "rewards.safetensors")
    rewards = load_file(tmp_path / "bradley-terry-0" / "rewards.safetensors")
    assert theirs.keys() == rewards.keys()
    for name, tensor in theirs.items():
        assert torch.allclose(rewards[name], tensor, atol=1e-3), name


def test_search_finds_settings_for_all_seeds(compared, tmp_path):
    common, _ = compared
    arguments = [*common[:3], str(tmp_path), "--lora_r", "4", "--search", "2"]
    arguments += ["--variants", "bradley-terry", "--seeds", "0", "1", "--set", "bf16=false", "num_train_epochs=1"]
    main(arguments)
    found = figures_of(tmp_path, "bradley-terry-search")
    assert len(found["trials"]) == 2 and found["nll"] == min(trial["nll"] for trial in found["trials"])
    for seed in (0, 1):
        settings = json.loads((tmp_path / f"bradley-terry-{seed}" / "run.json").read_text())["settings"]
        assert settings == {"bf16": False, "num_train_epochs": 1, **found["best"]}
        assert figures_of(tmp_path, f"bradley-terry-{seed}")["trainer"] == "trl.RewardTrainer"
    assert f"learning_rate={found['best']['learning_rate']}" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variants", "gamma"], "'gamma' is none of bradley-terry, .*-soft, normal"),
        (["--variants", "normal:temperature=2"], "'temperature=2' is no setting"),
        (["--variants", "normal:label_noise"], "'label_noise' is no setting"),
        (["--variants", "bradley-terry:learning_rate=1"], "what the others are compared with"),
        (["--dataset_test_split", "validation"], "validation"),
    ],
)
def test_errors_come_before_training(arguments, message, compared, tmp_path, capsys):
    common, _ = compared
    with pytest.raises(SystemExit, match=message):
        main([*common[:3], str(tmp_path / "out"), *arguments])
    assert not (tmp_path / "out").exists()


def compare_refuses(model: str, data: str, tmp_path: Path, *more: str) -> str:
    """What is said of data that cannot be read, before anything is trained."""
    with pytest.raises(SystemExit) as caught:
        main(["compare", model, data, str(tmp_path / "out"), *more])
    assert not (tmp_path / "out").exists()
    return str(caught.value)


@pytest.mark.parametrize("name", ["runs{1}", "{}", "{seed!r}", "{seed", "%s{seed.__class__}"])
def test_the_name_of_the_data_is_no_format(name, tiny_llama_dir, tmp_path):
    assert f"{tmp_path}/{name}: there is no such" in compare_refuses(tiny_llama_dir, f"{tmp_path}/{name}", tmp_path)


def test_seed_in_the_name_of_the_data_is_the_seed(tiny_llama_dir, tmp_path):
    said = compare_refuses(tiny_llama_dir, f"{tmp_path}/{{1}}-{{seed}}", tmp_path, "--seeds", "7")
    assert f"{tmp_path}/{{1}}-7: there is no such" in said


def test_a_configuration_of_the_data(tiny_llama_dir, tmp_path):
    for name in ("small", "large"):
        write_data(tmp_path / name)
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: {name}/{split}.jsonl\n" for split in splits)
        for name, splits in (("small", ["train"]), ("large", ["train", "test"]))
    )
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert "test" in compare_refuses(tiny_llama_dir, str(tmp_path), tmp_path, "--dataset_config", "small")
    said = compare_refuses(
        tiny_llama_dir, str(tmp_path), tmp_path, "--dataset_config", "large", "--dataset_test_split", "dev"
    )
    assert "dev" in said and "test" in said and "train" in said
    assert "'huge' not found" in compare_refuses(tiny_llama_dir, str(tmp_path), tmp_path, "--dataset_config", "huge")


def test_settings_are_of_the_type_that_they_look_like():
    variant = Variant.parse("logistic:prefix_sharing=False,label_noise=0.05,learning_rate=1e-4,weigh_by=vote")
    assert variant.base == "logistic"
    expected = {"prefix_sharing": False, "label_noise": 0.05, "learning_rate": 1e-4, "weigh_by": "vote"}
    assert variant.settings == expected


def result(name: str, seed: int, held_out, location: np.ndarray, scale: float) -> Result:
    figures = {"metrics": {"nll": {"value": scale, "low": 0, "high": 1}}, "tie_width": None}
    figures |= {group: {} for group in ("benchmark", "agreement", "attributes", "correlations")}
    return Result(Variant.parse(name), seed, figures, rewards_of(held_out, location, scale))


def test_the_better_of_two_models_is_called_better():
    generator = np.random.default_rng(0)
    location = generator.normal(size=100)
    pairs = generator.integers(100, size=(3000, 2))
    people = generator.normal(scale=0.7, size=(3000, 2))
    held_out = read_pairs(pairs, location[pairs[:, 0]] + people[:, 0] > location[pairs[:, 1]] + people[:, 1])
    blurred = location + generator.normal(scale=0.7, size=100)
    truth, worse = (
        [result(name, seed, held_out, values, 0.7) for seed in (0, 1)]
        for name, values in (("normal", location), ("bradley-terry", blurred))
    )
    verdicts = compare([*truth, *worse], held_out)["normal"]
    assert {name: found.word for name, found in verdicts.items()} == dict.fromkeys(
        ("nll", "accuracy", "brier"), "better"
    )
    assert verdicts["nll"].low < verdicts["nll"].mean < verdicts["nll"].high < 0 < verdicts["accuracy"].low
    turned = [replace(result, variant=truth[0].variant) for result in worse]
    as_reference = [replace(result, variant=worse[0].variant) for result in truth]
    worst = compare([*turned, *as_reference], held_out)["normal"]
    assert {name: found.word for name, found in worst.items()} == dict.fromkeys(("nll", "accuracy", "brier"), "worse")
    same = [result("normal", seed, held_out, blurred, 0.7) for seed in (0, 1)]
    for found in compare([*same, *worse], held_out)["normal"].values():
        assert str(found) == "undecided: +0.0000 (+0.0000 to +0.0000)"


def test_the_difference_of_accuracies_leaves_ties_out_as_the_accuracy_does():
    pairs = np.array([[0, 1], [2, 3], [4, 5], [6, 7]])
    held_out = read_pairs(pairs, [1.0, 1.0, 0.5, 0.5])
    ours = result("normal", 0, held_out, np.array([1.0, 0, 1, 0, 1, 0, 1, 0]), 0.7)
    theirs = result("bradley-terry", 0, held_out, np.array([1.0, 0, 0, 1, 1, 0, 1, 0]), 0.7)
    # Right in two of two against one of two.
    assert compare([ours, theirs], held_out)["normal"]["accuracy"].mean == pytest.approx(0.5)


def test_one_seed_is_named():
    held_out = read_pairs(np.array([[0, 1], [2, 3]]), [1.0, 1.0])
    runs = [
        result(name, seed, held_out, np.arange(4.0), 0.7)
        for name, seeds in (("bradley-terry", 2), ("normal", 2), ("cauchy", 1))
        for seed in range(seeds)
    ]
    said = verdict_table(compare(runs, held_out)).splitlines()[-1]
    assert said.startswith("With one seed, the verdicts of cauchy are about these runs")
    assert "With one seed" not in verdict_table(compare(runs[:4], held_out))


def test_mean_over_seeds():
    held_out = read_pairs(np.array([[0, 1]]), np.array([1.0]))
    runs = [result("normal", seed, held_out, np.zeros(2), scale) for seed, scale in enumerate((0.2, 0.4))]
    merged = mean_over_seeds(runs)["metrics"]["nll"]
    assert merged == pytest.approx({"value": 0.3, "low": 0.2, "high": 0.4})
    assert runs[0].figures["metrics"]["nll"]["value"] == 0.2 and torch.equal(runs[0].rewards.location, torch.zeros(2))
