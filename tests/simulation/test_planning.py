"""`disco_trl.simulation.planning`: exact fits find the truth, and err by as much as their Fisher information says.

The bound is held to what it claims: the covariance of many fits to votes simulated anew. The fits are held to the
truth within that bound.
"""

import dataclasses
import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch

from disco_trl.distributions.reward_distribution import get_family
from disco_trl.simulation import planning
from disco_trl.simulation.information import asymptotic_errors
from disco_trl.simulation.judging import Votes, balanced_pairs, random_pairs, vote
from disco_trl.simulation.planning import fit_linear, measured_precision, plan
from disco_trl.simulation.population import camps, heteroscedastic, tastes
from disco_trl.simulation.questions import Comparisons, rewards_of


FEATURES = np.random.default_rng(0).standard_normal((200, 3))
WORLD = heteroscedastic(FEATURES)
PAIRS = balanced_pairs(200, 50)
families = pytest.mark.parametrize("family", ["normal", "laplace", "cauchy"])


def in_the_fit_s_gauge(population):
    """True location and log scale, with the unit for geometric mean of the scales and mean location 0."""
    unit = get_family(population.noise_family).unit_scale / np.exp(np.log(population.scale).mean())
    return (population.location - population.location.mean()) * unit, np.log(population.scale * unit)


# The likelihood


def test_nll_of_a_fit_by_hand():
    """One feature, two texts, three votes to one: P = 3/4 is the likeliest, whatever scales divide it by."""
    votes = Votes(np.array([[0, 1]]), np.array([3]), np.array([1]), np.array([0]), forced=True)
    fit = fit_linear([[0.0], [1.0]], votes)
    assert fit.nll == pytest.approx(-(3 * math.log(3 / 4) + math.log(1 / 4)) / 4)
    location, scale = fit.predict([[0.0], [1.0]])
    assert scipy.stats.norm.cdf((location[0] - location[1]) / np.hypot(*scale)) == pytest.approx(3 / 4)
    assert np.exp(np.log(scale).mean()) == pytest.approx(fit.unit_scale)


@pytest.mark.parametrize(("count", "wins"), [(1, 1), (10, 7), (50, 20)])
@pytest.mark.parametrize("error", [0.2, 1.0])
def test_the_shared_error_is_integrated_out(count, wins, error):
    """Against scipy's adaptive quadrature of the definition, ∫ Φ(z)^w Φ(-z)^(k-w) φ(η) dη."""

    def integrand(eta):
        z = (0.7 + math.sqrt(2) * error * eta) / math.hypot(1.2, 0.9)
        return math.exp(
            wins * scipy.stats.norm.logcdf(z)
            + (count - wins) * scipy.stats.norm.logcdf(-z)
            + scipy.stats.norm.logpdf(eta)
        )

    expected = math.log(scipy.integrate.quad(integrand, -10, 10, epsabs=0, epsrel=1e-10, limit=200)[0])
    votes = Votes(np.array([[0, 1]]), *(np.array([number]) for number in (wins, count - wins, 0)), forced=True)
    location, scale = (torch.tensor([pair], dtype=torch.float64) for pair in ((0.7, 0.0), (1.2, 0.9)))
    question, counts = planning._given_votes(votes)
    rewards = rewards_of(location, scale, "normal", torch.tensor(error, dtype=torch.float64))
    assert question.log_probs(rewards, counts, {}).item() == pytest.approx(expected, abs=1e-6)


# Truth


@families
def test_fits_find_the_truth(family):
    """Within five of their own standard errors at every text, and with a spread that is as wide as these say."""
    world = heteroscedastic(FEATURES, family=family)
    fit = fit_linear(FEATURES, vote(world, PAIRS, 10), family)
    errors = asymptotic_errors(world, Comparisons(PAIRS, 10))
    location, scale = fit.predict(FEATURES)
    true_location, true_log_scale = in_the_fit_s_gauge(world)
    assert (np.abs(location - true_location) < 5 * errors.location).all()
    assert (np.abs(np.log(scale) - true_log_scale) < 5 * errors.log_scale).all()
    assert measured_precision(world, fit).scale_spearman > 0.95


def test_the_reference_world_is_learned():
    """2,000 texts, 32 features, 50 votes a text, each on a pair of its own: Spearman 0.99 and 0.95, and the bound."""
    features = np.random.default_rng(100).standard_normal((2000, 32))
    world, pairs = heteroscedastic(features), balanced_pairs(2000, 50)
    precision = measured_precision(world, fit_linear(features, vote(world, pairs)))
    assert precision.location_spearman > 0.99
    assert precision.scale_spearman > 0.95
    bound = asymptotic_errors(world, Comparisons(pairs)).precision
    assert precision.location_spearman == pytest.approx(bound.location_spearman, abs=0.001)
    assert precision.scale_spearman == pytest.approx(bound.scale_spearman, abs=0.01)
    assert precision.scale_error == pytest.approx(bound.scale_error, rel=0.3)


