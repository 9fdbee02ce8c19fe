"""The unit of the reward (the gauge): the likelihood does not determine it, the scale head fixes it by construction.

Multiplying all locations and scales by the same number changes no probability. `ScaleHead` subtracts a running mean of
the training rows' hidden states from each hidden state before it applies its weight. The log scales, in the family's
unit, then have mean 0 for every weight. The trainer updates the running mean.

The tests use a problem with known true values. An answer consists of two tokens, one for its quality and one for how
much people disagree about it, and a pair is decided by one draw from each answer's normal distribution. A tiny Llama
learns the problem in seconds.

One test runs this file under a launcher (`torchrun --nproc_per_node 2 tests/trainer/test_gauge.py OUTPUT ROWS`). It
then trains on each process and writes what was logged.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny_training import disco_trainer, logged
from transformers import LlamaConfig, LlamaForSequenceClassification

from disco_trl.models.scale_head import ScaleHead


MEANS = np.linspace(-2, 2, 8)
DEVIATIONS = np.array([0.3, 3.0])
FIRST_MEAN, FIRST_DEVIATION, END = 10, 30, 2  # token ids
# All possible answers, shape (16, 3), with their true locations and scales
ANSWERS = torch.tensor([[FIRST_MEAN + i, FIRST_DEVIATION + j, END] for i in range(8) for j in range(2)])
TRUE_LOCATION, TRUE_SCALE = np.repeat(MEANS, 2), np.tile(DEVIATIONS, 8)


def votes(pairs: int, seed: int = 0) -> Dataset:
    rng = np.random.default_rng(seed)
    mean, deviation = rng.integers(0, 8, (pairs, 2)), rng.integers(0, 2, (pairs, 2))
    rewards = MEANS[mean] + DEVIATIONS[deviation] * rng.standard_normal((pairs, 2))
    ids = np.stack([FIRST_MEAN + mean, FIRST_DEVIATION + deviation, np.full_like(mean, END)], axis=-1)
    row, winner = np.arange(pairs), rewards.argmax(axis=1)
    return Dataset.from_dict({"chosen_ids": ids[row, winner].tolist(), "rejected_ids": ids[row, 1 - winner].tolist()})


def tiny_llama(seed: int = 0, hidden_size: int = 16) -> LlamaForSequenceClassification:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=0,
        num_labels=1,
    )
    return LlamaForSequenceClassification(config)


@torch.no_grad()
def rewards_of_all_answers(model):
    return model.eval().reward_distribution(input_ids=ANSWERS)


def log_scales(model) -> np.ndarray:
    """Log scales of all answers, relative to the family's unit."""
    return torch.log(rewards_of_all_answers(model).scale / model.scale_head.unit_scale).numpy()


def trainer_of(folder, tokenizer, *, seed: int = 0, **options):
    settings = {"per_device_train_batch_size": 32, "max_steps": 300, "learning_rate": 5e-3, "logging_steps": 1000}
    settings |= {"model": tiny_llama(seed), "train_dataset": votes(9600, seed)}
    # A scale that is fitted when training ends has no time to drift.
    settings |= {"scale_training": "joint", "scale_layer": 0, "calibrate": False} | options
    return disco_trainer(folder, processing_class=tokenizer, **settings)


# With and without the gauge


@pytest.fixture(scope="module")
def runs(tmp_path_factory, _session_tokenizer):
    """Runs with the unit fixed and free, whose initial locations are 0.1 and 4 times their usual size."""
    found = {}
    for held in (True, False):
        for factor in (0.1, 4.0):
            trainer = trainer_of(tmp_path_factory.mktemp("run"), _session_tokenizer)
            trainer.model.score.weight.data *= factor
            with pytest.MonkeyPatch.context() as patch:
                if not held:
                    # The mean hidden state stays at zero, so that all scales can move together.
                    patch.setattr(ScaleHead, "track", lambda *args, **kwargs: None)
                trainer.train()
            location = rewards_of_all_answers(trainer.model).location.numpy()
            found[held, factor] = np.polyfit(TRUE_LOCATION, location, 1)[0], log_scales(trainer.model)
    return found


def test_let_go_location_and_scale_drift_together(runs):
    (small_slope, small), (large_slope, large) = runs[False, 0.1], runs[False, 4.0]
    # The same problem has two solutions, whose scales and locations differ by a factor of more than e^0.3 = 1.35.
    assert large.mean() - small.mean() > 0.3
    assert large_slope / small_slope > 1.35
    # Votes determine only the ratio of location to scale.
    ratios = [slope / np.exp(log_scale.mean()) for slope, log_scale in runs.values()]
    assert max(ratios) / min(ratios) < 1.25


def test_held_the_geometric_mean_is_the_unit_wherever_the_rewards_start(runs):
    """The tolerance is 0.1: the mean is over about 500 rows, and the model changes while it is being computed."""
    for factor in (0.1, 4.0):
        slope, log_scale = runs[True, factor]
        assert abs(log_scale.mean()) < 0.1
        # The unit is 1.128, and the geometric mean of the true scales 0.949.
        assert slope == pytest.approx(1.07, abs=0.15)


def test_held_the_scales_differ_as_much_as_let_go(runs):
    for factor in (0.1, 4.0):
        (_, held), (_, free) = runs[True, factor], runs[False, factor]
        assert held.std() > 0.85 * free.std()
        assert np.corrcoef(held, np.log(TRUE_SCALE))[0, 1] > 0.9
        # The model learns most of the true standard deviation, log(3 / 0.3) / 2 = 1.15.
        assert held.std() > 0.8


# Neither the batch size nor the number of processes matters


