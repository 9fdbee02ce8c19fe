"""The maths, against closed forms: mpmath with fifty digits, scipy, and plain counting.

`reference` below is the definition that the tests hold the package to. Its gradients are written out by hand: with
z = (μ_a - μ_b) / s and the hazard h = d log F / dz,

    d/dμ_a = h / s      d/dμ_b = -h / s      d/dσ = -h z / s · ds/dσ

where s = √(σ_a² + σ_b²) has ds/dσ_a = σ_a / s, and the Cauchy family's s = σ_a + σ_b has 1.
"""

import doctest
import itertools
import math
import subprocess
import sys
from types import SimpleNamespace

import mpmath
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from disco_trl import distributions
from disco_trl.distributions import FAMILIES, RewardDistribution, get_family


mpmath.mp.dps = 50
all_families = pytest.mark.parametrize("name", ["normal", "cauchy", "logistic"])
STANDARD = {
    "normal": SimpleNamespace(
        cdf=mpmath.ncdf,
        hazard=lambda z: mpmath.npdf(z) / mpmath.ncdf(z),
        quantile=lambda q: mpmath.sqrt(2) * mpmath.erfinv(2 * q - 1),
        scipy=scipy.stats.norm,
    ),
    "cauchy": SimpleNamespace(
        cdf=lambda z: mpmath.mpf(1) / 2 + mpmath.atan(z) / mpmath.pi,
        hazard=lambda z: 1 / (mpmath.pi * (1 + z**2)) / (mpmath.mpf(1) / 2 + mpmath.atan(z) / mpmath.pi),
        quantile=lambda q: mpmath.tan(mpmath.pi * (q - mpmath.mpf(1) / 2)),
        scipy=scipy.stats.cauchy,
    ),
    "logistic": SimpleNamespace(
        cdf=lambda z: 1 / (1 + mpmath.exp(-z)),
        hazard=lambda z: 1 / (1 + mpmath.exp(z)),
        quantile=lambda q: mpmath.log(q / (1 - q)),
        scipy=scipy.stats.logistic,
    ),
}


def reference(name: str, loc_a: float, scale_a: float, loc_b: float, scale_b: float) -> list[mpmath.mpf]:
    """log P(R_a > R_b) and its derivatives with respect to loc_a, scale_a, loc_b and scale_b."""
    loc_a, scale_a, loc_b, scale_b = map(mpmath.mpf, (loc_a, scale_a, loc_b, scale_b))
    if name == "cauchy":
        s = scale_a + scale_b
        slope_a = slope_b = mpmath.mpf(1)
    else:
        s = mpmath.sqrt(scale_a**2 + scale_b**2)
        slope_a, slope_b = scale_a / s, scale_b / s
    z = (loc_a - loc_b) / s
    hazard = STANDARD[name].hazard(z)
    # log1p, because fifty digits do not hold 1 - 1e-60
    log_prob = mpmath.log1p(-STANDARD[name].cdf(-z)) if z > 0 else mpmath.log(STANDARD[name].cdf(z))
    return [log_prob, hazard / s, -hazard * z / s * slope_a, -hazard / s, -hazard * z / s * slope_b]


def computed(name: str, rows: list[tuple[float, ...]]) -> torch.Tensor:
    """The same five numbers for each row, from float32 tensors: Tensor `[N, 5]`."""
    arguments = [torch.tensor(column, dtype=torch.float32, requires_grad=True) for column in zip(*rows, strict=True)]
    log_prob = get_family(name).log_prob_greater(*arguments)
    assert log_prob.dtype == torch.float32
    return torch.stack([log_prob.detach(), *torch.autograd.grad(log_prob.sum(), arguments)], dim=-1)


def float32_rows(zs: list[float], scales: list[tuple[float, float]]) -> list[tuple[float, ...]]:
    """Arguments that float32 holds exactly, with about these z: the reference sees the very same numbers."""
    rows = []
    for z, (scale_a, scale_b), loc_b in itertools.product(zs, scales, [0.0, 1.5]):
        loc_a = loc_b + z * math.hypot(scale_a, scale_b)
        rows.append(tuple(torch.tensor([loc_a, scale_a, loc_b, scale_b], dtype=torch.float32).tolist()))
    return rows


