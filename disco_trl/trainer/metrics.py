"""What the trainer logs of a batch beside TRL's metrics, in two steps: figures of each pair, which processes can put
together, and what they come to."""

import torch
from torch import Tensor

from ..distributions.judgements import Judgements
from ..distributions.reward_distribution import RewardDistribution


def pair_figures(chosen: RewardDistribution, rejected: RewardDistribution, judgements: Judgements) -> Tensor:
    """Figures of B pairs, `[B, 8]`. (In pairs, of which those that a process has only to fill up can be left out.)"""
    log_prob = chosen.log_prob_greater(rejected)
    votes = judgements.wins + judgements.losses
    log_votes = judgements.wins * log_prob + judgements.losses * rejected.log_prob_greater(chosen)
    agreed = torch.where(chosen.location > rejected.location, judgements.wins, judgements.losses)
    locations = [chosen.location.to(log_prob), rejected.location.to(log_prob)]
    return torch.stack([log_votes, votes, agreed, log_prob.exp(), chosen.scale, rejected.scale, *locations], dim=-1)


def summarize(figures: Tensor) -> dict[str, float]:
    """
    Metrics of :func:`pair_figures`.

    `accuracy` and `nll` are per vote, and left out where nobody voted (ratings alone); the others are per pair and
    per answer.
    """
    log_votes, votes, agreed, prob, *scales = figures[:, :6].T
    scale = torch.cat(scales)
    compared = {"accuracy": agreed.sum() / votes.sum(), "nll": -log_votes.sum() / votes.sum()}
    metrics = {
        **(compared if votes.sum() > 0 else {}),
        "prob_chosen": prob.mean(),
        "scale_mean": scale.mean(),
        "scale_min": scale.min(),
        "scale_max": scale.max(),
    }
    return {name: value.item() for name, value in metrics.items()}


def summarize_rewards(figures: Tensor) -> dict[str, float]:
    """TRL's means of the rewards, of :func:`pair_figures`."""
    chosen, rejected = figures[:, 6:].T
    return {"mean_reward": ((chosen + rejected) / 2).mean().item(), "margin": (chosen - rejected).mean().item()}
