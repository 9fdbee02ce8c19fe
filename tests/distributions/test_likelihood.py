"""The likelihood of votes, ties, soft labels and ratings, against the integrals that define it.

`reference` is the definition: with D = R_a - R_b, whose distribution is that of the family at Δ + e,

    ∫ N(e; 0, τ_a² + τ_b²) P(D > m + δ)^wins P(D < m - δ)^losses P(|D - m| < δ)^ties de

in mpmath with 30 digits.
"""

import mpmath
import pytest
import torch

from disco_trl.distributions.families import FAMILIES
from disco_trl.distributions.judgements import Judgements
from disco_trl.distributions.likelihood import Responses, log_likelihood
from disco_trl.distributions.numerics import log_difference
from disco_trl.distributions.reward_distribution import RewardDistribution


mpmath.mp.dps = 30
all_families = pytest.mark.parametrize("name", list(FAMILIES))
SHAPES = {"mixture": torch.tensor([0.3, 0.8], dtype=torch.float64)}


def reward(name: str, location: float, scale: float, error: float | None = None) -> RewardDistribution:
    shape = SHAPES[name][None] if name in SHAPES else None
    location_error = None if error is None else torch.tensor([error], dtype=torch.float64)
    numbers = (torch.tensor([value], dtype=torch.float64) for value in (location, scale))
    return RewardDistribution(*numbers, name, shape, location_error)


def said(wins=0.0, losses=0.0, ties=0.0, tie_allowed=0.0, margin=0.0, ratings=None) -> Judgements:
    numbers = (torch.tensor([float(value)]) for value in (wins, losses, ties, tie_allowed, margin, 1.0))
    return Judgements(*numbers, rating_counts=None if ratings is None else torch.tensor(ratings))


def number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


# What is said once


@all_families
def test_a_forced_choice_is_the_disco_loss(name):
    a, b = reward(name, 0.7, 0.4), reward(name, -0.2, 1.3)
    one = Judgements.forced_choices(1, torch.device("cpu"))
    torch.testing.assert_close(log_likelihood(a, b, one), a.log_prob_greater(b), rtol=1e-12, atol=0)


@all_families
@pytest.mark.parametrize(("wins", "losses"), [(7, 3), (0.8, 0.2), (0, 5), (0, 0)], ids=str)
def test_votes_and_soft_labels_are_binomial(name, wins, losses):
    a, b = reward(name, 0.7, 0.4), reward(name, -0.2, 1.3)
    expected = wins * a.log_prob_greater(b) + losses * b.log_prob_greater(a)
    found = log_likelihood(a, b, said(wins, losses))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)


def test_a_margin_moves_the_difference():
    # 0.9 - 0.4 over √(0.3² + 0.4²) = ½: z = 1
    found = log_likelihood(reward("normal", 0.9, 0.3), reward("normal", 0, 0.4), said(1, margin=0.4))
    assert found.item() == pytest.approx(float(mpmath.log(mpmath.ncdf(1))), rel=1e-6)


@pytest.mark.parametrize(
    ("delta", "width"), [(0.0, 0.5), (1.3, 0.2), (-30.0, 1.0), (30.0, 1.0), (0.4, 1e-4), (2, 40.0)]
)
def test_the_tie_band_of_the_normal(delta, width):
    a, b = reward("normal", delta, 0.6), reward("normal", 0.0, 0.8)  # s = 1
    responses = Responses(tie_width=number(width))
    tie = log_likelihood(a, b, said(ties=1, tie_allowed=1), responses)
    # The smaller tail, as Φ cancels in the larger
    d = -abs(mpmath.mpf(delta))
    exact = mpmath.log(mpmath.ncdf(d + mpmath.mpf(width)) - mpmath.ncdf(d - mpmath.mpf(width)))
    assert tie.item() == pytest.approx(float(exact), rel=1e-9)
    win = log_likelihood(a, b, said(1, tie_allowed=1), responses)
    assert win.item() == pytest.approx(float(mpmath.log(mpmath.ncdf(mpmath.mpf(delta) - mpmath.mpf(width)))), rel=1e-9)


@all_families
def test_win_loss_and_tie_are_all_there_is(name):
    a, b = reward(name, 0.7, 0.4), reward(name, -0.2, 1.3)
    for noise in (None, number(0.1)):
        responses = Responses(tie_width=number(0.6), label_noise=noise)
        outcomes = (said(1, tie_allowed=1), said(losses=1, tie_allowed=1), said(ties=1, tie_allowed=1))
        total = sum(log_likelihood(a, b, one, responses).exp().item() for one in outcomes)
        assert total == pytest.approx(1, rel=1e-9)


