"""Calibration at the end of training: known truths are recovered, and runs keep, save and resume what it needs."""

import math
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from tiny_training import SMALL_RUN, learnable_preferences
from torch import nn
from transformers import AutoModelForSequenceClassification, TrainerCallback

from disco_trl import DiscoRewardConfig, DiscoRewardTrainer
from disco_trl.distributions.judgements import Judgements
from disco_trl.distributions.reward_distribution import RewardDistribution, get_family
from disco_trl.evaluation.metrics import spearman
from disco_trl.models.heads import DiscoHead
from disco_trl.models.inference import score
from disco_trl.models.likelihood_head import LikelihoodHead
from disco_trl.trainer.calibration import Calibration, Dials, Signs, _comparisons_of_ratings, calibrate
from disco_trl.trainer.head_fit import NothingToFit
from disco_trl.trainer.predictions import MOST_PAIRS, PredictionMemory, Predictions
from disco_trl.trainer.rating_share import LARGEST_SHARE, share_of_ratings


# Predictions


def world(
    pairs: int, family: str, overconfidence: float, bias: bool = False, seed: int = 0
) -> tuple[DiscoHead, Predictions, torch.Tensor]:
    """A head whose locations are a factor too large and whose scale is untrained, its predictions, and the truth."""
    generator = torch.Generator().manual_seed(seed)
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
    none = hidden.new_zeros(pairs, 2, 0)
    return head, Predictions(none, hidden, predicted, none, said, none, none[:, 0], alone), scale


@pytest.mark.parametrize(
    ("family", "bias"), [("normal", False), ("normal", True), ("cauchy", False), ("laplace", False)]
)
def test_factor_and_scale_are_found(family, bias):
    head, predictions, scale = world(6000, family, overconfidence=1.6, bias=bias)
    before = head.weight.clone()
    metrics = calibrate(head, get_family(family), predictions)
    factor = metrics["calibration_factor"]
    # Both dials together: a location error takes a larger factor for the same probabilities.
    spread = math.hypot(metrics["scale_level"], metrics["model_error"] / get_family("normal").unit_scale)
    assert factor / spread == pytest.approx(1 / 1.6, rel=0.1)
    torch.testing.assert_close(head.weight, before * factor)
    if bias:
        assert head.bias.item() == pytest.approx(0.5 * factor)
    hidden = predictions.scale_states.flatten(0, 1)
    found = head.scale(hidden).detach()
    assert spearman(found[:, 0], scale.flatten()) > 0.9
    # The gauge: the geometric mean of the scales is the unit, less the model's own error.
    level = (found / head.scale.unit_scale).log().mean().exp().item()
    assert level == pytest.approx(metrics["scale_level"], rel=0.05)


def with_votes(predictions: Predictions, wins: torch.Tensor) -> Predictions:
    said = torch.stack([wins, 1 - wins, *predictions.said.T[2:]], dim=-1)
    return replace(predictions, said=said)


def test_predictions_that_say_nothing_leave_the_head_as_it_was():
    """Coin flips (a factor of 1e-8 once), votes that are all as predicted (1e10 once), rewards that never moved."""
    head, predictions, _ = world(2000, "normal", overconfidence=1.0)
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    coin = (torch.rand(2000, generator=torch.Generator().manual_seed(1)) < 0.5).float()
    as_predicted = (predictions.location[:, 0] > predictions.location[:, 1]).float()
    unmoved = 1e-6 * torch.randn(2000, 2, generator=torch.Generator().manual_seed(2))
    for pairs, reason in (
        (with_votes(predictions, coin), "1000 predictions are hardly better than chance"),
        (with_votes(predictions, as_predicted), "fits best is 100 or more"),
        (replace(predictions, location=unmoved), "1000 predictions are hardly better than chance"),
        (predictions[:500], "500 predictions are kept on the first process, and 512 are needed"),
    ):
        with pytest.raises(NothingToFit, match=reason):
            calibrate(head, get_family("normal"), pairs)
        for name, tensor in head.state_dict().items():
            assert torch.equal(tensor, before[name]), name


