"""
What a run ends with: the head that was fitted to ratings and votes, its moments, its evaluation, and one line.

One test runs this file under a launcher (`torchrun --nproc_per_node 2 tests/trainer/test_head_fit.py FOLDER PASSES
MODEL`). It then trains, and each process writes the head and the log that it ends with.
"""

import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from test_gauge import (
    ANSWERS,
    DEVIATIONS,
    END,
    FIRST_DEVIATION,
    FIRST_MEAN,
    MEANS,
    TRUE_LOCATION,
    TRUE_SCALE,
    tiny_llama,
)
from tiny_training import disco_trainer, learnable_preferences, preferences

from disco_trl.evaluation.metrics import spearman


THRESHOLDS = np.array([-2.0, -0.7, 0.7, 2.0])


def judged(pairs: int, seed: int, votes: bool) -> Dataset:
    """Pairs with one rating of each answer, from 1 to 5, and with one vote each or none."""
    rng = np.random.default_rng(seed)
    mean, deviation = rng.integers(0, 8, (pairs, 2)), rng.integers(0, 2, (pairs, 2))
    ids = np.stack([FIRST_MEAN + mean, FIRST_DEVIATION + deviation, np.full_like(mean, END)], axis=-1)
    drawn = MEANS[mean] + DEVIATIONS[deviation] * rng.standard_normal((2, pairs, 2))
    ratings = np.digitize(drawn[0], THRESHOLDS) + 1
    row, winner = np.arange(pairs), drawn[1].argmax(axis=1)
    columns = {
        f"{side}_{name}": values[row, of_side].tolist()
        for side, of_side in (("chosen", winner), ("rejected", 1 - winner))
        for name, values in (("ids", ids), ("rating", ratings))
    }
    if not votes:
        columns |= {f"{side}_votes": [0] * pairs for side in ("chosen", "rejected")}
    return Dataset.from_dict(columns)


@pytest.fixture(scope="module", params=["ratings", "votes and ratings"])
def trained(request, tmp_path_factory, _session_tokenizer):
    """A run on one rating of each answer, with an evaluation before it ends, and with what is fitted then."""
    votes = request.param == "votes and ratings"
    return train(tmp_path_factory.mktemp("run"), _session_tokenizer, votes, batch_size=32)


def train(folder, tokenizer, votes: bool, batch_size: int):
    trainer = disco_trainer(
        folder,
        model=tiny_llama(),
        processing_class=tokenizer,
        train_dataset=judged(2400, 0, votes),
        eval_dataset=judged(400, 1, votes),
        eval_strategy="epoch",
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=200,
        max_steps=-1,
        num_train_epochs=1,
        learning_rate=5e-3,
        logging_steps=1000,
        epistemic=not votes,
    )
    trainer.train()
    trainer.save_model()
    return trainer


def train_twice(folder, tokenizer, model: str):
    """A run of two passes, for which pairs are set aside."""
    data = learnable_preferences(1400)
    trainer = disco_trainer(
        folder,
        model=model,
        processing_class=tokenizer,
        train_dataset=data,
        eval_dataset=data.select(range(40)),
        eval_strategy="epoch",
        per_device_train_batch_size=8,
        max_steps=-1,
        num_train_epochs=2,
        learning_rate=5e-3,
        logging_steps=1000,
        epistemic=True,
    )
    assert len(trainer._unseen) == 140 and len(trainer.train_dataset) == 1260
    trainer.train()
    return trainer


def test_calibration_keeps_what_ratings_taught_of_the_scale(trained):
    found = trained.model.eval().reward_distribution(input_ids=ANSWERS)
    assert spearman(found.scale.detach(), torch.from_numpy(TRUE_SCALE)) > 0.8
    assert spearman(found.location.detach(), torch.from_numpy(TRUE_LOCATION)) > 0.9