def test_label_noise_mixes_the_two_outcomes():
    a, b = reward("normal", 1.0, 0.6), reward("normal", 0.0, 0.8)
    p = float(mpmath.ncdf(1))
    found = log_likelihood(a, b, said(1), Responses(label_noise=number(0.2)))
    assert found.exp().item() == pytest.approx(0.8 * p + 0.2 * (1 - p), rel=1e-9)


def test_a_forced_choice_beside_ties_has_no_band():
    a, b = reward("normal", 1.0, 0.6), reward("normal", 0.0, 0.8)
    found = log_likelihood(a, b, said(1), Responses(tie_width=number(0.5)))
    assert found.item() == pytest.approx(float(mpmath.log(mpmath.ncdf(1))), rel=1e-9)


@all_families
def test_each_rating_has_the_probability_between_its_thresholds(name):
    a, b = reward(name, 0.7, 0.4), reward(name, 40.0, 1.3)
    thresholds = torch.tensor([-1.0, 0.5, 0.6, 3.0], dtype=torch.float64)
    cumulative = []
    for threshold in thresholds:
        cumulative.append([side.cdf(threshold).item() for side in (a, b)])
    limits = [[0.0, 0.0], *cumulative, [1.0, 1.0]]
    for level in range(5):
        one_hot = [[float(index == level) for index in range(5)], [0.0] * 5]
        found = log_likelihood(a, b, said(ratings=one_hot), Responses(thresholds=thresholds)).exp().item()
        assert found == pytest.approx(limits[level + 1][0] - limits[level][0], rel=1e-9)
    # Of the other side, whose location lies far above them all
    low = log_likelihood(a, b, said(ratings=[[0.0] * 5, [0, 0, 1.0, 0, 0]]), Responses(thresholds=thresholds))
    assert torch.isfinite(low).all()
    if name == "normal":
        tail = [mpmath.ncdf((mpmath.mpf(t) - 40) / mpmath.mpf(1.3)) for t in (0.5, 0.6)]
        assert low.item() == pytest.approx(float(mpmath.log(tail[1] - tail[0])), rel=1e-6)


def test_what_cannot_be_read_is_refused():
    a, b = reward("normal", 0.7, 0.4), reward("normal", -0.2, 1.3)
    with pytest.raises(ValueError, match="no tie width"):
        log_likelihood(a, b, said(ties=1, tie_allowed=1))
    with pytest.raises(ValueError, match="no thresholds"):
        log_likelihood(a, b, said(ratings=[[1.0, 0], [0, 1.0]]))


def test_the_difference_of_two_probabilities_in_logs():
    larger = torch.tensor([0.0, -1.0, -700.0, -1e-12], dtype=torch.float64)
    smaller = torch.tensor([-1e-9, -50.0, -701.0, -3.0], dtype=torch.float64)
    exact = [
        float(mpmath.log(mpmath.exp(mpmath.mpf(one)) - mpmath.exp(mpmath.mpf(other))))
        for one, other in zip(larger.tolist(), smaller.tolist(), strict=True)
    ]
    assert log_difference(larger, smaller).tolist() == pytest.approx(exact, rel=1e-7)


# The error that judgements share


def reference(name: str, delta: float, spread: float, wins: int, losses: int) -> float:
    """log of the integral, with scales 0.6 and 0.8."""
    scale = {"cauchy": mpmath.mpf(1.4), "laplace": None}.get(name, mpmath.mpf(1))

    def prob(d: mpmath.mpf) -> mpmath.mpf:
        if name == "normal":
            return mpmath.ncdf(d / scale)
        if name == "cauchy":
            return mpmath.mpf(1) / 2 + mpmath.atan(d / scale) / mpmath.pi
        return 1 / (1 + mpmath.exp(-d / scale))

    def log_integrand(e: mpmath.mpf) -> mpmath.mpf:
        total = -((e / spread) ** 2) / 2
        for count, sign in ((wins, 1), (losses, -1)):
            if count:
                total += count * mpmath.log(prob(sign * (delta + e)))
        return total

    # The integrand is a narrow peak for many votes: find it first.
    grid = [mpmath.mpf(k) / 200 * 10 * spread for k in range(-200, 201)]
    top = max(grid, key=log_integrand)
    height = log_integrand(top)
    width = spread / mpmath.sqrt(1 + (wins + losses) * spread**2 / 4)
    points = [top + k * width for k in (-60, -20, -8, -4, -2, 0, 2, 4, 8, 20, 60)]
    integral = mpmath.quad(lambda e: mpmath.exp(log_integrand(e) - height), points)
    return float(height + mpmath.log(integral / (spread * mpmath.sqrt(2 * mpmath.pi))))