def test_unseen_pairs_determine_the_factor_and_the_first_pass_the_scale():
    """A model that has learned its training pairs by heart, and predicts others with locations 2.5 times too large."""
    head, predictions, scale = world(4300, "normal", overconfidence=1.0)
    in_first_pass, unseen = predictions[slice(4000)], predictions[slice(4000, None)]
    unseen = replace(unseen, location=2.5 * unseen.location)
    metrics = calibrate(head, get_family("normal"), in_first_pass, unseen)
    spread = math.hypot(metrics["scale_level"], metrics["model_error"] / get_family("normal").unit_scale)
    assert metrics["calibration_factor"] / spread == pytest.approx(1 / 2.5, rel=0.25)
    found = head.scale(unseen.scale_states.flatten(0, 1)).detach()[:, 0]
    assert spearman(found, scale[4000:].flatten()) > 0.9


@pytest.mark.parametrize("overconfidence", [2.5, 0.4])
def test_few_pairs_suffice_for_a_factor_far_from_one(overconfidence):
    head, predictions, _ = world(700, "normal", overconfidence=overconfidence)
    metrics = calibrate(head, get_family("normal"), predictions)
    spread = math.hypot(metrics["scale_level"], metrics["model_error"] / get_family("normal").unit_scale)
    assert metrics["calibration_factor"] / spread == pytest.approx(1 / overconfidence, rel=0.3)


def test_a_factor_within_its_error_is_shrunk():
    """350 predictions determine the log of the factor to 0.1 or so, which a factor of 1.1 is no sign of."""
    factors = []
    for seed in range(6):
        head, predictions, _ = world(700, "normal", overconfidence=1.0, seed=seed)
        with torch.no_grad():
            head.scale.weight.zero_()
        signs = Signs(head, get_family("normal"), predictions.recent(), torch.zeros(350, 2, dtype=torch.float64))
        likeliest = min(
            (math.exp(step / 100) for step in range(-60, 61)),
            key=lambda factor: signs.losses_of(Dials(factor)).sum().item(),
        )
        fitted, _ = signs.fit_factor(Dials())
        assert abs(math.log(fitted.factor)) <= abs(math.log(likeliest)) + 0.01
        factors.append(math.log(fitted.factor) / math.log(likeliest) if likeliest != 1 else 0)
    assert sum(factors) / len(factors) < 0.7


def test_pairs_that_share_answers_count_less():
    """The same pairs eight times over determine a factor no better than once."""
    head, predictions, _ = world(700, "normal", overconfidence=1.2)
    numbers = torch.arange(1400).view(700, 2)
    once = replace(predictions, answers=numbers)
    tensors = {name: torch.cat([tensor] * 8) for name, tensor in vars(once).items()}
    repeated = Predictions(**tensors)
    fitted = [
        Signs(head, get_family("normal"), pairs, torch.zeros(len(pairs), 2, dtype=torch.float64)).fit_factor(Dials())[
            0
        ]
        for pairs in (once, repeated[: 4 * 700])
    ]
    assert fitted[1].factor == pytest.approx(fitted[0].factor, rel=0.01)


def test_ratings_are_compared_where_nobody_compared_the_answers():
    """
    Ratings 1 and 3 against 2 and 3: of four pairs of raters 1 < 2, 1 < 3, 3 > 2 and 3 = 3, so one win to two, of four
    ratings.
    """
    first, second = torch.tensor([[1.0, 0, 1]]).double(), torch.tensor([[0.0, 1, 1]]).double()
    wins, losses = _comparisons_of_ratings(first, second)
    assert wins.item() == pytest.approx(4 / 3)
    assert losses.item() == pytest.approx(8 / 3)
    alone = torch.zeros(1, 3).double()  # nobody rated the other answer
    assert [x.item() for x in _comparisons_of_ratings(first, alone)] == [0, 0]


def rated_world(share: float, pairs: int = 1000, raters: int = 5) -> tuple[DiscoHead, Predictions]:
    """People rate answers whose levels are a share of the variance off from what is predicted; nobody compares two."""
    generator = torch.Generator().manual_seed(3)
    family = get_family("normal")
    unit, bounds = family.unit_scale, torch.tensor([-1.5, -0.5, 0.5, 1.5])
    head = DiscoHead.convert(nn.Linear(16, 1, bias=False), unit, None)
    head.likelihood = LikelihoodHead({"location_error": True, "rating_values": [1, 2, 3, 4, 5]}, unit, None)
    hidden = torch.randn(pairs, 2, 16, generator=generator)
    with torch.no_grad():
        head.weight.normal_(0, 0.2, generator=generator)
        head.scale.rows_seen.fill_(1)
    predicted = (hidden @ head.weight[0]).detach()
    level = predicted + share**0.5 * unit * torch.randn(pairs, 2, generator=generator)
    opinions = level[..., None] + (1 - share) ** 0.5 * unit * torch.randn(pairs, 2, raters, generator=generator)
    counts = nn.functional.one_hot(torch.searchsorted(bounds, opinions.contiguous()), 5).sum(dim=2).float()
    said = torch.tensor([[0.0, 0, 0, 0, 0, 1]]).expand(pairs, 6)
    none = hidden.new_zeros(pairs, 2, 0)
    return head, Predictions(none, hidden, predicted, none, said, counts, none[:, 0], torch.full((pairs, 2), -1))


