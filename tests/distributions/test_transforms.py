"""`disco_trl.distributions.transforms` and the certainty equivalent: numbers worked out by hand, mpmath, and what is
refused."""

import dataclasses
import math

import mpmath
import numpy as np
import pytest
import torch

from disco_trl import RewardDistribution, get_family
from disco_trl.distributions.families import FAMILIES
from disco_trl.distributions.transforms import TRANSFORMS, get_transform, group_members


ALL_FAMILIES = ["normal", "cauchy", "logistic", "laplace", "mixture"]
CAMPS = [0.2, 0.8]  # of every mixture here: a fifth likes the answer, and 0.64 of the variance lies between the camps


def rewards(location, scale, family="normal", dtype=torch.float32):
    shape = torch.tensor([CAMPS] * len(location), dtype=dtype) if family == "mixture" else None
    return RewardDistribution(torch.tensor(location, dtype=dtype), torch.tensor(scale, dtype=dtype), family, shape)


TWO = rewards([1.5, -0.5], [0.5, 2.0])


# Closed forms


def test_mean_is_the_location():
    assert get_transform("mean")(TWO).tolist() == [1.5, -0.5]


def test_lower_bound():
    # 1.5 - 2 · 0.5 = 0.5;  -0.5 - 2 · 2 = -4.5. By default k = 1: 1.5 - 0.5 = 1;  -0.5 - 2 = -2.5.
    assert get_transform("lower_bound", k=2)(TWO).tolist() == [0.5, -4.5]
    assert get_transform("lower_bound")(TWO).tolist() == [1.0, -2.5]
    assert get_transform("lower_bound", k=0)(TWO).tolist() == [1.5, -0.5]


@pytest.mark.parametrize(
    ("family", "q", "standard"),
    [
        # Φ(-1) = 0.158655253931457, so F⁻¹ of it is -1; Φ⁻¹(½) = 0.
        ("normal", 0.158655253931457, -1.0),
        ("normal", 0.5, 0.0),
        # ½ + arctan(-1)/π = ½ - ¼: the lower quartile of the Cauchy is at -1.
        ("cauchy", 0.25, -1.0),
        # sigmoid(-log 3) = 1 / (1 + 3) = ¼.
        ("logistic", 0.25, -math.log(3)),
        # ½ e^(-log 2) = ¼.
        ("laplace", 0.25, -math.log(2)),
        # Camps: 1/5 at 0.8 · √(0.8/0.2) = 1.6, 4/5 at -0.8 · √(0.2/0.8) = -0.4, both of standard deviation √(1 - 0.64)
        # = 0.6. At z = -0.4:  1/5 · Φ(-2 / 0.6) + 4/5 · Φ(0) = 0.2 · 0.000429060 + 0.4 = 0.400085812.
        ("mixture", 0.400085812, -0.4),
    ],
)
def test_quantile(family, q, standard):
    got = get_transform("quantile", q=q)(rewards([1.5, -0.5], [0.5, 2.0], family))
    assert got.tolist() == pytest.approx([1.5 + 0.5 * standard, -0.5 + 2 * standard], abs=1e-5)


def test_the_default_quantile_is_the_tenth():
    # Φ⁻¹(0.1) = -1.2815516
    assert get_transform("quantile")(rewards([1.0], [2.0])).item() == pytest.approx(1 - 2 * 1.2815516, abs=1e-6)


def test_certainty_equivalent_of_the_normal():
    # μ - σ²/2β: 1.5 - 0.25/4 = 1.4375;  -0.5 - 4/4 = -1.5.
    assert get_transform("certainty_equivalent", beta=2.0)(TWO).tolist() == pytest.approx([1.4375, -1.5], abs=1e-6)


def test_certainty_equivalent_of_the_logistic():
    # -β log(πt / sin πt) with t = σ/β = ½: πt = π/2 and sin = 1, so μ - β log(π/2) = 3 - 2 · 0.4515827 = 2.0968346.
    got = get_transform("certainty_equivalent", beta=2.0)(rewards([3.0], [1.0], "logistic"))
    assert got.item() == pytest.approx(2.0968346, abs=1e-6)