@pytest.mark.parametrize("name", ["normal", "logistic", "cauchy"])
@pytest.mark.parametrize(
    ("delta", "error", "wins", "losses"),
    [
        *((0.5, 0.3, 1, 0), (0.5, 0.3, 7, 3), (-2.0, 1.0, 9, 1), (0.0, 2.0, 10, 0), (3.0, 0.5, 20, 30)),
        *((0.3, 1.0, 5000, 5000), (1.0, 0.05, 2, 8)),
    ],
    ids=str,
)
def test_the_shared_error_is_integrated_out(name, delta, error, wins, losses):
    a, b = reward(name, delta, 0.6, error), reward(name, 0.0, 0.8, 2 * error)
    found = log_likelihood(a, b, said(wins, losses)).item()
    exact = reference(name, delta, error * mpmath.sqrt(5), wins, losses)
    assert found == pytest.approx(exact, abs=1e-9, rel=1e-9)


def test_one_vote_of_the_normal_has_a_closed_form():
    deltas = torch.linspace(-6, 6, 25, dtype=torch.float64)
    ones = torch.ones_like(deltas)
    a = RewardDistribution(deltas, 0.6 * ones, "normal", location_error=1.2 * ones)
    b = RewardDistribution(0 * ones, 0.8 * ones, "normal", location_error=0.5 * ones)
    found = log_likelihood(a, b, Judgements.forced_choices(25, torch.device("cpu")))
    # Φ(Δ / √(σ_a² + σ_b² + τ_a² + τ_b²))
    exact = torch.special.log_ndtr(deltas / (0.6**2 + 0.8**2 + 1.2**2 + 0.5**2) ** 0.5)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-8)


def test_no_error_is_the_limit_of_a_small_one():
    for judgement in (said(7, 3), said(ties=1, tie_allowed=1)):
        responses = Responses(tie_width=number(0.4))
        sides = [[reward("normal", 0.5, 0.6, error), reward("normal", 0, 0.8, error)] for error in (None, 1e-5)]
        exact, limit = (log_likelihood(*pair, judgement, responses) for pair in sides)
        assert limit.item() == pytest.approx(exact.item(), rel=1e-7)


def test_votes_of_a_pair_agree_with_each_other_through_the_error():
    # Ten votes all one way are likelier than ten times one vote, because the first says where the others will go.
    a, b = reward("normal", 0.0, 0.6, 2.0), reward("normal", 0.0, 0.8, 2.0)
    ten, one = (log_likelihood(a, b, said(n)).item() for n in (10, 1))
    assert ten > 10 * one + 3


def test_a_rated_answers_error_is_integrated_out():
    thresholds = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    counts = [2.0, 0.0, 1.0, 4.0]
    a, b = reward("normal", 0.3, 0.5, 0.9), reward("normal", 0.0, 0.5, 0.9)
    found = log_likelihood(a, b, said(ratings=[counts, [0.0] * 4]), Responses(thresholds=thresholds))

    def integrand(e):
        limits = [mpmath.mpf(0), *(mpmath.ncdf((t - 0.3 - e) / 0.5) for t in (-1, 0, 1)), mpmath.mpf(1)]
        product = mpmath.npdf(e, 0, 0.9)
        for level, count in enumerate(counts):
            product *= (limits[level + 1] - limits[level]) ** count
        return product

    exact = mpmath.log(mpmath.quad(integrand, mpmath.linspace(-8, 8, 33)))
    assert found.item() == pytest.approx(float(exact), rel=1e-6)