def share_of(predictions: Predictions, head: DiscoHead) -> float:
    family, log_scale = get_family("normal"), torch.zeros(len(predictions), 2, dtype=torch.float64)
    return share_of_ratings(head, family, predictions, log_scale, 1.0, family.unit_scale)


@pytest.mark.parametrize("share", [0.1, 0.4, 0.8])
def test_ratings_tell_the_share_of_the_models_own_error(share):
    head, predictions = rated_world(share, pairs=250)
    assert share_of(predictions, head) == pytest.approx(share, abs=0.07)


def test_one_rating_of_each_answer_says_nothing_about_the_share():
    head, predictions = rated_world(0.2, pairs=250, raters=1)
    assert share_of(predictions, head) == pytest.approx(LARGEST_SHARE / 2, abs=0.1)


def test_an_answer_that_recurs_is_rated_once():
    """The first prediction of it counts, because the model has learned from its ratings since."""
    head, predictions = rated_world(0.4, pairs=64)
    once = replace(predictions, answers=torch.arange(128).view(64, 2))
    known = replace(once, location=once.location + 100)
    twice = Predictions(**{name: torch.cat([getattr(once, name), getattr(known, name)]) for name in vars(once)})
    assert share_of(twice, head) == pytest.approx(share_of(once, head), abs=1e-6)


def test_where_nobody_compared_ratings_split_the_variance():
    """Which of two answers is preferred says next to nothing about it. The thresholds follow."""
    head, predictions = rated_world(0.2, pairs=600)
    metrics = calibrate(head, get_family("normal"), predictions)
    unit = get_family("normal").unit_scale
    assert (metrics["model_error"] / unit) ** 2 == pytest.approx(0.2, abs=0.07)
    assert metrics["scale_level"] ** 2 == pytest.approx(0.8, abs=0.07)
    assert head.scale.is_constant
    found = head.likelihood.values()["thresholds"]
    assert found.tolist() == pytest.approx([-1.5, -0.5, 0.5, 1.5], abs=0.15)


def test_hindsight():
    hidden = torch.arange(12.0).reshape(3, 2, 2)
    shape = -hidden[..., :1]
    said = torch.rand(3, 6, generator=torch.Generator().manual_seed(0))
    # The first pair's chosen answer is the last one's rejected; two that are alone are not the same.
    answers = torch.tensor([[7, 0], [-1, 0], [-1, 7]])
    ratings, strengths = torch.rand(3, 2, 4), torch.rand(3, 6)
    rest = {"said": said, "rating_counts": ratings, "strength_counts": strengths, "answers": answers}
    later = Predictions(hidden, -hidden, hidden[..., 0], shape, **rest).in_hindsight()
    last = hidden.flatten(0, 1)[[5, 3, 2, 3, 4, 5]].reshape(3, 2, 2)
    expected = Predictions(last, -last, last[..., 0], -last[..., :1], **rest)
    torch.testing.assert_close(vars(later), vars(expected), rtol=0, atol=0)


def test_hindsight_finds_the_scale_where_answers_come_again():
    # The same 300 answers in other pairs, again and again; the first predictions of them are far off.
    _, predictions, scale = world(6000, "normal", overconfidence=1.0)
    generator = torch.Generator().manual_seed(3)
    answers = torch.randint(300, (6000, 2), generator=generator)
    hidden = predictions.scale_states.flatten(0, 1)[answers]
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
        pairs = replace(predictions, scale_states=hidden, location=location + error, answers=known)
        calibrate(learner, get_family("normal"), pairs)
        fitted = learner.scale(hidden.flatten(0, 1)).detach()[:, 0]
        found.append(0.0 if learner.scale.is_constant else spearman(fitted, scale.flatten()))
    assert found[0] > 0.9
    assert found[1] < found[0] - 0.1


