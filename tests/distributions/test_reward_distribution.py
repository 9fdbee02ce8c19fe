"""Batches of rewards: comparing, indexing and putting them together, and the model's own error of the locations."""

import doctest
import itertools
import math
import subprocess
import sys

import mpmath
import pytest
import torch
from test_families import reference
from torch.utils._python_dispatch import TorchDispatchMode

from disco_trl.distributions import reward_distribution
from disco_trl.distributions.families import FAMILIES, Difference, base, get_family
from disco_trl.distributions.reward_distribution import RewardDistribution
from disco_trl.distributions.transforms import get_transform


@pytest.mark.parametrize("name", list(FAMILIES))
def test_reward_distribution(name):
    # Of the mixture both camps are equally large, which makes it as symmetric as the others are.
    family = get_family(name)
    shape = torch.tensor([[0.5, 0.8], [0.5, 0.3]]) if family.shape_names else None
    a = RewardDistribution(torch.tensor([1.7, 0.0]), torch.tensor([0.4, 1.0]), name, shape)
    b = RewardDistribution(torch.tensor([1.2, 0.0]), torch.tensor([0.3, 2.0]), name, shape)
    torch.testing.assert_close(
        a.log_prob_greater(b),
        family.log_prob_greater(a.location, a.scale, b.location, b.scale, shape, shape),
        rtol=0,
        atol=0,
    )
    torch.testing.assert_close(a.prob_greater(b) + b.prob_greater(a), torch.ones(2))
    assert a.prob_greater(b)[1].item() == pytest.approx(0.5)
    # The median is the location, and q and 1 - q lie equally far from it.
    torch.testing.assert_close(a.quantile(0.5), a.location)
    torch.testing.assert_close(a.quantile(0.9) + a.quantile(0.1), 2 * a.location)
    torch.testing.assert_close(a.cdf(a.quantile(0.2)), torch.full((2,), 0.2))
    assert a.cdf(0).shape == (2,)
    assert a.sample().shape == (2,)
    assert a.sample((5, 3)).shape == (5, 3, 2)
    draws = [a.sample((4,), generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    torch.testing.assert_close(*draws, rtol=0, atol=0)


def test_reward_distribution_keeps_a_level_that_bfloat16_would_round_to_one():
    reward = RewardDistribution(torch.zeros(1, dtype=torch.bfloat16), torch.ones(1, dtype=torch.bfloat16), "normal")
    assert reward.quantile(0.999).item() == pytest.approx(3.0902, rel=1e-3)


def test_rewards_of_different_families_cannot_be_compared():
    a = RewardDistribution(torch.zeros(1), torch.ones(1), "normal")
    b = RewardDistribution(torch.zeros(1), torch.ones(1), "cauchy")
    with pytest.raises(ValueError, match=r"'normal' reward cannot be compared with a 'cauchy' one"):
        a.prob_greater(b)


ALL = RewardDistribution(
    torch.tensor([1.0, 2.0, 3.0]),
    torch.tensor([0.5, 1.0, 2.0]),
    "mixture",
    shape=torch.tensor([[0.5, 0.1], [0.4, 0.2], [0.3, 0.3]]),
    location_error=torch.tensor([0.1, 0.2, 0.3]),
)


def test_every_tensor_is_indexed_mapped_and_put_together():
    one = ALL[1]
    assert (one.location, one.scale, one.location_error) == (torch.tensor(2.0), torch.tensor(1.0), torch.tensor(0.2))
    assert one.shape.tolist() == pytest.approx([0.4, 0.2])
    assert len(ALL) == 3 and len(ALL[torch.tensor([True, False, True])]) == 2
    wide = ALL.map(torch.Tensor.double)
    assert {field.dtype for field in (wide.location, wide.scale, wide.shape, wide.location_error)} == {torch.float64}
    again = RewardDistribution.cat([ALL[:1], ALL[1:]])
    for name in ("location", "scale", "shape", "location_error"):
        torch.testing.assert_close(getattr(again, name), getattr(ALL, name), rtol=0, atol=0)
    assert again.family == "mixture"
    plain = RewardDistribution(torch.zeros(2), torch.ones(2), "normal")
    assert RewardDistribution.cat([plain, plain]).shape is RewardDistribution.cat([plain]).location_error is None


def test_what_cannot_be_put_together():
    normal = RewardDistribution(torch.zeros(2), torch.ones(2), "normal")
    certain = RewardDistribution(torch.zeros(2), torch.ones(2), "normal", location_error=torch.ones(2))
    for rewards in ([normal, RewardDistribution(torch.zeros(2), torch.ones(2), "cauchy")], [normal, certain], []):
        with pytest.raises(ValueError, match=rf"got {len(rewards)} batches of the families"):
            RewardDistribution.cat(rewards)


def test_fields_of_a_wrong_size():
    two = torch.ones(2)
    with pytest.raises(
        ValueError, match=r"'mixture' rewards must be of size \[2, 2\] \(weight, polarization\), .* None"
    ):
        RewardDistribution(two, two, "mixture")
    with pytest.raises(
        ValueError, match=r"'normal' rewards must be of size \[2, 0\] \(none\), but it is of size \[2, 1\]"
    ):
        RewardDistribution(two, two, "normal", shape=torch.ones(2, 1))
    with pytest.raises(ValueError, match=r"location_error is of size \[\] and location of \[2\]"):
        RewardDistribution(two, two, "normal", location_error=torch.tensor(0.1))


# The model's own error


def test_location_errors_by_hand():
    # σ² + τ² = 0.16 + 0.09 and 0.09 + 0.16, so s = √0.5 = 0.707107 and z = 0.5 / s = 0.707107:  Φ(z) = 0.760250.
    # With the first error alone s = √(0.16 + 0.09 + 0.09) = 0.583095, z = 0.857493:  Φ(z) = 0.804414.
    a = RewardDistribution(torch.tensor([1.7]), torch.tensor([0.4]), "normal", location_error=torch.tensor([0.3]))
    b = RewardDistribution(torch.tensor([1.2]), torch.tensor([0.3]), "normal", location_error=torch.tensor([0.4]))
    assert a.prob_greater(b).item() == pytest.approx(0.760250, abs=1e-6)
    assert a.prob_greater(RewardDistribution(b.location, b.scale, "normal")).item() == pytest.approx(
        0.804414, abs=1e-6
    )
    assert RewardDistribution(b.location, b.scale, "normal").prob_greater(a).item() == pytest.approx(
        1 - 0.804414, abs=1e-6
    )


class LargestTensor(TorchDispatchMode):
    """Sees the number of elements of the largest tensor that is computed."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.size = max(self.size, result.numel())
        return result


@pytest.mark.parametrize("size", [None, 1000])
def test_many_pairs_are_compared_a_part_at_a_time(size):
    # 200 answers are 40,000 pairs, each with a quadrature of some hundred nodes, and two rows of error factors.
    location, scale = torch.linspace(-3, 3, 200), torch.linspace(0.5, 2, 200)
    factor = None if size is None else 0.3 * torch.nn.functional.normalize(torch.randn(200, size), dim=-1)
    rewards = RewardDistribution(location, scale, "laplace", None, torch.full((200,), 0.3), factor)
    first, second = torch.cartesian_prod(torch.arange(200), torch.arange(200)).T
    with LargestTensor() as largest:
        found = rewards.prob_greater_within(first, second)
    assert 8 * largest.size <= reward_distribution.BYTES_AT_ONCE < 8 * 40_000 * (size or 256)
    torch.testing.assert_close(
        found.reshape(200, 200), rewards[:, None].prob_greater(rewards[None]), rtol=1e-6, atol=1e-7
    )
    with LargestTensor() as largest:
        get_transform("win_rate")(rewards, torch.zeros(200, dtype=torch.long))
    assert 8 * largest.size <= reward_distribution.BYTES_AT_ONCE
    assert rewards.prob_greater_within(first[:0], second[:0]).shape == (0,)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_no_error_and_an_error_of_zero_are_one(name):
    shape = torch.tensor([[0.3, 0.7]] * 4) if get_family(name).shape_names else None
    location, scale = torch.tensor([0.0, -8.0, 0.5, 5.0]), torch.tensor([1.0, 0.1, 0.7, 2.0])
    error = torch.zeros(4, requires_grad=True)
    known = RewardDistribution(location, scale, name, shape)
    sure = RewardDistribution(location, scale, name, shape, error)
    log_prob = sure[:, None].log_prob_greater(sure[None])
    torch.testing.assert_close(log_prob, known[:, None].log_prob_greater(known[None]), rtol=1e-6, atol=1e-9)
    (gradient,) = torch.autograd.grad(log_prob.sum(), error)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", list(FAMILIES))
def test_an_error_changes_what_is_said_of_pairs_and_not_of_people(name):
    shape = torch.tensor([[0.3, 0.7], [0.5, 0.2]]) if get_family(name).shape_names else None
    known = RewardDistribution(torch.tensor([0.0, 1.5]), torch.tensor([1.0, 0.5]), name, shape)
    guess = RewardDistribution(known.location, known.scale, name, shape, torch.tensor([2.0, 1.0]))
    assert known[1].prob_greater(known[0]) > guess[1].prob_greater(guess[0]) + 0.05
    torch.testing.assert_close(guess.quantile(0.2), known.quantile(0.2), rtol=0, atol=0)
    torch.testing.assert_close(guess.cdf(0.3), known.cdf(0.3), rtol=0, atol=0)
    draws = [reward.sample((9,), torch.Generator().manual_seed(0)) for reward in (guess, known)]
    torch.testing.assert_close(*draws, rtol=0, atol=0)


def mean_over_error(name: str, log_unit: float, delta, error, scale_a, scale_b, *shapes) -> mpmath.mpf:
    """∫ P(R_a > R_b at Δ + τη) φ(η) dη / e^log_unit, cut where the integrand bends and about where it is large.

    The unit is there because mpmath's quadrature stops at an absolute error.
    """
    s = mpmath.sqrt(scale_a**2 + scale_b**2)
    bend = -delta / error
    cuts = {bend + k * s / error for k in (-16, -4, -1, 0, 1, 4, 16)} | {mpmath.mpf(x) for x in range(-30, 31, 5)}
    return mpmath.quad(
        lambda x: mpmath.exp(reference(name, delta + error * x, scale_a, 0, scale_b, *shapes) - x**2 / 2 - log_unit),
        sorted(x for x in cuts if -30 <= x <= 30),
    ) / mpmath.sqrt(2 * mpmath.pi)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_probabilities_averaged_over_the_error_against_quadrature(name):
    shape = (0.5, 0.8125)
    for (scale_a, scale_b), ratio, z in itertools.product(
        [(1.0, 1.0), (0.25, 1.125)], [0.05, 3.0], [-30.0, -0.4, 1.5]
    ):
        s = math.hypot(scale_a, scale_b)
        numbers = (torch.tensor(x, dtype=torch.float64) for x in (z * s, scale_a, scale_b, shape, shape))
        error = torch.tensor(ratio * s, dtype=torch.float64)
        log_prob = Difference(get_family(name), *numbers).log_prob_exceeds(error=error).item()
        with mpmath.workdps(15):
            share = mean_over_error(
                name, log_prob, *map(mpmath.mpf, (z * s, ratio * s, scale_a, scale_b, *shape, *shape))
            )
        assert float(share) == pytest.approx(1, rel=1e-6), (scale_a, scale_b, ratio, z)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_an_error_far_beyond_the_scales_is_finite(name):
    # It is then the error alone that decides: Φ(Δ / τ).
    shape = torch.tensor([0.5, 0.8]).expand(7, 2) if get_family(name).shape_names else None
    delta = torch.tensor([-1e4, -30.0, -1.0, 0.0, 1.0, 30.0, 1e4], requires_grad=True)
    zero, one, error = torch.zeros(7), torch.full((7,), 0.01), torch.full((7,), 10.0, requires_grad=True)
    unsure = RewardDistribution(delta, one, name, shape, error)
    log_prob = unsure.log_prob_greater(RewardDistribution(zero, one, name, shape))
    gradients = torch.autograd.grad(log_prob.sum(), [delta, error])
    assert all(torch.isfinite(tensor).all() for tensor in (log_prob, *gradients))
    expected = torch.special.ndtr(delta.detach() / 10)
    torch.testing.assert_close(log_prob[2:5].exp().detach(), expected[2:5], rtol=2e-3, atol=0)


def test_the_examples_in_the_docstrings():
    for module in (reward_distribution, base):
        result = doctest.testmod(module)
        assert result.attempted > 0
        assert result.failed == 0


def test_the_maths_needs_torch_alone():
    code = (
        "import sys, disco_trl.distributions.reward_distribution; "
        "sys.exit(any(m in sys.modules for m in ('transformers', 'trl', 'peft')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# What the errors of two answers have in common


def uncertain(location, factor, own=0.0, name="normal") -> RewardDistribution:
    factor = torch.tensor(factor, dtype=torch.float64)
    error = torch.hypot(factor.norm(dim=-1), torch.tensor(own, dtype=torch.float64))
    location = torch.tensor(location, dtype=torch.float64)
    shape = torch.tensor([0.5, 0.8]).expand(*location.shape, 2) if name == "mixture" else None
    return RewardDistribution(location, torch.ones_like(location), name, shape, error, factor)


def test_the_error_of_a_difference_leaves_out_what_both_errors_share():
    a, b = uncertain([1.0], [[3.0, 4.0]], own=0.6), uncertain([0.0], [[3.0, 0.0]], own=0.8)
    # Var = (3 - 3)² + (4 - 0)² + 0.6² + 0.8² = 17
    assert a.error_of_difference(b).item() == pytest.approx(math.sqrt(17))
    assert a.prob_greater(b).item() == pytest.approx(torch.special.ndtr(torch.tensor(1 / math.sqrt(2 + 17))).item())
    # Without factors the errors are independent: 25 + 0.36 + 9 + 0.64 = 35.
    apart = [RewardDistribution(r.location, r.scale, "normal", None, r.location_error) for r in (a, b)]
    assert apart[0].error_of_difference(apart[1]).item() == pytest.approx(math.sqrt(35))
    exact = RewardDistribution(b.location, b.scale, "normal")
    assert a.error_of_difference(exact).item() == pytest.approx(math.sqrt(25 + 0.36))
    assert exact.error_of_difference(exact) is None


@pytest.mark.parametrize("name", list(FAMILIES))
def test_answers_that_share_their_whole_error_are_compared_as_if_there_were_none(name):
    a, b = uncertain([0.7], [[3.0, 4.0]], name=name), uncertain([0.2], [[3.0, 4.0]], name=name)
    exact = [RewardDistribution(r.location, r.scale, name, r.shape) for r in (a, b)]
    torch.testing.assert_close(a.prob_greater(b), exact[0].prob_greater(exact[1]), rtol=1e-6, atol=0)


def test_errors_of_all_pairs_of_a_group():
    rewards = uncertain([0.1, 0.2, 0.9], [[1.0, 0.0], [0.5, 0.5], [0.0, 2.0]])
    found = rewards[:, None].error_of_difference(rewards[None, :])
    expected = torch.cdist(rewards.error_factor, rewards.error_factor)
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-7)


def test_error_factors_go_where_the_rewards_go():
    rewards = uncertain([0.1, 0.2, 0.9], [[1.0, 0.0], [0.5, 0.5], [0.0, 2.0]])
    again = RewardDistribution.cat([rewards[:1], rewards[torch.tensor([1, 2])]])
    assert torch.equal(again.error_factor, rewards.error_factor)
    assert rewards.map(lambda tensor: tensor.float()).error_factor.dtype == torch.float32
    plain = RewardDistribution(rewards.location, rewards.scale, "normal", None, rewards.location_error)
    with pytest.raises(ValueError, match="1 with an error factor"):
        RewardDistribution.cat([rewards, plain])
    with pytest.raises(ValueError, match="one row for each location, and a location_error"):
        RewardDistribution(rewards.location, rewards.scale, "normal", error_factor=rewards.error_factor)
    with pytest.raises(ValueError, match=r"error_factor is of size \[2, 2\] and location of \[3\]"):
        RewardDistribution(rewards.location, rewards.scale, "normal", None, rewards.location_error, torch.ones(2, 2))


def test_a_reward_is_written_as_location_and_scale():
    one = RewardDistribution(torch.tensor(1.7), torch.tensor(0.4), "normal")
    assert f"{one}" == "1.70 ± 0.40"
    many = RewardDistribution(torch.linspace(-1, 1, 20), torch.tensor(0.5), "cauchy")
    assert str(many[:2]) == "[-1.00 ± 0.50, -0.89 ± 0.50]"
    assert str(many).startswith("[-1.00 ± 0.50, ") and str(many).endswith(", ... and 12 more]")
    assert str(many[:0]) == "[]"
