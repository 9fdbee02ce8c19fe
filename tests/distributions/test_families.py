"""The maths, against closed forms: mpmath with fifty digits, scipy, and plain counting.

`reference` below is the definition that the tests hold the package to, and its derivatives are mpmath's, by finite
differences with many more digits than fifty. It takes a row: location and scale of a, the same of b, and for the
mixture weight and polarization of either.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from types import SimpleNamespace

import mpmath
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from disco_trl import RewardDistribution
from disco_trl.distributions.families import Difference, get_family


mpmath.mp.dps = 50
half = mpmath.mpf(1) / 2
SHAPES = [(0.5, 0.5), (0.25, 0.875), (0.75, 0.0625)]
all_families = pytest.mark.parametrize("name", ["normal", "cauchy", "logistic", "laplace", "mixture"])
# Those with no further parameters and a closed-form quantile.
plain_families = pytest.mark.parametrize("name", ["normal", "cauchy", "logistic", "laplace"])
STANDARD = {
    "normal": SimpleNamespace(
        cdf=mpmath.ncdf, quantile=lambda q: mpmath.sqrt(2) * mpmath.erfinv(2 * q - 1), scipy=scipy.stats.norm
    ),
    "cauchy": SimpleNamespace(
        # Fifty digits hold ½ + arctan(z) / π for z down to -1e6 well enough.
        cdf=lambda z: half + mpmath.atan(z) / mpmath.pi,
        quantile=lambda q: mpmath.tan(mpmath.pi * (q - half)),
        scipy=scipy.stats.cauchy,
    ),
    "logistic": SimpleNamespace(
        cdf=lambda z: 1 / (1 + mpmath.exp(-z)), quantile=lambda q: mpmath.log(q / (1 - q)), scipy=scipy.stats.logistic
    ),
    "laplace": SimpleNamespace(
        cdf=lambda z: mpmath.exp(z) / 2 if z < 0 else 1 - mpmath.exp(-z) / 2,
        quantile=lambda q: mpmath.log(2 * q) if q < half else -mpmath.log(2 * (1 - q)),
        scipy=scipy.stats.laplace,
    ),
}


def camps(weight: mpmath.mpf, polarization: mpmath.mpf) -> list[tuple[mpmath.mpf, mpmath.mpf, mpmath.mpf]]:
    """Share, center and inner standard deviation of both camps.

    Mean 0: w ρ √((1-w)/w) = ρ √(w(1-w)) = (1-w) ρ √(w/(1-w)). Variance 1: w ρ² (1-w)/w + (1-w) ρ² w/(1-w) = ρ² between
    the camps, and 1 - ρ² within.
    """
    within = mpmath.sqrt(1 - polarization**2)
    odds = (1 - weight) / weight
    return [
        (weight, polarization * mpmath.sqrt(odds), within),
        (1 - weight, -polarization / mpmath.sqrt(odds), within),
    ]


def less_likely(name: str, t: mpmath.mpf, scale_a: mpmath.mpf, scale_b: mpmath.mpf) -> mpmath.mpf:
    """P(R_a - R_b > t) at equal locations, for t ≥ 0."""
    if name == "laplace":
        if scale_a == scale_b:
            return mpmath.exp(-t / scale_a) * (1 + t / (2 * scale_a)) / 2
        # It cancels at nearly equal scales, which mpmath's finite differences make of equal ones.
        with mpmath.workdps(3 * mpmath.mp.dps):
            a, b = scale_a**2, scale_b**2
            return (a * mpmath.exp(-t / scale_a) - b * mpmath.exp(-t / scale_b)) / (a - b) / 2
    s = scale_a + scale_b if name == "cauchy" else mpmath.sqrt(scale_a**2 + scale_b**2)
    return STANDARD[name].cdf(-t / s)


def reference(name: str, loc_a, scale_a, loc_b, scale_b, *shapes) -> mpmath.mpf:
    """log P(R_a > R_b)."""
    delta = loc_a - loc_b
    if name != "mixture":
        tail = less_likely(name, abs(delta), scale_a, scale_b)
        # log1p, because fifty digits do not hold 1 - 1e-60
        return mpmath.log(tail) if delta < 0 else mpmath.log1p(-tail)
    wins = losses = mpmath.mpf(0)
    for (share_a, center_a, within_a), (share_b, center_b, within_b) in itertools.product(
        camps(*shapes[:2]), camps(*shapes[2:])
    ):
        s = mpmath.sqrt((scale_a * within_a) ** 2 + (scale_b * within_b) ** 2)
        z = (delta + scale_a * center_a - scale_b * center_b) / s
        wins += share_a * share_b * mpmath.ncdf(z)
        losses += share_a * share_b * mpmath.ncdf(-z)
    return mpmath.log(wins) if wins < losses else mpmath.log1p(-losses)


def computed(name: str, rows: Sequence[Sequence[float]]) -> torch.Tensor:
    """log P(R_a > R_b) and its derivatives by each number of the rows, from float32 tensors: Tensor `[N, 1 + K]`."""
    columns = [torch.tensor(column, dtype=torch.float32, requires_grad=True) for column in zip(*rows, strict=True)]
    shapes = [torch.stack(columns[i : i + 2], dim=-1) for i in range(4, len(columns), 2)]
    log_prob = get_family(name).log_prob_greater(*columns[:4], *shapes)
    assert log_prob.dtype == torch.float32
    return torch.stack([log_prob.detach(), *torch.autograd.grad(log_prob.sum(), columns)], dim=-1)


def float32_rows(name: str, zs: Sequence[float], scales: Sequence[tuple[float, float]]) -> list[tuple[float, ...]]:
    """Arguments that float32 holds exactly, with about these z: the reference sees the very same numbers."""
    rows = []
    shapes = list(itertools.pairwise([*SHAPES, SHAPES[0]])) if name == "mixture" else [((), ())]
    for row, (z, (scale_a, scale_b)) in enumerate(itertools.product(zs, scales)):
        loc_b = (0.0, 1.5)[row % 2]
        values = [loc_b + z * math.hypot(scale_a, scale_b), scale_a, loc_b, scale_b]
        shape_a, shape_b = shapes[row % len(shapes)]
        rows.append(tuple(torch.tensor([*values, *shape_a, *shape_b], dtype=torch.float32).tolist()))
    return rows


def assert_close(name: str, rows: Sequence[Sequence[float]], absolute: float = 1e-37) -> None:
    """All that `computed` gives is right to 1e-5 relative, or to `absolute`: float32 ends at 1e-38."""
    values = computed(name, rows)
    assert torch.isfinite(values).all()
    for row, value in zip(rows, values.tolist(), strict=True):
        exact = [mpmath.mpf(number) for number in row]
        expected = [reference(name, *exact)]
        for which in range(len(row)):
            expected.append(
                mpmath.diff(
                    lambda x, which=which, at=exact: reference(name, *at[:which], x, *at[which + 1 :]), exact[which]
                )
            )
        names = ("log P", "d/dμa", "d/dσa", "d/dμb", "d/dσb", "d/dwa", "d/dρa", "d/dwb", "d/dρb")
        for what, got, want in zip(names, value, expected, strict=False):
            # A shape's derivative is a difference of the camps' parts, each known to float64's rounding of log P.
            rounding = 1e-15 * abs(expected[0]) if what[3] in "wρ" else 0
            error = abs(mpmath.mpf(got) - want)
            assert error <= max(1e-5 * abs(want), absolute, rounding), (
                f"{name} {what} at {row}: {got}, but {mpmath.nstr(want, 8)}"
            )


SCALES = [(1e-3, 1e-3), (1e-3, 1.0), (0.5, 1e-2), (1.0, 1.0), (0.7, 3.0), (1e3, 1e-3), (1e3, 1e3), (1.0, 1.0 + 2**-20)]


@all_families
def test_value_and_gradients_are_right_to_1e5_relative(name):
    zs = [-1e4, -3e3, -500.0, -37.5, -12.0, -5.0, -2.0, -0.5, -1e-3, 1e-3, 0.5, 2.0, 5.0, 8.0, 10.0]
    assert_close(name, float32_rows(name, zs, SCALES))


@all_families
def test_the_far_tails_are_finite(name):
    zs = [-1e5, 10.5, 13.0, 15.0, 38.0, 100.0, 1e4, 1e6]
    assert_close(name, float32_rows(name, zs, SCALES), absolute=1e-20)
    farther = float32_rows(name, [-1e6], SCALES)
    if name == "mixture":  # the camps' parts are told apart by differences of log Φ, which are -5e11 each
        assert torch.isfinite(computed(name, farther)).all()
    else:
        assert_close(name, farther)


@all_families
def test_gradient_at_equal_locations(name):
    # Every run starts here, on the seam of the formulas for P < ½ and P > ½.
    shapes = (0.25, 0.875, 0.5, 0.5) if name == "mixture" else ()
    assert_close(name, [(0.0, 1.0, 0.0, 1.0, *shapes), (2.0, 0.3, 2.0, 1.7, *shapes)], absolute=1e-15)


def test_nearly_equal_laplace_scales():
    # On both sides of where the formula changes from its series: d = t |σa - σb| / σa σb = 0.1.
    scales = [1 + 2.0**-k for k in range(2, 24)] + [1.0, 1.0953125, 1.09375, 0.90625]
    assert_close("laplace", [(-1.0, 1.0, 0.0, scale) for scale in scales])
    assert_close("laplace", [(-30.0, scale, 0.0, 1.0) for scale in scales])


def test_worked_numbers():
    a, b = (torch.tensor(1.7), torch.tensor(0.4)), (torch.tensor(1.2), torch.tensor(0.3))
    # z = (1.7 - 1.2) / √(0.16 + 0.09) = 1:  Φ(1) = 0.84134,  sigmoid(1) = 0.73106
    # Cauchy: z = 0.5 / 0.7 = 0.71429:  ½ + arctan(0.71429) / π = 0.69743
    # Laplace: 1 - (0.16 e^(-0.5/0.4) - 0.09 e^(-0.5/0.3)) / (2 (0.16 - 0.09))
    #          = 1 - (0.16 · 0.286505 - 0.09 · 0.188876) / 0.14 = 0.79399
    for name, prob in (("normal", 0.84134), ("logistic", 0.73106), ("cauchy", 0.69743), ("laplace", 0.79399)):
        found = get_family(name).log_prob_greater(*a, *b).exp()
        torch.testing.assert_close(found, torch.tensor(prob), rtol=1e-4, atol=0)
    # Mixture of equal camps (w = ½) with ρ = 0.6, 0.8: centers ±0.6 · 0.4 = ±0.24 and ±0.8 · 0.3 = ±0.24; inner
    # deviations 0.8 · 0.4 = 0.32 and 0.6 · 0.3 = 0.18, so s = √(0.1024 + 0.0324) = 0.367151. The centers differ by 0
    # (twice), 0.48 and -0.48:  ½ Φ(0.5 / s) + ¼ Φ(0.98 / s) + ¼ Φ(0.02 / s)
    #   = ½ · 0.913369 + ¼ · 0.996202 + ¼ · 0.521722 = 0.836165
    shapes = torch.tensor([0.5, 0.6]), torch.tensor([0.5, 0.8])
    prob = get_family("mixture").log_prob_greater(*a, *b, *shapes).exp()
    torch.testing.assert_close(prob, torch.tensor(0.836165), rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale_b", [0.3, 0.8, 2.0])
def test_the_laplace_formula_is_the_convolution(scale_b):
    # P(X - Y > t) = ∫ f(y) P(X > y + t) dy, cut where either bends.
    t, scale_a = mpmath.mpf("0.7"), mpmath.mpf("0.8")
    scale_b = mpmath.mpf(scale_b)
    standard = STANDARD["laplace"].cdf
    with mpmath.workdps(20):
        expected = mpmath.quad(
            lambda y: mpmath.exp(-abs(y) / scale_b) / (2 * scale_b) * standard(-(y + t) / scale_a),
            [-mpmath.inf, -t, 0, mpmath.inf],
        )
    numbers = (torch.tensor(float(x)).double() for x in (0, scale_a, scale_b))
    got = Difference(get_family("laplace"), *numbers).log_prob_exceeds(float(t))
    assert got.exp().item() == pytest.approx(float(expected), rel=1e-6)


def test_logistic_at_inverse_root_two_is_bradley_terry():
    # s = √(½ + ½) = 1, which leaves sigmoid(μ_a - μ_b).
    loc_a, loc_b = torch.linspace(-30, 30, 61), torch.zeros(61)
    scale = torch.full((61,), 2**-0.5, dtype=torch.float64)
    log_prob = get_family("logistic").log_prob_greater(loc_a.double(), scale, loc_b.double(), scale)
    torch.testing.assert_close(
        log_prob, torch.nn.functional.logsigmoid(loc_a.double() - loc_b.double()), rtol=1e-12, atol=0
    )


def arguments(name: str, rows: Sequence[Sequence[float]]) -> list[torch.Tensor]:
    """Columns of rows as float64 arguments of `log_prob_greater`."""
    columns = list(torch.tensor(rows, dtype=torch.float64).T)
    return columns[:4] + [torch.stack(columns[i : i + 2], dim=-1) for i in range(4, len(columns), 2)]


def swapped(loc_a, scale_a, loc_b, scale_b, *shapes):
    return loc_b, scale_b, loc_a, scale_a, *shapes[::-1]


@all_families
def test_the_two_orders_are_complements(name):
    family = get_family(name)
    rows = arguments(name, float32_rows(name, [-8.0, -1.0, 0.0, 1e-3, 2.0, 8.0], SCALES))
    greater, less = family.log_prob_greater(*rows), family.log_prob_greater(*swapped(*rows))
    torch.testing.assert_close(greater.exp() + less.exp(), torch.ones(len(rows[0]), dtype=torch.float64))
    difference = Difference(family, rows[0] - rows[2], rows[1], rows[3], *rows[4:])
    torch.testing.assert_close(difference.log_prob_exceeds(), greater, rtol=0, atol=0)
    torch.testing.assert_close((-difference).log_prob_exceeds(), less, rtol=0, atol=0)


def test_the_complement_does_not_cancel():
    # 1 - P(a > b) is 0 in float32 from z = 6 on; log P(a < b) goes on to tell -1e4 from -1e3.
    one, zero = torch.ones(()), torch.zeros(())
    for z in (1e3, 1e4):
        log_prob = get_family("normal").log_prob_greater(zero, one, torch.tensor(z * math.sqrt(2)), one)
        expected = mpmath.log(mpmath.ncdf(-z))
        assert abs(log_prob.item() / float(expected) - 1) < 1e-6


@all_families
def test_gradcheck(name):
    torch.manual_seed(0)
    family = get_family(name)
    loc_a, loc_b = torch.randn(2, 12, dtype=torch.float64)
    loc_b[:3] = loc_a[:3]
    scale_a, scale_b = torch.rand(2, 12, dtype=torch.float64) + 0.2
    scale_b[6:9] = scale_a[6:9]
    shapes = family.shape_from_raw(torch.randn(2, 12, len(family.shape_names), dtype=torch.float64))
    inputs = [tensor.clone().requires_grad_() for tensor in (loc_a, scale_a, loc_b, scale_b, *shapes)]
    assert torch.autograd.gradcheck(family.log_prob_greater, inputs)
    # And with the errors of both locations.
    errors = [tensor.requires_grad_() for tensor in torch.rand(2, 12, dtype=torch.float64) + 0.1]

    def log_prob(loc_a, scale_a, loc_b, scale_b, *rest):
        *shapes, error_a, error_b = rest
        shape_a, shape_b = shapes or (None, None)
        a = RewardDistribution(loc_a, scale_a, family, shape_a, error_a)
        return a.log_prob_greater(RewardDistribution(loc_b, scale_b, family, shape_b, error_b))

    # The nodes of the integral move with the arguments: a longer step than usual sees past what that changes.
    assert torch.autograd.gradcheck(log_prob, [*inputs, *errors], eps=1e-5, atol=1e-5)


@all_families
def test_unit_scale_gives_the_slope_of_bradley_terry(name):
    family = get_family(name)
    scale = torch.tensor(family.unit_scale, dtype=torch.float64)
    loc = torch.zeros((), dtype=torch.float64, requires_grad=True)
    start = family.shape_from_raw(torch.zeros(len(family.shape_names), dtype=torch.float64))
    log_prob = family.log_prob_greater(loc, scale, torch.zeros_like(loc), scale, start, start)
    (slope,) = torch.autograd.grad(log_prob.exp(), loc)
    assert slope.item() == pytest.approx(0.25, rel=1e-12)


finite = st.floats(-50, 50, width=32)
positive = st.floats(0.0625, 20, width=32)
shapes = st.sampled_from(SHAPES)


@all_families
@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    loc_a=finite,
    loc_b=finite,
    more=st.floats(2**-10, 30, width=32),
    scale_a=positive,
    scale_b=positive,
    shape_a=shapes,
    shape_b=shapes,
)
def test_properties(name, loc_a, loc_b, more, scale_a, scale_b, shape_a, shape_b):
    family = get_family(name)

    def log_prob(loc_a, scale_a, loc_b, scale_b, *shapes):
        return family.log_prob_greater(
            *(torch.tensor(value, dtype=torch.float64) for value in (loc_a, scale_a, loc_b, scale_b, *shapes))
        ).item()

    value = log_prob(loc_a, scale_a, loc_b, scale_b, shape_a, shape_b)
    assert value <= 0
    # A higher location is likelier to win, as far as float64 can tell.
    higher = log_prob(loc_a + more, scale_a, loc_b, scale_b, shape_a, shape_b)
    assert higher > value or higher > -1e-15
    # Only the difference of the locations counts.
    moved = log_prob(loc_a - loc_b, scale_a, 0.0, scale_b, shape_a, shape_b)
    assert moved == pytest.approx(value, rel=1e-9)
    # Rewards turned upside down: the other one wins. The upper camp becomes the lower one.
    upside_down = [(1 - weight, polarization) for weight, polarization in (shape_b, shape_a)]
    assert log_prob(-loc_b, scale_b, -loc_a, scale_a, *upside_down) == pytest.approx(value, rel=1e-9)
    if name != "mixture":  # which scale belongs to which side does not count
        assert log_prob(loc_a, scale_b, loc_b, scale_a) == pytest.approx(value, rel=1e-9)
    # The unit of reward is free: this is what the trainer's gauge has to fix.
    scaled = log_prob(3 * loc_a + 7, 3 * scale_a, 3 * loc_b + 7, 3 * scale_b, shape_a, shape_b)
    assert scaled == pytest.approx(value, rel=1e-9)


# One reward


def one_reward(name: str, loc: torch.Tensor, scale: torch.Tensor, shape: torch.Tensor) -> RewardDistribution:
    """With a shape if the family has shape parameters."""
    return RewardDistribution(loc, scale, name, shape if get_family(name).shape_names else None)


def standard_cdf(name: str, z: mpmath.mpf, shape: tuple[float, float]) -> mpmath.mpf:
    if name != "mixture":
        return STANDARD[name].cdf(z)
    return sum(share * mpmath.ncdf((z - center) / within) for share, center, within in camps(*map(mpmath.mpf, shape)))


@all_families
def test_log_cdf_and_log_survival_with_their_gradients(name):
    shape = SHAPES[1]
    zs = [-1e4, -300.0, -37.5, -8.0, -1.0, -1e-3, 0.0, 0.5, 3.0, 10.0, 30.0, 1e4]
    z = torch.tensor(zs, dtype=torch.float64, requires_grad=True)
    family = get_family(name)
    below = family.log_cdf(z, torch.tensor(shape, dtype=torch.float64))
    above = family.log_survival(z, torch.tensor(shape, dtype=torch.float64))
    got = [below, torch.autograd.grad(below.sum(), z)[0], above, torch.autograd.grad(above.sum(), z)[0]]
    mirrored = (1 - shape[0], shape[1])

    def log_share_below(x, shape, mirrored):
        # From the side where nothing is lost: beyond the middle, log1p of minus the other side's share.
        if x < 0:
            return mpmath.log(standard_cdf(name, x, shape))
        return mpmath.log1p(-standard_cdf(name, -x, mirrored))

    for i, x in enumerate(map(mpmath.mpf, zs)):
        # Beside 0, where the Laplace reference changes its formula, any point will do.
        x = x or mpmath.mpf(2) ** -60
        expected = [
            log_share_below(x, shape, mirrored),
            mpmath.diff(lambda x: log_share_below(x, shape, mirrored), x),
            log_share_below(-x, mirrored, shape),
            mpmath.diff(lambda x: log_share_below(-x, mirrored, shape), x),
        ]
        for value, want in zip((part[i].item() for part in got), expected, strict=True):
            assert abs(value - want) <= max(1e-10 * abs(want), 1e-300), (name, zs[i], value, mpmath.nstr(want, 15))


LEVELS = [1e-12, 1e-6, 0.025, 0.3, 0.5, 0.75, 0.999, 1 - 1e-6, 1 - 2**-40]


@plain_families
def test_quantile_against_mpmath_and_scipy(name):
    loc, scale = torch.tensor(0.25, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
    quantile = RewardDistribution(loc, scale, name).quantile(torch.tensor(LEVELS, dtype=torch.float64))
    for level, value in zip(LEVELS, quantile.tolist(), strict=True):
        expected = float(0.25 + 2 * STANDARD[name].quantile(mpmath.mpf(level)))
        assert value == pytest.approx(expected, rel=1e-10, abs=1e-14), level
        assert value == pytest.approx(STANDARD[name].scipy.ppf(level, loc=0.25, scale=2.0), rel=1e-8), level


@plain_families
def test_cdf_against_scipy(name):
    loc, scale = torch.tensor(-1.0, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    x = torch.tensor([-30.0, -4.0, -1.0, 0.0, 3.5], dtype=torch.float64)
    cdf = RewardDistribution(loc, scale, name).cdf(x)
    torch.testing.assert_close(cdf, torch.from_numpy(STANDARD[name].scipy.cdf(x, -1.0, 0.7)))


@all_families
def test_cdf_of_a_quantile_is_its_level(name):
    loc, scale = torch.tensor(-1.0, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    for shape in torch.tensor(SHAPES, dtype=torch.float64):
        reward = one_reward(name, loc, scale, shape)
        torch.testing.assert_close(reward.cdf(reward.quantile(levels)), levels, rtol=1e-9, atol=0)


@all_families
@pytest.mark.parametrize("level", [0.0, 1.0, -0.1, float("nan")])
def test_quantile_level_outside_the_open_interval(name, level):
    reward = one_reward(name, torch.ones(()), torch.ones(()), torch.tensor(SHAPES[0]))
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        reward.quantile(torch.tensor([0.5, level]))


DRAWS = 400_000


@pytest.mark.parametrize("name", ["normal", "cauchy", "laplace", "mixture"])
def test_samples_compare_as_the_formula_says(name):
    # These families are exact, so the share of draws in which a wins is binomial with P(a > b): its standard error is
    # √(P (1 - P) / N), at most 0.0008, and the seed is fixed. A wrong way to add scales is off by 0.02 and more.
    generator = torch.Generator().manual_seed(0)
    a = one_reward(name, torch.tensor(0.8), torch.tensor(1.5), torch.tensor([0.25, 0.9]))
    b = one_reward(name, torch.tensor(0.1), torch.tensor(0.4), torch.tensor([0.6, 0.4]))
    wins = a.sample((DRAWS,), generator) > b.sample((DRAWS,), generator)
    prob = a.prob_greater(b).item()
    assert abs(wins.double().mean().item() - prob) < 4 * math.sqrt(prob * (1 - prob) / DRAWS)


@all_families
def test_samples_follow_the_cdf(name):
    loc, scale = torch.tensor(-2.0, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    reward = one_reward(name, loc, scale, torch.tensor([0.25, 0.9], dtype=torch.float64))
    draws = reward.sample((DRAWS,), torch.Generator().manual_seed(1))
    # Kolmogorov–Smirnov: the largest gap exceeds 1.95 / √N once in a thousand seeds.
    empirical = torch.arange(1, DRAWS + 1, dtype=torch.float64) / DRAWS
    gap = (reward.cdf(draws.sort().values) - empirical).abs().max()
    assert gap < 1.95 / math.sqrt(DRAWS)


def test_the_logistic_marginal_matches_the_variance_of_its_link():
    # sigmoid(Δ / s) is the law of a logistic difference of variance π² s² / 3 = π² σ_a² / 3 + π² σ_b² / 3. The draws'
    # variance has a relative standard error of √((4.2 - 1) / N), with 4.2 the logistic's kurtosis.
    generator = torch.Generator().manual_seed(2)
    a, b = (RewardDistribution(torch.zeros(()), torch.tensor(scale), "logistic") for scale in (0.5, 1.2))
    difference = a.sample((DRAWS,), generator) - b.sample((DRAWS,), generator)
    expected = math.pi**2 / 3 * (0.5**2 + 1.2**2)
    assert difference.var().item() == pytest.approx(expected, rel=4 * math.sqrt(3.2 / DRAWS))


@all_families
@pytest.mark.parametrize("value", [0.0, 1 - 2**-53, 0.25])
def test_extreme_random_numbers_are_finite_draws(name, value, monkeypatch):
    # `torch.rand` gives multiples of 2⁻⁵³ from 0 on; 0.25 is where a mixture with that weight changes camps.
    monkeypatch.setattr(torch, "rand", lambda size, **kwargs: torch.full(size, value, dtype=torch.float64))
    reward = one_reward(name, torch.zeros(1), torch.full((1,), 1e3), torch.tensor([[0.25, 0.5]]))
    assert torch.isfinite(reward.sample()).all()


# Tensors


@all_families
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes(name, dtype):
    family = get_family(name)
    loc, scale = torch.tensor([0.5, -1.0], dtype=dtype), torch.tensor([1.0, 2.0], dtype=dtype)
    shape = torch.tensor(SHAPES[:2], dtype=dtype)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert family.log_prob_greater(loc, scale, loc.flip(0), scale, shape, shape).dtype == expected
    reward = one_reward(name, loc, scale, shape)
    assert dataclasses.replace(reward, location_error=scale).log_prob_greater(reward[[1, 0]]).dtype == expected
    assert reward.quantile(torch.tensor(0.1)).dtype == expected
    assert reward.cdf(torch.tensor(0.1)).dtype == expected
    assert reward.sample((3,)).dtype == expected
    # Nothing is worked out in half precision: what is lost is lost in the arguments.
    arguments = (loc, scale, loc.flip(0), scale, shape, shape)
    wide = family.log_prob_greater(*(argument.double() for argument in arguments))
    torch.testing.assert_close(family.log_prob_greater(*arguments).double(), wide)


@all_families
def test_shapes_broadcast(name):
    family = get_family(name)
    shape_a, shape_b = torch.tensor([[SHAPES[0]], [SHAPES[1]], [SHAPES[2]]]), torch.tensor(SHAPES[0])
    numbers = torch.zeros(3, 1), torch.ones(3, 1), torch.zeros(4), torch.ones(())
    assert family.log_prob_greater(*numbers, shape_a, shape_b).shape == (3, 4)
    b = one_reward(name, torch.zeros(4), torch.ones(()), shape_b.expand(4, 2))
    for error in (None, torch.ones(3, 1)):
        a = one_reward(name, torch.zeros(3, 1), torch.ones(3, 1), shape_a)
        assert dataclasses.replace(a, location_error=error).log_prob_greater(b).shape == (3, 4)
    assert one_reward(name, torch.zeros(3, 1), torch.ones(4), shape_a).sample((2, 5)).shape == (2, 5, 3, 4)
    assert b.quantile(torch.tensor([[0.1], [0.9]])).shape == (2, 4)