def overall(location, judgements):
    """Overall rewards of a batch, and what was said about them, as a memory takes them."""
    return {"overall": (location, None)}, {"overall": judgements}


def test_the_memory_keeps_the_latest(tmp_path):
    memory = PredictionMemory({"overall": 2}, {"overall": 1}, keeps_hidden_states=True)
    assert memory.predictions() is None
    for start in range(0, MOST_PAIRS + 1000, 100):
        numbers = torch.arange(start, start + 100).float()
        hidden = torch.stack([numbers, numbers]).reshape(200, 1).expand(200, 3)
        judgements = Judgements.forced_choices(100, torch.device("cpu"), margin=numbers)
        if start:  # the first batch has no ratings
            judgements = replace(judgements, rating_counts=hidden[:, :2], strength_counts=hidden[:100, :2])
        memory.add(hidden, 2 * hidden, *overall(-hidden[:, :1], judgements), hidden[:, 0].long())
        assert memory.seen == start + 100
    kept = memory.predictions()
    assert MOST_PAIRS <= len(kept) < MOST_PAIRS + 100
    # Chosen and rejected of each pair side by side, oldest first, and the last one is the last that came
    assert kept.location[-1].tolist() == [-(start + 99.0)] * 2
    torch.testing.assert_close(kept.hidden_states[:, 0, 0], -kept.location[:, 1])
    torch.testing.assert_close(kept.said[:, 4], kept.hidden_states[:, 1, 2])
    assert kept.said[:, 4].diff().unique().tolist() == [1.0]
    # All ratings of each answer, and in the likelihood's order again: chosen sides first
    assert torch.equal(kept.rating_counts, kept.hidden_states[..., :2])
    assert torch.equal(kept.judgements.rating_counts, kept.hidden_states[..., :2].transpose(0, 1).flatten(0, 1))
    assert torch.equal(kept.answers.float(), kept.hidden_states[..., 0])
    assert torch.equal(kept.scale_states, 2 * kept.hidden_states)
    assert torch.equal(kept.judgements.strength_counts[:, 0], kept.location[:, 1].neg())

    memory.save(tmp_path / "memory.safetensors")
    other = PredictionMemory({"overall": 2}, {"overall": 1}, keeps_hidden_states=True)
    other.load(tmp_path / "memory.safetensors")
    assert other.seen == memory.seen
    for one in (memory, other):
        said = Judgements.forced_choices(1, torch.device("cpu"))
        one.add(torch.zeros(2, 3), torch.zeros(2, 3), *overall(torch.zeros(2, 1), said))
    torch.testing.assert_close(vars(other.predictions()), vars(memory.predictions()), rtol=0, atol=0)
    assert other.predictions().answers[-1].tolist() == [-1, -1]


def test_the_memory_keeps_forecasts_apart_from_later_passes(tmp_path):
    memory = PredictionMemory()
    for number in range(4):
        state = torch.full((2, 3), float(number))
        one = Judgements.forced_choices(1, torch.device("cpu"))
        memory.add(state, state, *overall(state[:, :1] + 1, one), in_advance=number < 2)
    memory.save(tmp_path / "memory.safetensors")
    loaded = PredictionMemory()
    loaded.load(tmp_path / "memory.safetensors")
    for kept in (memory, loaded):
        assert kept.seen == 4
        kept.rescale(2.0)  # each of them once, though two are in both
        assert kept.predictions().location[:, 0].tolist() == [2.0, 4.0, 6.0, 8.0]
        assert kept.forecasts().location[:, 0].tolist() == [2.0, 4.0]
        assert kept.forecasts().scale_states[:, 1, 0].tolist() == [0.0, 1.0]
        kept.clear()
        assert kept.predictions() is None and kept.forecasts() is None


def test_a_memory_without_forecasts_is_saved_and_read(tmp_path):
    """As after a run that is resumed in its second pass from a checkpoint that has no predictions."""
    memory, loaded = PredictionMemory(), PredictionMemory()
    one = Judgements.forced_choices(1, torch.device("cpu"))
    memory.add(torch.ones(2, 3), torch.ones(2, 3), *overall(torch.ones(2, 1), one), in_advance=False)
    memory.save(tmp_path / "memory.safetensors")
    loaded.load(tmp_path / "memory.safetensors")
    assert len(loaded.predictions()) == 1 and loaded.forecasts() is None


