"""Calibration at the end of training: known truths are recovered, and runs keep, save and resume what it needs."""

import math

import pytest
import torch
from datasets import Dataset
from tiny_training import SMALL_RUN, preferences
from torch import nn
from transformers import AutoModelForSequenceClassification, TrainerCallback

from disco_trl import DiscoRewardConfig, DiscoRewardTrainer
from disco_trl.distributions.judgements import Judgements
from disco_trl.distributions.likelihood import Responses
from disco_trl.distributions.reward_distribution import RewardDistribution, get_family
from disco_trl.evaluation.metrics import spearman
from disco_trl.models.heads import DiscoHead
from disco_trl.models.inference import score
from disco_trl.trainer.calibration import calibrate
from disco_trl.trainer.predictions import MOST_PAIRS, PredictionMemory, Predictions


# Predictions


def world(
    pairs: int, family: str, overconfidence: float, bias: bool = False
) -> tuple[DiscoHead, Predictions, torch.Tensor]:
    """A head whose locations are a factor too large and whose scale is untrained, its predictions, and the truth."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(pairs, 2, 16, generator=generator) * torch.logspace(-1, 1, 16) + 3
    location_row, scale_row = torch.randn(2, 16, generator=generator) / torch.logspace(-1, 1, 16) / 4
    # Told apart: one half of the features is the location's, the other the scale's
    location_row[8:], scale_row[:8] = 0, 0
    unit = get_family(family).unit_scale
    head = DiscoHead.convert(nn.Linear(16, 1, bias=bias), unit, None)
    with torch.no_grad():
        head.scale.mean_hidden.copy_(hidden.flatten(0, 1).mean(dim=0))
        head.scale.rows_seen.fill_(1)
        head.weight.copy_(overconfidence * location_row[None])
        if bias:
            head.bias.fill_(0.5)
        location = (hidden @ location_row) * 2
        head.weight.mul_(2)
        scale = unit * torch.exp((hidden - head.scale.mean_hidden) @ scale_row)
        drawn = RewardDistribution(location, scale, family).sample(generator=generator)
    wins = (drawn[:, 0] > drawn[:, 1]).float()
    zeros = torch.zeros(pairs)
    said = torch.stack([wins, 1 - wins, zeros, zeros, zeros, zeros + 1], dim=-1)
    predicted = (hidden @ head.weight[0]).detach()
    alone = torch.full((pairs, 2), -1)
    return head, Predictions(hidden, predicted, hidden.new_zeros(pairs, 2, 0), said, alone), scale


@pytest.mark.parametrize(
    ("family", "bias"), [("normal", False), ("normal", True), ("cauchy", False), ("laplace", False)]
)
def test_factor_and_scale_are_found(family, bias):
    head, predictions, scale = world(6000, family, overconfidence=1.6, bias=bias)
    before = head.weight.clone()
    factor = calibrate(head, get_family(family), predictions, Responses())
    assert factor == pytest.approx(1 / 1.6, rel=0.08)
    torch.testing.assert_close(head.weight, before * factor)
    if bias:
        assert head.bias.item() == pytest.approx(0.5 * factor)
    hidden = predictions.hidden_states.flatten(0, 1)
    found = head.scale(hidden).detach()
    assert spearman(found[:, 0], scale.flatten()) > 0.9
    # The gauge: the geometric mean of the scales is the unit.
    assert (found / head.scale.unit_scale).log().mean().item() == pytest.approx(0, abs=0.05)


def test_votes_without_a_scale_to_learn_leave_it_almost_alone():
    head, predictions, _ = world(2000, "normal", overconfidence=1.0)
    coin = (torch.rand(2000, generator=torch.Generator().manual_seed(1)) < 0.5).float()
    predictions.said[:, 0], predictions.said[:, 1] = coin, 1 - coin
    factor = calibrate(head, get_family("normal"), predictions, Responses())
    assert abs(factor) < 0.1  # nothing that was predicted came true
    assert (head.scale(predictions.hidden_states.flatten(0, 1)) / head.scale.unit_scale).log().std() < 0.1


def test_hindsight():
    hidden = torch.arange(12.0).reshape(3, 2, 2)
    shape = -hidden[..., :1]
    said = torch.rand(3, 6, generator=torch.Generator().manual_seed(0))
    # The first pair's chosen answer is the last one's rejected; two that are alone are not the same.
    answers = torch.tensor([[7, 0], [-1, 0], [-1, 7]])
    later = Predictions(hidden, hidden[..., 0], shape, said, answers).in_hindsight()
    last = hidden.flatten(0, 1)[[5, 3, 2, 3, 4, 5]].reshape(3, 2, 2)
    expected = Predictions(last, last[..., 0], -last[..., :1], said, answers)
    torch.testing.assert_close(vars(later), vars(expected), rtol=0, atol=0)


def test_hindsight_finds_the_scale_where_answers_come_again():
    # The same 300 answers in other pairs, again and again; the first predictions of them are far off.
    _, predictions, scale = world(6000, "normal", overconfidence=1.0)
    generator = torch.Generator().manual_seed(3)
    answers = torch.randint(300, (6000, 2), generator=generator)
    hidden = predictions.hidden_states.flatten(0, 1)[answers]
    scale = scale.flatten()[answers]
    location = predictions.location.flatten()[answers]
    drawn = RewardDistribution(location, scale, "normal").sample(generator=generator)
    wins = (drawn[:, 0] > drawn[:, 1]).float()
    predictions.said[:, 0], predictions.said[:, 1] = wins, 1 - wins
    error = torch.linspace(6, 0, 6000)[:, None] * torch.randn(6000, 2, generator=generator)
    found = []
    for known in (answers, torch.full_like(answers, -1)):
        learner = world(1, "normal", overconfidence=1.0)[0]
        learner.scale.mean_hidden.copy_(hidden.flatten(0, 1).mean(dim=0))
        pairs = Predictions(hidden, location + error, predictions.raw_shape, predictions.said, known)
        calibrate(learner, get_family("normal"), pairs, Responses())
        found.append(spearman(learner.scale(hidden.flatten(0, 1)).detach()[:, 0], scale.flatten()))
    assert found[0] > 0.9
    assert found[1] < found[0] - 0.1


def test_the_memory_keeps_the_latest(tmp_path):
    memory = PredictionMemory()
    assert memory.predictions() is None
    for start in range(0, MOST_PAIRS + 1000, 100):
        numbers = torch.arange(start, start + 100).float()
        hidden = torch.stack([numbers, numbers]).reshape(200, 1).expand(200, 3)
        judgements = Judgements.forced_choices(100, torch.device("cpu"), margin=numbers)
        memory.add(hidden, -hidden[:, :1], None, judgements, hidden[:, 0].long())
        assert memory.seen == start + 100
    kept = memory.predictions()
    assert MOST_PAIRS <= len(kept) < MOST_PAIRS + 100
    # Chosen and rejected of each pair side by side, oldest first, and the last one is the last that came
    assert kept.location[-1].tolist() == [-(start + 99.0)] * 2
    torch.testing.assert_close(kept.hidden_states[:, 0, 0], -kept.location[:, 1])
    torch.testing.assert_close(kept.said[:, 4], kept.hidden_states[:, 1, 2])
    assert kept.said[:, 4].diff().unique().tolist() == [1.0]
    assert torch.equal(kept.answers.float(), kept.hidden_states[..., 0])

    memory.save(tmp_path / "memory.safetensors")
    other = PredictionMemory()
    other.load(tmp_path / "memory.safetensors")
    assert other.seen == memory.seen
    for one in (memory, other):
        one.add(torch.zeros(2, 3), torch.zeros(2, 1), None, Judgements.forced_choices(1, torch.device("cpu")))
    torch.testing.assert_close(vars(other.predictions()), vars(memory.predictions()), rtol=0, atol=0)
    assert other.predictions().answers[-1].tolist() == [-1, -1]


# Training


def run(model: str, path, rows: int = 600, dataset: Dataset | None = None, callbacks=None, resume=None, **options):
    settings = {**SMALL_RUN, "max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 40, **options}
    trainer = DiscoRewardTrainer(
        model,
        DiscoRewardConfig(str(path), **settings),
        train_dataset=preferences(rows=rows) if dataset is None else dataset,
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def factors(trainer) -> list[float]:
    return [log["calibration_factor"] for log in trainer.state.log_history if "calibration_factor" in log]


def test_a_run_ends_with_it(tiny_llama_dir, tmp_path):
    calibrated = run(tiny_llama_dir, tmp_path / "one")
    plain = run(tiny_llama_dir, tmp_path / "two", calibrate=False)
    (factor,) = factors(calibrated)
    assert factors(plain) == []
    assert math.isfinite(factor)
    torch.testing.assert_close(calibrated.model.score.weight, plain.model.score.weight * factor)
    assert not torch.equal(calibrated.model.score.scale.weight, plain.model.score.scale.weight)
    kept = calibrated._memory.predictions()
    assert len(kept) == len(calibrated.train_dataset)
    ids = [tuple(row[side]) for row in calibrated.train_dataset for side in ("chosen_ids", "rejected_ids")]
    assert len(kept.answers.unique()) == len(set(ids))
    calibrated.save_model()
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "one", num_labels=1)
    location = score(calibrated.model, [[5, 6, 7]]).location
    assert stock(torch.tensor([[5, 6, 7]])).logits[0, 0].item() == pytest.approx(location.item(), abs=1e-6)


def test_an_adapter_is_calibrated_too(tiny_llama_dir, tmp_path):
    from peft import LoraConfig

    from disco_trl import DiscoRewardModel

    trainer = DiscoRewardTrainer(
        tiny_llama_dir,
        DiscoRewardConfig(
            str(tmp_path), **{**SMALL_RUN, "max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 40}
        ),
        train_dataset=preferences(rows=600),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    trainer.train()
    assert len(factors(trainer)) == 1
    trainer.save_model()
    ours, loaded = score(trainer.model, [[5, 6, 7]]), score(DiscoRewardModel.from_pretrained(tmp_path), [[5, 6, 7]])
    torch.testing.assert_close((ours.location, ours.scale), (loaded.location, loaded.scale), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"num_train_epochs": 2},
        {"fixed_scale": 1.0},
        {"rows": 500},
        {"location_error": True},
    ],
    ids=str,
)
def test_where_it_is_left_out(tiny_llama_dir, tmp_path, options):
    assert factors(run(tiny_llama_dir, tmp_path, **options)) == []


def test_a_stream_is_calibrated(tiny_llama_dir, tmp_path):
    stream = preferences(rows=600).to_iterable_dataset()
    assert len(factors(run(tiny_llama_dir, tmp_path, dataset=stream, max_steps=14))) == 1
    # Two passes are not.
    assert factors(run(tiny_llama_dir, tmp_path, dataset=stream, max_steps=30)) == []


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def test_a_resumed_run_ends_the_same(tiny_llama_dir, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 5}
    straight = run(tiny_llama_dir, tmp_path / "one", **options)
    run(tiny_llama_dir, tmp_path / "two", callbacks=[StopAt(5)], **options)
    resumed = run(tiny_llama_dir, tmp_path / "two", resume=str(tmp_path / "two" / "checkpoint-5"), **options)
    assert factors(straight) == factors(resumed)
    torch.testing.assert_close(resumed.model.state_dict(), straight.model.state_dict(), rtol=0, atol=0)
