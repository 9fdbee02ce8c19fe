"""Callbacks of the trainers: a guard against numbers that are not finite, epochs of samplers, settings of adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ..models.adapters import save_adapter_settings
from ..models.heads import DiscoHead


class FiniteGuard(TrainerCallback):
    """
    Stops a run whose numbers are not finite before its weights are touched.

    It raises `FloatingPointError` where the loss of a batch, or a gradient before an optimizer step, is not finite.
    The message names the rows of the step. The device is asked once for each optimizer step, because the host waits
    for the answer.

    Args:
        scales_gradients (`Callable[[], bool]`):
            Whether a gradient scaler is at work, as in fp16. It skips a step that overflows and lowers its factor,
            which is ordinary, so gradients are not looked at then.
        steps_in_backward (`Callable[[], bool]`, *optional*):
            Whether the optimizer steps as part of the backward pass, as DeepSpeed's does. The loss is then looked at
            before it.

    Attributes:
        rows (`list[torch.Tensor]`):
            Rows of the training dataset in the batches since the last optimizer step.
        losses (`list[torch.Tensor]`):
            Losses of these batches.
    """

    def __init__(self, scales_gradients: Callable[[], bool], steps_in_backward: Callable[[], bool] = lambda: False):
        self.scales_gradients, self.steps_in_backward = scales_gradients, steps_in_backward
        self.rows: list[Tensor] = []
        self.losses: list[Tensor] = []

    def check_loss(self, loss: Tensor, rows: Tensor | None, args: TrainingArguments, state: TrainerState) -> Tensor:
        """
        Note the loss of a training batch, to be checked before the optimizer steps.

        Args:
            loss (`torch.Tensor`):
                Loss of the batch, a scalar.
            rows (`torch.Tensor` of shape `(B,)`, *optional*):
                Rows of the training dataset in the batch. A data collator of the user's own may carry none.
            args ([`~transformers.TrainingArguments`]):
                Arguments of the run, for the message.
            state ([`~transformers.TrainerState`]):
                State of the run, for the message.

        Returns:
            `torch.BoolTensor`: Whether the loss is finite, a scalar.

        Raises:
            `FloatingPointError`: If the loss is not finite, and the backward pass would touch the weights.
        """
        self.rows += [] if rows is None else [rows]
        self.losses.append(loss.detach())
        is_finite = torch.isfinite(self.losses[-1])
        if self.steps_in_backward() and not is_finite:
            raise self._error_of_loss(args, state)
        return is_finite

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Check the losses, and the gradients, which by now have been clipped."""
        checked = [*self.losses]
        if not self.scales_gradients():
            # Clipping has spread a NaN to every gradient, and an infinite norm has made NaNs of infinite elements: one
            # norm over all of them shows either, at the cost of reading them once.
            gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
            checked += [torch.nn.utils.get_total_norm(gradients)] if gradients else []
        if checked and not torch.stack([value.to(checked[0]) for value in checked]).isfinite().all():
            if any(not torch.isfinite(loss) for loss in self.losses):
                raise self._error_of_loss(args, state)
            raise self._error("a gradient is not finite", args, state)
        self.rows.clear()
        self.losses.clear()

    def _error_of_loss(self, args: Any, state: Any) -> FloatingPointError:
        (value, *_) = (loss.item() for loss in self.losses if not torch.isfinite(loss))
        return self._error(f"the loss is {value}", args, state)

    def _error(self, what: str, args: Any, state: Any) -> FloatingPointError:
        numbers = [number for rows in self.rows for number in rows.tolist()]
        rows = ", ".join(map(str, numbers)) or "unknown (a data collator of your own carries no row_index)"
        folder = Path(str(args.output_dir))
        checkpoint = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        return FloatingPointError(
            f"step {state.global_step + 1}: {what}, so training stops before the weights are touched. "
            f"Rows of the training dataset in this step: {rows}. Last good checkpoint: "
            f"{checkpoint or 'none saved yet'}. Look at these rows, then lower learning_rate or max_grad_norm, or "
            "train in bf16 instead of fp16."
        )


class FoldAttributes(TrainerCallback):
    """
    Has the location row of the overall reward follow the rows of the attributes that it is made of.

    It does so after each optimizer step, so that whatever is saved, evaluated or handed over is up to date.

    Args:
        head ([`~disco_trl.models.heads.DiscoHead`]):
            Head of the model.
    """

    def __init__(self, head: DiscoHead):
        self.head = head

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Fold the rows into one."""
        self.head.fold()


class SamplerEpoch(TrainerCallback):
    """
    Sets the epoch of the training dataloader's sampler.

    The Trainer does so too, but does not reach it through every wrapper. Where several processes resume in the middle
    of an epoch, accelerate (1.10 to 1.15) passes the epoch to its own samplers only, and another one would repeat the
    order of the first epoch. A batch sampler of several processes is never reached.
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
    Writes an adapter's settings to the folder that is pushed to the Hub.

    While training goes on, transformers copies the files of a checkpoint's model there by a list of names, and the
    settings file of a disco adapter is not on that list.
    """

    def on_push_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Write the settings before the files are uploaded."""
        if args.should_save and is_peft_model(model):
            save_adapter_settings(model, Path(args.output_dir))