def test_ties_are_fitted_with_their_band():
    votes = vote(WORLD, PAIRS, 10, tie_half_width=0.5)
    fit = fit_linear(FEATURES, votes)
    unit = fit.unit_scale / np.exp(np.log(WORLD.scale).mean())
    assert fit.tie_half_width == pytest.approx(0.5 * unit, rel=0.05)
    # A tie is one more answer, and tells more than being made to choose does.
    forced = measured_precision(WORLD, fit_linear(FEATURES, vote(WORLD, PAIRS, 10)))
    assert measured_precision(WORLD, fit).scale_error < forced.scale_error


def test_units_and_useless_features_change_nothing():
    votes = vote(WORLD, PAIRS)
    plain = fit_linear(FEATURES, votes).predict(FEATURES)
    scaled = np.hstack([1e4 * FEATURES + 7, FEATURES[:, :1], np.ones((200, 1))])
    for ours, theirs in zip(plain, fit_linear(scaled, votes).predict(scaled), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_texts_that_were_not_voted_on_can_be_predicted():
    fit = fit_linear(FEATURES, vote(WORLD, PAIRS, 10))
    fresh = heteroscedastic(np.random.default_rng(1).standard_normal((500, 3)))  # the same directions: the same seed
    assert measured_precision(fresh, fit).scale_spearman > 0.95


# The bound


@families
def test_errors_of_many_fits_are_the_asymptotic_ones(family):
    world, pairs = heteroscedastic(FEATURES, family=family), balanced_pairs(200, 10)
    location, log_scale = [], []
    for seed in range(60):
        fitted = fit_linear(FEATURES, vote(world, pairs, 10, seed=seed), family).predict(FEATURES)
        location.append(fitted[0])
        log_scale.append(np.log(fitted[1]))
    bound = asymptotic_errors(world, Comparisons(pairs, 10))
    for fits, expected in ((location, bound.location), (log_scale, bound.log_scale)):
        # The root mean square over texts of 60 fits of 6 parameters: known to about 1 / √(2 · 60 · 3) = 5 %
        measured = np.sqrt(np.var(fits, axis=0).mean())
        assert measured == pytest.approx(np.sqrt(np.mean(expected**2)), rel=0.2)


def test_information_adds_up():
    """k votes of each pair, or each pair k times: the same, as no error is shared; errors fall with √k."""
    once = asymptotic_errors(WORLD, Comparisons(PAIRS))
    four = asymptotic_errors(WORLD, Comparisons(PAIRS, 4))
    again = asymptotic_errors(WORLD, Comparisons(np.tile(PAIRS, (4, 1))))
    np.testing.assert_allclose(four.log_scale, once.log_scale / 2, rtol=1e-9)
    np.testing.assert_allclose(four.location, again.location, rtol=1e-9)
    assert once.location_error is None


def test_information_by_hand():
    """
    One feature of ±1, μ = ±m and σ the same for both: z = 2m / √2σ, and by symmetry the weight of log σ has slope 0.

    Both texts' scales move against each other with it, so that s = √(σ_a² + σ_b²) stands still: the votes tell nothing
    of the scales, which is an error. With a third text between the two, they do.
    """
    world = heteroscedastic([[-1.0], [1.0]], log_scale_std=0.0)
    with pytest.raises(ValueError, match="do not determine 2 parameters"):
        asymptotic_errors(world, Comparisons(np.array([[0, 1]])))
    world = heteroscedastic([[-1.0], [1.0], [0.0]], log_scale_std=0.0)
    bound = asymptotic_errors(world, Comparisons(np.array([[0, 1], [0, 2], [1, 2]]), 7))
    # x = ±√(3/2) after scaling to variance 1. In units of σ: Δ = 2 and 1, s = √2. Slopes of z by the weights:
    # of location, (x_a - x_b) / σ√2; of log scale, -z (x_a + x_b) / 2. Opposite signs of the latter for the pairs with
    # the third text leave no covariance.
    x, unit = math.sqrt(3 / 2), get_family("normal").unit_scale
    far, near = math.sqrt(2), 1 / math.sqrt(2)

    def weight(z):
        return scipy.stats.norm.pdf(z) ** 2 / scipy.stats.norm.cdf(z) / scipy.stats.norm.cdf(-z)

    location_slopes = weight(far) * (2 * x) ** 2 / 2 + 2 * weight(near) * x**2 / 2
    scale_slopes = 2 * weight(near) * near**2 * (x / 2) ** 2
    assert bound.location[:2] == pytest.approx(unit * x / math.sqrt(7 * location_slopes))
    assert bound.log_scale[:2] == pytest.approx(x / math.sqrt(7 * scale_slopes))
    assert bound.log_scale[2] == pytest.approx(0, abs=1e-12)


# The model's own error


def test_a_shared_error_is_told_from_disagreement_by_several_votes():
    features = np.random.default_rng(5).standard_normal((4000, 3))
    world = heteroscedastic(features, unseen_std=0.6)
    votes = vote(world, balanced_pairs(4000, 2), 10)
    plain, aware = (fit_linear(features, votes, with_location_error=aware) for aware in (False, True))
    unit = aware.unit_scale / np.exp(np.log(world.scale).mean())
    assert aware.location_error == pytest.approx(0.6 * unit, rel=0.1)
    assert aware.nll < plain.nll
    # Without it, what the model does not know is put down to the people: sure ones look unsure.
    assert measured_precision(world, aware).scale_error < 0.6 * measured_precision(world, plain).scale_error


@pytest.mark.slow
def test_errors_of_many_fits_with_a_shared_error():
    """Each text is in one pair, so that votes on different pairs are independent, as the bound takes them to be."""
    features = np.random.default_rng(5).standard_normal((1000, 2))
    log_scale, error = [], []
    pairs = balanced_pairs(1000, 1)
    bounds = []
    for seed in range(40):
        world = heteroscedastic(features, unseen_std=0.5)
        unseen = 0.5 * np.random.default_rng([7, seed]).standard_normal(1000)
        world = dataclasses.replace(world, opinions=heteroscedastic(features).opinions + unseen)
        fit = fit_linear(features, vote(world, pairs, 6, seed=seed), with_location_error=True)
        log_scale.append(np.log(fit.predict(features)[1]))
        error.append(fit.location_error)
        if seed < 3:
            bounds.append(asymptotic_errors(world, Comparisons(pairs, 6)))
    expected = np.mean([bound.precision.scale_error for bound in bounds])
    assert np.sqrt(np.var(log_scale, axis=0).mean()) == pytest.approx(expected, rel=0.25)
    assert np.std(error) == pytest.approx(np.mean([bound.location_error for bound in bounds]), rel=0.35)


def test_one_vote_tells_little_of_a_shared_error():
    world = heteroscedastic(FEATURES, unseen_std=0.5)
    one, ten = (
        asymptotic_errors(world, Comparisons(random_pairs(200, 10_000))),
        asymptotic_errors(world, Comparisons(random_pairs(200, 1000), 10)),
    )
    assert one.location_error > 3 * ten.location_error  # from the same number of votes


# Models that cannot say what is true


@pytest.mark.parametrize("make", [tastes, camps])
def test_disagreement_that_is_not_linear_in_the_features(make):
    world = make(FEATURES)
    votes = vote(world, PAIRS, 40)
    quadratic = np.hstack([FEATURES, *(FEATURES[:, i:] * FEATURES[:, i : i + 1] for i in range(3))])
    knowing = dataclasses.replace(world, features=quadratic)
    blind, seeing = (
        measured_precision(population, fit_linear(population.features, votes)) for population in (world, knowing)
    )
    assert seeing.scale_spearman > 0.7 > 0.5 > blind.scale_spearman


# Plans


def test_a_plan_is_the_fewest_votes():
    answer = plan(WORLD, PAIRS, scale_error=0.05, simulations=3)
    assert answer.votes == answer.votes_per_pair * len(PAIRS)
    assert answer.expected.scale_error <= 0.05
    assert asymptotic_errors(WORLD, Comparisons(PAIRS, answer.votes_per_pair - 1)).precision.scale_error > 0.05
    measured = np.sqrt(np.mean([precision.scale_error**2 for precision in answer.simulated]))
    assert measured == pytest.approx(answer.expected.scale_error, rel=0.5)


def test_a_plan_knows_what_the_features_do_not_tell():
    """The last votes on a pair tell less than the first: its shared error stays. So it takes more than by √k."""
    pairs = balanced_pairs(200, 2)
    sure = plan(WORLD, pairs, scale_error=0.15, simulations=0)
    unsure = plan(heteroscedastic(FEATURES, unseen_std=0.3), pairs, scale_error=0.15, simulations=0)
    assert unsure.votes_per_pair > 1.2 * sure.votes_per_pair


def test_a_plan_that_fails_says_what_can_be_reached():
    with pytest.raises(ValueError, match=r"2 votes on each of 100 pairs leave log σ an error of 0\.\d+"):
        plan(WORLD, balanced_pairs(200, 1), scale_error=0.01, most_votes_per_pair=2)


# Errors


def test_votes_that_cannot_be_fitted():
    with pytest.raises(ValueError, match="no votes"):
        fit_linear(FEATURES, vote(WORLD, np.empty((0, 2), dtype=int)))
    with pytest.raises(ValueError, match="the same for every text"):
        fit_linear(np.ones((200, 2)), vote(WORLD, PAIRS))
    with pytest.raises(RuntimeError, match="too few votes"):
        wide = np.random.default_rng(0).standard_normal((200, 40))
        fit_linear(wide, vote(WORLD, balanced_pairs(200, 1)[:20]))
