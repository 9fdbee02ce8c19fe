"""
Parameters and memory of a training run, for `disco-trl estimate`.

The model is built from its configuration alone, and `disco_trl.trainer.dataless_step` measures a step of it on tensors
without data. For several devices, the share of each under DistributedDataParallel, ZeRO or FSDP is calculated from
these measurements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from .dataless_model import METHODS, Settings, check_choice
from .dataless_step import DatalessTrainer


SHARDINGS = ("none", "zero2", "zero3", "fsdp")
# Upper limit of the search for the largest batch. Batches in use are far smaller.
MOST_PAIRS = 4096


@dataclass(frozen=True)
class Estimate:
    """
    What a training run needs. Memory is in bytes on each device.

    Args:
        parameters (`int`):
            Number of parameters of the whole model. A packed weight counts as the number of 4-bit weights in it.
        trained (`int`):
            Number of parameters that are trained.
        weights (`int`):
            Bytes of weights and buffers, including the scales of 4-bit weights.
        gradients (`int`):
            Bytes of the gradients of all weights, including the buckets in which DistributedDataParallel reduces them.
        optimizer (`int`):
            Bytes of the optimizer's states, including ZeRO's float32 copy of weights that are kept in bfloat16.
        activations (`int`):
            Largest number of bytes at one time that a forward and backward pass needs beyond weights and their
            gradients: tensors saved for the backward pass, recomputed activations, temporary tensors, and weights
            gathered from other devices.
        total (`int`):
            Largest number of bytes at one time. With `sharding="none"` it is less than the sum of the parts, because
            gradients are created while activations are freed.
        prefix_sharing_refusal (`str`, *optional*):
            Why batches are padded. `None` if prefixes are shared.
        fits (`bool`, *optional*, defaults to `None`):
            Whether `total` is at most the memory of the device. `None` if that is not known.
        largest_batch (`int`, *optional*, defaults to `None`):
            Largest number of pairs that fit, 0 if one pair does not. `None` if the memory of the device is not known.
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
    Estimate what a training run needs on each device.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            Configuration of the language model. It is not modified.
        path (`str`):
            Where the configuration comes from, for error messages.
        method (`str`):
            `"full"`, `"lora"` or `"qlora"`.
        settings ([`~disco_trl.trainer.dataless_model.Settings`]):
            Settings of the training run.
        batch_size (`int`, *optional*, defaults to `8`):
            Number of pairs on each device.
        processes (`int`, *optional*, defaults to `1`):
            Number of devices.
        sharding (`str`, *optional*, defaults to `"none"`):
            What is divided among the devices: nothing (`"none"`), gradients and optimizer states (`"zero2"`), or the
            weights as well (`"zero3"` and `"fsdp"`).
        memory (`int`, *optional*, defaults to `None`):
            Bytes of a device's memory. If given, the estimate says what fits.

    Returns:
        [`Estimate`]: Parameters and memory.

    Raises:
        `ValueError`: If the architecture cannot be made a reward model, `settings.length` exceeds the model's maximum
            length, or a step depends on the values of tensors.
        `ImportError`: If the optimizer is one of bitsandbytes, and bitsandbytes is not installed.
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
    """
    Settings of the step that a device runs on sharded weights.

    Without sharding, autocast casts float32 weights to bfloat16 for each product. ZeRO and FSDP in mixed precision
    compute with bfloat16 weights, which no autocast has to copy.
    """
    if sharding == "none" or settings.dtype == "float32":
        return settings
    return replace(settings, dtype="bfloat16")


