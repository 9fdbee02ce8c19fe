"""Judge routing: the curve against brute force and both ends, equal doubts, and its area with an interval."""

from itertools import permutations

import numpy as np
import pytest
import torch
from test_evaluate import read_pairs, rewards_of

from disco_trl.distributions.reward_distribution import RewardDistribution
from disco_trl.evaluation.forecasts import Forecasts
from disco_trl.evaluation.held_out import HeldOut
from disco_trl.evaluation.metrics import accuracy
from disco_trl.evaluation.routing import (
    area_under_routing,
    doubts,
    judge_of_people,
    judge_of_rewards,
    routing_curve,
    routing_figures,
)


def some_forecasts(count: int, seed: int = 0, people: bool = True) -> tuple[Forecasts, np.ndarray, np.ndarray]:
    """Forecasts, a judge who is better, and a doubt."""
    generator = np.random.default_rng(seed)
    target = generator.integers(0, 5, count) / 4 if people else generator.integers(0, 2, count).astype(float)
    weight = generator.integers(0, 4, count) if people else 1.0
    prob = np.clip(0.5 + 0.3 * (target - 0.5) + 0.3 * generator.normal(size=count), 0.01, 0.99)
    judge = np.where(generator.random(count) < 0.8, target > 0.5, target < 0.5).astype(float)
    doubt = generator.integers(0, 4, count) - 3 * np.abs(prob - 0.5)
    return Forecasts.of_probabilities(prob, target, weight), judge, doubt


def brute_force(forecasts: Forecasts, judge: np.ndarray, order: tuple[int, ...]) -> list[float]:
    """Accuracy with the first of an order sent to the judge: none of them, one, and so on."""
    found = []
    for sent in range(len(order) + 1):
        right = 0.0
        for place, index in enumerate(order):
            ahead = np.sign(judge[index] - 0.5) if place < sent else np.sign(forecasts.margin[index])
            share = forecasts.target[index]
            right += forecasts.weight[index] * {1: share, -1: 1 - share, 0: 0.5}[int(ahead)]
        found.append(right / sum(forecasts.weight[index] for index in order))
    return found


def test_curve_is_that_of_brute_force():
    forecasts, judge, doubt = some_forecasts(60)
    doubt = doubt + 1e-3 * np.arange(60)  # all different
    decided = np.flatnonzero(forecasts.decided)
    order = tuple(decided[np.argsort(-doubt[decided])])
    share, found = routing_curve(forecasts, judge, doubt)
    assert 0 < len(order) < 60
    assert share == pytest.approx(np.arange(len(order) + 1) / len(order))
    assert found == pytest.approx(brute_force(forecasts, judge, order))


def test_equal_doubts_are_the_mean_over_all_orders():
    forecasts, judge, _ = some_forecasts(9, seed=2)
    decided = np.flatnonzero(forecasts.decided)
    first, rest = decided[:1], decided[1:]
    doubt = np.where(np.arange(9) == first[0], 2.0, 1.0)
    curves = [brute_force(forecasts, judge, (*first, *order)) for order in permutations(rest)]
    share, found = routing_curve(forecasts, judge, doubt)
    assert len(share) == 3
    grid = np.arange(len(decided) + 1) / len(decided)
    assert np.interp(grid, share, found) == pytest.approx(np.mean(curves, axis=0))


@pytest.mark.parametrize("people", [True, False])
def test_ends_are_the_accuracies_of_model_and_judge(people):
    forecasts, judge, doubt = some_forecasts(200, seed=1, people=people)
    of_judge = accuracy(Forecasts.of_probabilities(judge, forecasts.target, forecasts.weight))
    assert of_judge > accuracy(forecasts)
    for of_rule in (doubt, -doubt, np.zeros(200)):
        share, found = routing_curve(forecasts, judge, of_rule)
        assert (share[0], share[-1]) == (0, 1)
        assert found[[0, -1]] == pytest.approx([accuracy(forecasts), of_judge])
    # At random, the curve is the straight line between both.
    assert len(found) == 2
    assert area_under_routing(forecasts, judge, np.zeros(200)) == pytest.approx(found.mean())


def test_the_best_and_the_worst_order_in_closed_form():
    # A perfect judge, and a model that is right on 7 of 10: the errors sent first, the curve rises to 1 at 0.3. Its
    # area is (0.7 + 1) / 2 · 0.3 + 0.7 = 0.955. Sent last, it is 0.7 · 0.7 + (0.7 + 1) / 2 · 0.3 = 0.745.
    right = np.arange(10) < 7
    forecasts = Forecasts.of_probabilities(np.where(right, 0.8, 0.3))
    judge = np.ones(10)
    assert area_under_routing(forecasts, judge, ~right) == pytest.approx(0.955)
    assert area_under_routing(forecasts, judge, right) == pytest.approx(0.745)
    share, found = routing_curve(forecasts, judge, ~right)
    assert share == pytest.approx([0, 0.3, 1]) and found == pytest.approx([0.7, 1, 1])