def assert_close(name: str, rows: list[tuple[float, ...]], absolute: float) -> None:
    values = computed(name, rows)
    assert torch.isfinite(values).all()
    for row, value in zip(rows, values.tolist(), strict=True):
        expected = reference(name, *row)
        for what, got, want in zip(("log P", "d/dμa", "d/dσa", "d/dμb", "d/dσb"), value, expected, strict=True):
            error = abs(mpmath.mpf(got) - want)
            assert error <= max(1e-5 * abs(want), absolute), (
                f"{name} {what} at {row}: {got}, but {mpmath.nstr(want, 8)}"
            )


SCALES = [(1e-3, 1e-3), (1e-3, 1.0), (0.5, 1e-2), (1.0, 1.0), (0.7, 3.0), (1e3, 1e-3), (1e3, 1e3)]


@all_families
def test_value_and_gradients_are_right_to_1e5_relative(name):
    zs = [-1e4, -3e3, -500.0, -37.5, -12.0, -5.0, -2.0, -0.5, -1e-3, 1e-3, 0.5, 2.0, 5.0, 8.0, 10.0]
    assert_close(name, float32_rows(zs, SCALES), absolute=0)


@all_families
def test_the_far_tails_are_finite(name):
    zs = [-1e6, -1e5, 10.5, 13.0, 15.0, 38.0, 100.0, 1e4, 1e6]
    assert_close(name, float32_rows(zs, SCALES), absolute=1e-20)


@all_families
def test_gradient_at_equal_locations(name):
    # Every run starts here, on the seam of the two formulas. At z = 0: P = ½, h = 2 F'(0).
    assert_close(name, [(0.0, 1.0, 0.0, 1.0), (2.0, 0.3, 2.0, 1.7)], absolute=0)


def test_worked_numbers():
    a, b = (torch.tensor(1.7), torch.tensor(0.4)), (torch.tensor(1.2), torch.tensor(0.3))
    # z = (1.7 - 1.2) / √(0.16 + 0.09) = 1:  Φ(1) = 0.84134,  sigmoid(1) = 0.73106
    # Cauchy: z = 0.5 / 0.7 = 0.71429:  ½ + arctan(0.71429) / π = 0.69743
    for name, prob in (("normal", 0.84134), ("logistic", 0.73106), ("cauchy", 0.69743)):
        torch.testing.assert_close(get_family(name).prob_greater(*a, *b), torch.tensor(prob), rtol=1e-4, atol=0)


def test_logistic_at_inverse_root_two_is_bradley_terry():
    # s = √(½ + ½) = 1, which leaves sigmoid(μ_a - μ_b).
    loc_a, loc_b = torch.linspace(-30, 30, 61), torch.zeros(61)
    scale = torch.full((61,), 2**-0.5, dtype=torch.float64)
    log_prob = get_family("logistic").log_prob_greater(loc_a.double(), scale, loc_b.double(), scale)
    torch.testing.assert_close(
        log_prob, torch.nn.functional.logsigmoid(loc_a.double() - loc_b.double()), rtol=1e-12, atol=0
    )


@all_families
def test_the_two_orders_are_complements(name):
    family = get_family(name)
    rows = torch.tensor(float32_rows([-8.0, -1.0, 0.0, 1e-3, 2.0, 8.0], SCALES), dtype=torch.float64).T
    torch.testing.assert_close(
        family.prob_greater(*rows) + family.log_prob_less(*rows).exp(), torch.ones(rows.shape[1], dtype=torch.float64)
    )
    loc_a, scale_a, loc_b, scale_b = rows
    torch.testing.assert_close(
        family.log_prob_less(*rows), family.log_prob_greater(loc_b, scale_b, loc_a, scale_a), rtol=0, atol=0
    )


def test_the_complement_does_not_cancel():
    # 1 - P(a > b) is 0 in float32 from z = 6 on; log P(a < b) goes on to tell -1e4 from -1e3.
    one, zero = torch.ones(()), torch.zeros(())
    for z in (1e3, 1e4):
        log_prob = get_family("normal").log_prob_less(torch.tensor(z * math.sqrt(2)), one, zero, one)
        expected = mpmath.log(mpmath.ncdf(-z))
        assert abs(log_prob.item() / float(expected) - 1) < 1e-6


@all_families
def test_gradcheck(name):
    torch.manual_seed(0)
    loc_a, loc_b = torch.randn(2, 12, dtype=torch.float64)
    loc_b[:3] = loc_a[:3]
    scale_a, scale_b = torch.rand(2, 12, dtype=torch.float64) + 0.2
    arguments = [tensor.clone().requires_grad_() for tensor in (loc_a, scale_a, loc_b, scale_b)]
    assert torch.autograd.gradcheck(get_family(name).log_prob_greater, arguments)


