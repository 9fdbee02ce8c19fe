"""What will training need? `disco-trl estimate`: parameters and memory of a run, before anyone rents a machine.

The model is built from its config alone, and `disco_trl.trainer.memory` runs a step of it on tensors without data.
What several devices share by ZeRO or FSDP is arithmetic on top of that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from .memory import METHODS, DatalessTrainer, Settings, check_choice


SHARDINGS = ("none", "zero2", "zero3", "fsdp")
MOST_PAIRS = 4096  # in a batch; nobody looks for a larger one


@dataclass(frozen=True)
class Estimate:
    """
    What one way of training needs on each device. Memory is in bytes.

    Attributes:
        parameters, trained: how many, of the whole model. A weight in 4 bits counts as what it stands for.
        weights: with buffers, and with scales of weights in 4 bits.
        gradients: when all are there; with the buckets in which several processes add them up.
        optimizer: its states, and ZeRO's float32 copy of weights that are kept in bfloat16.
        activations: the most at one time of what else there is in a forward and backward pass: what is saved for the
            backward pass, what is computed again, buffers that come and go, and weights gathered from other devices.
        total: the most at one time. On one device less than the sum, as gradients come while activations go.
        fits, largest_batch: in the memory given, this batch, and the largest one, in pairs; 0 if none does.
    """

    parameters: int
    trained: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    total: int
    prefix_sharing_refusal: str | None
    fits: bool | None = None
    largest_batch: int | None = None


def estimate(
    config: Any,
    path: str,
    method: str,
    settings: Settings,
    batch_size: int = 8,
    processes: int = 1,
    sharding: str = "none",
    memory: int | None = None,
) -> Estimate:
    """
    What a way of training will need on each device.

    Args:
        config: of the language model.
        path: where it comes from, for messages.
        method: `"full"`, `"lora"` or `"qlora"`.
        settings: see there.
        batch_size: pairs on each device.
        processes: devices.
        sharding: what they share: `"none"` (each has everything), `"zero2"` (gradients and optimizer states),
            `"zero3"` or `"fsdp"` (weights as well).
        memory: bytes of a device, to say what fits.

    Raises:
        ValueError: the model cannot be trained so.
    """
    check_choice("method", method, METHODS)
    check_choice("sharding", sharding, SHARDINGS)
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest and settings.length > longest:
        raise ValueError(f"{path} reads at most {longest} tokens, and --length is {settings.length}")
    device = _Device(
        DatalessTrainer(config, path, method, _as_sharded(settings, sharding)), settings, processes, sharding
    )
    found = device.estimate(batch_size)
    if memory is None:
        return found
    largest = largest_batch(lambda pairs: device.estimate(pairs).total, memory)
    return replace(found, fits=found.total <= memory, largest_batch=largest)


def _as_sharded(settings: Settings, sharding: str) -> Settings:
    """ZeRO and FSDP compute with weights in bfloat16 where one device would cast them under autocast."""
    if sharding == "none" or settings.dtype == "float32":
        return settings
    return replace(settings, dtype="bfloat16")


class _Device:
    """One of several devices, and its part of a run."""

    def __init__(self, trainer: DatalessTrainer, settings: Settings, processes: int, sharding: str):
        self.trainer, self.processes, self.sharding = trainer, processes, sharding
        self.weights = trainer.weight_bytes
        # DeepSpeed keeps a float32 copy of what it trains in bfloat16, and float32 states; FSDP in mixed precision has
        # float32 weights and gathers bfloat16 ones.
        has_copy = settings.dtype != "float32" and sharding in ("zero2", "zero3")
        is_cast = settings.dtype == "mixed" and sharding == "fsdp"
        self.states, self.update = trainer.optimizer_bytes(torch.float32 if has_copy or is_cast else None)
        self.copies = 4 * trainer.trained if has_copy else 0
        self.is_cast = is_cast
        self._found: dict[int, Estimate] = {}

    def estimate(self, batch_size: int) -> Estimate:
        """What a batch of so many pairs needs."""
        if batch_size not in self._found:
            self._found[batch_size] = self._estimate(batch_size)
        return self._found[batch_size]

    def _estimate(self, batch_size: int) -> Estimate:
        trainer, share = self.trainer, 1 / self.processes
        step = trainer.step(batch_size)
        weights, gradients, optimizer, activations = self.weights, step.gradients, self.states, step.activations
        if self.sharding == "none":
            # DistributedDataParallel adds gradients up in buckets that hold all of them once more.
            buckets = gradients if self.processes > 1 else 0
            total = weights + optimizer + buckets + max(step.peak, gradients + self.update)
            gradients += buckets
        else:
            root, block = trainer.unit_bytes()
            if self.is_cast:
                weights, gradients = trainer.float32_weight_bytes, 4 * trainer.trained
            optimizer = round((optimizer + self.copies) * share)
            gradients = round(gradients * share)
            if self.sharding != "zero2":
                weights = round(weights * share)
                # The block at work and the next one are whole, so are embedding and head, and one block's gradient.
                activations += root + 2 * block + (block if trainer.is_full else 0)
            total = weights + optimizer + gradients + max(activations, round(self.update * share))
        return Estimate(
            trainer.parameters, trainer.trained, weights, gradients, optimizer, activations, total, trainer.refusal
        )


def largest_batch(total: Callable[[int], int], memory: int) -> int:
    """
    The largest number of pairs whose `total` is at most `memory`, 0 if that of one pair is not.

    A step's memory is the largest of sums that grow in proportion to the batch, each at a moment of its own. So it
    grows and bends upwards, and a chord between one batch that fits and one that does not lies above it: where the
    chord meets the memory, a batch fits.
    """
    fits, needed = 0, 0
    too_many, excess = MOST_PAIRS + 1, 0
    pairs = 1
    while fits < MOST_PAIRS and too_many - fits > 1:
        found = total(pairs)
        if found <= memory:
            slope = (found - needed) / (pairs - fits) if fits else 0
            fits, needed = pairs, found
        else:
            too_many, excess = pairs, found
        if excess:
            chord = (excess - needed) / (too_many - fits) if fits else 0
            step = int((memory - needed) / chord) if chord else (too_many - fits) // 2
            pairs = fits + min(max(step, 1), too_many - fits - 1)
        else:
            # As far as the last slope would take it, which is too far rather than not far enough
            step = int((memory - needed) / slope) + 1 if slope else fits
            pairs = fits + min(max(step, 1), 8 * fits, MOST_PAIRS - fits)
    return fits
