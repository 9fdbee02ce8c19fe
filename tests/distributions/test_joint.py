"""`disco_trl/distributions/joint.py`: against scipy's multivariate normal, and against draws."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import cauchy, multivariate_normal, norm

from disco_trl import JointRewardDistribution, RewardDistribution
from disco_trl.distributions.families import FAMILIES


NAMES = ("helpfulness", "safety", "verbosity")
CORRELATION = torch.tensor([[1.0, 0.6, -0.3], [0.6, 1.0, 0.2], [-0.3, 0.2, 1.0]], dtype=torch.float64)
LOCATION = torch.tensor([[1.0, 0.5, -0.2], [-1.0, 2.0, 0.0], [0.3, 0.3, 4.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
SCALE = torch.tensor([[0.5, 1.0, 2.0], [1.0, 0.1, 1.5], [2.0, 2.0, 0.3], [1.0, 1.0, 1.0]], dtype=torch.float64)
WEIGHTS = {"helpfulness": 1.0, "safety": 0.7, "verbosity": -0.4}


def joint(**changed) -> JointRewardDistribution:
    arguments = {"correlation": CORRELATION, "names": NAMES, "family": "normal"} | changed
    return JointRewardDistribution(LOCATION, SCALE, **arguments)


def covariance(row: int) -> np.ndarray:
    deviation = SCALE[row].numpy()
    return deviation[:, None] * CORRELATION.numpy() * deviation


# Projections


def test_a_weighted_sum_of_normals():
    projected = joint().project(WEIGHTS)
    w = np.array([1.0, 0.7, -0.4])
    for row in range(len(LOCATION)):
        assert projected.location[row].item() == pytest.approx(w @ LOCATION[row].numpy(), abs=1e-12)
        assert projected.scale[row].item() == pytest.approx(math.sqrt(w @ covariance(row) @ w), rel=1e-12)
    assert projected.family == "normal"


def test_worked_by_hand():
    # Scales 3 and 4 with correlation 0.5 and weights 1 and -1: variance 9 + 16 - 2 * 0.5 * 12 = 13.
    rewards = JointRewardDistribution(
        torch.tensor([[2.0, 1.0]]), torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.5], [0.5, 1.0]]), ["a", "b"]
    )
    difference = rewards.project({"a": 1.0, "b": -1.0})
    assert difference.location.tolist() == [1.0]
    torch.testing.assert_close(difference.scale, torch.tensor([math.sqrt(13)]))


def test_preferences_by_a_weighted_sum():
    a, b = joint()[:2], joint()[2:]
    w = np.array([1.0, 0.7, -0.4])
    for row, value in enumerate(a.prob_greater(b, WEIGHTS).tolist()):
        mean = w @ (LOCATION[row] - LOCATION[row + 2]).numpy()
        variance = w @ (covariance(row) + covariance(row + 2)) @ w
        assert value == pytest.approx(norm.cdf(mean / math.sqrt(variance)), abs=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weight", [2.5, -2.5])
def test_one_attribute_in_another_unit_is_exact_in_every_family(family, weight):
    shape = torch.rand(4, 3, len(FAMILIES[family].shape_names), dtype=torch.float64) * 0.5 + 0.2
    rewards = joint(family=family, correlation=None, shape=shape if FAMILIES[family].shape_names else None)
    if weight < 0 and FAMILIES[family].shape_names:
        with pytest.raises(ValueError, match="not of any family"):
            rewards.project({"safety": weight})
        return
    projected, marginal = rewards.project({"safety": weight}), rewards.marginal("safety")
    x = torch.linspace(-3, 3, 4, dtype=torch.float64)
    expected = marginal.cdf(x / weight)
    torch.testing.assert_close(projected.cdf(x), expected if weight > 0 else 1 - expected)


def test_independent_cauchy_rewards_add_up():
    projected = joint(family="cauchy", correlation=None).project(WEIGHTS)
    torch.testing.assert_close(projected.scale, (SCALE * torch.tensor([1.0, 0.7, 0.4])).sum(dim=-1))
    draws = cauchy.rvs(size=(200_000, 3), random_state=0) * SCALE[1].numpy() + LOCATION[1].numpy()
    share = np.mean(draws @ np.array([1.0, 0.7, -0.4]) <= 1.0)
    assert projected[1].cdf(1.0).item() == pytest.approx(share, abs=4e-3)


@pytest.mark.parametrize(
    ("family", "message"),
    [("cauchy", "only if they are independent"), ("laplace", "not of any family"), ("logistic", "not of any family")],
)
def test_sums_that_are_of_no_family_are_refused(family, message):
    with pytest.raises(ValueError, match=message):
        joint(family=family).project(WEIGHTS)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"helpfulness": 1.0, "safty": 1.0}, "no attribute 'safty'; there are 'helpfulness', 'safety', 'verbosity'"),
        ({"helpfulness": 0.0}, "no attribute has a weight other than 0"),
        ({}, "no attribute has a weight other than 0"),
        ({"helpfulness": math.nan}, "the weight of 'helpfulness' is nan"),
        ({"helpfulness": math.inf}, "the weight of 'helpfulness' is inf"),
    ],
)
def test_weights_that_say_nothing_are_errors(weights, message):
    with pytest.raises(ValueError, match=message):
        joint().project(weights)


def test_errors_of_the_locations_are_projected():
    error = torch.tensor([[0.1, 0.2, 0.3]] * 4, dtype=torch.float64)
    factor = torch.zeros(4, 3, 2, dtype=torch.float64)
    factor[..., 0] = error  # all of the error is shared by the four answers, for each attribute apart
    rewards = joint(location_error=error, error_factor=factor)
    projected = rewards.project(WEIGHTS)
    expected = math.sqrt(0.1**2 + (0.7 * 0.2) ** 2 + (0.4 * 0.3) ** 2)
    torch.testing.assert_close(projected.location_error, torch.full((4,), expected, dtype=torch.float64))
    # What all answers share cancels in a difference.
    assert projected[:2].error_of_difference(projected[2:]).max() < 1e-8
    single = rewards.project({"safety": -2.0})
    torch.testing.assert_close(single.location_error, torch.full((4,), 0.4, dtype=torch.float64))
    assert single[:2].error_of_difference(single[2:]).max() < 1e-8


def test_results_have_the_type_of_the_rewards():
    rewards = JointRewardDistribution(LOCATION.float(), SCALE.float(), CORRELATION.float(), NAMES)
    assert rewards.project(WEIGHTS).location.dtype == torch.float32
    assert rewards.project(WEIGHTS).scale.dtype == torch.float32
    assert rewards.prob_all_greater({"safety": 0.0}).dtype == torch.float32


# All at once


@pytest.mark.parametrize("names", [("safety",), ("helpfulness", "verbosity"), NAMES])
def test_all_bars_at_once(names):
    bars = dict(zip(names, (0.1, 0.4, -0.5), strict=False))
    places = [NAMES.index(name) for name in names]
    found = joint().prob_all_greater(bars)
    for row, value in enumerate(found.tolist()):
        sub = covariance(row)[np.ix_(places, places)]
        expected = multivariate_normal.cdf(
            -np.array([*bars.values()]), mean=-LOCATION[row, places].numpy(), cov=sub, abseps=1e-8, maxpts=10**6
        )
        assert value == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("family", ["cauchy", "laplace"])
def test_bars_of_independent_attributes_multiply(family):
    rewards = joint(family=family, correlation=None)
    expected = (1 - rewards.marginal("helpfulness").cdf(0.2)) * (1 - rewards.marginal("verbosity").cdf(-1.0))
    torch.testing.assert_close(rewards.prob_all_greater({"helpfulness": 0.2, "verbosity": -1.0}), expected)


@pytest.mark.parametrize("names", [NAMES[:1], NAMES[:2], NAMES])
@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_whether_all_bars_are_exceeded(names, probability):
    generator = torch.Generator().manual_seed(0)
    location = torch.randn(200, 3, generator=generator, dtype=torch.float64)
    rewards = JointRewardDistribution(location, torch.ones_like(location), CORRELATION, NAMES)
    bars = dict(zip(names, (-0.5, 0.1, -1.0), strict=False))
    found = rewards.exceeds_all(bars, probability)
    assert torch.equal(found, rewards.prob_all_greater(bars) >= probability)
    assert 0 < found.sum() < 200


def test_bars_of_no_attribute_and_of_unknown_joint_distributions_are_errors():
    with pytest.raises(ValueError, match="no bar is given"):
        joint().prob_all_greater({})
    with pytest.raises(ValueError, match="no attribute 'tone'"):
        joint().prob_all_greater({"tone": 0.0})
    with pytest.raises(ValueError, match="only if they are independent"):
        joint(family="laplace").prob_all_greater({"helpfulness": 0.0, "safety": 0.0})


def test_no_answers():
    none = joint()[:0]
    assert len(none) == 0
    assert none.prob_all_greater({"helpfulness": 0.0, "safety": 0.0}).shape == (0,)
    assert none.project(WEIGHTS).location.shape == (0,)


# People


def test_draws_have_the_joint_distribution():
    draws = joint().sample((100_000,), torch.Generator().manual_seed(0))
    assert draws.shape == (100_000, 4, 3)
    torch.testing.assert_close(draws.mean(dim=0), LOCATION, atol=0.03, rtol=0)
    for row in range(4):
        np.testing.assert_allclose(np.corrcoef(draws[:, row].numpy().T), CORRELATION.numpy(), atol=0.015)
        np.testing.assert_allclose(draws[:, row].std(dim=0), SCALE[row], rtol=0.02)
    # Different answers are independent.
    assert abs(np.corrcoef(draws[:, 0, 0], draws[:, 1, 0])[0, 1]) < 0.02


def test_draws_of_families_that_have_no_correlation():
    drawn = joint(family="laplace", correlation=None).sample((10,), torch.Generator().manual_seed(0))
    assert drawn.shape == (10, 4, 3)
    with pytest.raises(ValueError, match="only if these are independent"):
        joint(family="laplace").sample()


# Sizes and batches


def test_marginals_and_batches():
    rewards = joint()
    assert len(rewards) == 4
    assert str(rewards[:1]) == "helpfulness: [1.00 ± 0.50], safety: [0.50 ± 1.00], verbosity: [-0.20 ± 2.00]"
    marginal = rewards.marginal("verbosity")
    assert isinstance(marginal, RewardDistribution)
    assert torch.equal(marginal.location, LOCATION[:, 2])
    assert torch.equal(marginal.scale, SCALE[:, 2])
    again = JointRewardDistribution.cat([rewards[:1], rewards[1:]])
    assert torch.equal(again.location, LOCATION)
    assert again.names == NAMES
    assert rewards.to(torch.float32).correlation.dtype == torch.float32
    with pytest.raises(ValueError, match="same attributes"):
        JointRewardDistribution.cat([rewards, joint(names=("a", "b", "c"))])


def correlation_of(a: float, b: float, c: float) -> torch.Tensor:
    return torch.tensor([[1.0, a, b], [a, 1.0, c], [b, c, 1.0]])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"correlation": correlation_of(0.9, 0.9, -0.9)}, "not positive definite"),
        ({"correlation": correlation_of(1.0, 0.0, 0.0)}, "not positive definite"),
        ({"correlation": torch.tensor([[1.0, 0.5, 0], [0.4, 1, 0], [0, 0, 1]])}, "make it symmetric"),
        ({"correlation": 2 * torch.eye(3)}, "ones on the diagonal"),
        ({"correlation": torch.eye(2)}, r"is of size \[2, 2\], and must be of size \[3, 3\]"),
        ({"names": ("a", "b")}, "3 different ones"),
        ({"names": ("a", "b", "a")}, "3 different ones"),
        ({"location_error": torch.zeros(4)}, "location_error is of size"),
    ],
)
def test_what_does_not_fit_is_an_error(changed, message):
    with pytest.raises(ValueError, match=message):
        joint(**changed)


def test_locations_and_scales_of_different_sizes_are_an_error():
    with pytest.raises(ValueError, match=r"\[answers, attributes\]"):
        JointRewardDistribution(LOCATION, SCALE[:2])
    with pytest.raises(ValueError, match=r"\[answers, attributes\]"):
        JointRewardDistribution(LOCATION[0], SCALE[0])
