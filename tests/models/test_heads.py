"""The head and its parts on tensors; the scale is in `test_scale_head.py`, whole models in contracts C1, C2 and C6."""

import math

import pytest
import torch
from torch import nn
from torch.nn.parallel.scatter_gather import gather
from torch.utils._pytree import tree_flatten, tree_map

from disco_trl import DiscoRewardModel, RewardDistribution, get_family
from disco_trl.models.heads import DiscoHead, heads_bypassed
from disco_trl.models.likelihood_head import LikelihoodHead, width_penalty
from disco_trl.models.outputs import HeadOutput, overall


@pytest.mark.parametrize("bias", [True, False])
def test_convert_keeps_the_layer(bias):
    torch.manual_seed(0)
    layer = nn.Linear(4, 1, bias=bias)
    parameters = dict(layer.named_parameters())
    hidden_states = torch.randn(2, 3, 4)
    expected = layer(hidden_states)
    head = DiscoHead.convert(layer, unit_scale=0.5, fixed_scale=None)
    assert head is layer
    assert all(dict(head.named_parameters())[name] is parameter for name, parameter in parameters.items())
    assert torch.equal(head(hidden_states), expected)


def test_a_frozen_layer_gets_a_frozen_scale():
    layer = nn.Linear(4, 1).requires_grad_(False)
    head = DiscoHead.convert(layer, unit_scale=0.5, fixed_scale=None)
    assert not any(parameter.requires_grad for parameter in head.parameters())


