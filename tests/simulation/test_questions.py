"""Grades and ratings in `disco_trl.simulation`: fits find the truth, and err by as much as their information says."""

import dataclasses
import math

import numpy as np
import pytest
import scipy.stats
import torch

from disco_trl.distributions.reward_distribution import get_family
from disco_trl.simulation.information import Truth, asymptotic_errors
from disco_trl.simulation.judging import balanced_pairs, grade, random_pairs, rate, vote
from disco_trl.simulation.planning import fit_linear, measured_precision
from disco_trl.simulation.population import heteroscedastic
from disco_trl.simulation.questions import Comparisons, Ratings, all_answers
from disco_trl.simulation.spending import Ask, Outlook, typical_world, ways_to_spend


FEATURES = np.random.default_rng(0).standard_normal((200, 3))
WORLD = heteroscedastic(FEATURES)
PAIRS = balanced_pairs(200, 10)
TIE, BOUNDARIES, THRESHOLDS = 0.4, (1.0, 2.0), (-1.5, -0.5, 0.5, 1.5)


def unit_of(population):
    return get_family(population.noise_family).unit_scale / np.exp(np.log(population.scale).mean())


def test_all_answers_of_people():
    """Of 3 people and 3 answers: 10 ways, in 27 orders."""
    ways = list(all_answers(3, 3))
    assert len({tuple(counts) for counts, _ in ways}) == 10
    assert all(counts.sum() == 3 and (counts >= 0).all() for counts, _ in ways)
    assert sum(math.exp(log_orders) for _, log_orders in ways) == pytest.approx(27)


# Truth


@pytest.mark.parametrize("family", ["normal", "laplace", "cauchy"])
def test_grades_find_scales_and_boundaries(family):
    world = heteroscedastic(FEATURES, family=family)
    said = grade(world, PAIRS, BOUNDARIES, 10, tie_half_width=TIE)
    fit, errors = fit_linear(FEATURES, said, family), asymptotic_errors(world, Comparisons(PAIRS, 10, BOUNDARIES, TIE))
    location, scale = fit.predict(FEATURES)
    assert (np.abs(location - (world.location - world.location.mean()) * unit_of(world)) < 5 * errors.location).all()
    assert (np.abs(np.log(scale) - np.log(world.scale * unit_of(world))) < 5 * errors.log_scale).all()
    expected = np.array([TIE, *BOUNDARIES]) * unit_of(world)
    np.testing.assert_allclose([fit.tie_half_width, *fit.boundaries], expected, rtol=0.08)
    # With the same people who only vote, it is less.
    votes = measured_precision(world, fit_linear(FEATURES, vote(world, PAIRS, 10), family))
    assert measured_precision(world, fit).scale_error < votes.scale_error


def test_ratings_find_scales_and_thresholds():
    fit = fit_linear(FEATURES, None, ratings=rate(WORLD, 50, THRESHOLDS))
    assert measured_precision(WORLD, fit).scale_spearman > 0.95
    expected = (np.array(THRESHOLDS) - WORLD.location.mean()) * unit_of(WORLD)
    np.testing.assert_allclose(fit.thresholds, expected, atol=0.15)
    assert fit.tie_half_width is None and fit.boundaries is None


def test_some_texts_are_rated_beside_votes():
    ratings = rate(WORLD, 5, THRESHOLDS).astype(float)
    ratings[40:] = np.nan
    ratings[:20, 3:] = np.nan
    alone, both = (fit_linear(FEATURES, vote(WORLD, PAIRS), ratings=of) for of in (None, ratings))
    assert measured_precision(WORLD, both).scale_error < measured_precision(WORLD, alone).scale_error
    assert len(both.thresholds) == 4 and alone.thresholds is None


def test_a_prior_draws_scales_together():
    votes = vote(WORLD, PAIRS[:200])
    spreads = [
        np.std(np.log(fit_linear(FEATURES, votes, log_scale_std=std).predict(FEATURES)[1])) for std in (2.0, 0.5, 0.01)
    ]
    assert spreads[0] > spreads[1] > spreads[2] and spreads[2] < 0.01


# The bound