def test_a_pair_that_occurs_twice_is_two():
    forecasts, judge, doubt = some_forecasts(20)
    times = np.random.default_rng(1).integers(0, 3, 20)
    index = np.repeat(np.arange(20), times)
    repeated = routing_curve(forecasts[index], judge[index], doubt[index])
    for ours, theirs in zip(routing_curve(forecasts, judge, doubt, times), repeated, strict=True):
        assert ours == pytest.approx(theirs)


def test_nothing_to_route():
    forecasts = Forecasts.of_probabilities([0.3, 0.6], [0.5, 1.0], [1.0, 0.0])  # a tie, and nobody asked
    assert [len(values) for values in routing_curve(forecasts, [1, 1], [1, 2])] == [0, 0]
    assert np.isnan(area_under_routing(forecasts, [1, 1], [1, 2]))


def test_doubts_by_rule():
    location = torch.tensor([0.0, 1.0, 3.0])
    scale = torch.tensor([1.0, 2.0, 0.5])
    factor = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
    rewards = RewardDistribution(location, scale, "normal", None, factor.norm(dim=-1), factor)
    found = doubts(rewards[[0, 1, 2]], rewards[[1, 2, 0]])
    assert list(found) == ["error", "margin", "probability", "scale", "random"]
    # Differences of the rows: (0, -1), (1, -1), (-1, 2).
    assert found["error"] == pytest.approx([1, 2**0.5, 5**0.5], abs=1e-6)
    assert found["margin"] == pytest.approx([-1, -2, -3])
    assert found["scale"] == pytest.approx([5**0.5, 4.25**0.5, 1.25**0.5], abs=1e-6)
    assert np.ptp(found["random"]) == 0
    # P nearest 1/2: z is 1 / √(5 + 1), 2 / √(4.25 + 2), 3 / √(1.25 + 5)
    assert list(np.argsort(-found["probability"])) == [0, 1, 2]
    assert "error" not in doubts(rewards_of_plain(location), rewards_of_plain(location.flip(0)))


def rewards_of_plain(location: torch.Tensor) -> RewardDistribution:
    return RewardDistribution(location, torch.full_like(location, 2**-0.5), "logistic")


def test_judges():
    held_out = read_pairs(np.array([[0, 1], [2, 3], [4, 5]]), np.array([1.0, 0.25, 0.5]))
    assert list(judge_of_people(held_out)) == [1, 0, 0.5]
    rewards = rewards_of(held_out, np.array([0.0, 1, 2, 1, 3, 3]), 0.7)
    assert list(judge_of_rewards(rewards, held_out)) == [0, 1, 0.5]


def test_the_majority_of_ratings_judges_pairs_that_are_rated(tiny_tokenizer):
    rows = [
        # One vote for the text that most pairs of ratings are against: 1 > 0 twice, 1 < 5 four times.
        {"chosen": "good film", "rejected": "bad film", "chosen_rating": [1, 1], "rejected_rating": [0, 5, 5]},
        {"chosen": "fine plot", "rejected": "poor plot"},
    ]
    held_out = HeldOut.read(rows, tiny_tokenizer)
    assert list(judge_of_people(held_out)) == [0, 1]


def test_figures_compare_rules_in_the_same_resamples():
    generator = np.random.default_rng(3)
    size = 600
    margin = generator.normal(size=size)
    wins = generator.random(size) < 1 / (1 + np.exp(-2 * margin))
    forecasts = Forecasts.of_probabilities(1 / (1 + np.exp(-2 * margin)), wins)
    of_rules = {
        "margin": -np.abs(margin),
        "copy": -2 * np.abs(margin),
        "random": np.zeros(size),
        "perfect": forecasts.right < 0.5,
    }
    found = routing_figures([(forecasts, of_rules)], wins, draws=100)
    for rule, (area, gain) in found.items():
        assert area.value == area_under_routing(forecasts, wins, of_rules[rule])
        assert area.low < area.value < area.high
        assert gain.value == pytest.approx(area.value - found["margin"][0].value)
    assert found["copy"][1] == found["margin"][1] and found["copy"][1].low == found["copy"][1].high == 0
    assert found["random"][1].high < 0 < found["perfect"][1].low
    # With a perfect judge and at random, the area is (1 + accuracy) / 2: ±1.96 √(p (1 − p) / n) / 2
    p = accuracy(forecasts)
    random = found["random"][0]
    assert (random.high - random.low) / 2 == pytest.approx(0.98 * np.sqrt(p * (1 - p) / size), rel=0.3)
    # The mean over two runs is that of their areas.
    second = {rule: doubt[::-1].copy() for rule, doubt in of_rules.items()}
    both = routing_figures([(forecasts, of_rules), (forecasts, second)], wins, draws=2)
    areas = [area_under_routing(forecasts, wins, run["margin"]) for run in (of_rules, second)]
    assert both["margin"][0].value == pytest.approx(np.mean(areas))
