"""What will training need? `disco-trl estimate`: parameters and memory of a run, before anyone rents a machine.

The model is built from its config alone, and `disco_trl.memory` runs a step of it on tensors without data. What
several devices share by ZeRO or FSDP is arithmetic on top of that.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import AutoConfig

from .memory import DTYPES, METHODS, OPTIMIZERS, DatalessTrainer, Settings


SHARDINGS = ("none", "zero2", "zero3", "fsdp")
LABELS = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}
MOST_PAIRS = 4096  # in a batch; nobody looks for a larger one
GIB = 2**30


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


# The command


def table(estimates: dict[str, Estimate], memory: int | None) -> str:
    """A Markdown table, a row for each way of training; memory in GiB."""
    head = ["", "parameters", "trained", "weights", "gradients", "optimizer", "activations", "total, GiB"]
    if memory is not None:
        head += [f"fits {memory / GIB:g} GiB", "largest batch"]
    rows = [head]
    for method, found in estimates.items():
        parts = (found.weights, found.gradients, found.optimizer, found.activations, found.total)
        row = [LABELS[method], f"{found.parameters:,}", f"{found.trained:,}", *(f"{part / GIB:.2f}" for part in parts)]
        if memory is not None:
            row += ["yes" if found.fits else "no", str(found.largest_batch)]
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width if place == 0 else "-" * (width - 1) + ":" for place, width in enumerate(widths)])
    return "\n".join(
        "| " + " | ".join(cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in line) + " |"
        for line in (enumerate(zip(row, widths, strict=True)) for row in rows)
    )


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="disco-trl estimate",
        description="Parameters and memory of training a reward model: in full, with LoRA, and with QLoRA (nf4, "
        "double quantization). Only the model's config is read.",
        allow_abbrev=False,
    )
    parser.add_argument("model", help="local folder or Hub id")
    parser.add_argument("--batch-size", type=int, default=8, help="pairs on each device (default: %(default)s)")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a side of a pair (default: %(default)s)")
    parser.add_argument(
        "--prompt-share",
        type=float,
        default=0.0,
        help="part of a side that both sides share, which prefix sharing computes once (default: %(default)s)",
    )
    parser.add_argument("--no-prefix-sharing", action="store_true", help="padded batches, as TRL's")
    parser.add_argument("--lora-r", type=int, default=16, help="rank of the adapters (default: %(default)s)")
    parser.add_argument(
        "--lora-target-modules",
        nargs="+",
        default=["all-linear"],
        help="modules that get one, by name (default: all-linear)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="mixed",
        help="mixed: weights in float32, computing in bfloat16, what TRL's defaults come to; bfloat16: weights too; "
        "float32: all (default: %(default)s)",
    )
    parser.add_argument(
        "--optim", choices=OPTIMIZERS, default=OPTIMIZERS[0], help="as in transformers (default: %(default)s)"
    )
    parser.add_argument(
        "--gradient-checkpointing",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="forget activations and compute them again (default: on, as TRL's)",
    )
    parser.add_argument("--processes", type=int, default=1, help="devices (default: %(default)s)")
    parser.add_argument(
        "--sharding", choices=SHARDINGS, default="none", help="what the devices share (default: %(default)s)"
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="kind of device (default: %(default)s)"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="(default: all)")
    parser.add_argument(
        "--memory", type=float, metavar="GIB", help="of a device: say what fits, and the largest batch"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, memory in bytes")
    return parser


def main(argv: list[str]) -> None:
    """Run `disco-trl estimate` with these arguments."""
    parser = make_parser()
    args = parser.parse_args(argv)
    for name in ("batch_size", "length", "lora_r", "processes"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    if not 0 <= args.prompt_share <= 1:
        parser.error(f"--prompt-share {args.prompt_share} must be between 0 and 1")
    if args.memory is not None and not args.memory > 0:
        parser.error(f"--memory {args.memory} must be positive")
    targets = args.lora_target_modules
    settings = Settings(
        length=args.length,
        prompt_share=args.prompt_share,
        prefix_sharing=not args.no_prefix_sharing,
        dtype=args.dtype,
        optim=args.optim,
        gradient_checkpointing=args.gradient_checkpointing,
        lora_r=args.lora_r,
        lora_targets="all-linear" if targets == ["all-linear"] else tuple(targets),
        device=args.device,
    )
    memory = None if args.memory is None else round(args.memory * GIB)
    try:
        config = AutoConfig.from_pretrained(args.model, trust_remote_code=False)
        estimates = {
            method: estimate(
                config, args.model, method, settings, args.batch_size, args.processes, args.sharding, memory
            )
            for method in args.methods
        }
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"{parser.prog}: {error}")
    if args.json:
        result = {"settings": vars(args), "estimates": {name: asdict(found) for name, found in estimates.items()}}
        print(json.dumps(result, indent=2))
        return
    refusal = next(iter(estimates.values())).prefix_sharing_refusal
    layout = "prefixes shared" if refusal is None else "padded"
    print(
        f"{args.model}, on each of {args.processes} {args.device}: {args.batch_size} pairs, {args.length} tokens a "
        f"side, {layout}, {args.dtype}, {args.optim}"
    )
    if refusal is not None and settings.prefix_sharing:
        print(f"Without prefix sharing: {refusal}.")
    print(f"\n{table(estimates, memory)}")
    if args.processes == 1:
        print("\nGradients come while activations go, so the total is less than the sum.")
    if args.device == "cuda":
        print("CUDA itself takes about half a GiB more, and the allocator's gaps some of the rest.")