@pytest.mark.parametrize("asked", ["grades", "ratings", "both"])
def test_errors_of_many_fits_are_the_asymptotic_ones(asked):
    rated = np.arange(0, 200, 2)
    questions = [Comparisons(PAIRS, 1, BOUNDARIES, TIE)] * (asked != "ratings")
    questions += [Ratings(rated, 8, THRESHOLDS)] * (asked != "grades")
    fits = []
    for seed in range(30):
        said = grade(WORLD, PAIRS, BOUNDARIES, tie_half_width=TIE, seed=seed) if asked != "ratings" else None
        ratings = np.full((200, 8), np.nan)
        if asked != "grades":
            ratings[rated] = rate(WORLD, 8, THRESHOLDS, seed=1000 + seed)[rated]
        ratings = None if asked == "grades" else ratings
        fits.append(np.log(fit_linear(FEATURES, said, ratings=ratings).predict(FEATURES)[1]))
    # 30 fits of 3 parameters are known to about 1 / √(2 · 30 · 3) = 7 %.
    bound = asymptotic_errors(WORLD, *questions).log_scale
    assert np.sqrt(np.var(fits, axis=0).mean()) == pytest.approx(np.sqrt(np.mean(bound**2)), rel=0.25)


def test_errors_with_a_prior_are_those_of_fits_with_one():
    """With few comparisons, where the prior matters: its pull is a part of the error."""
    world = heteroscedastic(np.random.default_rng(3).standard_normal((400, 12)), seed=5)
    pairs = balanced_pairs(400, 2)
    measured = [
        measured_precision(
            world,
            fit_linear(
                world.features,
                grade(world, pairs, BOUNDARIES, tie_half_width=TIE, seed=seed),
                log_scale_std=0.5,
            ),
        )
        for seed in range(25)
    ]
    bound = asymptotic_errors(world, Comparisons(pairs, 1, BOUNDARIES, TIE), log_scale_std=0.5).precision
    free = asymptotic_errors(world, Comparisons(pairs, 1, BOUNDARIES, TIE)).precision
    assert bound.scale_error < free.scale_error
    error = np.sqrt(np.mean([precision.scale_error**2 for precision in measured]))
    assert error == pytest.approx(bound.scale_error, rel=0.2)
    rank = np.mean([precision.scale_spearman for precision in measured])
    assert rank == pytest.approx(bound.scale_spearman, abs=0.06)


def test_the_shared_error_is_integrated_out_of_the_information():
    """Of votes, against finite differences of the likelihood's own quadrature, at one pair and its parameters."""
    features = np.random.default_rng(2).standard_normal((60, 1))
    world = heteroscedastic(features, unseen_std=0.7)
    truth = Truth(world, [Comparisons(np.array([[0, 1]]))])
    pair, people = np.array([[3, 7]]), 3
    information = truth.information(Comparisons(pair, people))
    items, error = pair[0], truth.unseen_std
    center = np.array([*truth.seen[items], *np.log(truth.scale[items]), error])
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)

    def log_prob(values, wins):
        (first, second, log_first, log_second, tau) = values
        z = (first - second + math.sqrt(2) * tau * nodes) / math.hypot(math.exp(log_first), math.exp(log_second))
        terms = scipy.stats.norm.cdf(z) ** wins * scipy.stats.norm.sf(z) ** (people - wins)
        return math.log(weights @ terms / weights.sum())

    design = np.zeros((5, 3))
    design[:2, 0] = design[2:4, 1] = truth.inputs[items, 0]
    design[4, 2] = 1
    expected = np.zeros((3, 3))
    for wins in range(people + 1):
        steps = 1e-5 * np.eye(5)
        slope = [(log_prob(center + step, wins) - log_prob(center - step, wins)) / 2e-5 for step in steps]
        slope = np.array(slope) @ design
        expected += math.comb(people, wins) * math.exp(log_prob(center, wins)) * np.outer(slope, slope)
    np.testing.assert_allclose(information, expected, rtol=1e-5, atol=1e-8)


def test_random_answers_stand_for_all_of_them(monkeypatch):
    world = heteroscedastic(np.random.default_rng(5).standard_normal((500, 2)), unseen_std=0.5)
    question = Comparisons(random_pairs(500, 400), 2, BOUNDARIES, TIE)
    truth = Truth(world, [question])
    every = truth.information(question)
    monkeypatch.setattr("disco_trl.simulation.information.MOST_ENUMERATED", 1)
    drawn = truth.information(question)
    np.testing.assert_allclose(np.diag(drawn), np.diag(every), rtol=0.1)
    assert not np.array_equal(drawn, every)