def test_the_head_works_in_float32():
    torch.manual_seed(0)
    head = DiscoHead.convert(nn.Linear(4, 1), unit_scale=0.5, fixed_scale=None)
    hidden_states = torch.randn(5, 4).bfloat16()
    expected = head(hidden_states.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(head(hidden_states), expected)
    assert torch.equal(head(hidden_states), expected)
    # A model cast as a whole takes its head along; the head still does not round what it puts out.
    head.to(torch.bfloat16)
    assert head(hidden_states).dtype == torch.float32


LIKELIHOOD = {"location_error": True, "tie_width": "learned", "label_noise": 0.1, "rating_values": [0.0, 1.0, 2.0]}


def full_head() -> DiscoHead:
    """A head with all of its parts, each of which says something else of each answer."""
    family = get_family("mixture")
    torch.manual_seed(0)
    head = DiscoHead.convert(nn.Linear(4, 1), family.unit_scale, None, shape_size=len(family.shape_names))
    head.add_likelihood(LIKELIHOOD)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return head


def test_all_that_a_head_returns():
    head = full_head()
    hidden_states = torch.randn(2, 3, 4)
    output = head(hidden_states, full_output=True)
    assert isinstance(output, HeadOutput)
    assert torch.equal(output.location, head(hidden_states))
    assert torch.equal(output.scale, head.scale(hidden_states))
    assert torch.equal(output.raw_shape, head.shape(hidden_states))
    sizes = {"location_error": 1, "tie_width": 1, "label_noise": 1, "thresholds": 2}
    assert {name: tuple(value.shape) for name, value in output.likelihood.items()} == {
        name: (2, 3, size) for name, size in sizes.items()
    }
    assert output.location.shape == output.scale.shape == (2, 3, 1)
    assert overall(output.location).shape == (2, 3)


def test_the_scale_may_read_other_states():
    head = full_head()
    hidden_states, scale_states = torch.randn(2, 3, 4), torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    output, plain = head(hidden_states, True, scale_states), head(hidden_states, full_output=True)
    assert torch.equal(output.scale, head.scale(scale_states.float()))
    assert not torch.equal(output.scale, plain.scale)
    for name in ("location", "raw_shape"):
        assert torch.equal(getattr(output, name), getattr(plain, name))
    output.scale.sum().backward()
    assert scale_states.grad.any()


def test_what_a_plain_head_has_not():
    head = DiscoHead.convert(nn.Linear(4, 1), unit_scale=0.5, fixed_scale=None)
    output = head(torch.randn(3, 4), full_output=True)
    assert output.raw_shape is None
    assert output.likelihood is None
    assert set(vars(head.responses()).values()) == {None}


def test_what_the_likelihood_learns():
    # Half a unit times exp(L tanh(raw / L)), or for the noise sigmoid(raw - 2) / 2; thresholds by their differences.
    head = LikelihoodHead(LIKELIHOOD, unit_scale=2.0, device=None)
    assert {name: value.tolist() for name, value in head.values().items()} == {
        "location_error": [1.0],
        "tie_width": [1.0],
        "label_noise": [pytest.approx(0.1)],
        "thresholds": [0.0, 2.0],
    }
    with torch.no_grad():
        head.tie_width.fill_(0.3)
        head.thresholds.copy_(torch.tensor([-0.5, 0.3]))
    limit = math.log(1e3)
    factor = math.exp(limit * math.tanh(0.3 / limit))
    assert head.values()["tie_width"].tolist() == pytest.approx([factor])
    assert head.values()["thresholds"].tolist() == pytest.approx([-1.0, -1.0 + 2 * factor])
    learned = LikelihoodHead({"label_noise": "learned"}, unit_scale=2.0, device=None)
    assert learned.values()["label_noise"].tolist() == pytest.approx([1 / (1 + math.exp(2)) / 2])


def test_the_parameters_say_what_the_output_says():
    head = full_head()
    output = head(torch.randn(3, 4), full_output=True)
    for name, value in head.likelihood.values().items():
        for row in output.likelihood[name]:
            assert torch.equal(row, value)
    responses = head.responses()
    for name in ("tie_width", "label_noise", "thresholds"):
        assert torch.equal(getattr(responses, name), output.likelihood[name][0])
        assert not getattr(responses, name).requires_grad


def test_what_was_learned_is_kept_when_there_is_more_to_learn():
    head = DiscoHead.convert(nn.Linear(4, 1), unit_scale=0.5, fixed_scale=None)
    head.add_likelihood({"tie_width": "learned"})
    with torch.no_grad():
        head.likelihood.tie_width.fill_(1.25)
    head.add_likelihood({"tie_width": "learned", "location_error": True})
    assert head.likelihood.tie_width.item() == 1.25
    assert head.likelihood.location_error.item() == 0


def test_a_factor_goes_through_all_that_is_learned_in_reward_units():
    settings = {
        "location_error": True,
        "tie_width": "learned",
        "label_noise": "learned",
        "rating_values": [1, 2, 3, 4],
        "strength_levels": 3,
    }
    head = DiscoHead.convert(nn.Linear(4, 1), unit_scale=0.5, fixed_scale=None)
    head.add_likelihood(settings)
    head.add_epistemic(4)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) / 4)
        head.epistemic.directions.copy_(torch.eye(4))
        for tensor in (head.epistemic.unit, head.epistemic.variances, head.epistemic.prior_variance):
            tensor.fill_(0.3)
    rows = torch.randn(2000, 4, generator=torch.Generator().manual_seed(1)) + 1
    head.scale.track(rows, head(rows).detach())

    def quantities() -> dict[str, torch.Tensor]:
        with torch.no_grad():
            return {
                "location": head(rows),
                "posterior": head.epistemic(rows),
                "scale": head.scale(rows),
                **head.likelihood.values(),
            }

    before = quantities()
    head.refit(rows, head(rows).detach()[:, 0], 2.5)
    for name, value in quantities().items():
        stays = name in ("scale", "label_noise")  # the gauge, and what has no unit
        torch.testing.assert_close(value, before[name] * (1 if stays else 2.5), rtol=1e-4, atol=1e-5)
    assert head.scale.mean_traits[0].item() == pytest.approx(head(rows)[-512:].mean().item(), abs=0.1)
    # A tie width that the user has given is one in the unit that the scales fix, as a margin is.
    given = LikelihoodHead({"tie_width": 0.7}, unit_scale=0.5, device=None)
    given.rescale(2.5)
    assert given.values()["tie_width"].item() == pytest.approx(0.7)