def head_after(batch_size: int, rows: torch.Tensor) -> ScaleHead:
    head = ScaleHead(hidden_size=rows.shape[1], unit_scale=1.0, fixed_scale=None, device=None)
    for batch in rows.split(batch_size):
        head.track(batch, torch.zeros(len(batch), 1))
    return head


def test_the_weight_of_a_row_decays_with_the_rows_since():
    start, later = torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 5.0]])
    for batch_size in (1, 2, 16, 64):
        # Share of the first batch in the running mean after 256 more rows
        left = math.exp(-256 / 512) * math.expm1(-batch_size / 512) / math.expm1(-(256 + batch_size) / 512)
        head = head_after(batch_size, torch.cat([start.expand(batch_size, 2), later.expand(256, 2)]))
        expected = [left * 1 + (1 - left) * 3, left * -2 + (1 - left) * 5]
        assert head.mean_hidden.tolist() == pytest.approx(expected, rel=1e-4)


def test_a_row_counts_the_same_in_a_batch_of_any_size():
    rows = torch.randn(192, 16, generator=torch.Generator().manual_seed(0))
    means = [head_after(batch_size, rows).mean_hidden for batch_size in (1, 2, 16, 64)]
    # Rows of one batch have equal weights. In batches of one, the last of 64 rows weighs e^(63 / 512) - 1 = 13 % more
    # than the first.
    assert max((mean - means[0]).abs().max().item() for mean in means) < 0.02


def test_no_weight_moves_all_scales_together():
    rows = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)) + 3
    head = head_after(64, rows)
    head.weight.data = torch.tensor([[0.1, -0.2, 0.3, 0.1]])
    log_scale = torch.log(head(rows))
    assert log_scale.std() > 0.1
    # Not exactly 0, because the tanh that bounds the log scales is not linear.
    assert log_scale.mean().item() == pytest.approx(0, abs=1e-3)
    log_scale.mean().backward()
    assert head.weight.grad.abs().max() < 0.01  # the gradient of a single row is of order 1


def test_batches_of_one_pair_and_of_eight(tmp_path, tiny_tokenizer):
    """Each step has the same eight pairs, in one batch of eight or in eight batches of one."""
    ends = []
    for batch_size in (8, 1):
        trainer = trainer_of(
            tmp_path,
            tiny_tokenizer,
            max_steps=20,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=8 // batch_size,
        )
        trainer.train()
        ends.append((trainer.model.scale_head.mean_hidden, torch.from_numpy(log_scales(trainer.model))))
    (mean_hidden, log_scale), (mean_hidden_1, log_scale_1) = ends
    # Not equal: with batches of one, the mean is updated within a step.
    assert torch.allclose(mean_hidden, mean_hidden_1, atol=0.1)
    assert log_scale.std() > 0.05
    assert abs(log_scale.mean() - log_scale_1.mean()) < 0.03


def train_and_report(output: Path, batch_size: int, tokenizer) -> dict:
    """Train, return what was logged and the final head, and write it on the first process."""
    trainer = trainer_of(output, tokenizer, per_device_train_batch_size=batch_size, max_steps=12, logging_steps=1)
    trainer.train()
    report = {
        "processes": trainer.accelerator.num_processes,
        # Without the number of tokens, which depends on the processes: prefixes are shared within a process only.
        "logs": [{name: log[name] for name in log if name != "num_tokens"} for log in logged(trainer)],
        "mean_hidden": trainer.model.scale_head.mean_hidden.tolist(),
        "log_scales": log_scales(trainer.model).tolist(),
    }
    if trainer.is_world_process_zero():
        (output / "report.json").write_text(json.dumps(report))
    return report


@pytest.mark.slow
@pytest.mark.multiprocess
def test_one_process_and_two(tmp_path, tiny_tokenizer):
    (tmp_path / "two").mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", __file__]
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    run = subprocess.run(
        [*command, str(tmp_path / "two"), "4"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    two = json.loads((tmp_path / "two" / "report.json").read_text())
    (tmp_path / "one").mkdir()
    one = train_and_report(tmp_path / "one", 8, tiny_tokenizer)
    assert (one["processes"], two["processes"]) == (1, 2)

    assert len(one["logs"]) == len(two["logs"]) == 13
    for one_log, two_log in zip(one["logs"], two["logs"], strict=True):
        assert two_log == pytest.approx(one_log, rel=1e-4, abs=1e-5)
    assert np.std(one["log_scales"]) > 0.01
    assert two["log_scales"] == pytest.approx(one["log_scales"], abs=1e-5)
    assert two["mean_hidden"] == pytest.approx(one["mean_hidden"], abs=1e-5)


# Where no gauge is needed


def test_a_fixed_scale_has_no_gauge(tmp_path, tiny_tokenizer):
    trainer = trainer_of(tmp_path, tiny_tokenizer, fixed_scale=0.5, max_steps=2, logging_steps=1)
    assert not trainer.model.scale_head.state_dict()
    trainer.train()
    for step in logged(trainer)[:2]:
        assert step["loss"] == pytest.approx(step["nll"], abs=1e-6)  # there is no other term
        assert step["scale_min"] == step["scale_mean"] == step["scale_max"] == 0.5
    assert np.allclose(rewards_of_all_answers(trainer.model).scale.numpy(), 0.5)


def test_evaluation_leaves_the_mean_alone(tmp_path, tiny_tokenizer):
    trainer = trainer_of(tmp_path, tiny_tokenizer, max_steps=2, eval_dataset=votes(32, seed=1))
    trainer.train()
    before = trainer.model.scale_head.mean_hidden.clone()
    assert before.any()
    trainer.evaluate()
    assert torch.equal(trainer.model.scale_head.mean_hidden, before)


if __name__ == "__main__":
    from conftest import build_tokenizer  # also sets the tests' environment variables

    train_and_report(Path(sys.argv[1]), int(sys.argv[2]), build_tokenizer())