def test_information_of_grades_by_hand():
    """Two texts of one location and σ: the sign tells nothing of σ, and how far apart they are does."""
    world = heteroscedastic([[-1.0], [0.0], [1.0]], log_scale_std=0.0)
    world = dataclasses.replace(world, opinions=np.zeros((1, 3)))
    pairs, boundary = np.array([[0, 1], [1, 2], [0, 2]]), 1.0
    truth = Truth(world, [graded := Comparisons(pairs, 1, [boundary])])
    votes = truth.information(Comparisons(pairs))
    assert votes[1, 1] == pytest.approx(0, abs=1e-12)
    # P(1) = Φ(c/s) - 1/2, P(2) = 1 - Φ(c/s), each twice; d(c/s) by the weight of log σ is -(c/s) (x_a + x_b) / 2.
    z = boundary / math.sqrt(2)  # in units of σ = 1
    density, above = scipy.stats.norm.pdf(z), scipy.stats.norm.sf(z)
    of_pair = 2 * (density * z) ** 2 * (1 / (0.5 - above) + 1 / above)
    x = math.sqrt(3 / 2)
    assert truth.information(graded)[1, 1] == pytest.approx(of_pair * 2 * (x / 2) ** 2)


def test_questions_share_what_answers_depend_on():
    with pytest.raises(ValueError, match="questions with different boundaries"):
        Truth(WORLD, [Comparisons(PAIRS, 1, [1.0]), Comparisons(PAIRS, 1, [2.0])])


def test_nobody_judged():
    with pytest.raises(ValueError, match="there are no judgements"):
        fit_linear(FEATURES, None, ratings=np.full((200, 2), np.nan))


# Spending


def test_ways_to_spend_the_next_judgements():
    outlook = Outlook(typical_world(dimension=8, texts=300))
    ways = {way.what: way for way in ways_to_spend(outlook, 1000)}
    assert all(
        sum(ask.readings * count for ask, count in way.asked.items()) == pytest.approx(2000, abs=10)
        for way in ways.values()
    )
    rank = {what: way.expected.scale_spearman for what, way in ways.items()}
    # What is measured on real texts too: grades and a few ratings tell what votes do not.
    assert rank["1,000 votes"] < rank["1,000 graded comparisons"]
    assert rank["1,000 votes"] < rank["900 votes; 201 ratings, 3 of an answer"]
    assert list(rank.values()) == sorted(rank.values())
    # What is at hand counts.
    at_hand = {Ask("grades"): 1000}
    more = {way.what: way.expected.scale_error for way in ways_to_spend(outlook, 1000, at_hand)}
    assert all(more[what] < way.expected.scale_error for what, way in ways.items())
    assert more["1,000 graded comparisons"] == pytest.approx(outlook.expected({Ask("grades"): 2000}).scale_error)


def test_an_outlook_is_what_fits_reach():
    world = typical_world(dimension=8, texts=600, unseen_std=0.0)
    outlook = Outlook(world)
    question = outlook._asked["grades"]
    measured = []
    for seed in range(8):
        pairs = random_pairs(600, 600, seed)
        said = grade(world, pairs, question.boundaries, tie_half_width=question.tie_half_width, seed=seed)
        fit = fit_linear(world.features, said, log_scale_std=float(np.std(np.log(world.scale))))
        measured.append(measured_precision(world, fit).scale_error)
    expected = outlook.expected({Ask("grades"): 600}).scale_error
    assert np.sqrt(np.mean(np.square(measured))) == pytest.approx(expected, rel=0.25)


def test_few_judgements_leave_scales_unknown():
    outlook = Outlook(typical_world(dimension=8, texts=300, log_scale_std=0.5))
    spread = np.std(np.log(outlook.population.scale))
    assert outlook.expected({Ask("votes"): 1}).scale_error == pytest.approx(spread, rel=0.05)
    assert torch.isfinite(torch.tensor(outlook.expected({Ask("ratings", 5): 3}).scale_spearman))
