"""`disco_trl.simulation.population`: what people are said to feel is what they draw, counted in large samples."""

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

from disco_trl.distributions.families import get_family
from disco_trl.evaluation.metrics import centrality, spearman
from disco_trl.simulation.judging import random_pairs, vote
from disco_trl.simulation.population import LEVELS, Population, camps, heteroscedastic, tastes, trait_texts


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


# Probabilities


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
        # Two passes of votes, all of which the scale needs
        scale_training="joint",
        scale_layer=0,
        calibrate=False,
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
        (lambda p: trait_texts(3, traits=33), "traits=33"),
        (lambda p: heteroscedastic(np.ones(3)), "features must be"),
    ],
)
def test_arguments_out_of_range(call, message):
    with pytest.raises(ValueError, match=message):
        call(POPULATIONS["normal"])
