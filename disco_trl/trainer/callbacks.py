"""What stops a run whose numbers are not finite before its weights are touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from ..models.adapters import save_adapter_settings


class FiniteGuard(TrainerCallback):
    """
    Raises `FloatingPointError` where the loss of a batch of a `DiscoRewardTrainer`, or a gradient before an optimizer
    step, is not finite; the message names the rows of the step.

    Attributes:
        rows: of the batches since the last optimizer step.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.rows: list[int] = []

    def check_loss(self, loss: Tensor, rows: Tensor | None) -> None:
        """Look at the loss of a training batch of these rows of the dataset; None if its collator carries none."""
        self.rows += [] if rows is None else rows.tolist()
        if not torch.isfinite(loss):
            raise self._error(f"the loss is {loss.item()}")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # In fp16 the scaler skips a step that overflows and lowers its factor: ordinary, and its own business.
        if self.trainer.accelerator.scaler is None:
            gradients = [weight.grad for weight in self.trainer.model.parameters() if weight.grad is not None]
            # Clipping has spread a NaN to every gradient, and an infinite norm has made NaNs of infinite elements: one
            # norm over all of them tells, at the cost of reading them once.
            if gradients and not torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
                raise self._error("a gradient is not finite")
        self.rows.clear()

    def _error(self, what: str) -> FloatingPointError:
        rows = ", ".join(map(str, self.rows)) or "unknown (a data collator of your own carries no row_index)"
        folder = Path(str(self.trainer.args.output_dir))
        checkpoint = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        return FloatingPointError(
            f"step {self.trainer.state.global_step + 1}: {what}, so training stops before the weights are touched. "
            f"Rows of the training dataset in this step: {rows}. Last good checkpoint: "
            f"{checkpoint or 'none saved yet'}. Look at these rows, then lower learning_rate or max_grad_norm, or "
            "train in bf16 instead of fp16."
        )


class SamplerEpoch(TrainerCallback):
    """
    Tells the sampler of the training dataloader which epoch begins.

    The Trainer does so too, but not through every wrapper. Where several processes resume in the middle of an epoch, a
    sampler that is not accelerate's own hears nothing (accelerate 1.10 to 1.15) and would give the order of the first
    epoch; a batch sampler of several processes never does.
    """

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        """Find the sampler under its wrappers and set its epoch."""
        sampler = train_dataloader
        while hasattr(sampler, "batch_sampler"):
            sampler = sampler.batch_sampler
        sampler = getattr(sampler, "sampler", sampler)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(int(state.epoch or 0))


class PushWithSettings(TrainerCallback):
    """
    Puts an adapter's settings where a push takes its files from. While training goes on transformers copies there, by
    a list of names, what belongs to a checkpoint's model, and the list does not have them.
    """

    def on_push_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if args.should_save and is_peft_model(model):
            save_adapter_settings(model, Path(args.output_dir))