def test_certainty_equivalent_of_the_laplace():
    # μ - β log 1 / (1 - t²) with t = σ/β = ½: 3 + 2 log ¾ = 3 - 0.5753641 = 2.4246359.
    got = get_transform("certainty_equivalent", beta=2.0)(rewards([3.0], [1.0], "laplace"))
    assert got.item() == pytest.approx(2.4246359, abs=1e-6)


def test_certainty_equivalent_of_the_mixture():
    # With t = -σ/β = -½: E[e^(tε)] = (1/5 e^(-0.8) + 4/5 e^(0.2)) e^(0.36 · ¼ / 2) = 1.0669880 · 1.0460279
    # = 1.1160992, so 3 - 2 · 0.1098397 = 2.7803206.
    got = get_transform("certainty_equivalent", beta=2.0)(rewards([3.0], [1.0], "mixture"))
    assert got.item() == pytest.approx(2.7803206, abs=1e-6)


def certainty_equivalent_by_quadrature(family: str, location: float, scale: float, beta: float) -> float:
    """-β log ∫ e^(-r/β) f(r) dr, with 30 digits; the exponents are put together, since each alone overflows."""
    with mpmath.workdps(30):
        t = -mpmath.mpf(scale) / beta
        if family == "normal":
            integral = mpmath.quad(
                lambda z: mpmath.exp(t * z - z * z / 2) / mpmath.sqrt(2 * mpmath.pi), [-mpmath.inf, t, mpmath.inf]
            )
        elif family == "mixture":
            integral = mpmath.quad(
                lambda z: mpmath.exp(t * z) * (0.2 * mpmath.npdf(z, 1.6, 0.6) + 0.8 * mpmath.npdf(z, -0.4, 0.6)),
                [-mpmath.inf, -0.4, 1.6, mpmath.inf],
            )
        else:
            # e^(tz) e^(-z) / (1 + e^(-z))² by u = F(z), z = log(u / (1-u)): ∫ u^t (1-u)^(-t) du over the unit
            # interval. With u = v^n the singularity at 0, as t → -1, is one that quadrature can take.
            n = 1 / (1 + t)
            integral = mpmath.quad(lambda v: n * (1 - v**n) ** (-t), [0, 0.5, 1])
        return float(location - beta * mpmath.log(integral))


@pytest.mark.parametrize("scale", [1e-3, 0.3, 1.0, 1.9, 1.999, 1.99999])
@pytest.mark.parametrize("family", ["normal", "logistic", "mixture"])
def test_certainty_equivalent_against_quadrature(family, scale):
    reward = rewards([0.7], [scale], family, torch.float64)
    expected = certainty_equivalent_by_quadrature(family, 0.7, scale, 2.0)
    assert get_transform("certainty_equivalent", beta=2.0)(reward).item() == pytest.approx(expected, rel=1e-9)


def test_certainty_equivalent_is_below_the_mean_and_tends_to_it():
    for family in ("normal", "logistic", "laplace", "mixture"):
        values = [
            get_transform("certainty_equivalent", beta=beta)(rewards([1.0], [0.5], family)).item()
            for beta in (0.6, 1.0, 10.0, 1e6)
        ]
        assert values == sorted(values)
        assert values[0] < 0.9
        assert values[-1] == pytest.approx(1.0, abs=1e-6)


# Refusals


@pytest.mark.parametrize("beta", [1e-3, 1.0, 1e9])
def test_cauchy_has_no_certainty_equivalent_whatever_beta(beta):
    # Known before there is any reward, so that training does not begin.
    with pytest.raises(ValueError, match=r"'cauchy' reward is -∞: its tails .* use 'lower_bound' or 'quantile'"):
        get_transform("certainty_equivalent", beta=beta).check_family("cauchy")


@pytest.mark.parametrize("family", ["logistic", "laplace"])
@pytest.mark.parametrize("scale", [2.0, 2.5])
def test_logistic_and_laplace_have_none_from_scale_beta_on(family, scale):
    transform = get_transform("certainty_equivalent", beta=2.0)
    transform.check_family(family)  # most scales are below
    with pytest.raises(ValueError, match=rf"scales below beta=2\.0 \(the largest scale is {scale:.4g}\)"):
        transform(rewards([0.0, 0.0], [0.1, scale], family))