# Training


ONE_PASS = {
    **SMALL_RUN,
    "max_steps": -1,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 8,
    "learning_rate": 3e-3,
    "logging_steps": 100,
}


def run(model: str, path, rows: int = 600, dataset: Dataset | None = None, callbacks=None, resume=None, **options):
    settings = {**ONE_PASS, **options}
    trainer = DiscoRewardTrainer(
        model,
        DiscoRewardConfig(str(path), **settings),
        train_dataset=learnable_preferences(rows) if dataset is None else dataset,
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
        DiscoRewardConfig(str(tmp_path), **ONE_PASS),
        train_dataset=learnable_preferences(600),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    trainer.train()
    assert len(factors(trainer)) == 1
    trainer.save_model()
    ours, loaded = score(trainer.model, [[5, 6, 7]]), score(DiscoRewardModel.from_pretrained(tmp_path), [[5, 6, 7]])
    torch.testing.assert_close((ours.location, ours.scale), (loaded.location, loaded.scale), rtol=1e-5, atol=1e-6)


def test_a_stream_is_calibrated(tiny_llama_dir, tmp_path):
    stream = learnable_preferences(600).to_iterable_dataset()
    assert len(factors(run(tiny_llama_dir, tmp_path, dataset=stream, max_steps=72))) == 1
    # Two passes are not.
    assert factors(run(tiny_llama_dir, tmp_path, dataset=stream, max_steps=80)) == []


@pytest.mark.parametrize("epistemic", [False, True])
def test_after_several_passes_it_is_by_pairs_that_were_set_aside(tiny_llama_dir, tmp_path, caplog, epistemic):
    options = {"num_train_epochs": 5, "learning_rate": 1e-2, "epistemic": epistemic}
    options |= {"eval_strategy": "epoch", "per_device_eval_batch_size": 50}
    trainer = DiscoRewardTrainer(
        tiny_llama_dir,
        DiscoRewardConfig(str(tmp_path), **ONE_PASS | options),
        train_dataset=learnable_preferences(1500),
        eval_dataset=learnable_preferences(1900).select(range(1500, 1900)),
    )
    assert "150 of the 1,500 rows of the train dataset are not trained on" in caplog.text
    assert len(trainer.train_dataset) == 1350 and len(trainer._unseen) == 150
    trained_on, collate = set(), trainer.data_collator

    def watch(examples):
        if trainer.model.training:
            trained_on.update(example["row_index"] for example in examples)
        return collate(examples)

    trainer.data_collator = watch
    trainer.train()
    assert trained_on == set(trainer.train_dataset["row_index"])
    assert len(trainer._memory.forecasts()) == 1350
    (factor,) = factors(trainer)
    assert factor < 0.9
    before, after = [log["eval_nll"] for log in trainer.state.log_history if "eval_nll" in log][-2:]
    assert after < before + 0.005  # as far as 400 pairs can tell
    unseen = Judgements.forced_choices(150, torch.device("cpu"))
    forecasts = next(fit for fit in trainer._head_fits.fits if isinstance(fit, Calibration)).forecasts
    assert torch.equal(forecasts.said, unseen.table)
    trainer._unseen_memory = None  # what was predicted before the calibration
    kept = trainer._predict_unseen("overall")
    torch.testing.assert_close(kept.location, forecasts.location, rtol=1e-4, atol=1e-5)


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("rated", [False, True], ids=["votes", "ratings"])
def test_a_resumed_run_ends_the_same(tiny_llama_dir, tmp_path, rated):
    data = learnable_preferences(600)
    if rated:
        data = data.add_column("chosen_rating", [1.0, 3.0, 2.0] * 200).add_column("rejected_rating", [1.0, 2.0] * 300)
    options = {"dataset": data, "save_strategy": "steps", "save_steps": 40}
    straight = run(tiny_llama_dir, tmp_path / "one", **options)
    run(tiny_llama_dir, tmp_path / "two", callbacks=[StopAt(40)], **options)
    resumed = run(tiny_llama_dir, tmp_path / "two", resume=str(tmp_path / "two" / "checkpoint-40"), **options)
    assert factors(straight) == factors(resumed)
    torch.testing.assert_close(resumed.model.state_dict(), straight.model.state_dict(), rtol=0, atol=0)