@all_families
@pytest.mark.parametrize("has_error", [False, True])
def test_gradients(name, has_error):
    def total(location, scale, error, width, noise, thresholds):
        rewards = RewardDistribution(
            location,
            scale,
            name,
            SHAPES[name].expand(4, 2) if name in SHAPES else None,
            error.expand(4) if has_error else None,
        )
        judgements = Judgements(
            *(
                torch.tensor(values)
                for values in ([3.0, 1.0], [2.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.1, 0], [1.0, 1.0])
            ),
            rating_counts=torch.tensor([[1.0, 0, 2], [0, 0, 1], [0, 0, 0], [3, 1, 0]]),
        )
        responses = Responses(width, noise, thresholds)
        return log_likelihood(rewards[:2], rewards[2:], judgements, responses)

    arguments = ([0.3, -1.0, 0.5, 0.9], [0.5, 1.2, 0.8, 2.0], [0.7], 0.4, 0.1, [-0.5, 0.8])
    inputs = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in arguments]
    if has_error:
        # The nodes move with the arguments: a longer step than usual sees past what that changes.
        assert torch.autograd.gradcheck(total, inputs, eps=1e-5, atol=1e-5)
    else:
        assert torch.autograd.gradcheck(lambda *args: total(*args[:2], None, *args[3:]), inputs, atol=1e-7)


# Strengths of a preference

BOUNDARIES = [0.9, 2.0]  # c_2 and c_3; c_1 is the tie width, 0.4


def graded(strength: int, tie_allowed: float = 1.0, margin: float = 0.0, count: float = 1.0) -> Judgements:
    """`count` judgements of one pair, of a strength from −3 to 3."""
    counts = torch.zeros(1, 6)
    if strength:
        counts[0, abs(strength) - 1 + 3 * (strength < 0)] = count
    numbers = (count * (strength > 0), count * (strength < 0), count * (strength == 0), tie_allowed, margin, 1.0)
    return Judgements(*(torch.tensor([float(x)]) for x in numbers), strength_counts=counts)


def levels(noise: float | None = None, width: float = 0.4) -> Responses:
    return Responses(
        tie_width=number(width),
        label_noise=None if noise is None else number(noise),
        strength_boundaries=torch.tensor(BOUNDARIES, dtype=torch.float64),
    )


@all_families
@pytest.mark.parametrize("delta", [-40.0, -0.3, 1.1, 40.0])
@pytest.mark.parametrize(("tie_allowed", "margin", "noise"), [(1, 0, None), (0, 0, 0.1), (1, 0.7, 0.2)], ids=str)
def test_strengths_divide_the_votes(name, delta, tie_allowed, margin, noise):
    a, b = reward(name, delta, 0.6), reward(name, 0, 0.8)
    found = {
        k: log_likelihood(a, b, graded(k, tie_allowed, margin), levels(noise)).item()
        for k in range(-3, 4)
        if k or tie_allowed
    }
    for sign in (-1, 1):
        vote = said(sign > 0, sign < 0, tie_allowed=tie_allowed, margin=margin)
        whole = log_likelihood(a, b, vote, levels(noise)).item()
        of_strengths = torch.tensor([found[sign * k] for k in (1, 2, 3)], dtype=torch.float64)
        assert torch.logsumexp(of_strengths, 0).item() == pytest.approx(whole, rel=1e-9, abs=1e-12)
    assert sum(map(mpmath.exp, found.values())) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("delta", [-60.0, -3.0, 0.2, 5.0, 60.0])
@pytest.mark.parametrize("strength", [-3, -2, -1, 0, 1, 2, 3])
def test_a_strength_is_the_probability_of_an_interval_in_both_tails(delta, strength):
    found = log_likelihood(reward("normal", delta, 0.6), reward("normal", 0, 0.8), graded(strength), levels())
    limits = [*map(mpmath.mpf, (-mpmath.inf, -2, "-0.9", "-0.4", "0.4", "0.9", 2, mpmath.inf))]
    # D ~ N(Δ, 0.6² + 0.8² = 1); from the side on which both probabilities are small
    low, high = (limit - delta for limit in limits[strength + 3 : strength + 5])
    if low + high > 0:
        low, high = -high, -low
    with mpmath.workdps(60):
        exact = mpmath.log(mpmath.ncdf(high) - mpmath.ncdf(low))
    assert found.item() == pytest.approx(float(exact), rel=1e-5, abs=1e-20)


@all_families
def test_one_strength_is_a_vote(name):
    a, b = reward(name, 0.7, 0.4, 0.5), reward(name, -0.2, 1.3, 0.5)
    one = Judgements(
        *(torch.tensor([x]) for x in (2.0, 1.0, 0.0, 0.0, 0.0, 1.0)), strength_counts=torch.tensor([[2.0, 1.0]])
    )
    responses = Responses(strength_boundaries=torch.empty(0, dtype=torch.float64))
    torch.testing.assert_close(log_likelihood(a, b, one, responses), log_likelihood(a, b, said(2, 1)))