@all_families
def test_unit_scale_gives_the_slope_of_bradley_terry(name):
    family = get_family(name)
    scale = torch.tensor(family.unit_scale, dtype=torch.float64)
    loc = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(family.prob_greater(loc, scale, torch.zeros_like(loc), scale), loc)
    assert slope.item() == pytest.approx(0.25, rel=1e-12)


finite = st.floats(-50, 50, width=32)
positive = st.floats(0.0625, 20, width=32)


@all_families
@settings(deadline=None, max_examples=60, derandomize=True)
@given(loc_a=finite, loc_b=finite, more=st.floats(2**-10, 30, width=32), scale_a=positive, scale_b=positive)
def test_properties(name, loc_a, loc_b, more, scale_a, scale_b):
    family = get_family(name)

    def log_prob(loc_a, scale_a, loc_b, scale_b):
        return family.log_prob_greater(
            *(torch.tensor(value, dtype=torch.float64) for value in (loc_a, scale_a, loc_b, scale_b))
        ).item()

    value = log_prob(loc_a, scale_a, loc_b, scale_b)
    assert value <= 0
    # A higher location is likelier to win, as far as float64 can tell.
    higher = log_prob(loc_a + more, scale_a, loc_b, scale_b)
    assert higher > value or higher > -1e-15
    # Only the difference of the locations counts, and which scale belongs to which side does not.
    assert log_prob(loc_a, scale_b, loc_b, scale_a) == pytest.approx(value, rel=1e-9)
    assert log_prob(-loc_b, scale_b, -loc_a, scale_a) == pytest.approx(value, rel=1e-9)
    # The unit of reward is free: this is what the trainer's gauge has to fix.
    assert log_prob(3 * loc_a + 7, 3 * scale_a, 3 * loc_b + 7, 3 * scale_b) == pytest.approx(value, rel=1e-9)


LEVELS = [1e-12, 1e-6, 0.025, 0.3, 0.5, 0.75, 0.999, 1 - 1e-6, 1 - 2**-40]


