"""The likelihood of the spread of ratings, against the integral that defines it and against what it is for.

With thresholds t_1 < ... < t_(L-1), a step s = (t_(L-1) - t_1) / (L - 2) and ends a = t_1 - s, b = t_(L-1) + s, it is

    log ∫ π(m) Π_k P(t_(k-1) < m + σε < t_k)^(n_k) dm,   π(m) = [Φ((m - a) / (s/4)) - Φ((m - b) / (s/4))] / (b - a).
"""

import itertools
import math

import mpmath
import pytest
import torch

from disco_trl.distributions.families import FAMILIES, get_family
from disco_trl.distributions.ratings import (
    SpreadTable,
    has_spread,
    rating_log_likelihood,
    spread_log_likelihood,
)
from disco_trl.distributions.reward_distribution import RewardDistribution


THRESHOLDS = torch.tensor([-1.5, -0.5, 0.8, 1.7], dtype=torch.float64)
all_families = pytest.mark.parametrize("name", list(FAMILIES))


def rewards(scale: torch.Tensor, name: str = "normal", location: float = 0.0, error=None) -> RewardDistribution:
    shape = torch.tensor([0.3, 0.8], dtype=torch.float64).expand(len(scale), 2) if name == "mixture" else None
    return RewardDistribution(torch.full_like(scale, location), scale, name, shape, error)


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def every_outcome(raters: int, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts `(N, levels)` of everything that raters can say, and in how many orders they can."""
    sets = list(itertools.combinations_with_replacement(range(levels), raters))
    counts = torch.stack([torch.bincount(torch.tensor(chosen), minlength=levels) for chosen in sets]).double()
    orders = math.factorial(raters) / torch.lgamma(counts + 1).exp().prod(dim=1)
    return counts, orders


# Values and gradients


def exact(counts: list[int], scale: mpmath.mpf) -> mpmath.mpf:
    """The definition, for the normal family."""
    t = [mpmath.mpf(x) for x in THRESHOLDS.tolist()]
    step = (t[-1] - t[0]) / (len(t) - 1)
    a, b = t[0] - step, t[-1] + step

    def integrand(m: mpmath.mpf) -> mpmath.mpf:
        below = [mpmath.mpf(0), *(mpmath.ncdf((x - m) / scale) for x in t), mpmath.mpf(1)]
        product = (mpmath.ncdf(4 * (m - a) / step) - mpmath.ncdf(4 * (m - b) / step)) / (b - a)
        for k, count in enumerate(counts):
            if count:
                product *= (below[k + 1] - below[k]) ** count
        return product

    cuts = sorted(
        {a - 2 * step, a - step, a, b, b + step, b + 2 * step, *t, *(x + d * scale for x in t for d in (-2, 2))}
    )
    return mpmath.log(mpmath.quad(integrand, cuts, maxdegree=4))


@pytest.mark.parametrize(
    ("counts", "scale"),
    [([1, 0, 1, 0, 0], 0.3), ([0, 0, 3, 0, 0], 1.0), ([5, 0, 0, 0, 0], 4.0), ([1, 2, 0, 1, 3], 0.7)],
    ids=str,
)
def test_against_the_integral(counts, scale):
    sigma = numbers(scale).requires_grad_()
    found = spread_log_likelihood(rewards(sigma), torch.tensor([counts]), THRESHOLDS)
    found.sum().backward()
    step = mpmath.mpf("1e-4")
    with mpmath.workdps(25):
        low, value, high = (exact(counts, scale + shift * step) for shift in (-1, 0, 1))
    assert found.item() == pytest.approx(float(value), abs=1e-7)
    assert sigma.grad.item() == pytest.approx(float((high - low) / (2 * step)), rel=1e-5, abs=1e-6)


@all_families
def test_everything_that_can_be_said_has_probability_one(name):
    counts, orders = every_outcome(raters=3, levels=5)
    for scale in (0.2, 1.3):
        found = spread_log_likelihood(rewards(torch.full((len(counts),), scale), name), counts, THRESHOLDS)
        assert (orders * found.exp()).sum().item() == pytest.approx(1, abs=1e-6)


@all_families
def test_gradients(name):
    counts = torch.tensor([[2, 0, 1, 0, 0], [0, 0, 0, 0, 3], [0, 1, 0, 0, 0], [1, 0, 0, 0, 1]])
    shape = torch.tensor([[0.3, 0.8], [0.5, 0.4], [0.2, 0.2], [0.7, 0.6]], dtype=torch.float64)

    def total(scale, shape):
        of_family = shape if name == "mixture" else None
        return spread_log_likelihood(RewardDistribution(0 * scale, scale, name, of_family), counts, THRESHOLDS)

    scale = numbers(0.5, 1.2, 0.8, 2.0).requires_grad_()
    if name == "mixture":
        assert torch.autograd.gradcheck(total, (scale, shape.requires_grad_()), eps=1e-5, atol=1e-5)
    else:
        assert torch.autograd.gradcheck(lambda scale: total(scale, shape), (scale,), eps=1e-5, atol=1e-5)


# Where there is nothing to say, or little


def test_fewer_than_two_ratings_say_nothing():
    counts = torch.tensor([[0, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 1, 0, 1, 0]])
    scale = torch.ones(3, requires_grad=True)
    found = spread_log_likelihood(rewards(scale), counts, THRESHOLDS)
    found.sum().backward()
    assert has_spread(counts).tolist() == [False, False, True]
    assert found[:2].tolist() == [0, 0] and scale.grad[:2].tolist() == [0, 0]
    assert scale.grad[2] > 0
    alone = spread_log_likelihood(rewards(torch.ones(2)), counts[:2], THRESHOLDS)
    assert alone.tolist() == [0, 0]


def test_two_levels_say_nothing():
    # P(rating 2) is a function of (m - t) / σ alone.
    counts = torch.tensor([[2, 3]])
    assert not has_spread(counts).any()
    assert spread_log_likelihood(rewards(torch.ones(1)), counts, numbers(0.0)).tolist() == [0]


@all_families
@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0, 30.0, 1e3])
def test_ratings_at_one_end_are_finite(name, scale):
    counts = torch.tensor([[0, 0, 0, 0, 2], [100, 0, 0, 0, 0], [50, 0, 0, 0, 50]])
    sigma = torch.full((3,), scale, dtype=torch.float64, requires_grad=True)
    found = spread_log_likelihood(rewards(sigma, name), counts, THRESHOLDS)
    found.sum().backward()
    assert found.isfinite().all() and sigma.grad.isfinite().all()
    if name == "normal" and scale == 1.0:
        assert sigma.grad[0] < 0 and sigma.grad[1] < 0 < sigma.grad[2]


def test_only_scale_and_shape_are_taught():
    location, thresholds = numbers(0.3).requires_grad_(), THRESHOLDS.clone().requires_grad_()
    scale = numbers(0.7).requires_grad_()
    spread_log_likelihood(
        RewardDistribution(location, scale, "normal"), torch.tensor([[1, 0, 2, 0, 0]]), thresholds
    ).sum().backward()
    assert location.grad is None and thresholds.grad is None and scale.grad is not None


def test_it_depends_on_neither_the_unit_nor_the_origin():
    counts = torch.tensor([[1, 0, 2, 0, 0], [0, 0, 0, 1, 4]])
    scale = numbers(0.7, 1.9)
    found = spread_log_likelihood(rewards(scale), counts, THRESHOLDS)
    for factor, shift in ((3.0, 0.0), (1.0, 50.0)):
        moved = spread_log_likelihood(rewards(factor * scale), counts, factor * THRESHOLDS + shift)
        torch.testing.assert_close(moved, found, rtol=1e-7, atol=1e-7)


# What it is for


def test_with_fine_steps_it_is_the_restricted_likelihood():
    # Ratings in steps of 1/5 of σ. Of a normal's likelihood, -(r - 1) log σ - S / 2σ² is left, with S = Σ (r - mean)².
    thresholds = torch.arange(-40, 41, dtype=torch.float64) / 5
    places = torch.tensor([[30, 37, 49, 40], [45, 47, 44, 46]])  # of 82 levels
    counts = torch.zeros(2, 82).scatter_(1, places, 1.0)
    squares = ((places / 5) - (places / 5).mean(dim=1, keepdim=True)).square().sum(dim=1).double()
    found = [spread_log_likelihood(rewards(torch.full((2,), scale)), counts, thresholds) for scale in (0.8, 1.3)]
    expected = -3 * math.log(1.3 / 0.8) - squares * (1 / 1.3**2 - 1 / 0.8**2) / 2
    # What is left of the rounding; with r in place of r - 1 it would be off by 0.49.
    torch.testing.assert_close(found[1] - found[0], expected, rtol=0.02, atol=0.01)


@pytest.fixture(scope="module")
def world() -> dict[str, torch.Tensor]:
    """Three ratings from -4 to 4 of answers with σ = 0.8 and levels N(0, 2²): all that can be said, and how often."""
    thresholds = torch.arange(-3.5, 4, dtype=torch.float64)
    counts, orders = every_outcome(raters=3, levels=9)
    levels = torch.linspace(-9, 9, 361, dtype=torch.float64)
    cdf = torch.special.ndtr((thresholds - levels[:, None]) / 0.8)
    ends = torch.cat([torch.zeros(361, 1), cdf, torch.ones(361, 1)], dim=1)
    log_probs = ends.diff(dim=1).clamp_min(1e-300).log()
    prior = torch.softmax(-levels.square() / 8, dim=0)
    given = orders * (log_probs @ counts.T).exp()  # [levels, outcomes]
    return {"thresholds": thresholds, "counts": counts, "levels": levels, "prior": prior, "given": given}


def scores(log_likelihood) -> torch.Tensor:
    """Derivatives in log σ at the truth, of everything that can be said."""
    log_scale = torch.full((165,), math.log(0.8), dtype=torch.float64, requires_grad=True)
    (score,) = torch.autograd.grad(log_likelihood(log_scale.exp()).sum(), log_scale)
    return score


def bias(score: torch.Tensor, probability: torch.Tensor) -> float:
    """How far log σ moves from the truth in one step of Fisher's scoring."""
    return ((probability * score).sum() / (probability * score.square()).sum()).item()


def given_level(world: dict[str, torch.Tensor], level: float) -> torch.Tensor:
    return world["given"][(world["levels"] - level).abs().argmin()]


def test_the_score_of_the_spread_has_mean_zero_at_the_truth(world):
    score = scores(lambda scale: spread_log_likelihood(rewards(scale), world["counts"], world["thresholds"]))
    # The prior of the level is uniform, and the levels are normal.
    assert bias(score, world["prior"] @ world["given"]) == pytest.approx(0, abs=0.03)
    # Of answers at any one level, up to near the ends of the scale
    for level in (-3.0, -1.0, 0.0, 0.5, 2.0, 3.0):
        assert bias(score, given_level(world, level)) == pytest.approx(0, abs=0.1), level


def test_an_error_of_the_location_looks_like_disagreement_to_the_likelihood_of_the_location(world):
    # The level is 2, and the model says 0 with an error of 0.5.
    at = given_level(world, 2.0)

    def at_predicted(scale):
        predicted = rewards(scale, "normal", 0.0, torch.full_like(scale, 0.5))
        return rating_log_likelihood(predicted, world["counts"], world["thresholds"])

    assert bias(scores(at_predicted), at) > 0.15


def test_the_location_is_taught_by_a_score_of_mean_zero_too(world):
    # Levels N(0, 2²) are what a model says that predicts 0 with an error of 2. Location and error:
    location, error = torch.zeros(165, dtype=torch.float64), torch.full((165,), 2.0, dtype=torch.float64)
    inputs = [location.requires_grad_(), error.requires_grad_()]
    predicted = RewardDistribution(location, torch.full_like(error, 0.8), "normal", None, error)
    total = rating_log_likelihood(predicted, world["counts"], world["thresholds"]).sum()
    for score in torch.autograd.grad(total, inputs):
        assert (world["prior"] @ world["given"] @ score).item() == pytest.approx(0, abs=1e-4)


# The table


@all_families
def test_the_table_is_the_function(name):
    counts = torch.tensor([[2, 0, 1, 0, 0], [0, 0, 0, 0, 3], [0, 1, 0, 0, 0], [2, 0, 1, 0, 0], [4, 0, 0, 3, 3]])
    scale = numbers(0.5, 3.0, 1.0, 0.21, 0.9).requires_grad_()
    of_name = rewards(scale, name)
    exact = spread_log_likelihood(of_name, counts, THRESHOLDS)
    (expected,) = torch.autograd.grad(exact.sum(), scale)
    found = SpreadTable(get_family(name), of_name.shape, counts, THRESHOLDS)(scale)
    (slope,) = torch.autograd.grad(found.sum(), scale)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(slope, expected, rtol=1e-3, atol=1e-3)
    assert found[2] == 0 and slope[2] == 0


def test_a_table_of_nothing():
    table = SpreadTable(get_family("normal"), None, torch.tensor([[0, 1, 0, 0, 0]]), THRESHOLDS)
    assert table(numbers(1.0)).tolist() == [0]


def test_known_scales_are_recovered():
    generator = torch.Generator().manual_seed(0)
    features, levels = torch.randn(3000, generator=generator), 2 * torch.randn(3000, generator=generator)
    scale = 0.8 * (0.3 * features).exp()
    said = levels[:, None] + scale[:, None] * torch.randn(3000, 3, generator=generator)
    counts = torch.nn.functional.one_hot(said.round().clamp(-4, 4).long() + 4, 9).sum(dim=1)
    table = SpreadTable(get_family("normal"), None, counts, torch.arange(-3.5, 4))
    weights = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=50, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        total = -table((weights[0] + weights[1] * features.double()).exp()).mean()
        total.backward()
        return total

    optimizer.step(loss)
    # Standard errors are about 0.013.
    assert weights.tolist() == pytest.approx([math.log(0.8), 0.3], abs=0.04)


def test_a_table_of_some_answers_is_that_of_these():
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 3, (12, 5), generator=generator) * torch.tensor([0, 1] * 6)[:, None]
    counts[3] = torch.tensor([0, 1, 0, 0, 0])  # one rating, which says nothing
    scale, keep = torch.rand(12, generator=generator).double() + 0.5, torch.arange(12) % 3 > 0
    table = SpreadTable(get_family("normal"), None, counts, THRESHOLDS)
    torch.testing.assert_close(table.select(keep)(scale[keep]), table(scale)[keep], rtol=0, atol=0)
    assert table.select(torch.zeros(12, dtype=torch.bool))(scale[:0]).shape == (0,)
