"""A simulated world whose joint truth is known: what a trained model makes of locations, scales, correlation, weights.

One token of an answer decides the levels of three attributes, another one how much people disagree. The others make
it an answer of its own.
"""

import numpy as np
import pytest
import torch
from datasets import Dataset
from test_gauge import END, FIRST_DEVIATION, FIRST_MEAN, tiny_llama
from tiny_training import disco_trainer, logged

from disco_trl.evaluation.metrics import spearman


pytestmark = pytest.mark.slow

NAMES = ("bright", "clear", "deep")
CORRELATION = np.array([[1.0, 0.6, -0.3], [0.6, 1.0, 0.2], [-0.3, 0.2, 1.0]])
WEIGHTS = np.array([1.0, 0.4, -0.7])
PEOPLE = 5
EDGES = np.array([-1.8, -0.6, 0.6, 1.8])
LEVELS = np.random.default_rng(0).normal(0, 1.2, (8, 3))
DEVIATIONS = np.array([[0.5, 0.6, 0.8], [1.2, 1.1, 1.6]])
ANSWERS = [(level, deviation) for level in range(8) for deviation in range(2)]


FILLERS = [*range(3, FIRST_MEAN), *range(FIRST_MEAN + 8, FIRST_DEVIATION), *range(FIRST_DEVIATION + 2, 40)]


def ids_of(level: int, deviation: int, fillers=(FILLERS[0],) * 3) -> list[int]:
    return [*fillers, FIRST_MEAN + level, FIRST_DEVIATION + deviation, END]


def world(pairs: int, seed: int, overall: bool) -> Dataset:
    """Pairs, each answer rated by five people, and compared overall by one more person or nobody."""
    generator = np.random.default_rng(seed)
    factor = np.linalg.cholesky(CORRELATION)
    rows = []
    for _ in range(pairs):
        answers = [ANSWERS[place] for place in generator.integers(len(ANSWERS), size=2)]
        people = [
            LEVELS[level] + DEVIATIONS[deviation] * (generator.standard_normal((PEOPLE + 1, 3)) @ factor.T)
            for level, deviation in answers
        ]
        if overall and people[0][-1] @ WEIGHTS < people[1][-1] @ WEIGHTS:
            answers, people = answers[::-1], people[::-1]
        row = {} if overall else {"chosen_votes": 0, "rejected_votes": 0}
        for side, answer, rewards in zip(("chosen", "rejected"), answers, people, strict=True):
            ratings = np.digitize(rewards[:-1], EDGES) + 1
            row[f"{side}_ids"] = ids_of(*answer, generator.choice(FILLERS, 3).tolist())
            row[f"{side}_rating"] = dict(zip(NAMES, ratings.T.tolist(), strict=True))
        rows.append(row)
    return Dataset.from_list(rows)


def train(folder, tokenizer, overall: bool, pairs: int = 3000, **options):
    settings = {
        "per_device_train_batch_size": 16,
        "max_steps": -1,
        "num_train_epochs": 1,
        "learning_rate": 3e-3,
        "scale_layer": 0,
        "scale_training": "joint",
        "logging_steps": 1000,
        "attribute_weights": dict(zip(NAMES, (1.0, 1.0, -1.0), strict=True)),
    }
    trainer = disco_trainer(
        folder,
        model=tiny_llama(hidden_size=64),
        processing_class=tokenizer,
        train_dataset=world(pairs, 0, overall),
        **settings | options,
    )
    trainer.train()
    return trainer


@torch.no_grad()
def held_out(trainer):
    """The joint rewards of 640 answers, with their true levels and deviations, `(640, 3)`."""
    generator = np.random.default_rng(1)
    answers = ANSWERS * 40
    ids = torch.tensor([ids_of(*answer, generator.choice(FILLERS, 3).tolist()) for answer in answers])
    levels, deviations = (np.array(of) for of in zip(*((LEVELS[m], DEVIATIONS[d]) for m, d in answers), strict=True))
    return trainer.model.eval().joint_distribution(input_ids=ids), levels, deviations


@pytest.fixture(scope="module")
def trained(tmp_path_factory, _session_tokenizer):
    """A run on 3,000 pairs: 6,000 answers, five raters each, and an overall comparison of each pair."""
    return train(tmp_path_factory.mktemp("run"), _session_tokenizer, True)


def test_the_correlation_of_people_is_recovered(trained):
    joint, _, _ = held_out(trained)
    np.testing.assert_allclose(joint.correlation.numpy(), CORRELATION, atol=0.1)


def test_locations_and_scales_are_recovered(trained):
    joint, levels, deviations = held_out(trained)
    for place, name in enumerate(joint.names):
        location, scale = joint.location[:, place].numpy(), joint.scale[:, place].numpy()
        assert spearman(location, levels[:, place]) > 0.9, name
        assert spearman(scale, deviations[:, place]) > 0.5, name


def test_the_weights_that_people_use_are_recovered(trained):
    """Up to a factor, which is the unit of the overall reward, in units of the attributes."""
    joint, _, deviations = held_out(trained)
    units = np.exp((np.log(joint.scale.numpy()) - np.log(deviations)).mean(axis=0))
    found = np.array([trained.model.attribute_weights[name] for name in NAMES]) * units
    cosine = found @ WEIGHTS / np.linalg.norm(found) / np.linalg.norm(WEIGHTS)
    assert cosine > 0.9  # from 3,000 forced choices
    entries = [entry for entry in logged(trained) if "attribute_weight/deep" in entry]
    assert len(entries) == 1


def test_several_passes_leave_the_correlation_what_it_is(tmp_path, _session_tokenizer):
    trainer = train(tmp_path, _session_tokenizer, False, pairs=1000, num_train_epochs=3)
    joint, _, _ = held_out(trainer)
    np.testing.assert_allclose(joint.correlation.numpy(), CORRELATION, atol=0.1)
