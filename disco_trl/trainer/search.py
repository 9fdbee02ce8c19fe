"""
A search for hyperparameters through the Trainer's own hook (Optuna, or another of its backends).

transformers builds a new model for each trial by `model_init`, which TRL's trainer does not take: a model has been
loaded, wrapped and given a head by then. Here each trial begins with the same model and the weights that it had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from ..models.modeling import DiscoRewardModel
from .predictions import PredictionMemory


class Beginning:
    """
    A `model_init` that returns a model to the state that it is in now.

    Weights that are not trained are not copied. Of the others there is a copy in the CPU's memory.

    Args:
        model ([`~torch.nn.Module`]):
            Model that is trained. Between trials the trainer has none, so it is kept here.
        heads (`Iterable[nn.Module]`):
            Reward heads of the model, whose buffers training changes too: they describe the training rows.
        memory ([`PredictionMemory`], *optional*):
            Predictions of the run, which each trial begins without.
        unwrap (`Callable[[nn.Module], nn.Module]`):
            Function that takes off what accelerate has put around the model for the last trial.
    """

    def __init__(
        self,
        model: nn.Module,
        heads: Iterable[nn.Module],
        memory: PredictionMemory | None,
        unwrap: Callable[[nn.Module], nn.Module],
    ):
        self.model = model
        self.heads = list(heads)
        self.memory = memory
        self.unwrap = unwrap
        self._copies = {name: tensor.detach().cpu().clone() for name, tensor in self._tensors().items()}

    def _tensors(self) -> dict[str, torch.Tensor]:
        """All that training changes: trained parameters, and the buffers of the heads."""
        of_heads = {id(tensor) for head in self.heads for tensor in head.buffers()}
        tensors = {name: tensor for name, tensor in self.model.named_parameters() if tensor.requires_grad}
        return tensors | {name: tensor for name, tensor in self.model.named_buffers() if id(tensor) in of_heads}

    @torch.no_grad()
    def __call__(self) -> nn.Module:
        """Put the weights back, and return the model."""
        for name, tensor in self._tensors().items():
            tensor.copy_(self._copies[name])
        if self.memory is not None:
            self.memory.clear()
        return self.unwrap(self.model)


def mean_nll(metrics: dict[str, float]) -> float:
    """
    The `compute_objective` by default: `eval_nll`, or the mean of `eval_NAME_nll` over several eval sets.

    Args:
        metrics (`dict[str, float]`):
            Metrics of an evaluation.

    Returns:
        `float`: Mean negative log-likelihood of a vote, in nats.
    """
    of_sets = [value for name, value in metrics.items() if name.startswith("eval_") and name.endswith("nll")]
    return sum(of_sets) / len(of_sets)


def space_around(learning_rate: float, batch_size: int) -> Callable[[Any], dict[str, Any]]:
    """
    Make the `hp_space` that is searched by default, for Optuna.

    Args:
        learning_rate (`float`):
            Learning rate in the middle: rates from a quarter to four times this one are tried, on a logarithmic scale.
        batch_size (`int`):
            Number of pairs in a batch of a process: half of it, itself and twice it are tried.

    Returns:
        `Callable[[optuna.Trial], dict[str, Any]]`: The settings of a trial.
    """

    def space(trial: Any) -> dict[str, Any]:
        sizes = sorted({max(1, batch_size // 2), batch_size, 2 * batch_size})
        return {
            "learning_rate": trial.suggest_float("learning_rate", learning_rate / 4, learning_rate * 4, log=True),
            "per_device_train_batch_size": trial.suggest_categorical("per_device_train_batch_size", sizes),
        }

    return space


class SearchFromHere(Trainer):
    """
    A trainer that searches from the weights that its model has.

    It is inherited beside one of TRL's trainers and before it, so that `super()` here reaches that one's methods.
    """

    model: Any
    _reward_model: DiscoRewardModel
    _memory: PredictionMemory | None

    def hyperparameter_search(  # type: ignore[override]  # the rest goes through `kwargs`
        self,
        hp_space: Callable[[Any], dict[str, Any]] | None = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Launches a hyperparameter search, as in transformers, but without a `model_init`.

        Each trial begins with the weights that the model has now. After the search it has them again.

        Args:
            hp_space (`Callable[[optuna.Trial], dict[str, Any]]`, *optional*):
                Function that defines the search space. Defaults to learning rates and batch sizes around those in
                `args`; see [`~disco_trl.trainer.search.space_around`].
            compute_objective (`Callable[[dict[str, float]], float]`, *optional*):
                Function that computes the objective from the metrics of an evaluation. Defaults to `eval_nll`, or its
                mean over several eval sets.
            **kwargs:
                `n_trials`, `direction`, `backend`, `hp_name`, and arguments of the backend.
        """
        heads = [head for _, head in self._reward_model.named_reward_heads()]
        beginning = Beginning(
            self.model,
            heads,
            self._memory,
            lambda model: self.accelerator.unwrap_model(model, keep_fp32_wrapper=False),
        )
        self.model_init = beginning  # type: ignore[assignment]
        try:
            return super().hyperparameter_search(
                hp_space or space_around(self.args.learning_rate, self.args.per_device_train_batch_size),
                compute_objective or mean_nll,
                **kwargs,
            )
        finally:
            self.model_init = None  # type: ignore[assignment]
            self.model = self.model_wrapped = beginning()
