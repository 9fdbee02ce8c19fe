"""Two camps: what the mixture has beyond the others. The tests that all families share are in test_families."""

import math

import mpmath
import pytest
import torch
from test_families import DRAWS, LEVELS, SCALES, SHAPES, assert_close, float32_rows, standard_cdf

from disco_trl import RewardDistribution
from disco_trl.distributions.families import get_family


def test_a_mixture_without_polarization_is_normal():
    rows = torch.tensor(float32_rows("normal", [-1e4, -8.0, -1.0, 0.0, 1e-3, 2.0, 8.0], SCALES)).double().T
    one_camp = torch.tensor([0.3, 0.0], dtype=torch.float64)
    mixture, normal = get_family("mixture"), get_family("normal")
    torch.testing.assert_close(
        mixture.log_prob_greater(*rows, one_camp, one_camp), normal.log_prob_greater(*rows), rtol=1e-13, atol=0
    )
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    torch.testing.assert_close(mixture.quantile(levels, one_camp), normal.quantile(levels), rtol=1e-13, atol=0)
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    reward = RewardDistribution(zero, one, mixture, one_camp)
    assert reward.certainty_equivalent(2.0).item() == pytest.approx(-0.25, rel=1e-12)


def test_location_and_scale_of_a_mixture_are_its_mean_and_standard_deviation():
    # The standard error of the mean is 3 / √N, that of the variance 9 √((κ - 1) / N) with a kurtosis κ below 4 here.
    for weight, polarization in SHAPES:
        shape = torch.tensor([weight, polarization])
        generator = torch.Generator().manual_seed(4)
        reward = RewardDistribution(torch.tensor(-1.0), torch.tensor(3.0), "mixture", shape)
        draws = reward.sample((DRAWS,), generator).double()
        assert draws.mean().item() == pytest.approx(-1, abs=4 * 3 / math.sqrt(DRAWS))
        assert draws.var().item() == pytest.approx(9, abs=4 * 9 * math.sqrt(3 / DRAWS))


def test_a_strongly_polarized_mixture():
    # Inner standard deviations of 0.1 σ, small camps: what `shape_from_raw` gives at most.
    shapes = [(0.01, 0.9949), (0.99, 0.9949)]
    rows = [
        (z, 1.0, 0.0, 0.5, *shape_a, *shape_b)
        for z in (-1e3, -12.0, -3.0, -0.3, 0.2, 2.0, 9.0)
        for shape_a in shapes
        for shape_b in shapes
    ]
    assert_close("mixture", [tuple(torch.tensor(row).tolist()) for row in rows])


@pytest.mark.parametrize("shape", [*SHAPES, (0.01, 0.9949), (0.99, 0.9949), (1e-4, 0.999)])
def test_quantile_of_a_mixture_against_mpmath(shape):
    quantile = get_family("mixture").quantile(
        torch.tensor(LEVELS, dtype=torch.float64), torch.tensor(shape, dtype=torch.float64)
    )
    for level, value in zip(LEVELS, quantile.tolist(), strict=True):
        share = standard_cdf("mixture", mpmath.mpf(value), shape)
        slope = mpmath.diff(lambda z: standard_cdf("mixture", z, shape), mpmath.mpf(value))
        # How far the value is from the exact quantile, to first order.
        assert abs((share - mpmath.mpf(level)) / slope) <= 1e-10 * max(1, abs(value)), (level, value)


def test_raw_shapes_stay_in_their_domain():
    family = get_family("mixture")
    assert family.shape_from_raw(torch.zeros(2)).tolist() == pytest.approx([0.5, 0.5], abs=0.003)
    raw = torch.tensor([[-1e4, -1e4], [-30.0, 30.0], [30.0, -30.0], [1e4, 1e4]], requires_grad=True)
    shape = family.shape_from_raw(raw)
    weight, polarization = shape.unbind(-1)
    assert weight.min() >= 0.0099 and weight.max() <= 0.9901
    assert polarization.min() >= 0 and (1 - polarization**2).min() >= 0.0099
    one = torch.ones(4)
    log_prob = family.log_prob_greater(one, one, 0 * one, one, shape, shape.flip(0))
    assert torch.isfinite(log_prob).all()
    assert torch.isfinite(torch.autograd.grad(log_prob.sum(), raw)[0]).all()


def test_a_mixture_without_its_shape_is_refused():
    one = torch.ones(1)
    with pytest.raises(ValueError, match=r"shape parameters \(weight, polarization\); pass them"):
        get_family("mixture").log_prob_greater(one, one, one, one)
