"""The metrics that `DiscoReward` logs, and what it warns about."""

import math

import pytest
import torch
from reward_rows import COMPLETIONS, PROMPTS, close, distribution_of
from tiny_models import load, randomize_heads

from disco_trl import DiscoReward


def test_metrics_by_hand(reward_dir):
    model = randomize_heads(load(reward_dir()))
    reward = DiscoReward(model, transform="lower_bound", name="film")
    sequences = reward.tokenize(PROMPTS, COMPLETIONS)
    own = distribution_of(model, sequences)
    with torch.no_grad():
        hidden_states = torch.cat([model(input_ids=torch.tensor([ids])).pooled_hidden_state for ids in sequences])
    head = model.scale_head
    head.mean_traits.copy_(torch.tensor([0.5, 0.1, 0.2]))
    head.var_traits.copy_(torch.tensor([4.0, 0.25, 9.0]))
    head.var_hidden.fill_(2.0)
    head.rows_seen.fill_(64)

    metrics, extra = {}, {}
    reward(prompts=PROMPTS, completions=COMPLETIONS, log_metric=metrics.__setitem__, log_extra=extra.__setitem__)
    log_scale = (own.scale / (2 / math.sqrt(math.pi))).log()
    distance = ((hidden_states - head.mean_hidden).square() / 2).mean(dim=1).log()
    pairs = [(0, 2), (0, 5), (2, 5), (1, 4)]
    gaps = [abs(own.location[i] - own.location[j]).item() for i, j in pairs]
    near = [gap < math.hypot(own.scale[i], own.scale[j]) for gap, (i, j) in zip(gaps, pairs, strict=True)]
    assert metrics == pytest.approx(
        {
            "film/location/mean": own.location.mean().item(),
            "film/scale/mean": own.scale.mean().item(),
            "film/within_noise": sum(near) / 4,
            "film/scale/drift": log_scale.mean().item(),
            "film/shift/location": (own.location.mean().item() - 0.5) / 2,
            "film/shift/scale": (log_scale.mean().item() - 0.1) / 0.5,
            "film/shift/distance": (distance.mean().item() - 0.2) / 3,
        },
        rel=1e-4,
        abs=1e-5,
    )
    assert extra == {"film/location": close(own.location), "film/scale": close(own.scale)}


@pytest.mark.parametrize("settings", [{"fixed_scale": 0.5}, {}], ids=["fixed scale", "never trained"])
def test_without_training_rows_there_is_nothing_to_shift_from(settings, reward_dir, caplog):
    model = load(reward_dir(**settings))
    if not settings:
        model.scale_head.rows_seen.zero_()
    metrics = {}
    DiscoReward(model)(prompts=["a", "b"], completions=["c", "d"], log_metric=metrics.__setitem__)
    assert metrics.keys() == {"disco_mean/location/mean", "disco_mean/scale/mean"}
    assert not caplog.records


def warnings_of(caplog):
    return [record.message for record in caplog.records if record.name.startswith("disco_trl.rewards.")]


@pytest.fixture
def trained_on_short_texts(reward_dir):
    """A reward model whose head has been shown the rows of `COMPLETIONS` as its training rows."""
    model = load(reward_dir())
    reward = DiscoReward(model)
    head = model.scale_head
    with torch.no_grad():
        for tensor in (head.mean_hidden, head.var_hidden, head.mean_traits, head.var_traits, head.rows_seen):
            tensor.zero_()
        for _ in range(20):
            outputs = [model(input_ids=torch.tensor([ids])) for ids in reward.tokenize(PROMPTS, COMPLETIONS)]
            hidden_states = torch.cat([output.pooled_hidden_state for output in outputs])
            head.track(hidden_states, torch.cat([output.logits for output in outputs]))
    return model


def test_leaving_the_training_region_is_warned_of_once(trained_on_short_texts, caplog):
    reward = DiscoReward(trained_on_short_texts)
    metrics = {}
    reward(prompts=PROMPTS, completions=COMPLETIONS, log_metric=metrics.__setitem__)
    assert abs(metrics["disco_mean/shift/location"]) < 1
    assert abs(metrics["disco_mean/shift/distance"]) < 1
    assert not warnings_of(caplog)

    # Tokens whose hidden states lie elsewhere
    with torch.no_grad():
        trained_on_short_texts.model.norm.weight.mul_(10)
    for _ in range(3):
        reward(prompts=["x"] * 4, completions=["0", "1", "2", "3"], log_metric=metrics.__setitem__)
    assert max(abs(metrics[f"disco_mean/shift/{name}"]) for name in ("location", "scale", "distance")) > 3
    (warning,) = warnings_of(caplog)
    assert "standard deviations from that of the answers that the reward model was trained on" in warning


def moments_of(model, rows_seen: float) -> None:
    """Moments in which the location of an answer of the tests lies 3.5 standard deviations off."""
    head = model.scale_head
    head.rows_seen.fill_(rows_seen)
    location = DiscoReward(model).distribution(prompts=["x"], completions=["0"]).location.item()
    head.mean_traits[0], head.var_traits[0] = location - 3.5, 1.0
    head.var_traits[1:] = 1e6


@pytest.mark.parametrize(("answers", "rows_seen", "warns"), [(1, 2000, False), (64, 2000, True), (64, 40, False)])
def test_chance_is_not_warned_of(answers, rows_seen, warns, trained_on_short_texts, caplog):
    """Of one answer in a thousand the location lies 3.5 deviations off; of 64 together only if they are different."""
    moments_of(trained_on_short_texts, rows_seen)
    reward, metrics = DiscoReward(trained_on_short_texts), {}
    reward(prompts=["x"] * answers, completions=["0"] * answers, log_metric=metrics.__setitem__)
    assert metrics["disco_mean/shift/location"] == pytest.approx(3.5, abs=1e-3)
    assert len(warnings_of(caplog)) == warns


def test_the_moments_of_a_handful_of_rows_are_not_warned_of(reward_dir, caplog):
    """One step on four rows leaves no spread: the next answers lie hundreds of its standard deviations away."""
    model = load(reward_dir())
    reward, head = DiscoReward(model), model.scale_head
    for tensor in (head.mean_hidden, head.var_hidden, head.mean_traits, head.var_traits, head.rows_seen):
        tensor.zero_()
    with torch.no_grad():
        outputs = [model(input_ids=torch.tensor([ids])) for ids in reward.tokenize(["a"] * 4, ["b"] * 4)]
        head.track(torch.cat([out.pooled_hidden_state for out in outputs]), torch.cat([out.logits for out in outputs]))
    metrics = {}
    reward(prompts=["x"] * 4, completions=["0", "1", "2", "3"], log_metric=metrics.__setitem__)
    assert max(abs(metrics[f"disco_mean/shift/{name}"]) for name in ("location", "scale", "distance")) > 100
    assert not warnings_of(caplog)


def test_an_answer_without_siblings_is_warned_of_once(reward_dir, caplog):
    reward = DiscoReward(reward_dir(fixed_scale=1.0), transform="win_rate")
    assert reward(prompts=["a", "a"], completions=["b", "c"])[0] != 0.5
    assert not warnings_of(caplog)
    for _ in range(3):
        assert reward(prompts=["a", "b"], completions=["c", "d"]) == [0.5, 0.5]
    (warning,) = warnings_of(caplog)
    assert "one answer only" in warning
    # Other transforms need no siblings.
    DiscoReward(reward_dir(fixed_scale=1.0))(prompts=["a", "b"], completions=["c", "d"])
    assert len(warnings_of(caplog)) == 1
