"""What is logged of a batch, against counts by hand."""

from dataclasses import replace

import pytest
import torch

from disco_trl.distributions import RewardDistribution
from disco_trl.judgements import Judgements
from disco_trl.metrics import pair_figures, summarize


def said(**columns) -> Judgements:
    """Judgements of three pairs; what is not named is absent."""
    tensors = {name: torch.tensor(values) for name, values in columns.items()}
    return replace(Judgements.forced_choices(3, torch.device("cpu")), **tensors)


CHOSEN = RewardDistribution(torch.tensor([1.0, -0.5, 0.0]), torch.tensor([1.0, 2.0, 0.5]), "normal")
REJECTED = RewardDistribution(torch.tensor([0.0, 0.5, 0.0]), torch.tensor([0.1, 0.2, 0.3]), "normal")


def test_forced_choices():
    metrics = summarize(pair_figures(CHOSEN, REJECTED, said()))
    prob = CHOSEN.prob_greater(REJECTED)
    assert metrics["accuracy"] == pytest.approx(1 / 3)  # equal locations are not ahead, as in TRL
    assert metrics["nll"] == pytest.approx(-prob.log().mean().item())
    assert metrics["prob_chosen"] == pytest.approx(prob.mean().item())
    assert (metrics["scale_min"], metrics["scale_max"]) == pytest.approx((0.1, 2.0))
    assert metrics["scale_mean"] == pytest.approx(4.1 / 6)


def test_votes_count_one_by_one():
    votes = said(wins=[3.0, 1.0, 0.0], losses=[1.0, 5.0, 0.0])
    metrics = summarize(pair_figures(CHOSEN, REJECTED, votes))
    assert metrics["accuracy"] == pytest.approx((3 + 5) / 10)
    prob = CHOSEN.prob_greater(REJECTED)
    log_votes = 3 * prob[0].log() + (1 - prob[0]).log() + prob[1].log() + 5 * (1 - prob[1]).log()
    assert metrics["nll"] == pytest.approx(-log_votes.item() / 10)


def test_nobody_voted():
    metrics = summarize(pair_figures(CHOSEN, REJECTED, said(wins=[0.0] * 3, losses=[0.0] * 3)))
    assert set(metrics) == {"prob_chosen", "scale_mean", "scale_min", "scale_max"}


def test_figures_of_processes_are_put_together():
    votes = said(wins=[3.0, 1.0, 0.0], losses=[1.0, 5.0, 2.0])
    whole = pair_figures(CHOSEN, REJECTED, votes)
    assert whole.shape == (3, 6)
    parts = torch.cat([whole[:1], whole[1:]])
    assert summarize(parts) == summarize(whole)