@pytest.mark.parametrize("name", [name for name in TRANSFORMS if name != "certainty_equivalent"])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_the_others_exist_for_every_family(name, family):
    get_transform(name).check_family(family)


@pytest.mark.parametrize(
    ("name", "option", "bad"),
    [
        *(("lower_bound", "k", bad) for bad in (-1e-9, math.inf, math.nan, True, "1", None, [1.0])),
        *(("quantile", "q", bad) for bad in (0, 1, 0.0, 1.0, -0.1, math.nan, True, "0.5", None)),
        *(("certainty_equivalent", "beta", bad) for bad in (0, -1.0, math.inf, math.nan, True, "1", None)),
        *(("sample", "seed", bad) for bad in (-1, 1.5, math.nan, True, "1", None, 2**63)),
    ],
)
def test_options_out_of_their_domain(name, option, bad):
    with pytest.raises(ValueError, match=rf"transform '{name}': {option}=.* must be"):
        get_transform(name, **{option: bad})


def test_numpy_numbers_are_numbers():
    assert get_transform("lower_bound", k=np.float32(2))(TWO).tolist() == [0.5, -4.5]
    get_transform("sample", seed=np.int64(3))(TWO)


def test_unknown_names():
    with pytest.raises(ValueError, match=r"transform='median' is unknown; choose one of 'mean', 'lower_bound'"):
        get_transform("median")
    with pytest.raises(ValueError, match=r"'certainty_equivalent' has no option 'bta'; did you mean 'beta'\?"):
        get_transform("certainty_equivalent", bta=1.0)
    with pytest.raises(ValueError, match=r"'lower_bound' has no option 'q'; it takes 'k', 'total'"):
        get_transform("lower_bound", q=0.1)
    with pytest.raises(ValueError, match=r"'mean' has no option 'k'; it takes 'total'"):
        get_transform("mean", k=1.0)


# Win rate


def test_win_rate_by_hand():
    # Normal, all σ = 1/√2, so that s = √(½ + ½) = 1 and P(a ≻ b) = Φ(μa - μb).
    # Group 7, rows 0, 2, 5 with μ = 2, 1, 0:  Φ(1) = 0.8413447, Φ(2) = 0.9772499.
    #   row 0: (Φ(1) + Φ(2)) / 2 = 0.9092973;  row 2: (Φ(-1) + Φ(1)) / 2 = ½;  row 5: (Φ(-2) + Φ(-1)) / 2 = 0.0907027.
    # Group 3, rows 1, 4 with μ = 5, 4:  Φ(1) and Φ(-1) = 0.1586553.
    # Group 9, row 3 alone: ½.
    location = [2.0, 5.0, 1.0, -8.0, 4.0, 0.0]
    reward = rewards(location, [0.5**0.5] * 6)
    got = get_transform("win_rate")(reward, torch.tensor([7, 3, 7, 9, 3, 7]))
    assert got.tolist() == pytest.approx([0.9092973, 0.8413447, 0.5, 0.5, 0.1586553, 0.0907027], abs=1e-6)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_win_rate_is_free_of_the_unit(family):
    generator = torch.Generator().manual_seed(0)
    location = torch.randn(12, generator=generator, dtype=torch.float64)
    scale = torch.rand(12, generator=generator, dtype=torch.float64) + 0.1
    group = torch.tensor([0, 1, 2] * 4)
    transform = get_transform("win_rate")
    shape = torch.rand(12, 2, generator=generator, dtype=torch.float64) if family == "mixture" else None
    one = transform(RewardDistribution(location, scale, family, shape), group)
    other = transform(RewardDistribution(7.3 * location - 41.0, 7.3 * scale, family, shape), group)
    torch.testing.assert_close(other, one, rtol=0, atol=1e-12)
    assert one.min() < 0.4 < 0.6 < one.max()
    # Wins of one are losses of another: each group's mean is ½.
    for members in group_members(group):
        assert one[members].mean().item() == pytest.approx(0.5, abs=1e-12)


def test_win_rate_without_groups_is_refused():
    with pytest.raises(ValueError, match="compares the answers to one prompt"):
        get_transform("win_rate")(TWO)


