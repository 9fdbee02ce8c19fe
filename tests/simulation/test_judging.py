"""`disco_trl.simulation.judging`: people vote and rate as the population says they do, counted in large samples."""

import dataclasses

import numpy as np
import pytest
import torch
from test_population import DRAWS, FEATURES, PAIRS, POPULATIONS, TEXTS, every_population

from disco_trl.data.columns import find_layout
from disco_trl.data.records import read_record
from disco_trl.distributions.reward_distribution import RewardDistribution
from disco_trl.simulation.judging import (
    Votes,
    balanced_pairs,
    grade,
    random_pairs,
    rate,
    rating_rows,
    soft_label_rows,
    vote,
)
from disco_trl.simulation.population import camps, heteroscedastic, tastes


SIX_ERRORS = 6 * 0.5 / np.sqrt(DRAWS)  # of a frequency, at most


# Votes


@every_population
@pytest.mark.parametrize("same_annotator", [False, True])
def test_votes_are_as_frequent_as_their_probability(population, same_annotator):
    votes = vote(population, PAIRS, DRAWS, same_annotator=same_annotator)
    assert (votes.wins + votes.losses == DRAWS).all()
    expected = population.prob_greater(PAIRS, same_annotator=same_annotator)
    np.testing.assert_allclose(votes.wins / DRAWS, expected, atol=SIX_ERRORS)


def test_ties_are_rewards_nearer_than_the_half_width():
    """P(win) = P(R_a - R_b > δ), the same as with μ_a lowered by δ; P(loss) likewise; the rest are ties."""
    population = POPULATIONS["normal"]
    votes = vote(population, PAIRS, DRAWS, tie_half_width=0.4)
    rewards = RewardDistribution(torch.tensor(population.location), torch.tensor(population.scale), "normal")
    difference = rewards[PAIRS[:, 0]] - rewards[PAIRS[:, 1]]
    win, loss = (side.log_prob_exceeds(0.4).exp() for side in (difference, -difference))
    np.testing.assert_allclose(votes.wins / DRAWS, win, atol=SIX_ERRORS)
    np.testing.assert_allclose(votes.losses / DRAWS, loss, atol=SIX_ERRORS)
    np.testing.assert_allclose(
        votes.ties / DRAWS, difference.log_prob_within(torch.tensor(0.4)).exp(), atol=SIX_ERRORS
    )
    assert (votes.wins + votes.losses + votes.ties == DRAWS).all()


def test_grades_are_differences_between_boundaries():
    """P(k) = P(c_k < R_a - R_b < c_(k+1)), and the same mirrored; in sum the votes."""
    population, bounds = POPULATIONS["normal"], [0.4, 0.9, 1.8, np.inf]
    said = grade(population, PAIRS, bounds[1:3], DRAWS, tie_half_width=0.4)
    rewards = RewardDistribution(torch.tensor(population.location), torch.tensor(population.scale), "normal")
    difference = rewards[PAIRS[:, 0]] - rewards[PAIRS[:, 1]]
    for side, sign in enumerate((difference, -difference)):
        above = [sign.log_prob_exceeds(bound).exp().numpy() for bound in bounds]
        for k in range(3):
            found = said.strengths[:, 3 * side + k] / DRAWS
            np.testing.assert_allclose(found, above[k] - above[k + 1], atol=SIX_ERRORS)
    votes = vote(population, PAIRS, DRAWS, tie_half_width=0.4)
    assert votes.strengths is None
    for name in ("wins", "losses", "ties"):
        np.testing.assert_array_equal(getattr(said, name), getattr(votes, name))
    np.testing.assert_array_equal(said.strengths[:, :3].sum(axis=1), said.wins)
    np.testing.assert_array_equal(said.strengths[:, 3:].sum(axis=1), said.losses)


def test_label_noise_exchanges_a_strength_with_its_opposite():
    population = POPULATIONS["camps"]
    meant, said = (grade(population, PAIRS, [1.0], DRAWS, label_noise=noise).strengths / DRAWS for noise in (0, 0.2))
    np.testing.assert_allclose(said, 0.8 * meant + 0.2 * meant[:, [2, 3, 0, 1]], atol=SIX_ERRORS)


