"""`disco_trl.simulation.population`: what people are said to feel is what they draw, vote and rate, counted in large
samples."""

import dataclasses

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny_training import disco_trainer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from disco_trl.data.columns import find_layout
from disco_trl.data.records import read_record
from disco_trl.distributions.reward_distribution import get_family
from disco_trl.evaluation.metrics import centrality, spearman
from disco_trl.simulation.population import (
    LEVELS,
    Population,
    balanced_pairs,
    camps,
    heteroscedastic,
    random_pairs,
    rate,
    rating_rows,
    soft_label_rows,
    tastes,
    trait_texts,
    vote,
)


FEATURES = np.random.default_rng(0).standard_normal((6, 4))
TEXTS = [f"text {index}" for index in range(6)]
POPULATIONS = {
    "normal": heteroscedastic(FEATURES, texts=TEXTS),
    "cauchy": heteroscedastic(FEATURES, family="cauchy", texts=TEXTS),
    "laplace": heteroscedastic(FEATURES, family="laplace", texts=TEXTS),
    "tastes": tastes(FEATURES, annotators=30, texts=TEXTS),
    "camps": camps(FEATURES, share=0.3, texts=TEXTS),
}
every_population = pytest.mark.parametrize("population", POPULATIONS.values(), ids=POPULATIONS.keys())
PAIRS = random_pairs(6, 5, seed=1)
DRAWS = 40_000
SIX_ERRORS = 6 * 0.5 / np.sqrt(DRAWS)  # of a frequency, at most


def drawn(population: Population) -> np.ndarray:
    """Rewards `[DRAWS, N]` by people drawn at random."""
    rng = np.random.default_rng(2)
    return population.draw(np.arange(6), population.draw_groups((DRAWS, 6), rng), rng)


# What a population says of itself


@every_population
def test_location_and_scale_are_those_of_the_rewards_drawn(population):
    rewards = drawn(population)
    if population.family in ("cauchy", "laplace"):
        # Quartiles of the standard distributions: tan(π/4) = 1 and log 2
        quartile = {"cauchy": 1.0, "laplace": np.log(2)}[population.family]
        low, median, high = np.quantile(rewards, [0.25, 0.5, 0.75], axis=0)
        np.testing.assert_allclose(median, population.location, atol=0.06)
        np.testing.assert_allclose((high - low) / 2 / quartile, population.scale, rtol=0.06)
    else:
        np.testing.assert_allclose(rewards.mean(axis=0), population.location, atol=0.05)
        np.testing.assert_allclose(rewards.std(axis=0), population.scale, rtol=0.03)


def test_families():
    assert [population.family for population in POPULATIONS.values()] == [
        *("normal", "cauchy", "laplace", "normal", "mixture")
    ]


def test_the_reference_world():
    """Over standard normal features, μ ~ N(0, 1) and log σ ~ N(0, 0.5²)."""
    population = heteroscedastic(np.random.default_rng(3).standard_normal((20_000, 32)))
    for values, std in ((population.location, 1), (np.log(population.scale), 0.5)):
        assert values.mean() == pytest.approx(0, abs=0.03 * std)
        assert values.std() == pytest.approx(std, rel=0.03)


def test_what_is_unseen_adds_to_the_location_alone():
    features = np.random.default_rng(3).standard_normal((20_000, 4))
    seen, all_of_it = heteroscedastic(features), heteroscedastic(features, unseen_std=0.3)
    assert np.std(all_of_it.location - seen.location) == pytest.approx(0.3, rel=0.03)
    np.testing.assert_array_equal(all_of_it.scale, seen.scale)


def test_camps_by_hand():
    # 0.3 of the people hold +2 and 0.7 hold -1, each ± 0.5:
    # mean 0.6 - 0.7 = -0.1; variance 0.3 · 2.1² + 0.7 · 0.9² + 0.5² = 1.323 + 0.567 + 0.25 = 2.14
    population = Population(np.ones((1, 1)), np.array([[2.0], [-1.0]]), np.array([0.3, 0.7]), np.array([0.5]))
    assert population.location == pytest.approx([-0.1])
    assert population.scale**2 == pytest.approx([2.14])
    assert population.division**2 == pytest.approx([1.89])


