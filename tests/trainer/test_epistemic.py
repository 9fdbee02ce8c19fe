"""`disco_trl.trainer.epistemic`: the posterior against the matrix it stands for, and what it is there for."""

import logging
import math
import operator

import pytest
import torch
from peft import LoraConfig
from tiny_training import disco_trainer, furthest, learnable_preferences, logged, preferences, weights
from torch import nn

from disco_trl import DiscoReward, DiscoRewardModel
from disco_trl.distributions.judgements import Judgements
from disco_trl.distributions.likelihood import Responses
from disco_trl.distributions.reward_distribution import FAMILIES, RewardDistribution, get_family
from disco_trl.models.heads import DiscoHead
from disco_trl.models.inference import score
from disco_trl.trainer.calibration import FACTOR_DEGREES, FACTOR_WIDTH, LEAST_PAIRS, recalibrate_unit
from disco_trl.trainer.epistemic import curvature, fit_posterior, prior_precision
from disco_trl.trainer.predictions import Predictions


def make_head(size: int, family: str = "normal", rank: int | None = None) -> DiscoHead:
    torch.manual_seed(0)
    kind = get_family(family)
    head = DiscoHead.convert(nn.Linear(size, 1, bias=False), kind.unit_scale, None, len(kind.shape_names))
    head.add_epistemic(rank or size)
    return head


def errors_of(head: DiscoHead, states: torch.Tensor) -> torch.Tensor:
    """Standard deviations `(...)` of the locations of hidden states `(..., H)`."""
    return head.epistemic(states).norm(dim=-1)


def simulate(head: DiscoHead, pairs: int, family: str = "normal", spread: torch.Tensor | None = None) -> Predictions:
    """Forced choices between answers whose true weight is the head's own."""
    generator = torch.Generator().manual_seed(1)
    size = head.in_features
    states = torch.randn(pairs, 2, size, generator=generator) * (torch.ones(size) if spread is None else spread)
    with torch.no_grad():
        location = head(states).squeeze(-1)
    noise = get_family(family).unit_scale * torch.randn(pairs, 2, generator=generator)
    swap = (location + noise).diff(dim=-1).squeeze(-1) > 0
    states[swap], location[swap] = states[swap].flip(1), location[swap].flip(1)
    said = Judgements.forced_choices(pairs, torch.device("cpu")).table
    shape, ratings = torch.zeros(pairs, 2, len(get_family(family).shape_names)), torch.zeros(pairs, 2, 0)
    alone = torch.full((pairs, 2), -1)
    return Predictions(states, states, location, shape, said, ratings, said[:, :0], alone)


@pytest.mark.parametrize("name", FAMILIES)
def test_curvature_is_the_second_derivative(name):
    family = get_family(name)
    location = torch.tensor([[0.4, -0.3], [0.1, 0.2], [-1.0, 0.6]], dtype=torch.float64)
    scale = torch.tensor([[0.9, 1.1], [1.0, 1.3], [0.7, 0.8]], dtype=torch.float64)
    shape = family.shape_from_raw(torch.zeros(3, 2, len(family.shape_names), dtype=torch.float64))
    shape = shape if family.shape_names else None
    judgements = Judgements.forced_choices(3, torch.device("cpu"))
    found = curvature(family, location, scale, shape, judgements, Responses())

    step = 1e-4
    sides = (
        RewardDistribution(location[:, side], scale[:, side], family, None if shape is None else shape[:, side])
        for side in (0, 1)
    )
    difference = operator.sub(*sides)
    values = [-(difference + shift).log_prob_exceeds() for shift in (-step, 0, step)]
    second = ((values[0] - 2 * values[1] + values[2]) / step**2).clamp_min(0)
    assert found[:, 0, 0] == pytest.approx(second, abs=1e-5)
    assert found[:, 0, 1] == pytest.approx(-second, abs=1e-5)


