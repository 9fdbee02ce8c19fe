"""`DiscoRewardModel.as_scalar`: a transformed reward as a module for PPO."""

import pytest
import torch
from reward_rows import close
from tiny_models import load, lora


@pytest.mark.parametrize(("transform", "options"), [("mean", {}), ("lower_bound", {"k": 1}), ("quantile", {"q": 0.3})])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_as_scalar(transform, options, architecture, disco_dir):
    model = load(disco_dir(architecture))
    scalar = model.as_scalar(transform, **options)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    backbone = getattr(scalar, scalar.base_model_prefix)
    assert backbone is getattr(model, model.base_model_prefix)
    assert scalar.config is model.config
    with torch.no_grad():
        hidden_states = backbone(input_ids=ids).last_hidden_state
        scores = scalar.score(hidden_states)
        reward = model.reward_distribution(input_ids=ids)
        output = scalar(input_ids=ids)
    k = {"mean": 0, "lower_bound": 1, "quantile": 0.5244005}[transform]  # Φ⁻¹(0.7)
    expected = reward.location - k * reward.scale
    assert scores.shape == (2, 4, 1)
    assert scores[:, -1, 0].tolist() == close(expected)
    assert output.logits.shape == (2, 1)
    assert output.logits[:, 0].tolist() == close(expected)
    # The model's own parameters, each of them once
    assert {id(parameter) for parameter in scalar.parameters()} == {id(parameter) for parameter in model.parameters()}
    assert not any(module.training for module in scalar.modules())


def test_as_scalar_of_an_adapter(tiny_llama_dir):
    model = lora(load(tiny_llama_dir))
    ids = torch.tensor([[5, 6, 7, 2]])
    with torch.no_grad():
        reward = model.get_base_model().reward_distribution(input_ids=ids)
        scalar = model.as_scalar("lower_bound", k=3.0)
        hidden_states = getattr(scalar, scalar.base_model_prefix)(input_ids=ids).last_hidden_state
        assert scalar.score(hidden_states)[:, -1, 0].tolist() == close(reward.location - 3 * reward.scale)


def test_as_scalar_has_the_mode_of_its_model(reward_dir):
    assert all(module.training for module in load(reward_dir()).train().as_scalar().modules())


@pytest.mark.parametrize(
    ("architecture", "settings", "transform", "options", "message"),
    [
        ("llama", {}, "win_rate", {}, "PPO scores each answer alone"),
        ("llama", {}, "lower_bound", {"k": -1}, "k=-1 must be"),
        ("llama", {"reward_family": "cauchy"}, "certainty_equivalent", {}, "-∞"),
        # PPO transforms the rewards at all tokens of a text, where the scale may be anything.
        ("llama", {"reward_family": "logistic"}, "certainty_equivalent", {"beta": 5.0}, "-∞"),
        ("bert", {}, "lower_bound", {}, "is an encoder"),
        ("modernbert", {}, "mean", {}, "is an encoder"),
    ],
)
def test_as_scalar_refuses(architecture, settings, transform, options, message, disco_dir):
    with pytest.raises(ValueError, match=message):
        load(disco_dir(architecture, **settings)).as_scalar(transform, **options)


def test_a_certainty_equivalent_that_is_always_finite(disco_dir):
    scalar = load(disco_dir("llama", reward_family="logistic", fixed_scale=0.5)).as_scalar("certainty_equivalent")
    assert scalar(input_ids=torch.tensor([[5, 6, 2]])).logits.isfinite().all()
