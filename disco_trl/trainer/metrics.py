"""
What the trainer logs of a batch beside TRL's metrics.

It is computed in two steps: figures of each pair, which processes can gather, and what they come to over all pairs.
[`EvaluationMetrics`] logs the latter for an evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from ..data.columns import OVERALL
from ..distributions.judgements import Judgements
from ..distributions.reward_distribution import RewardDistribution


FIGURES = 8
"""Number of figures of a pair, for each attribute."""


def pair_figures(chosen: RewardDistribution, rejected: RewardDistribution, judgements: Judgements) -> Tensor:
    """
    Figures of each pair, from which those of repeated pairs can be left out before they are summarized.

    Args:
        chosen, rejected ([`~disco_trl.RewardDistribution`]):
            Rewards of the two sides of `B` pairs.
        judgements ([`~disco_trl.distributions.judgements.Judgements`]):
            What was said about the pairs.

    Returns:
        `torch.Tensor` of shape `(B, 8)`: Log-likelihood of the votes (nats), number of votes, votes that agree with
            the locations, P(chosen ≻ rejected), scales of both sides, and locations of both sides.
    """
    both, reverse = (RewardDistribution.cat(sides) for sides in ([chosen, rejected], [rejected, chosen]))
    log_prob, log_prob_of_loss = both.log_prob_greater(reverse).chunk(2)
    votes = judgements.wins + judgements.losses
    log_votes = judgements.wins * log_prob + judgements.losses * log_prob_of_loss
    agreed = torch.where(chosen.location > rejected.location, judgements.wins, judgements.losses)
    locations = [chosen.location.to(log_prob), rejected.location.to(log_prob)]
    return torch.stack([log_votes, votes, agreed, log_prob.exp(), chosen.scale, rejected.scale, *locations], dim=-1)


def summarize(figures: Tensor) -> dict[str, Tensor]:
    """
    Summarize the figures of pairs.

    Args:
        figures (`torch.Tensor` of shape `(B, 8)`):
            What [`pair_figures`] returns.

    Returns:
        `dict[str, torch.Tensor]`: `accuracy` and `nll` per vote, which are `nan` if nobody voted (with ratings alone);
            `prob_chosen` per pair; `scale_mean`, `scale_min` and `scale_max` over answers. Scalars on the device of
            the figures.
    """
    log_votes, votes, agreed, prob, *scales = figures[:, :6].T
    scale = torch.cat(scales)
    return {
        "accuracy": agreed.sum() / votes.sum(),
        "nll": -log_votes.sum() / votes.sum(),
        "prob_chosen": prob.mean(),
        "scale_mean": scale.mean(),
        "scale_min": scale.min(),
        "scale_max": scale.max(),
    }


def summarize_all(figures: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """
    Summarize the figures of pairs for all attributes.

    Args:
        figures (`torch.Tensor` of shape `(B, 8 * A)`):
            What [`pair_figures`] returns, for one attribute after the other.
        names (`Sequence[str]`):
            Names of the attributes, the overall judgement first.

    Returns:
        `dict[str, torch.Tensor]`: What [`summarize`] returns for the overall reward. For each other attribute
            `accuracy/NAME`, `nll/NAME` and `scale_mean/NAME`.
    """
    overall, *others = figures.split(FIGURES, dim=1)
    metrics = summarize(overall)
    for name, of_name in zip(names[1:], others, strict=True):
        found = summarize(of_name)
        metrics |= {f"{key}/{name}": found[key] for key in ("accuracy", "nll", "scale_mean")}
    return metrics


def as_numbers(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """Metrics as numbers, without those per vote where nobody voted. The host waits for the device, once."""
    return dict(_read(metrics.items()))


def _read(metrics: Iterable[tuple[str, Tensor]]) -> list[tuple[str, float]]:
    """As [`as_numbers`], of names that may recur."""
    found = list(metrics)
    values = torch.stack([value.float() for _, value in found]).tolist() if found else []
    numbers = [(name, value) for (name, _), value in zip(found, values, strict=True)]
    return [one for one in numbers if not (one[0].split("/")[0] in ("accuracy", "nll") and math.isnan(one[1]))]


def summarize_rewards(figures: Tensor) -> dict[str, float]:
    """
    Summarize the locations as TRL does the rewards.

    Args:
        figures (`torch.Tensor` of shape `(B, 8)`):
            What [`pair_figures`] returns.

    Returns:
        `dict[str, float]`: `mean_reward` and `margin`, in reward units.
    """
    chosen, rejected = figures[:, 6:].T
    return {"mean_reward": ((chosen + rejected) / 2).mean().item(), "margin": (chosen - rejected).mean().item()}


class MetricsOnDevice(Trainer):
    """
    A trainer whose metrics stay on their device until they are logged, because reading them makes the host wait.

    It is inherited beside one of TRL's trainers and before it, so that `super()` here reaches that one's methods.
    """

    _metrics: Any  # TRL's: by "train" and "eval", and by name, a list with an entry for each batch
    _unread: dict[str, list[tuple[str, Tensor]]]  # by mode, what has been noted since the last log

    def _note(self, mode: str, metrics: Mapping[str, Tensor]) -> None:
        """Add the metrics of a batch, scalars, to those of the mode (`"train"` or `"eval"`)."""
        self._unread[mode] += [(name, value.detach()) for name, value in metrics.items()]

    def _read_metrics(self) -> None:
        """Hand what has been noted to TRL, which averages and logs it."""
        for mode, unread in self._unread.items():
            for name, value in _read(unread):
                self._metrics[mode][name].append(value)
            unread.clear()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self._read_metrics()
        super().log(logs, start_time)


class EvaluationMetrics(MetricsOnDevice):
    """
    A trainer of pairs that logs the metrics of an evaluation under its prefix, over all of its pairs at once.

    It is inherited beside one of TRL's trainers and before it, so that `super()` here reaches that one's methods. TRL
    (1.12 to 1.16) averages its metrics over batches, and logs them as `eval_...` also where transformers has another
    prefix: that of one set among several (`eval_NAME`), or the caller's `metric_key_prefix`.
    """

    model: Any
    _reward_model: Any
    # Figures of the pairs of an evaluation, for when it is logged
    _evaluated: list[Tensor]
    _metric_key_prefix = "eval"

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        # `predict` leaves what is not logged.
        self._evaluated = []
        self._metrics["eval"].clear()
        self._metric_key_prefix = kwargs.get("metric_key_prefix", "eval")
        return super().evaluation_loop(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self._read_metrics()
        batches = self._metrics["eval"]
        if batches and not self.model.training:
            metrics = {name: sum(values) / len(values) for name, values in batches.items()}
            # A mean of batches' means would depend on the sizes of the batches.
            figures = torch.cat(self._evaluated)
            metrics |= as_numbers(summarize_all(figures, [OVERALL, *self._reward_model.attributes]))
            metrics |= summarize_rewards(figures[:, :FIGURES])
            logs.update({f"{self._metric_key_prefix}_{name}": value for name, value in metrics.items()})
            batches.clear()
        super().log(logs, start_time)
