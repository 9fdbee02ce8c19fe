"""
A search for hyperparameters through the Trainer's own hook (Optuna, or another of its backends).

transformers builds a new model for each trial by `model_init`, which TRL's trainer does not take: a model has been
loaded, wrapped and given a head by then. Here each trial begins with the same model and the weights that it had.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .calibration import HeadMemory


class Beginning:
    """
    What a trainer's model is now, to begin with again: a `model_init`.

    Weights that are not trained are taken for granted; of the others there is a copy in the CPU's memory.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.model = trainer.model  # between trials the trainer has none
        self._copies = {name: tensor.detach().cpu().clone() for name, tensor in self._tensors().items()}

    def _tensors(self) -> dict[str, torch.Tensor]:
        """All that training changes: parameters, and what the heads know of the training rows."""
        heads = {
            id(tensor) for _, head in self.trainer._reward_model.named_reward_heads() for tensor in head.buffers()
        }
        tensors = {name: tensor for name, tensor in self.model.named_parameters() if tensor.requires_grad}
        return tensors | {name: tensor for name, tensor in self.model.named_buffers() if id(tensor) in heads}

    @torch.no_grad()
    def __call__(self) -> torch.nn.Module:
        """Put the weights back, and return the model."""
        for name, tensor in self._tensors().items():
            tensor.copy_(self._copies[name])
        if self.trainer._memory is not None:
            self.trainer._memory = HeadMemory()
        # Without what accelerate has put around it for the last trial
        return self.trainer.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)


def space_around(learning_rate: float, batch_size: int) -> Callable[[Any], dict[str, Any]]:
    """What to try if nobody says otherwise: learning rates from a quarter to four times this one, on a logarithmic
    scale, and batches of half, once and twice as many pairs. As an `hp_space` for Optuna."""

    def space(trial: Any) -> dict[str, Any]:
        sizes = sorted({max(1, batch_size // 2), batch_size, 2 * batch_size})
        return {
            "learning_rate": trial.suggest_float("learning_rate", learning_rate / 4, learning_rate * 4, log=True),
            "per_device_train_batch_size": trial.suggest_categorical("per_device_train_batch_size", sizes),
        }

    return space
