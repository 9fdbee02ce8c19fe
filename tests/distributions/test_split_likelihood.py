"""The likelihood with the gradients of location and scale apart: which goes where, and both right at the truth."""

import pytest
import torch
from torch import Tensor

from disco_trl.distributions.judgements import Judgements
from disco_trl.distributions.likelihood import Responses, log_likelihood, split_log_likelihood
from disco_trl.distributions.reward_distribution import RewardDistribution


BOUNDARIES = torch.tensor([0.4, 1.2, 2.5], dtype=torch.float64)  # of a tie, and between three strengths


def graded(difference: Tensor) -> Judgements:
    """What people say who feel these differences, in four levels."""
    level = torch.bucketize(difference.abs(), BOUNDARIES)
    won, lost = difference > 0, difference < 0
    counts = torch.stack([(level == k) & side for side in (won, lost) for k in (1, 2, 3)], dim=-1).float()
    tie, zeros = (level == 0).float(), torch.zeros(len(difference))
    return Judgements(
        (won.float() - tie * won).float(), (lost.float() - tie * lost).float(), tie, zeros + 1, zeros, zeros + 1,
        strength_counts=counts,
    )  # fmt: skip


def leaves(count: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "location": torch.randn(2, count, generator=generator, dtype=torch.float64),
        "log_scale": 0.4 * torch.randn(2, count, generator=generator, dtype=torch.float64),
        "boundaries": BOUNDARIES.clone(),
    }


def evaluate(function, leaves: dict[str, Tensor], judgements: Judgements) -> Tensor:
    chosen, rejected = (
        RewardDistribution(location, log_scale.exp(), "normal")
        for location, log_scale in zip(leaves["location"], leaves["log_scale"], strict=True)
    )
    tie_width, *rest = leaves["boundaries"].unbind()
    responses = Responses(tie_width=tie_width, strength_boundaries=torch.stack(rest))
    return function(chosen, rejected, judgements, responses)


def gradients(function, leaves: dict[str, Tensor], judgements: Judgements) -> dict[str, Tensor]:
    free = {name: tensor.clone().requires_grad_() for name, tensor in leaves.items()}
    evaluate(function, free, judgements).sum().backward()
    return {name: torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for name, tensor in free.items()}


def drawn(leaves: dict[str, Tensor], seed: int = 1) -> Judgements:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(leaves["location"].shape, generator=generator, dtype=torch.float64)
    rewards = leaves["location"] + leaves["log_scale"].exp() * noise
    return graded(rewards[0] - rewards[1])


def test_each_gradient_is_that_of_its_own_likelihood():
    given = leaves(200)
    judgements = drawn(given)
    split = gradients(split_log_likelihood, given, judgements)
    whole = gradients(log_likelihood, given, judgements)
    votes = gradients(log_likelihood, given, judgements.without_strengths())
    torch.testing.assert_close(split["location"], votes["location"])
    torch.testing.assert_close(split["log_scale"], whole["log_scale"])
    torch.testing.assert_close(split["boundaries"], whole["boundaries"])
    assert not torch.allclose(whole["location"], votes["location"])
    torch.testing.assert_close(
        evaluate(split_log_likelihood, given, judgements), evaluate(log_likelihood, given, judgements)
    )


def test_without_strengths_and_ratings_it_is_the_likelihood():
    given = leaves(50)
    votes = drawn(given).without_strengths()
    torch.testing.assert_close(gradients(split_log_likelihood, given, votes), gradients(log_likelihood, given, votes))


def test_how_strong_a_preference_is_does_not_move_the_location():
    given = leaves(1)
    weak, strong = (gradients(split_log_likelihood, given, graded(torch.tensor([d]).double())) for d in (0.5, 3.0))
    torch.testing.assert_close(weak["location"], strong["location"], rtol=0, atol=0)
    assert not torch.allclose(weak["log_scale"], strong["log_scale"])


@pytest.mark.parametrize("name", ["location", "log_scale", "boundaries"])
def test_at_the_truth_every_score_has_mean_zero(name):
    """400,000 judgements of rewards as they are, against four standard errors; away from the truth it is not zero."""
    given = leaves(400_000)
    found = gradients(split_log_likelihood, given, drawn(given))[name]
    if name == "boundaries":
        # Of the sum over all pairs: each boundary's score has a variance of at most one judgement's.
        assert found.abs().max() < 4 * 400_000**0.5
        moved = given | {"boundaries": given["boundaries"] * 1.1}
        assert gradients(split_log_likelihood, moved, drawn(given))[name].abs().max() > 20 * 400_000**0.5
        return
    # Along the direction of the location's difference, and of the scale: mean and standard error over pairs
    direction = found * torch.sign(given[name])
    assert abs(direction.mean()) < 4 * direction.std() / direction.numel() ** 0.5
    moved = gradients(split_log_likelihood, given | {name: 1.3 * given[name]}, drawn(given))[name]
    away = moved * torch.sign(given[name])
    assert abs(away.mean()) > 10 * away.std() / away.numel() ** 0.5