def test_judgements_of_a_pair_may_have_a_strength_or_none():
    a, b = reward("normal", 0.7, 0.4), reward("normal", -0.2, 1.3)
    both = Judgements(
        *(torch.tensor([x]) for x in (3.0, 1.0, 0.0, 1.0, 0.0, 1.0)),
        strength_counts=torch.tensor([[0.0, 2.0, 0.0, 1.0, 0.0, 0.0]]),
    )
    parts = [graded(2, count=2.0), graded(-1), said(1, 0, tie_allowed=1)]
    expected = sum(log_likelihood(a, b, part, levels()) for part in parts)
    torch.testing.assert_close(log_likelihood(a, b, both, levels()), expected)


def test_strengths_without_boundaries_are_refused():
    with pytest.raises(ValueError, match="no boundaries to read them by"):
        log_likelihood(reward("normal", 0, 1), reward("normal", 0, 1), graded(1), Responses(tie_width=number(0.4)))


@all_families
@pytest.mark.parametrize("has_error", [False, True])
def test_gradients_of_strengths(name, has_error):
    counts = torch.tensor([[1.0, 0, 0, 0, 2, 0], [0, 0, 3, 0, 0, 1]])
    table = [[3.0, 4.0], [2.0, 1.0], [1.0, 0.0], [1.0, 0.0], [0.1, 0.0], [1.0, 1.0]]

    def total(location, scale, error, width, noise, boundaries):
        shape = SHAPES[name].expand(4, 2) if name in SHAPES else None
        rewards = RewardDistribution(location, scale, name, shape, error.expand(4) if has_error else None)
        judgements = Judgements(*map(torch.tensor, table), strength_counts=counts)
        responses = Responses(width, noise, strength_boundaries=boundaries)
        return log_likelihood(rewards[:2], rewards[2:], judgements, responses)

    arguments = ([0.3, -1.0, 0.5, 0.9], [0.5, 1.2, 0.8, 2.0], [0.7], 0.4, 0.1, BOUNDARIES)
    inputs = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in arguments]
    if has_error:
        assert torch.autograd.gradcheck(total, inputs, eps=1e-5, atol=1e-5)
    else:
        assert torch.autograd.gradcheck(
            lambda *args: total(*args[:2], None, *args[3:]), [*inputs[:2], *inputs[2:]], atol=1e-7
        )


def test_strengths_tell_what_votes_cannot():
    """Two groups of pairs with P(a ≻ b) alike, one with twice the scale: only the strengths know which is which."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([1.0, 2.0]).repeat(20_000).double()
    d = scale * (0.5 + torch.randn(40_000, generator=generator, dtype=torch.float64))
    strength = (d.sign() * (1 + (d.abs() > 0.9).int() + (d.abs() > 2).int())).int()
    counts = torch.zeros(40_000, 6)
    place = (strength.abs() - 1 + 3 * (strength < 0)).long()
    counts[torch.arange(40_000), place] = 1
    numbers = (strength > 0, strength < 0, strength == 0, 0 * strength, 0 * strength, 0 * strength + 1)
    judgements = Judgements(*(x.float() for x in numbers), strength_counts=counts)
    free = torch.zeros(4, dtype=torch.float64, requires_grad=True)  # log scale ratio, log scale, boundaries
    optimizer = torch.optim.LBFGS([free], max_iter=60, line_search_fn="strong_wolfe")

    def parameters():
        wide = torch.exp(free[1]) * torch.where(scale > 1, torch.exp(free[0]), torch.ones(()).double())
        return wide, torch.cumsum(torch.exp(free[2:]), 0)

    def loss():
        optimizer.zero_grad()
        wide, boundaries = parameters()
        half = wide / 2**0.5
        a = RewardDistribution(0.5 * wide, half, "normal")
        b = RewardDistribution(torch.zeros_like(wide), half, "normal")
        value = -log_likelihood(a, b, judgements, Responses(strength_boundaries=boundaries)).mean()
        value.backward()
        return value

    optimizer.step(loss)
    wide, boundaries = parameters()
    # Up to the unit of reward, which nothing here fixes
    assert (wide[1] / wide[0]).item() == pytest.approx(2, rel=0.05)
    assert (boundaries / wide[0]).tolist() == pytest.approx(BOUNDARIES, rel=0.05)