def test_label_noise_mixes_wins_and_losses():
    population = POPULATIONS["camps"]
    votes = vote(population, PAIRS, DRAWS, label_noise=0.2)
    prob = population.prob_greater(PAIRS)
    np.testing.assert_allclose(votes.wins / DRAWS, 0.8 * prob + 0.2 * (1 - prob), atol=SIX_ERRORS)


def test_the_seed_decides():
    population = POPULATIONS["tastes"]

    def wins(seed):
        return vote(population, PAIRS, 50, seed=seed).wins.tolist()

    assert wins(0) == wins(0) != wins(1)
    assert rate(population, 5, [0.0], seed=3).tolist() == rate(population, 5, [0.0], seed=3).tolist()
    for make in (heteroscedastic, tastes, camps):
        assert (make(FEATURES, seed=1).location == make(FEATURES, seed=1).location).all()
        assert (make(FEATURES, seed=1).location != make(FEATURES, seed=2).location).any()


# Ratings


def test_ratings_count_the_thresholds_below_the_reward():
    population, thresholds = POPULATIONS["normal"], np.array([-1.0, 0.0, 0.5])
    ratings = rate(population, DRAWS, thresholds, lowest=-1)
    for index, threshold in enumerate(thresholds):
        below = torch.special.ndtr(torch.tensor((threshold - population.location) / population.scale))
        np.testing.assert_allclose((ratings <= index - 1).mean(axis=1), below, atol=SIX_ERRORS)


def test_rounding_and_clipping_are_thresholds():
    population = POPULATIONS["cauchy"]
    ratings = rate(population, 200, np.arange(1.5, 5), lowest=1, seed=5)
    rng = np.random.default_rng(5)
    rewards = population.draw(np.arange(6)[:, None], population.draw_groups((6, 200), rng), rng)
    np.testing.assert_array_equal(ratings, np.clip(np.rint(rewards), 1, 5))


# Pairs


def test_pairs_are_of_two_texts_and_cover_them():
    pairs = random_pairs(5, 3000)
    assert (pairs[:, 0] != pairs[:, 1]).all()
    counts = np.zeros((5, 5))
    np.add.at(counts, tuple(pairs.T), 1)
    assert counts[~np.eye(5, dtype=bool)] == pytest.approx(150, abs=60)  # 3000 / 20, within five standard errors


def test_balanced_pairs_take_each_text_equally_often():
    pairs = balanced_pairs(10, 7)
    assert pairs.shape == (35, 2)
    assert np.bincount(pairs.ravel()).tolist() == [7] * 10
    assert (pairs[:, 0] != pairs[:, 1]).all()


# Rows


def test_rows_of_votes():
    population = POPULATIONS["normal"]
    votes = vote(population, PAIRS, 9)
    rows = votes.rows(TEXTS)
    for row, (first, second), wins, losses in zip(rows, PAIRS, votes.wins, votes.losses, strict=True):
        winner, loser = (first, second) if wins > losses else (second, first)
        assert row == {
            "chosen": TEXTS[winner],
            "rejected": TEXTS[loser],
            "chosen_votes": max(wins, losses),
            "rejected_votes": min(wins, losses),
        }


def test_rows_of_ties_stand_by_themselves():
    votes = vote(POPULATIONS["normal"], PAIRS, 9, tie_half_width=1.0)
    rows = votes.rows(TEXTS)
    assert sum(row["chosen_votes"] + row["rejected_votes"] for row in rows) == (votes.wins + votes.losses).sum()
    assert sum(row["weight"] for row in rows if row["tie"]) == votes.ties.sum() > 0
    assert all(row["chosen_votes"] == row["rejected_votes"] == 0 for row in rows if row["tie"])
    assert all(row["weight"] == 1 for row in rows if not row["tie"])


