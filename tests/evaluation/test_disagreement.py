"""`disco_trl.evaluation.disagreement`: against counting, and in simulated worlds whose truth is known."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from disco_trl.evaluation.disagreement import (
    _shrinkage,
    auroc,
    matched_auroc,
    rater_correlations,
    spreads_of_halves,
)
from disco_trl.evaluation.metrics import spearman


# Divided pairs


def test_auroc_counts_pairs_of_cases():
    # Of 2 · 3 pairs: 3 > 1, 3 > 2, 3 = 3, 2 > 1, 2 = 2, 2 < 3, which is 3 + 2 / 2 of 6
    scores, positive = np.array([3.0, 2.0, 1.0, 2.0, 3.0]), np.array([True, True, False, False, False])
    assert auroc(scores, positive)[0] == pytest.approx(4 / 6)


def test_auroc_has_the_interval_of_delong():
    generator = np.random.default_rng(0)
    scores, positive = np.round(generator.normal(size=60), 1), generator.random(60) < 0.4
    value, low, high = auroc(scores, positive)
    wins = (1 + np.sign(scores[positive][:, None] - scores[~positive])) / 2
    assert value == pytest.approx(wins.mean())
    # Without corrections for few cases, which are those of 60 independent ones
    variance = wins.mean(axis=1).var() / positive.sum() + wins.mean(axis=0).var() / (~positive).sum()
    half = stats.t.ppf(0.975, 59) * math.sqrt(variance * 60 / 59) / (value * (1 - value))
    assert [math.log(end / (1 - end)) for end in (low, high)] == pytest.approx(
        [math.log(value / (1 - value)) + side * half for side in (-1, 1)]
    )
    # The same cases twice contain no more than once.
    twice = auroc(np.tile(scores, 2), np.tile(positive, 2), np.tile(np.arange(60), 2))
    assert twice == pytest.approx((value, low, high))


def test_matched_auroc_compares_with_neighbors_on_both_sides():
    # By distance: n0 n1 P n2 n3 P n4. With one neighbour a side: the first P with n1 and n2, the other with n3 and n4.
    distance = np.array([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    positive = np.array([False, False, True, False, False, True, False])
    scores = np.array([9.0, 1.0, 2.0, 2.0, 1.0, 0.0, 8.0])
    # 2 > 1, 2 = 2; 0 < 1, 0 < 8: (1 + 1/2 + 0 + 0) / 4
    assert matched_auroc(scores, positive, distance, neighbors=1)[0] == pytest.approx(1.5 / 4)
    # With two: P with n0, n1, n2, n3: 0 + 1 + 1/2 + 1 of 4. The other has one case above, so it is compared with one
    # below as well.
    assert matched_auroc(scores, positive, distance, neighbors=2)[0] == pytest.approx((2.5 / 4 + 0) / 2)


@pytest.mark.parametrize("digits", [0, 1, 9])
def test_what_the_distance_tells_is_nothing_among_matched_pairs(digits):
    """Also with equal distances."""
    generator = np.random.default_rng(0)
    distance = np.round(np.abs(generator.normal(size=300)), digits)
    positive = generator.random(300) < np.exp(-distance)
    assert auroc(-distance, positive)[0] > 0.6
    for score in (-distance, distance**3, np.exp(-distance), np.zeros(300)):
        value, low, high = matched_auroc(score, positive, distance)
        assert value == pytest.approx(0.5, abs=1e-12) and low <= value <= high


def test_without_both_kinds_there_is_no_auroc():
    ones = np.ones(3, dtype=bool)
    for positive in (ones, ~ones):
        for found in (auroc(np.arange(3.0), positive), matched_auroc(np.arange(3.0), positive, np.arange(3.0))):
            assert all(map(math.isnan, found))
    # All above the others: how near to 1 the truth is cannot be told from these.
    value, *ends = auroc(np.arange(6.0), np.arange(6) > 2)
    assert value == 1 and all(map(math.isnan, ends))


def divided_pairs(generator, count: int, informs: bool):
    """Votes of 5 people each. The scale that a model predicts grows with the distance; apart from this trend, it is
    the true one or has nothing to do with it.
    """
    distance = np.abs(generator.normal(scale=1.5, size=count))
    own, other = generator.normal(scale=0.4, size=(2, count))
    votes = generator.binomial(5, stats.norm.cdf(distance / np.exp(own)))
    return distance, 0.5 * distance + (own if informs else other), (votes > 0) & (votes < 5)


@pytest.mark.parametrize("informs", [False, True])
def test_matched_auroc_covers(informs):
    """
    Of 100 intervals of 95 % coverage, more than 12 miss with a probability below 0.2 %. What a scale without
    information is worth, 0.5, is known; what one with information is, is the mean. Unmatched, either scores below 0.4:
    distant pairs divide fewer people, and have larger scales.
    """
    generator = np.random.default_rng(0)
    found = []
    for _ in range(100):
        distance, scale, divided = divided_pairs(generator, 300, informs)
        found.append(matched_auroc(scale, divided, distance))
    value, low, high = np.transpose(found)
    truth = value.mean() if informs else 0.5
    assert value.mean() == pytest.approx(0.675 if informs else 0.5, abs=0.02)
    assert ((low <= truth) & (truth <= high)).sum() >= 88
    assert (high - low).mean() / 3.92 == pytest.approx(value.std(), rel=0.2)
    assert auroc(scale, divided)[0] < 0.4


# Raters


def test_shrinkage_of_a_standard_deviation():
    # E|x − y| / √2 of two standard normals is √(2 / π), and c4(5) = 0.9400 in any table.
    assert _shrinkage(2) == pytest.approx(math.sqrt(2 / math.pi))
    assert _shrinkage(5) == pytest.approx(0.9400, abs=1e-4)


def test_halves_have_different_raters():
    spreads = spreads_of_halves([np.array([0.0, 0.0, 3.0, 3.0]), np.array([0.0, 1.0, 2.0, 30.0, 40.0])], splits=50)
    # Both halves are equal, or each has 0 and 3, of standard deviation 3 / √2.
    pairs = {tuple(np.round(pair, 6)) for pair in spreads[:, :, 0].T}
    assert pairs == {(0.0, 0.0), tuple(np.round([3 / math.sqrt(2) / _shrinkage(2)] * 2, 6))}
    # Of five raters, the first half has two in some splits and three in others.
    of_two = {
        round(abs(a - b) / math.sqrt(2) / _shrinkage(2), 6) for a, b in itertools.combinations([0, 1, 2, 30, 40], 2)
    }
    is_of_two = [[round(spread, 6) in of_two for spread in half] for half in spreads[:, :, 1]]
    assert 10 < sum(is_of_two[0]) < 40 and [not one for one in is_of_two[0]] == is_of_two[1]


def test_correction_by_hand():
    # Ranks of the halves correlate by 1 − 6 · 2 / (4 · 15) = 0.8, those of the scores with them by 1 and 0.8.
    spreads = np.array([[[1.0, 2.0, 3.0, 4.0]], [[1.0, 3.0, 2.0, 4.0]]])
    correlations, agreement = rater_correlations([[5.0, 6.0, 7.0, 8.0], [0.0, 0.0, 0.0, 0.0]], spreads)
    assert agreement == pytest.approx(0.8)
    assert correlations[0] == pytest.approx(0.9 / math.sqrt(0.8)) and math.isnan(correlations[1])


def test_without_agreement_there_is_no_correction():
    spreads = np.array([[[1.0, 2.0, 3.0]], [[3.0, 2.0, 1.0]]])
    correlations, agreement = rater_correlations([1.0, 2.0, 3.0], spreads)
    assert agreement == pytest.approx(-1) and np.isnan(correlations)


@pytest.mark.parametrize("raters", [(5,), (10,), (4, 6, 9, 20)])
@pytest.mark.parametrize("whole", [False, True])
def test_the_corrected_correlation_is_that_with_the_truth(raters, whole):
    """
    Ratings are normal about a location of their own, or their nearest whole numbers from −4 to 4. The model's scale is
    the true one times noise. Few raters make the observed correlation far smaller than that with the true standard
    deviation; corrected, it is the same up to its own error.
    """
    generator = np.random.default_rng(0)
    count = 3000
    location, scale = generator.normal(scale=1.2, size=count), np.exp(generator.normal(scale=0.35, size=count))
    claimed = scale * np.exp(generator.normal(scale=0.35, size=count))
    ratings = [location[i] + scale[i] * generator.normal(size=int(generator.choice(raters))) for i in range(count)]
    truth = scale
    if whole:
        ratings = [np.clip(np.round(of_answer), -4, 4) for of_answer in ratings]
        values = np.arange(-4, 5)
        below = stats.norm.cdf((np.append(values[:-1] + 0.5, np.inf)[:, None] - location) / scale)
        share = np.diff(below, axis=0, prepend=0)
        truth = np.sqrt(values**2 @ share - (values @ share) ** 2)
    true, raw = spearman(claimed, truth), spearman(claimed, [of.std(ddof=1) for of in ratings])
    corrected, _ = rater_correlations(claimed, spreads_of_halves(ratings))
    assert raw < true - 0.1
    assert corrected == pytest.approx(true, abs=0.06)
