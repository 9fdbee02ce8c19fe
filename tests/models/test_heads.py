"""The head and its parts on tensors; the scale is in `test_scale_head.py`, whole models in contracts C1, C2 and C6."""

import math

import pytest
import torch
from torch import nn
from torch.nn.parallel.scatter_gather import gather
from torch.utils._pytree import tree_flatten, tree_map

from disco_trl import get_family
from disco_trl.models.heads import DiscoHead, LikelihoodHead, heads_bypassed
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
    head.scale.reads_detached = True
    head.zero_grad()
    head(hidden_states.requires_grad_(), True, scale_states.detach().requires_grad_()).scale.sum().backward()
    assert hidden_states.grad is None and head.scale.weight.grad.any()


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
    head.refit(rows, 2.5)
    for name, value in quantities().items():
        stays = name in ("scale", "label_noise")  # the gauge, and what has no unit
        torch.testing.assert_close(value, before[name] * (1 if stays else 2.5), rtol=1e-4, atol=1e-5)
    assert head.scale.mean_traits[0].item() == pytest.approx(head(rows)[-512:].mean().item(), abs=0.1)
    # A tie width that the user has given is one in the unit that the scales fix, as a margin is.
    given = LikelihoodHead({"tie_width": 0.7}, unit_scale=0.5, device=None)
    given.rescale(2.5)
    assert given.values()["tie_width"].item() == pytest.approx(0.7)


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