@pytest.mark.parametrize("tie_width", ["learned", 0.3, None])
def test_boundaries_between_strengths_ascend_above_the_tie_width(tie_width):
    settings = {"strength_levels": 4} | ({} if tie_width is None else {"tie_width": tie_width})
    head = LikelihoodHead(settings, unit_scale=0.5, device=None)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    before = head.values()
    lowest = before.get("tie_width", torch.zeros(1))
    assert (before["strength_boundaries"].diff(prepend=lowest) > 0).all()
    head.rescale(2.5)
    after = head.values()
    if tie_width == 0.3:  # what the user has given stays, and the widths above it follow the rewards
        expected = 0.3 + 2.5 * (before["strength_boundaries"] - 0.3)
    else:
        expected = 2.5 * before["strength_boundaries"]
    torch.testing.assert_close(after["strength_boundaries"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["normal", "cauchy", "mixture"])
def test_strengths_start_where_equal_rewards_would_give_those_observed(name, tiny_llama_dir):
    """Ties and three strengths, in 200, 400, 300 and 100 of 1,000 judgements: P(|D| < c) is 0.2, 0.6 and 0.9."""
    model = DiscoRewardModel.from_pretrained(tiny_llama_dir, reward_family=name)
    model.reward_head.add_likelihood({"tie_width": "learned", "strength_levels": 3})
    model.init_strengths({0: 200, 1: 400, 2: 300, 3: 100})
    values = model.reward_head.likelihood.values()
    boundaries = torch.cat([values["tie_width"], values["strength_boundaries"]]).detach().double()
    unit, zero = torch.tensor(model.family.unit_scale).double(), torch.zeros(()).double()
    raw = torch.zeros(len(model.family.shape_names)).double()
    rewards = RewardDistribution(zero, unit, name, model.family.shape_from_raw(raw) if len(raw) else None)
    within = (rewards - rewards).log_prob_within(boundaries).exp()
    torch.testing.assert_close(within, torch.tensor([0.2, 0.6, 0.9]).double(), rtol=5e-3, atol=0)
    # What a checkpoint has learned stays.
    model.init_strengths({0: 1, 1: 1, 2: 1, 3: 1})
    assert torch.equal(model.reward_head.likelihood.values()["tie_width"], values["tie_width"])


def test_the_prior_holds_the_width_of_a_level_that_nobody_used():
    """−log of a log-normal density about half a unit, with deviation 1: a width of e halves of a unit costs ½."""
    boundaries = torch.tensor([0.2 + math.e, 0.2 + 2 * math.e])
    quantities = {"tie_width": torch.tensor([0.2]), "strength_boundaries": boundaries}
    assert width_penalty(quantities, unit_scale=2.0).item() == pytest.approx(1.0)
    assert width_penalty({"thresholds": torch.tensor([-1.0, 0.0])}, unit_scale=2.0).item() == pytest.approx(0.0)
    assert width_penalty({"tie_width": torch.tensor([0.2])}, unit_scale=2.0) is None


def test_those_who_split_models_up_find_every_tensor():
    """FSDP2 by torch's trees, DataParallel by its gathering of what the replicas return."""
    output = full_head()(torch.randn(3, 4), full_output=True)
    leaves, _ = tree_flatten(output)
    assert len(leaves) == 3 + len(LIKELIHOOD)
    assert all(leaf.requires_grad or leaf is output.likelihood["label_noise"] for leaf in leaves)
    # FSDP2 warns of views, and an operation in place on one would lose its hook.
    assert all(leaf._base is None for leaf in leaves)
    assert isinstance(tree_map(torch.Tensor.double, output), HeadOutput)
    # (`gather` itself runs on accelerators only.)
    halves = [tree_map(lambda leaf, part=part: leaf[part], output) for part in (slice(2), slice(2, None))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "torch.nn.parallel.scatter_gather.Gather.apply", lambda device, dim, *parts: torch.cat(parts, dim)
        )
        whole = gather(halves, "cpu")
    assert isinstance(whole, HeadOutput)
    for found, expected in zip(tree_flatten(whole)[0], leaves, strict=True):
        assert torch.equal(found, expected)


def test_a_head_that_is_bypassed():
    head = full_head()
    hidden_states = torch.randn(3, 4)
    with pytest.raises(RuntimeError, match="on the way"), heads_bypassed():
        assert head(hidden_states) is hidden_states
        raise RuntimeError("on the way")
    assert head(hidden_states).shape == (3, 1)
