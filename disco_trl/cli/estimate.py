"""`disco-trl estimate`: parameters and memory of a training run, before anyone rents a machine."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from transformers import AutoConfig

from ..trainer.dataless_model import DTYPES, METHODS, OPTIMIZERS, Settings
from ..trainer.estimate import SHARDINGS, Estimate, estimate


LABELS = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}
GIB = 2**30


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