def test_rows_of_grades_hold_all_that_was_said_of_a_pair():
    pairs = np.array([[0, 1], [2, 3], [4, 5], [1, 0]])
    strengths = np.array([[1, 0, 0, 2], [0, 0, 2, 0], [0, 0, 0, 0], [0, 1, 1, 0]])
    said = Votes(pairs, np.array([1, 0, 0, 1]), np.array([2, 2, 0, 1]), np.array([0, 1, 0, 0]), False, strengths)
    # (No row of the pair that nobody judged; one and one: the stronger side.)
    assert said.rows(TEXTS) == [
        {"chosen": TEXTS[1], "rejected": TEXTS[0], "preference_strength": [2, 2, -1]},
        {"chosen": TEXTS[3], "rejected": TEXTS[2], "preference_strength": [1, 1, 0]},
        {"chosen": TEXTS[1], "rejected": TEXTS[0], "preference_strength": [2, -1]},
    ]


def test_rows_of_soft_labels_have_the_likelier_winner_first():
    population = POPULATIONS["camps"]
    probs = population.prob_greater(PAIRS)
    assert min(probs) < 0.5 < max(probs)  # both orders occur
    for row, (first, second), prob in zip(soft_label_rows(population, PAIRS), PAIRS, probs, strict=True):
        in_order = row["chosen"] == TEXTS[first] and row["rejected"] == TEXTS[second]
        assert in_order == (prob >= 0.5)
        assert row["preference_probability"] == pytest.approx(max(prob, 1 - prob))


@pytest.mark.parametrize("count", [6, 5])
def test_rows_of_ratings_hold_each_text_s_once(count):
    population = heteroscedastic(FEATURES[:count], texts=TEXTS[:count])
    ratings = rate(population, 3, [-0.5, 0.5])
    found = {}
    for row in rating_rows(population, ratings):
        assert row["chosen_votes"] == row["rejected_votes"] == 0
        for side in ("chosen", "rejected"):
            if row[f"{side}_rating"] is not None:
                assert row[side] not in found
                found[row[side]] = row[f"{side}_rating"]
    assert found == dict(zip(TEXTS, ratings.tolist(), strict=False))


def test_rows_are_what_training_reads():
    population = POPULATIONS["tastes"]
    rows = [
        *vote(population, PAIRS, 4, tie_half_width=0.5).rows(TEXTS),
        *vote(population, PAIRS).rows(TEXTS),
        *grade(population, PAIRS, [0.8, 1.6], 3, tie_half_width=0.3).rows(TEXTS),
        *soft_label_rows(population, PAIRS),
        *rating_rows(population, rate(population, 2, [0.0])),
    ]
    assert all(read_record(row, find_layout(row)) for row in rows)
    assert all(type(value) in (str, int, float, bool, list) for row in rows for value in row.values())


# Errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: vote(p, PAIRS, 0), "votes_per_pair=0"),
        (lambda p: vote(p, PAIRS, tie_half_width=-1), "tie_half_width=-1"),
        (lambda p: vote(p, PAIRS, label_noise=0.5), "label_noise=0.5"),
        (lambda p: vote(p, [[0, 6]]), "indices of the 6 texts"),
        (lambda p: vote(p, [0, 1]), "indices of the 6 texts"),
        (lambda p: grade(p, PAIRS, [1.0, 1.0]), r"boundaries must increase above tie_half_width=0.0"),
        (lambda p: grade(p, PAIRS, [0.4], tie_half_width=0.5), r"above tie_half_width=0.5, got \[0.4\]"),
        (lambda p: rate(p, 3, [1.0, 0.0]), "thresholds must increase"),
        (lambda p: balanced_pairs(5, 2), "texts=5 is odd"),
        (lambda p: random_pairs(1, 2), "a pair takes two"),
        (lambda p: soft_label_rows(dataclasses.replace(p, texts=None), PAIRS), "pass texts="),
        (lambda p: rating_rows(dataclasses.replace(p, texts=None), np.ones((6, 1))), "pass texts="),
    ],
)
def test_arguments_out_of_range(call, message):
    with pytest.raises(ValueError, match=message):
        call(POPULATIONS["normal"])