@all_families
def test_quantile_against_mpmath_and_scipy(name):
    loc, scale = torch.tensor(0.25, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
    quantile = get_family(name).quantile(torch.tensor(LEVELS, dtype=torch.float64), loc, scale)
    for level, value in zip(LEVELS, quantile.tolist(), strict=True):
        expected = float(0.25 + 2 * STANDARD[name].quantile(mpmath.mpf(level)))
        assert value == pytest.approx(expected, rel=1e-10, abs=1e-14), level
        assert value == pytest.approx(STANDARD[name].scipy.ppf(level, loc=0.25, scale=2.0), rel=1e-8), level


@all_families
def test_cdf_against_scipy_and_back(name):
    family = get_family(name)
    loc, scale = torch.tensor(-1.0, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    x = torch.tensor([-30.0, -4.0, -1.0, 0.0, 3.5], dtype=torch.float64)
    torch.testing.assert_close(family.cdf(x, loc, scale), torch.from_numpy(STANDARD[name].scipy.cdf(x, -1.0, 0.7)))
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    torch.testing.assert_close(family.cdf(family.quantile(levels, loc, scale), loc, scale), levels, rtol=1e-9, atol=0)


@all_families
@pytest.mark.parametrize("level", [0.0, 1.0, -0.1, float("nan")])
def test_quantile_level_outside_the_open_interval(name, level):
    one = torch.ones(())
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        get_family(name).quantile(torch.tensor([0.5, level]), one, one)


DRAWS = 400_000


@pytest.mark.parametrize("name", ["normal", "cauchy"])
def test_samples_compare_as_the_formula_says(name):
    # Both families are exact, so the share of draws in which a wins is binomial with P(a > b): its standard error is
    # √(P (1 - P) / N), at most 0.0008, and the seed is fixed. A wrong way to add scales is off by 0.02 and more.
    family = get_family(name)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.tensor(0.8), torch.tensor(1.5)), (torch.tensor(0.1), torch.tensor(0.4))
    wins = family.sample(*a, (DRAWS,), generator) > family.sample(*b, (DRAWS,), generator)
    prob = family.prob_greater(*a, *b).item()
    assert abs(wins.double().mean().item() - prob) < 4 * math.sqrt(prob * (1 - prob) / DRAWS)


@all_families
def test_samples_follow_the_cdf(name):
    family = get_family(name)
    loc, scale = torch.tensor(-2.0, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    draws = family.sample(loc, scale, (DRAWS,), torch.Generator().manual_seed(1))
    # Kolmogorov–Smirnov: the largest gap exceeds 1.95 / √N once in a thousand seeds.
    empirical = torch.arange(1, DRAWS + 1, dtype=torch.float64) / DRAWS
    gap = (family.cdf(draws.sort().values, loc, scale) - empirical).abs().max()
    assert gap < 1.95 / math.sqrt(DRAWS)


def test_the_logistic_marginal_matches_the_variance_of_its_link():
    # sigmoid(Δ / s) is the law of a logistic difference of variance π² s² / 3 = π² σ_a² / 3 + π² σ_b² / 3. The draws'
    # variance has a relative standard error of √((4.2 - 1) / N), with 4.2 the logistic's kurtosis.
    family = get_family("logistic")
    generator = torch.Generator().manual_seed(2)
    scale_a, scale_b = torch.tensor(0.5), torch.tensor(1.2)
    zero = torch.zeros(())
    difference = family.sample(zero, scale_a, (DRAWS,), generator) - family.sample(zero, scale_b, (DRAWS,), generator)
    expected = math.pi**2 / 3 * (0.5**2 + 1.2**2)
    assert difference.var().item() == pytest.approx(expected, rel=4 * math.sqrt(3.2 / DRAWS))


@all_families
def test_the_smallest_random_number_is_a_finite_draw(name, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda size, **kwargs: torch.zeros(size, dtype=torch.float64))
    draw = get_family(name).sample(torch.zeros(1), torch.full((1,), 1e3))
    assert torch.isfinite(draw).all()


@all_families
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes(name, dtype):
    family = get_family(name)
    loc, scale = torch.tensor([0.5, -1.0], dtype=dtype), torch.tensor([1.0, 2.0], dtype=dtype)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert family.log_prob_greater(loc, scale, loc.flip(0), scale).dtype == expected
    assert family.quantile(torch.tensor(0.1), loc, scale).dtype == expected
    assert family.cdf(torch.tensor(0.1), loc, scale).dtype == expected
    assert family.sample(loc, scale, (3,)).dtype == expected
    # Nothing is worked out in half precision: what is lost is lost in the arguments.
    wide = family.log_prob_greater(loc.double(), scale.double(), loc.flip(0).double(), scale.double())
    torch.testing.assert_close(family.log_prob_greater(loc, scale, loc.flip(0), scale).double(), wide)


@all_families
def test_shapes_broadcast(name):
    family = get_family(name)
    log_prob = family.log_prob_greater(torch.zeros(3, 1), torch.ones(3, 1), torch.zeros(4), torch.ones(()))
    assert log_prob.shape == (3, 4)
    assert family.sample(torch.zeros(3, 1), torch.ones(4), (2, 5)).shape == (2, 5, 3, 4)
    assert family.quantile(torch.tensor([[0.1], [0.9]]), torch.zeros(4), torch.ones(4)).shape == (2, 4)


def test_an_unknown_family_lists_those_there_are():
    with pytest.raises(ValueError, match=r"'gumbel' is unknown; choose one of 'normal', 'cauchy', 'logistic'"):
        get_family("gumbel")


def test_every_family_is_registered_under_its_name():
    assert {name: family.name for name, family in FAMILIES.items()} == {name: name for name in STANDARD}


@all_families
def test_reward_distribution(name):
    a = RewardDistribution(torch.tensor([1.7, 0.0]), torch.tensor([0.4, 1.0]), name)
    b = RewardDistribution(torch.tensor([1.2, 0.0]), torch.tensor([0.3, 2.0]), name)
    family = get_family(name)
    torch.testing.assert_close(
        a.log_prob_greater(b), family.log_prob_greater(a.location, a.scale, b.location, b.scale), rtol=0, atol=0
    )
    torch.testing.assert_close(a.prob_greater(b) + b.prob_greater(a), torch.ones(2))
    assert a.prob_greater(b)[1].item() == pytest.approx(0.5)
    # All three are symmetric: the median is the location, and q and 1 - q lie equally far from it.
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


def test_the_examples_in_the_docstrings():
    result = doctest.testmod(distributions)
    assert result.attempted > 0
    assert result.failed == 0


def test_the_maths_needs_torch_alone():
    code = (
        "import sys, disco_trl.distributions; sys.exit(any(m in sys.modules for m in ('transformers', 'trl', 'peft')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