def test_posterior_is_the_inverse_of_the_precision():
    head = make_head(6)
    predictions = simulate(head, 400)
    fit_posterior(head, get_family("normal"), predictions)
    found = head.epistemic

    features = ((predictions.hidden_states - found.mean) / found.unit).double()
    scale = torch.full((400, 2), get_family("normal").unit_scale, dtype=torch.float64)
    judgements = Judgements.of_table(predictions.said)
    bends = curvature(get_family("normal"), predictions.location.double(), scale, None, judgements, Responses())
    precision = torch.einsum("pih,pij,pjk->hk", features, bends, features)
    precision += torch.eye(6) / found.prior_variance.double()
    x = torch.randn(10, 6)
    phi = ((x - found.mean) / found.unit).double()
    expected = torch.einsum("bh,hk,bk->b", phi, precision.inverse(), phi).sqrt()
    assert found(x).norm(dim=-1) == pytest.approx(expected.float(), rel=1e-4)


def test_posterior_covers_the_truth():
    """Weights drawn from the prior, data drawn from the weights: the posterior's z-scores of the truth are N(0, 1)."""
    size, pairs, scores, differences = 8, 300, [], []
    family = get_family("logistic")
    for seed in range(40):
        head = make_head(size, "logistic")
        generator = torch.Generator().manual_seed(seed)
        truth = torch.randn(size, generator=generator)
        difference = torch.randn(pairs, size, generator=generator)
        wins = torch.rand(pairs, generator=generator) < torch.sigmoid(difference @ truth)
        difference = torch.where(wins[:, None], difference, -difference)
        weight = torch.zeros(size, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight], line_search_fn="strong_wolfe")

        def loss(weight=weight, difference=difference, optimizer=optimizer):
            optimizer.zero_grad()
            value = -torch.nn.functional.logsigmoid(difference @ weight).sum() + weight.square().sum() / 2
            value.backward()
            return value

        optimizer.step(loss)
        with torch.no_grad():
            head.weight.copy_(weight[None])
        states = torch.stack([difference / 2, -difference / 2], dim=1)
        location = (states @ weight).detach()
        said = Judgements.forced_choices(pairs, torch.device("cpu")).table
        none, alone = torch.zeros(pairs, 2, 0), torch.full((pairs, 2), -1)
        predictions = Predictions(states, states, location, none, said, none, said[:, :0], alone)
        fit_posterior(head, family, predictions)
        probe = torch.randn(20, size, generator=generator)
        error = (probe - head.epistemic.mean) @ (weight.detach() - truth)
        scores.append(error / errors_of(head, probe))
        # Two answers to a prompt look alike, so most of what is not known about them is the same.
        other = probe + 0.3 * torch.randn(20, size, generator=generator)
        rewards = [
            RewardDistribution(x @ truth, torch.ones(20), family, None, errors_of(head, x), head.epistemic(x))
            for x in (probe, other)
        ]
        spread = rewards[0].error_of_difference(rewards[1])
        differences.append((probe - other) @ (weight.detach() - truth) / spread)
        assert (spread < 0.7 * torch.hypot(*(reward.location_error for reward in rewards))).float().mean() > 0.9
    assert torch.cat(scores).square().mean().item() == pytest.approx(1, abs=0.25)
    assert torch.cat(differences).square().mean().item() == pytest.approx(1, abs=0.25)


def test_it_shrinks_with_data_as_one_over_the_root():
    head = make_head(6)
    spread = []
    for pairs in (500, 2000):
        fit_posterior(head, get_family("normal"), simulate(head, pairs))
        spread.append(errors_of(head, torch.randn(200, 6, generator=torch.Generator().manual_seed(2))).mean().item())
    assert spread[0] / spread[1] == pytest.approx(2, rel=0.15)


def test_a_sample_stands_for_all_pairs():
    head = make_head(6)
    predictions = simulate(head, 500)
    probe = torch.randn(50, 6)
    fit_posterior(head, get_family("normal"), predictions, pairs=50_000)
    many = errors_of(head, probe)
    fit_posterior(head, get_family("normal"), predictions)
    assert (errors_of(head, probe) / many).mean().item() == pytest.approx(10, rel=0.1)


def test_it_is_large_where_training_never_went():
    head = make_head(6)
    spread = torch.tensor([1.0, 1.0, 1.0, 1e-3, 1e-3, 1e-3])
    fit_posterior(head, get_family("normal"), simulate(head, 2000, spread=spread))
    familiar, strange = torch.zeros(1, 6), torch.zeros(1, 6)
    familiar[0, 0] = strange[0, 5] = 1.0
    assert errors_of(head, strange).item() > 20 * errors_of(head, familiar).item()