class _Device:
    """
    Memory of one device of a training run, for batches of different sizes.

    Args:
        trainer ([`~disco_trl.trainer.dataless_step.DatalessTrainer`]):
            Runs the steps, with the settings of `_as_sharded`.
        settings ([`~disco_trl.trainer.dataless_model.Settings`]):
            Settings of the training run.
        processes (`int`):
            Number of devices.
        sharding (`str`):
            What is divided among them, one of `SHARDINGS`.
    """

    def __init__(self, trainer: DatalessTrainer, settings: Settings, processes: int, sharding: str):
        self.trainer, self.processes, self.sharding = trainer, processes, sharding
        self.weights = trainer.weight_bytes
        # DeepSpeed keeps a float32 copy of the bfloat16 weights that it trains, and float32 states of them. FSDP in
        # mixed precision stores float32 weights and casts them to bfloat16 when it gathers them. In both cases the
        # optimizer updates float32 weights.
        has_copy = settings.dtype != "float32" and sharding in ("zero2", "zero3")
        is_cast = settings.dtype == "mixed" and sharding == "fsdp"
        self.states, self.update = trainer.optimizer_bytes(torch.float32 if has_copy or is_cast else None)
        self.copies = 4 * trainer.trained if has_copy else 0
        self.is_cast = is_cast
        self._found: dict[int, Estimate] = {}

    def estimate(self, batch_size: int) -> Estimate:
        """
        Estimate the memory of a batch.

        Estimates are kept, because the search for the largest batch may ask for a size again.

        Args:
            batch_size (`int`):
                Number of pairs on this device.

        Returns:
            [`Estimate`]: Parameters and memory, without `fits` and `largest_batch`.
        """
        if batch_size not in self._found:
            self._found[batch_size] = self._estimate(batch_size)
        return self._found[batch_size]

    def _estimate(self, batch_size: int) -> Estimate:
        trainer, share = self.trainer, 1 / self.processes
        step = trainer.step(batch_size)
        weights, gradients, optimizer, activations = self.weights, step.gradients, self.states, step.activations
        if self.sharding == "none":
            # DistributedDataParallel copies gradients into buckets to reduce them. All buckets together are as large
            # as the gradients.
            buckets = gradients if self.processes > 1 else 0
            # The peak is either in the backward pass or in the update, when the activations are gone.
            total = weights + optimizer + buckets + max(step.peak, gradients + self.update)
            gradients += buckets
        else:
            root, block = trainer.unit_bytes()
            # The step was measured with bfloat16 weights, which FSDP gathers. It stores float32 weights and gradients.
            if self.is_cast:
                weights, gradients = trainer.float32_weight_bytes, 4 * trainer.trained
            optimizer = round((optimizer + self.copies) * share)
            gradients = round(gradients * share)
            if self.sharding != "zero2":
                weights = round(weights * share)
                # These are whole on each device at one time: embedding and head, the layer at work, the next layer,
                # which is gathered ahead, and the gradient of a layer before it is reduced (negligible with LoRA).
                activations += root + 2 * block + (block if trainer.is_full else 0)
            # How gradients are created while activations are freed is not known here. The sum is an upper bound.
            total = weights + optimizer + gradients + max(activations, round(self.update * share))
        return Estimate(
            trainer.parameters, trainer.trained, weights, gradients, optimizer, activations, total, trainer.refusal
        )


def largest_batch(total: Callable[[int], int], memory: int) -> int:
    """
    Find the largest batch that fits, with few evaluations of its memory.

    The memory of a step is the maximum, over the moments of the step, of sums that are linear in the batch size. So it
    is convex and increasing, and the chord between a batch that fits and one that does not lies above it: where the
    chord reaches `memory`, a batch still fits.

    Args:
        total (`Callable[[int], int]`):
            Bytes that a batch of so many pairs needs, convex and increasing.
        memory (`int`):
            Bytes of a device's memory.

    Returns:
        `int`: Largest number of pairs, up to `MOST_PAIRS`, whose `total` is at most `memory`. 0 if one pair does not
        fit.
    """
    # The largest batch known to fit and the smallest known not to fit, with their bytes. `excess` is 0 as long as no
    # batch is known not to fit.
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
            # Nothing has exceeded the memory yet, so follow the last slope. As the slope only increases, that leads to
            # or beyond the largest batch, and the chord can take over.
            step = int((memory - needed) / slope) + 1 if slope else fits
            pairs = fits + min(max(step, 1), 8 * fits, MOST_PAIRS - fits)
    return fits