def test_the_head_that_is_saved_is_the_one_evaluated_last(trained):
    evaluations = [entry["eval_loss"] for entry in trained.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == 2
    # Thresholds go along with the locations: without that, the loss of votes and ratings rises by much. (It may rise
    # by a little, as the model's own error is fitted to which of two ratings is higher.)
    assert evaluations[1] < evaluations[0] + 0.05
    assert trained.evaluate()["eval_loss"] == pytest.approx(evaluations[1], abs=1e-6)
    assert trained.state.best_metric is None
    card = (trained._output_dir / "README.md").read_text()
    assert f"| eval_loss | {evaluations[1]:.4g} |" in card
    assert f"multiplied by\n{trained._memory.factors['overall']:.3g}." in card


def test_the_posterior_knows_what_ratings_say(trained):
    if not trained.args.epistemic:
        pytest.skip("this run has no posterior")
    found = trained.model.eval().reward_distribution(input_ids=ANSWERS)
    slope, shift = np.polyfit(TRUE_LOCATION, found.location.detach().numpy(), 1)
    wrong = np.std(found.location.detach().numpy() - slope * TRUE_LOCATION - shift)
    # The last layer's share of the error. With the ratings forgotten it was in the thousands.
    of_layer = found.location_error.square() - trained.model.scale_head.location_error.square()
    assert 0.1 * wrong < of_layer.mean().sqrt().item() < 3 * wrong
    # The answers of the highest and the lowest mean about which people agree: P is about 1, and was 0.500.
    assert found[[14]].prob_greater(found[[0]]).item() > 0.9


def test_the_moments_are_those_of_the_head_that_is_saved(trained):
    """Drift and shift, of answers drawn as the training data were: their ratio is the spread of each trait."""
    with torch.no_grad():
        output = trained.model.eval()(input_ids=ANSWERS)
    head = trained.model.scale_head
    traits = head.traits(output.scale_state, output.logits, output.scale)
    spread = head.var_traits.sqrt()
    torch.testing.assert_close(traits[:, :2].std(dim=0, correction=0), spread[:2], rtol=0.15, atol=0)
    assert ((traits.mean(dim=0) - head.mean_traits) / spread).abs().max() < 0.5


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"num_train_epochs": 3}, "training goes through its data 3 times"),
        ({"num_train_epochs": 2, "calibrate": True}, "training goes through its data 2 times"),
        ({}, "16 predictions are kept on the first process, and 512 are needed"),
        ({"location_error": True}, "16 predictions are kept on the first process"),
        ({"scale_training": "joint"}, "16 predictions are kept on the first process"),
        ({"calibrate": False, "scale_training": "joint"}, None),
        ({"fixed_scale": 1.0}, None),
    ],
    ids=str,
)
def test_a_run_without_calibration_says_so(tiny_llama_dir, tiny_tokenizer, tmp_path, caplog, options, line):
    options = {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 8, **options}
    with caplog.at_level(logging.WARNING):
        trainer = disco_trainer(
            tmp_path,
            model=tiny_llama_dir,
            processing_class=tiny_tokenizer,
            train_dataset=preferences(),
            eval_dataset=preferences(rows=4, seed=1),
            eval_strategy="steps",
            eval_steps=1000,
            **options,
        )
        trainer.train()
    said = [record.message for record in caplog.records if "The rewards are not calibrated: " in record.message]
    assert [line in message for message in said] == ([] if line is None else [True])
    assert all("The scale is the same for every answer" in message for message in said)
    # A scale that was learned together with the rest, and that nothing supports, has become constant, and the head is
    # evaluated again. The card names no factor.
    is_silenced = options.get("scale_training") == "joint" and line is not None
    assert sum("eval_loss" in entry for entry in trainer.state.log_history) == 1 + is_silenced
    assert trainer.model.scale_head.is_constant == (options.get("calibrate") is not False)
    trainer.create_model_card()
    assert "were calibrated" not in (tmp_path / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("passes", ["1", "2"])
def test_all_processes_end_with_the_head_that_the_first_has_fitted(tmp_path, tiny_llama_dir, passes):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", __file__]
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    run = subprocess.run(
        [*command, str(tmp_path), passes, tiny_llama_dir], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    (head, logs), (other_head, other_logs) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name, tensor in head.items():
        assert torch.equal(other_head[name], tensor), name
    assert head["epistemic.prior_variance"] > 0
    evaluations = int(passes) + 1
    for name, times in (("calibration_factor", 1), ("calibration_factor_with_errors", 1), ("eval_loss", evaluations)):
        values = [[entry[name] for entry in of_one if name in entry] for of_one in (logs, other_logs)]
        assert values[0] == values[1] and len(values[0]) == times, name


if __name__ == "__main__":
    from conftest import build_tokenizer  # also sets the tests' environment variables

    if sys.argv[2] == "1":
        trainer = train(Path(sys.argv[1]), build_tokenizer(), votes=False, batch_size=16)
    else:
        trainer = train_twice(Path(sys.argv[1]), build_tokenizer(), sys.argv[3])
    result = trainer._reward_model.reward_head.state_dict(), trainer.state.log_history
    torch.save(result, Path(sys.argv[1], f"{trainer.args.process_index}.pt"))