def test_fewer_directions_never_claim_more_certainty():
    head = make_head(12)
    spread = torch.logspace(0, -2, 12)
    probe = torch.randn(100, 12) * spread
    errors = {}
    for rank in (12, 6):
        head.add_epistemic(rank)
        fit_posterior(head, get_family("normal"), simulate(head, 1000, spread=spread))
        errors[rank] = errors_of(head, probe)
    assert (errors[6] >= errors[12] * (1 - 1e-5)).all()
    assert (errors[6] > errors[12] * 1.01).any()


def test_prior_precision_recovers_the_spread_of_the_weights():
    generator = torch.Generator().manual_seed(0)
    weight = 0.5 * torch.randn(4000, generator=generator, dtype=torch.float64)
    assert prior_precision(torch.full((4000,), 1e6, dtype=torch.float64), weight) == pytest.approx(4, rel=0.05)


# In training


TEXTS = [[5, 9, 30, 2], [7, 7, 120, 300, 41, 2], [250, 251, 252, 253, 254, 255, 2]]
RUN = {"max_steps": 30, "train_dataset": preferences(rows=120)}


def without_posterior(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state.items() if ".epistemic." not in name}


@pytest.fixture(params=["full", "lora"])
def trained(request, tmp_path, tiny_llama_dir, tiny_tokenizer):
    def run(**options):
        peft_config = LoraConfig(r=2, target_modules="all-linear") if request.param == "lora" else None
        options = {"model": tiny_llama_dir, "processing_class": tiny_tokenizer, "peft_config": peft_config, **options}
        trainer = disco_trainer(tmp_path / "run", **RUN, **options)
        trainer.train()
        return trainer

    return run


def test_training_leaves_a_posterior_and_nothing_else_behind(trained, tmp_path, tiny_tokenizer):
    trainer = trained(epistemic=True)
    rewards = score(trainer.model, TEXTS)
    assert (rewards.location_error > 0).all() and len(set(rewards.location_error.tolist())) == 3
    plain = trained()
    assert plain._reward_model.reward_head.epistemic is None and score(plain.model, TEXTS).location_error is None
    assert furthest(without_posterior(weights(trainer.model)), weights(plain.model)) == 0
    assert logged(trainer, "loss") == logged(plain, "loss")

    trainer.save_model(str(tmp_path / "saved"))
    again = score(DiscoRewardModel.from_pretrained(tmp_path / "saved"), TEXTS)
    torch.testing.assert_close(again.location_error, rewards.location_error)


def test_transforms_and_columns_use_it(trained, tmp_path, tiny_tokenizer):
    trainer = trained(epistemic=True)
    trainer.save_model(str(tmp_path / "saved"))
    model = DiscoRewardModel.from_pretrained(tmp_path / "saved")
    reward = DiscoReward(model, tiny_tokenizer, "lower_bound", k=2.0, total=True)
    found = reward.distribution([""], ["good"])
    total = torch.hypot(found.scale, found.location_error)
    assert reward([""], ["good"]) == pytest.approx((found.location - 2 * total).tolist(), abs=1e-5)
    row = reward.map(preferences(rows=1))[0]
    assert row["location_error_chosen"] > 0 and row["location_error_rejected"] > 0


def test_ppo_gets_it_at_every_token(tmp_path, tiny_llama_dir, tiny_tokenizer):
    trainer = disco_trainer(
        tmp_path / "run", model=tiny_llama_dir, processing_class=tiny_tokenizer, epistemic=True, **RUN
    )
    trainer.train()
    scalar = trainer.model.eval().as_scalar("lower_bound", k=1.0, total=True)
    inputs = torch.tensor([TEXTS[0]])
    hidden_states = trainer.model.model(inputs).last_hidden_state
    with torch.no_grad():
        found, expected = scalar.score(hidden_states)[0, -1, 0], scalar(input_ids=inputs).logits[0, 0]
    assert found.item() == pytest.approx(expected.item(), abs=1e-5)