def test_tastes_are_linear_in_the_features():
    """Each person's opinions are; and with features 0 nobody differs from anybody."""
    population = POPULATIONS["tastes"]
    weights, *_ = np.linalg.lstsq(FEATURES, population.opinions.T, rcond=None)
    np.testing.assert_allclose(FEATURES @ weights, population.opinions.T, atol=1e-12)
    np.testing.assert_allclose(tastes(np.zeros((2, 3)), noise=0.7).scale, 0.7)


# Votes


@every_population
@pytest.mark.parametrize("same_annotator", [False, True])
def test_votes_are_as_frequent_as_their_probability(population, same_annotator):
    votes = vote(population, PAIRS, DRAWS, same_annotator=same_annotator)
    assert (votes.wins + votes.losses == DRAWS).all()
    expected = population.prob_greater(PAIRS, same_annotator=same_annotator)
    np.testing.assert_allclose(votes.wins / DRAWS, expected, atol=SIX_ERRORS)


@pytest.mark.parametrize("name", ["normal", "cauchy", "laplace"])
def test_probabilities_of_one_group_are_the_family_s(name):
    population = POPULATIONS[name]
    location, scale = torch.tensor(population.location), torch.tensor(population.scale)
    a, b = torch.tensor(PAIRS).T
    expected = get_family(name).log_prob_greater(location[a], scale[a], location[b], scale[b]).exp()
    np.testing.assert_allclose(population.prob_greater(PAIRS), expected, rtol=1e-12)


def test_one_person_s_taste_cancels_where_it_judges_both_sides():
    """All weigh one feature differently and two texts have the same amount of it: nobody's taste speaks."""
    population = tastes([[1.0, 0.0], [1.0, 0.2]], taste_std=3.0, noise=0.01, seed=1)
    flat = dataclasses.replace(population, opinions=population.opinions - population.opinions[:, :1])
    both = [p.prob_greater([[1, 0]], same_annotator=True) for p in (population, flat)]
    assert both[0] == pytest.approx(both[1])
    assert population.prob_greater([[1, 0]]) != pytest.approx(both[0], abs=0.05)


def test_many_groups_are_summed_in_parts():
    """More terms than memory takes at once; the sum by hand of a pair is the mean over all pairs of persons."""
    population = tastes(FEATURES, annotators=300, seed=4)
    pairs = random_pairs(6, 30)
    gaps = population.opinions[:, None, pairs[:, 0]] - population.opinions[None, :, pairs[:, 1]]
    expected = torch.special.ndtr(torch.tensor(gaps / np.hypot(0.5, 0.5))).mean(dim=(0, 1))
    np.testing.assert_allclose(population.prob_greater(pairs), expected, rtol=1e-9)


def test_ties_are_rewards_nearer_than_the_half_width():
    """P(win) = P(R_a - R_b > δ), the same as with μ_a lowered by δ; P(loss) likewise; the rest are ties."""
    population = POPULATIONS["normal"]
    votes = vote(population, PAIRS, DRAWS, tie_half_width=0.4)
    location, scale = torch.tensor(population.location), torch.tensor(population.scale)
    a, b = torch.tensor(PAIRS).T
    family = get_family("normal")
    win = family.prob_greater(location[a] - 0.4, scale[a], location[b], scale[b]).numpy()
    loss = family.prob_greater(location[b] - 0.4, scale[b], location[a], scale[a]).numpy()
    np.testing.assert_allclose(votes.wins / DRAWS, win, atol=SIX_ERRORS)
    np.testing.assert_allclose(votes.losses / DRAWS, loss, atol=SIX_ERRORS)
    assert (votes.wins + votes.losses + votes.ties == DRAWS).all()


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
        *soft_label_rows(population, PAIRS),
        *rating_rows(population, rate(population, 2, [0.0])),
    ]
    assert all(read_record(row, find_layout(row)) for row in rows)
    assert all(type(value) in (str, int, float, bool, list) for row in rows for value in row.values())