def test_group_members_keep_the_order_of_rows():
    members = group_members(torch.tensor([5, 2, 5, 5, 2, 8]))
    assert [rows.tolist() for rows in members] == [[1, 4], [0, 2, 3], [5]]
    assert group_members(torch.empty(0, dtype=torch.long)) in ([], [torch.empty(0, dtype=torch.long)])


# Draws


def test_sample_is_reproducible_by_seed_and_goes_on():
    first, again, other = (get_transform("sample", seed=seed) for seed in (3, 3, 4))
    draws = [first(TWO), first(TWO)]
    assert not torch.equal(*draws)  # a stream, not the same draw each time
    assert torch.equal(torch.stack([again(TWO), again(TWO)]), torch.stack(draws))
    assert not torch.equal(other(TWO), draws[0])


def test_sample_does_not_touch_the_global_generator():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    get_transform("sample")(TWO)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_sample_has_the_quantiles_of_the_family(family):
    n = 20_000
    reward = rewards([1.5], [0.5], family, torch.float64)
    many = reward.map(lambda tensor: tensor.expand(n, *tensor.shape[1:]))
    draws = get_transform("sample", seed=1)(many).sort().values
    # Kolmogorov and Smirnov: sup |F_n - F| exceeds 1.95/√n = 0.0138 once in a thousand seeds; this one is fixed.
    empirical = torch.arange(n, dtype=torch.float64) / n
    assert (reward.cdf(draws) - empirical).abs().max().item() < 1.95 / math.sqrt(n)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_total_counts_the_error_of_the_location(family):
    certain = rewards([1.5, -0.5], [0.5, 2.0], family)
    unsure = dataclasses.replace(certain, location_error=torch.tensor([0.0, 3.0]))
    for name in ("lower_bound", "quantile"):
        plain, total = get_transform(name), get_transform(name, total=True)
        assert plain(unsure).tolist() == plain(certain).tolist() == total(certain).tolist()
        (one, other), expected = total(unsure).tolist(), plain(certain).tolist()
        assert one == pytest.approx(expected[0], abs=1e-6) and other < expected[1] - 0.5
    assert get_transform("lower_bound", total=True)(unsure)[1].item() == pytest.approx(
        -0.5 - math.hypot(2, 3 * get_family(family).unit_scale / get_family("normal").unit_scale), abs=1e-5
    )


def test_total_is_the_normal_that_it_stands_for():
    """Draw a location and then a person: that is how `total` is distributed."""
    reward = dataclasses.replace(rewards([0.3], [0.8]), location_error=torch.tensor([0.6]))
    total = get_transform("quantile", q=0.2, total=True)(reward).item()
    generator = torch.Generator().manual_seed(0)
    draws = 0.3 + torch.randn(2, 200_000, generator=generator).T @ torch.tensor([0.6, 0.8])
    assert (draws < total).float().mean().item() == pytest.approx(0.2, abs=0.004)
    with pytest.raises(ValueError, match="total=1 must be True or False"):
        get_transform("mean", total=1)


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("q", [1 - 1e-9, 1 - 1e-15, 1e-12])
def test_extreme_levels_are_levels_of_float64(family, q):
    transform = get_transform("quantile", q=q)
    transform.check_family(family)
    shape = torch.tensor([[0.5, 0.5]]) if family == "mixture" else None
    narrow, wide = (
        transform(
            RewardDistribution(torch.tensor([0.5], dtype=dtype), torch.tensor([2.0], dtype=dtype), family, shape)
        )
        for dtype in (torch.bfloat16, torch.float64)
    )
    assert narrow.item() == pytest.approx(wide.item(), rel=1e-6)
    kind = get_family(family)
    z = ((wide - 0.5) / 2).double()
    # The nearer tail, which keeps its digits
    tail = kind.log_cdf(z, shape).exp() if q < 0.5 else kind.log_survival(z, shape).exp()
    assert tail.item() == pytest.approx(min(q, 1 - q), rel=1e-6)


def test_a_level_whose_reward_would_be_infinite_is_refused_before_any_reward():
    with pytest.raises(ValueError, match=r"beyond float32 .* choose a less extreme level"):
        get_transform("quantile", q=1e-300).check_family("cauchy")
    get_transform("quantile", q=1e-300).check_family("normal")