def test_before_training_ends_nothing_is_claimed(tmp_path, tiny_llama_dir, tiny_tokenizer):
    options = {"model": tiny_llama_dir, "processing_class": tiny_tokenizer, "epistemic": True, **RUN}
    saving = {"save_strategy": "steps", "save_steps": 10}
    trainer = disco_trainer(tmp_path / "run", **options, **saving)
    trainer.train()
    middle = DiscoRewardModel.from_pretrained(tmp_path / "run" / "checkpoint-10")
    assert middle.reward_head.epistemic is not None and score(middle, TEXTS).location_error is None

    resumed = disco_trainer(tmp_path / "again", **options, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-10"))
    assert resumed._memory.seen == trainer._memory.seen == len(trainer.train_dataset)
    assert furthest(weights(resumed.model), weights(trainer.model)) < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_the_unit_is_the_likeliest_with_the_errors_counted(name):
    head, family = make_head(12, name), get_family(name)
    predictions = simulate(head, 300, name)
    fit_posterior(head, family, predictions)
    states = predictions.hidden_states
    before, errors = head.weight.detach().clone(), head.epistemic(states).double()

    def log_posterior(factor: float) -> float:
        with torch.no_grad():
            output = head(states, full_output=True)
            location = factor * (states @ before.T).squeeze(-1).double()
        shape = None if output.raw_shape is None else family.shape_from_raw(output.raw_shape.double())
        sides = [
            RewardDistribution(
                location[:, side],
                output.scale[:, side, 0].double(),
                name,
                None if shape is None else shape[:, side],
                errors[:, side].norm(dim=-1),
                errors[:, side],
            )
            for side in (0, 1)
        ]
        prior = -(FACTOR_DEGREES + 1) / 2 * math.log1p((math.log(factor) / FACTOR_WIDTH) ** 2 / FACTOR_DEGREES)
        return sides[0].log_prob_greater(sides[1]).sum().item() + prior

    factor = recalibrate_unit(head, family, predictions)
    assert factor > 0.999  # the errors alone would make the probabilities more modest than the choices are
    torch.testing.assert_close(head.weight.detach(), factor * before)
    # The posterior follows the locations, until it is fitted again.
    torch.testing.assert_close(head.epistemic(states).double(), factor * errors, rtol=1e-4, atol=1e-5)
    assert log_posterior(factor) > max(map(log_posterior, (factor * 0.9, factor * 1.1, 1.0))) - 0.01


def test_a_calibrated_run_counts_the_errors_once(tmp_path, tiny_llama_dir, tiny_tokenizer):
    options = {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 8, "learning_rate": 3e-3}
    trainer = disco_trainer(
        tmp_path,
        model=tiny_llama_dir,
        processing_class=tiny_tokenizer,
        train_dataset=learnable_preferences(LEAST_PAIRS + 88),
        epistemic=True,
        **options,
    )
    trainer.train()
    logs = trainer.state.log_history
    (calibrated,) = (log["calibration_factor"] for log in logs if "calibration_factor" in log)
    name = "calibration_factor_with_errors"
    (counted,) = (log[name] for log in logs if name in log)
    assert counted > calibrated > 0
    assert trainer._memory.factors["overall"] == counted
    assert trainer._head_fits.fits[-1].metrics == {name: counted}
    # What is kept has gone along with the head; its latest predictions are nearly what the head says now.
    predictions = trainer._memory.predictions()[slice(-8, None)]
    with torch.no_grad():
        now = trainer.model.score(predictions.hidden_states).squeeze(-1)
    torch.testing.assert_close(predictions.location, now, rtol=0.05, atol=0.05)


def test_other_weights_than_those_of_the_end_get_none(tmp_path, tiny_llama_dir, tiny_tokenizer, caplog):
    options = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 10}
    options |= {"eval_strategy": "steps", "eval_steps": 10, "eval_dataset": preferences(rows=8, seed=1)}
    trainer = disco_trainer(
        tmp_path, model=tiny_llama_dir, processing_class=tiny_tokenizer, epistemic=True, **options, **RUN
    )
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "The epistemic uncertainty is not fitted: load_best_model_at_end" in caplog.text
    assert score(trainer.model, TEXTS).location_error is None


def test_pairs_of_later_epochs_are_not_news(tmp_path, tiny_llama_dir, tiny_tokenizer):
    def error(epochs: int) -> float:
        run = {**RUN, "max_steps": -1, "num_train_epochs": epochs, "learning_rate": 1e-9}
        trainer = disco_trainer(
            tmp_path / str(epochs), model=tiny_llama_dir, processing_class=tiny_tokenizer, epistemic=True, **run
        )
        trainer.train()
        return score(trainer.model, TEXTS).location_error.mean().item()

    assert error(3) == pytest.approx(error(1), rel=0.05)
