"""The scale of a hidden state, and the running mean of the gauge; what else is tracked is in `test_traits.py`."""

import copy
import math

import pytest
import torch

from disco_trl.models.scale_head import MAX_LOG_SCALE, ScaleHead


def scale_head(**more) -> ScaleHead:
    return ScaleHead(**{"hidden_size": 4, "unit_scale": 0.5, "fixed_scale": None, "device": None, **more})


def test_a_new_scale_is_the_unit():
    torch.testing.assert_close(scale_head()(torch.randn(3, 4)), torch.full((3, 1), 0.5), rtol=0, atol=0)


def test_scale_of_a_hidden_state():
    # raw = 0.5 · (1 - 1) + 0.25 · (2 - 0) - 1 · (1 - 0.8) + 0 · 5 = 0.3; L = log 1000 = 6.9078
    # σ = 0.5 · exp(6.9078 · tanh(0.3 / 6.9078)) = 0.5 · exp(0.29981) = 0.67480
    head = scale_head()
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[0.5, 0.25, -1.0, 0.0]]))
        head.mean_hidden.copy_(torch.tensor([1.0, 0.0, 0.8, 0.0]))
    scale = head(torch.tensor([[1.0, 2.0, 1.0, 5.0]]))
    torch.testing.assert_close(scale, torch.tensor([[0.67480]]), rtol=1e-4, atol=0)


def test_the_scale_stays_in_the_range_where_the_probabilities_are_tested():
    head = scale_head(hidden_size=1)
    torch.nn.init.ones_(head.weight)
    raw = torch.tensor([[-1e30], [-1e4], [-50.0], [50.0], [1e4], [1e30]], requires_grad=True)
    scale = head(raw)
    assert (scale >= 0.5e-3 * (1 - 1e-5)).all()
    assert (scale <= 0.5e3 * (1 + 1e-5)).all()
    (gradient,) = torch.autograd.grad(scale.log().sum(), raw)
    assert torch.isfinite(gradient).all()


def test_near_the_unit_the_raw_scale_is_the_log():
    head = scale_head(hidden_size=1).double()
    torch.nn.init.ones_(head.weight)
    raw = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(head(raw).log(), raw)
    assert slope.item() == pytest.approx(1, rel=1e-12)
    assert pytest.approx(math.log(1000)) == MAX_LOG_SCALE


def test_a_fixed_scale():
    head = scale_head(fixed_scale=2.0)
    assert not list(head.parameters())
    assert not head.state_dict()
    assert torch.equal(head(torch.randn(3, 4)), torch.full((3, 1), 2.0))


def test_the_mean_hidden_state_starts_at_that_of_the_first_rows():
    head = scale_head()
    head.track(torch.tensor([[0.0, -2.0, 1.0, 4.0], [2.0, -2.0, -1.0, 4.0]]), torch.zeros(2, 1))
    assert head.mean_hidden.tolist() == pytest.approx([1.0, -2.0, 0.0, 4.0])


def test_the_mean_hidden_state_counts_rows_and_not_steps():
    # A row's weight decays by exp(-1 / 512) a row: one row of ones and 64 of zeros after it, in however many steps.
    # Their weights are q^64 (1 - q) and 1 - q^64, of 1 - q^65 in all.
    q = math.exp(-1 / 512)
    means = []
    for rows in (1, 8, 64):
        head = scale_head()
        head.track(torch.ones(1, 4), torch.zeros(1, 1))
        for _ in range(64 // rows):
            head.track(torch.zeros(rows, 4), torch.zeros(rows, 1))
        means.append(head.mean_hidden[0].item())
    assert means == pytest.approx([q**64 * (1 - q) / (1 - q**65)] * 3, rel=1e-3)


def test_the_mean_hidden_state_centres_the_scales_of_the_rows_it_was_made_of():
    torch.manual_seed(0)
    head = scale_head()
    torch.nn.init.normal_(head.weight, std=0.1)
    hidden_states = torch.randn(64, 4) + torch.tensor([5.0, 0.0, -3.0, 1.0])
    head.track(hidden_states, torch.zeros(64, 1))
    log_scale = (head(hidden_states) / 0.5).log()
    # Exactly zero but for tanh, which at |raw| < 1 bends it by less than raw³ / (3 L²) = 0.007.
    assert abs(log_scale.mean().item()) < 0.002
    assert log_scale.std() > 0.05


def test_is_constant():
    head = scale_head()
    assert head.is_constant
    head.weight.data[0, 1] = 1e-3
    assert not head.is_constant
    assert scale_head(fixed_scale=2.0).is_constant


def test_an_error_is_noticed_however_it_comes_about():
    """The buffer is asked once and not at each step, and again once it has changed."""
    head = scale_head()
    head.init_weights()
    assert not head.has_location_error
    head.location_error.fill_(0.3)
    assert head.has_location_error and copy.deepcopy(head).has_location_error
    head.load_state_dict({**head.state_dict(), "location_error": torch.tensor(0.0)})
    assert not head.has_location_error
    head.location_error = torch.tensor(0.2)
    assert head.has_location_error
    head.double().location_error.zero_()
    assert not head.has_location_error
    with torch.inference_mode():
        head.location_error = torch.tensor(0.0)
        assert not head.has_location_error
        head.location_error.fill_(0.1)
        assert head.has_location_error
    assert not scale_head(fixed_scale=0.5).has_location_error
