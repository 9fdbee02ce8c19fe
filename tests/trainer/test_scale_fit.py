"""The scale that predictions support: recovered where it is there, and constant where nothing says so."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from disco_trl.distributions.reward_distribution import get_family
from disco_trl.evaluation.metrics import spearman
from disco_trl.models.heads import DiscoHead
from disco_trl.trainer.predictions import Predictions, numbered
from disco_trl.trainer.scale_fit import dyadic_standard_error, fit_scale


UNIT = get_family("normal").unit_scale
BOUNDARIES = torch.tensor([0.5, 1.5, 3.0])


def world(
    pairs: int,
    spread: float,
    *,
    graded: bool,
    answers: int = 1200,
    error: float = 0.8,
    features: int = 32,
    seed: int = 0,
) -> tuple[DiscoHead, Predictions, torch.Tensor]:
    """
    Predictions of answers that recur, whose log σ is linear in the features with a standard deviation `spread`, and
    whose locations are predicted with an error. Returns the head, the predictions, and the true log σ.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    states = normal(answers, features)
    true_weight = normal(features)
    log_scale = states @ true_weight / true_weight.norm() * spread
    location = states @ normal(features) / math.sqrt(features) * 2
    said_about = torch.randint(answers, (pairs, 2), generator=generator)
    said_about[:, 1] = (said_about[:, 0] + 1 + said_about[:, 1] % (answers - 1)) % answers
    drawn = location[said_about] + UNIT * log_scale.exp()[said_about] * normal(pairs, 2)
    difference = drawn[:, 0] - drawn[:, 1]
    # The better answer is the chosen one.
    swap = difference < 0
    said_about = torch.where(swap[:, None], said_about.flip(1), said_about)
    strength = torch.bucketize(difference.abs(), BOUNDARIES) if graded else torch.ones(pairs)
    zeros, tie = torch.zeros(pairs), (strength == 0).float()
    said = torch.stack([1 - tie, zeros, tie, zeros + graded, zeros, zeros + 1], dim=-1)
    strengths = torch.zeros(pairs, 6 * graded)
    for level in (1, 2, 3) if graded else ():
        strengths[:, level - 1] = strength == level
    head = DiscoHead.convert(nn.Linear(features, 1, bias=False), UNIT, None)
    if graded:
        head.add_likelihood({"tie_width": "learned", "strength_levels": 3})
    predicted = (location + error * normal(answers))[said_about]
    none = zeros.new_zeros(pairs, 2, 0)
    predictions = Predictions(none, states[said_about], predicted, none, said, none, strengths, said_about)
    return head, predictions, log_scale


def test_strengths_teach_a_scale():
    head, predictions, truth = world(2400, 0.4, graded=True)
    fit = fit_scale(head, get_family("normal"), predictions)
    assert fit.weight is not None
    assert fit.gain > 3 * fit.standard_error
    states = predictions.scale_states.flatten(0, 1)
    found = states.double() @ fit.weight
    assert spearman(found, truth[predictions.answers].flatten()) > 0.75
    # The cross-fitted scales are those of other answers' weights: real, and a little worse.
    assert 0.6 < spearman(fit.log_scale.flatten(), truth[predictions.answers].flatten()) < 0.99


def silenced(make: Callable[[int], tuple], worlds: int) -> int:
    """In how many of so many worlds the scale is made constant."""
    return sum(fit_scale(*_with_family(make(seed))).weight is None for seed in range(worlds))


def _with_family(made: tuple) -> tuple:
    head, predictions, _ = made
    return head, get_family("normal"), predictions


@pytest.mark.parametrize(("graded", "worlds"), [(True, 5), (False, 12)], ids=["strengths", "votes"])
def test_a_world_without_a_scale_gets_none(graded, worlds):
    """All answers have one scale, and the locations are wrong, which is what a scale that overfits feeds on."""
    assert silenced(lambda seed: world(700, 0.0, graded=graded, seed=seed, features=16), worlds) >= worlds - 1


def test_the_same_judgements_twice_are_no_evidence():
    """Votes of 60 answers that recur thousands of times: each answer's wrong location looks like its own scale."""
    assert silenced(lambda seed: world(1500, 0.0, graded=False, answers=60, seed=seed, features=16), 8) >= 7


def test_answers_are_numbered_without_gaps():
    assert numbered(torch.tensor([[70, -1], [-1, 5], [5, 70]])).tolist() == [[3, 1], [0, 2], [2, 3]]


def test_the_standard_error_knows_pairs_that_share_an_answer():
    """Against the sum over all pairs of pairs, written out."""
    generator = torch.Generator().manual_seed(0)
    answers = torch.randint(6, (40, 2), generator=generator)
    answers[:, 1] = (answers[:, 0] + 1 + answers[:, 1] % 5) % 6
    values = torch.randn(40, generator=generator).double()
    deviation = values - values.mean()
    variance = sum(
        deviation[i] * deviation[j]
        for i in range(40)
        for j in range(40)
        if set(answers[i].tolist()) & set(answers[j].tolist())
    )
    assert dyadic_standard_error(values, answers) == pytest.approx(math.sqrt(max(variance, 0)))


def test_the_standard_error_of_pairs_that_share_nothing_is_the_usual_one():
    values = torch.randn(50, generator=torch.Generator().manual_seed(0)).double()
    expected = values.std(correction=0).item() * math.sqrt(50)
    assert dyadic_standard_error(values, torch.arange(100).view(50, 2)) == pytest.approx(expected)