# Texts


def test_texts_say_what_their_features_are():
    texts, features = trait_texts(4000, traits=3)
    assert features.mean(axis=0) == pytest.approx(0, abs=0.08)
    assert features.std(axis=0) == pytest.approx(1, abs=0.05)
    for text, row in zip(texts[:20], features, strict=False):
        said = text.removeprefix("This answer is ").split(", ")
        levels = [LEVELS.index(trait.rsplit(" ", 1)[0]) for trait in said]
        assert [(level - 2) / np.sqrt(2) for level in levels] == pytest.approx(row.tolist())


@pytest.mark.slow
def test_a_language_model_reads_from_texts_how_much_people_disagree(tmp_path):
    """A tiny Llama, from scratch, on one vote a pair."""
    texts, features = trait_texts(1500, traits=3, seed=1)
    world = heteroscedastic(features, log_scale_std=0.7, texts=texts)
    words = sorted({word for text in texts for word in text.replace(",", " ,").split()})
    backend = Tokenizer(WordLevel({word: token for token, word in enumerate(["<pad>", "<eos>", *words])}))
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=1,
    )
    torch.manual_seed(0)
    trainer = disco_trainer(
        tmp_path,
        model=LlamaForSequenceClassification(config),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(vote(world, random_pairs(1500, 12_800)).rows(texts)),
        per_device_train_batch_size=64,
        max_steps=400,
        learning_rate=5e-3,
        logging_steps=100,
    )
    trainer.train()
    batch = tokenizer([text + tokenizer.eos_token for text in texts], padding=True, return_tensors="pt")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        rewards = trainer.model.eval().reward_distribution(**inputs)
    location, scale = rewards.location.numpy(), rewards.scale.numpy()
    assert spearman(location, world.location) > 0.95
    assert (
        abs(spearman(centrality(location), world.scale)) < 0.3
    )  # the world's scales are not to be had from extremity
    assert spearman(scale, world.scale) > 0.85


# Errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise": np.zeros(6)}, "noise must be positive"),
        ({"noise": np.ones(5)}, "noise has 5 rows"),
        ({"share": np.array([0.5])}, "share must hold parts of 1"),
        ({"noise_family": "logistic"}, "no distribution"),
        ({"texts": TEXTS[:3]}, "texts has 3 rows"),
        ({"opinions": np.zeros((2, 6)), "share": np.ones(2) / 2, "noise_family": "cauchy"}, "2 groups with 'cauchy'"),
    ],
)
def test_populations_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(POPULATIONS["normal"], **changes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: vote(p, PAIRS, 0), "votes_per_pair=0"),
        (lambda p: vote(p, PAIRS, tie_half_width=-1), "tie_half_width=-1"),
        (lambda p: vote(p, PAIRS, label_noise=0.5), "label_noise=0.5"),
        (lambda p: vote(p, [[0, 6]]), "indices of the 6 texts"),
        (lambda p: vote(p, [0, 1]), "indices of the 6 texts"),
        (lambda p: rate(p, 3, [1.0, 0.0]), "thresholds must increase"),
        (lambda p: balanced_pairs(5, 2), "texts=5 is odd"),
        (lambda p: random_pairs(1, 2), "a pair takes two"),
        (lambda p: trait_texts(3, traits=33), "traits=33"),
        (lambda p: heteroscedastic(np.ones(3)), "features must be"),
        (lambda p: soft_label_rows(dataclasses.replace(p, texts=None), PAIRS), "pass texts="),
        (lambda p: rating_rows(dataclasses.replace(p, texts=None), np.ones((6, 1))), "pass texts="),
    ],
)
def test_arguments_out_of_range(call, message):
    with pytest.raises(ValueError, match=message):
        call(POPULATIONS["normal"])
