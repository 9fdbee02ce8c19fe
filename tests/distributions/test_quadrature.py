"""Integrals over the error of a location, against mpmath and a brute-force sum."""

import itertools
import math

import mpmath
import numpy as np
import pytest
import torch

from disco_trl.distributions.families import FAMILIES
from disco_trl.distributions.judgements import Judgements
from disco_trl.distributions.likelihood import Responses, log_likelihood
from disco_trl.distributions.quadrature import log_marginal
from disco_trl.distributions.reward_distribution import RewardDistribution


SHAPES = {"mixture": torch.tensor([[0.3, 0.8]], dtype=torch.float64)}


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def reward(name: str, location: float, error: float | None) -> RewardDistribution:
    location_error = None if error is None else column(error)
    return RewardDistribution(column(location), column(1.0), name, SHAPES.get(name), location_error)


def said(wins: float, losses: float, ties: float = 0.0, ratings: list[list[float]] | None = None) -> Judgements:
    counts = None if ratings is None else torch.tensor(ratings)
    numbers = (torch.tensor([float(value)]) for value in (wins, losses, ties, ties > 0, 0.0, 1.0))
    return Judgements(*numbers, rating_counts=counts)


def brute_force(log_integrand, spread: float, places: list[float]) -> float:
    """log ∫ N(e; 0, spread²) exp(log_integrand(e)) de by 10,000 nodes, crowded about the places."""
    reach = 14 + max(abs(place) for place in places) / spread
    cuts = set(np.linspace(-reach, reach, 601))
    for place in places:
        cuts |= {place / spread + sign * reach * 2.0**-level for level in range(30) for sign in (-1, 1)}
    cuts = np.array(sorted(cuts))
    nodes, weights = np.polynomial.legendre.leggauss(12)
    half = np.diff(cuts)[:, None] / 2
    u = torch.from_numpy(((cuts[1:] + cuts[:-1])[:, None] / 2 + half * nodes).ravel())
    log_weight = torch.from_numpy((half * weights).ravel()).log()
    terms = log_integrand(spread * u) - u.square() / 2 + log_weight
    return (torch.logsumexp(terms, 0) - math.log(2 * math.pi) / 2).item()


def test_the_marginal_of_a_constant_is_that_constant():
    spread = column(1e-200, 0.1, 3.0, 1e9)
    found = log_marginal(lambda e: torch.zeros_like(e) - 2, spread, torch.zeros(1, 4).double(), torch.ones(4).double())
    torch.testing.assert_close(found, torch.full_like(spread, -2.0), rtol=1e-9, atol=0)


@pytest.mark.parametrize("rows", [[0.5, math.nan], [math.nan]], ids=str)
def test_a_reward_that_is_not_a_number_stays_one(rows):
    locations, ones = column(*rows), torch.ones(len(rows), dtype=torch.float64)
    a = RewardDistribution(locations, ones, "cauchy", None, ones)
    found = a.log_prob_greater(RewardDistribution(0 * ones, ones, "cauchy", None, ones))
    assert found.isnan().tolist() == locations.isnan().tolist()


def test_no_pairs_have_no_integrals():
    none = torch.empty(0, dtype=torch.float64)
    a = RewardDistribution(none, none, "cauchy", None, none)
    assert log_likelihood(a, a, Judgements.forced_choices(0, torch.device("cpu"))).shape == (0,)
    assert a.log_prob_greater(a).shape == (0,)


@pytest.mark.parametrize("name", list(FAMILIES))
@pytest.mark.parametrize("ratio", [0.1, 1.0, 3.0, 10.0, 100.0])
def test_votes_and_ties_with_an_error_of_any_size(name, ratio):
    # Scales are 1 and `ratio` is the error of the difference. A wrong mode used to cost whole nats from 3 on.
    responses = Responses(tie_width=column(0.4)[0])
    for delta, judgement in itertools.product((-6.0, 0.0, 5.0), (said(1, 0), said(5, 0), said(70, 30), said(2, 1, 2))):
        a, b = (reward(name, location, ratio / math.sqrt(2)) for location in (delta, 0.0))
        found = log_likelihood(a, b, judgement, responses).item()
        exact_a, exact_b = (RewardDistribution(r.location, r.scale, name, r.shape) for r in (a, b))

        def given(e, a=exact_a, b=exact_b, judgement=judgement):
            def repeated(rewards, shift):
                shape = None if rewards.shape is None else rewards.shape.expand(len(e), -1)
                return RewardDistribution(rewards.location + shift, rewards.scale.expand(len(e)), name, shape)

            many = Judgements(
                *(
                    getattr(judgement, field).expand(len(e))
                    for field in ("wins", "losses", "ties", "tie_allowed", "margin", "weight")
                )
            )
            return log_likelihood(repeated(a, e), repeated(b, torch.zeros_like(e)), many, responses)

        exact = brute_force(given, ratio, [0.0, -delta, -delta - 0.4, -delta + 0.4])
        assert found == pytest.approx(exact, abs=1e-6 if name == "mixture" else 1e-8, rel=1e-8), (delta, judgement)


@pytest.mark.parametrize("name", list(FAMILIES))
@pytest.mark.parametrize("ratio", [0.1, 1.0, 10.0])
def test_ratings_with_an_error_of_any_size(name, ratio):
    thresholds = column(-2.0, 0.0, 0.5, 3.0)
    for counts in ([1, 0, 0, 0, 0], [0, 0, 1, 0, 0], [2, 0, 0, 0, 2], [0, 30, 20, 1, 0]):
        rated = reward(name, 0.3, ratio)
        ratings = [list(map(float, counts)), [0.0] * 5]
        found = log_likelihood(
            rated, reward(name, 0, ratio), said(0, 0, ratings=ratings), Responses(None, None, thresholds)
        )
        kind, shape = rated.kind, SHAPES.get(name)

        def given(e, kind=kind, shape=shape, counts=counts):
            z = thresholds - 0.3 - e[:, None]
            cdf = kind.log_cdf(z, shape if shape is None else shape[:, None]).exp()
            ends = torch.cat([torch.zeros_like(e)[:, None], cdf, torch.ones_like(e)[:, None]], dim=1)
            shares = ends.diff(dim=1).clamp_min(1e-300)
            return (torch.tensor(counts) * shares.log()).sum(dim=1)

        exact = brute_force(given, ratio, [0.0, *(thresholds - 0.3).tolist()])
        # The reference itself subtracts probabilities that are nearly equal in the far tails.
        assert found.item() == pytest.approx(exact, abs=1e-6), counts


def test_a_cauchy_probability_with_a_large_error_against_mpmath():
    a, b = reward("cauchy", -20.0, 7.0), reward("cauchy", 0.0, 7.0)
    spread = 7 * mpmath.sqrt(2)

    def integrand(e):
        return (mpmath.mpf(1) / 2 + mpmath.atan((e - 20) / 2) / mpmath.pi) * mpmath.npdf(e, 0, spread)

    exact = mpmath.log(mpmath.quad(integrand, [-120, -60, -20, 0, 10, 18, 20, 22, 30, 60, 120]))
    assert a.log_prob_greater(b).item() == pytest.approx(float(exact), abs=1e-8)
