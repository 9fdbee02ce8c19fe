"""The head, its scale and the running mean of the gauge, on tensors; whole models are in contracts C1, C2 and C6."""

import copy
import math

import pytest
import torch
from torch import nn

from disco_trl import DiscoRewardModel
from disco_trl.modeling import MAX_LOG_SCALE, DiscoHead, ScaleHead, resolve_settings


def scale_head(**more) -> ScaleHead:
    return ScaleHead(**{"hidden_size": 4, "unit_scale": 0.5, "fixed_scale": None, "device": None, **more})


def test_a_new_scale_is_the_unit():
    head = scale_head()
    torch.testing.assert_close(head.to_scale(head(torch.randn(3, 4))), torch.full((3, 1), 0.5), rtol=0, atol=0)


def test_scale_of_a_hidden_state():
    # raw = 0.5 · 1 + 0.25 · 2 - 1 + 0.3 = 0.3; L = log 1000 = 6.9078
    # σ = 0.5 · exp(6.9078 · tanh(0.3 / 6.9078)) = 0.5 · exp(0.29981) = 0.67480
    head = scale_head()
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[0.5, 0.25, -1.0, 0.0]]))
        head.bias.fill_(0.3)
    raw = head(torch.tensor([1.0, 2.0, 1.0, 5.0]))
    torch.testing.assert_close(raw, torch.tensor([0.3]))
    torch.testing.assert_close(head.to_scale(raw), torch.tensor([0.67480]), rtol=1e-4, atol=0)


def test_the_scale_stays_in_the_range_where_the_probabilities_are_tested():
    raw = torch.tensor([-1e30, -1e4, -50.0, 50.0, 1e4, 1e30], requires_grad=True)
    scale = scale_head().to_scale(raw)
    assert (scale >= 0.5e-3 * (1 - 1e-5)).all()
    assert (scale <= 0.5e3 * (1 + 1e-5)).all()
    (gradient,) = torch.autograd.grad(scale.log().sum(), raw)
    assert torch.isfinite(gradient).all()


def test_near_the_unit_the_raw_scale_is_the_log():
    raw = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(scale_head().to_scale(raw).log(), raw)
    assert slope.item() == pytest.approx(1, rel=1e-12)
    assert pytest.approx(math.log(1000)) == MAX_LOG_SCALE


def test_a_fixed_scale():
    head = scale_head(fixed_scale=2.0)
    assert not list(head.parameters())
    assert not head.state_dict()
    assert torch.equal(head.to_scale(head(torch.randn(3, 4))), torch.full((3, 1), 2.0))


def test_the_running_mean_counts_rows_and_not_steps():
    # The mean after n rows of value 1 is 1 - exp(-n / 512), in however many steps they came.
    means = []
    for batch_size in (1, 8, 64):
        head = scale_head()
        for _ in range(64 // batch_size):
            head.track(torch.ones(batch_size, 1))
        means.append(head.mean_log_scale.item())
    assert means == pytest.approx([1 - math.exp(-64 / 512)] * 3, rel=1e-5)


def test_the_running_mean_forgets_where_it_started():
    head = scale_head()
    head.mean_log_scale.fill_(5.0)
    for _ in range(100):
        head.track(torch.full((128, 1), -0.25))
    assert head.mean_log_scale.item() == pytest.approx(-0.25, abs=1e-6)


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


def test_autocast_leaves_location_and_scale_in_float32(tiny_llama_dir):
    model = DiscoRewardModel.from_pretrained(tiny_llama_dir).eval()
    inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**inputs)
    assert output.logits.dtype == output.scale.dtype == torch.float32


def test_a_copy_is_a_model_of_its_own(tiny_llama_dir):
    model = DiscoRewardModel.from_pretrained(tiny_llama_dir).eval()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.score.scale.bias.fill_(1.0)
        scales = [each(input_ids=torch.tensor([[5, 6, 7]])).scale.item() for each in (model, twin)]
    assert isinstance(twin, DiscoRewardModel)
    assert scales[1] > 2 * scales[0]


def test_an_error_in_the_backbone_leaves_the_head_as_it_was(tiny_llama_dir):
    model = DiscoRewardModel.from_pretrained(tiny_llama_dir).eval()
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[10**6]]))
    assert model.score(torch.zeros(2, 16)).shape == (2, 1)
    assert model(input_ids=torch.tensor([[5]])).logits.shape == (1, 1)


@pytest.mark.parametrize(
    ("stored", "asked", "expected"),
    [
        (None, (None, None), ("normal", None)),
        (None, ("cauchy", 2.0), ("cauchy", 2.0)),
        (("cauchy", None), (None, None), ("cauchy", None)),
        (("cauchy", None), ("cauchy", None), ("cauchy", None)),
        (("logistic", 0.5), (None, 0.5), ("logistic", 0.5)),
    ],
)
def test_resolve_settings(stored, asked, expected):
    names = ("reward_family", "fixed_scale")
    stored = None if stored is None else dict(zip(names, stored, strict=True))
    assert resolve_settings(stored, *asked) == dict(zip(names, expected, strict=True))
