"""Compare the speed of training, scoring and data preparation with TRL, and measure the cost of the distribution.

Run as:

    python -m benchmarks.speed train --dataset path/to/pairs.jsonl.gz --max-length 512     # 15 minutes on 2 cores
    python -m benchmarks.speed train --sweep                                              # 15 minutes
    python -m benchmarks.speed dpo --dataset path/to/pairs.jsonl.gz --max-length 512 --lora
    python -m benchmarks.speed dpo --sweep --lora
    python -m benchmarks.speed score --model path/to/disco-model --dataset path/to/pairs.jsonl.gz
    python -m benchmarks.speed prepare --dataset path/to/pairs.jsonl.gz
    python -m benchmarks.speed head

Model and dataset are Hub ids or local paths. The dataset contains pairs of any type that TRL's `RewardTrainer`
accepts. Without `--model`, a small chat LM is downloaded from the package index. Each command prints a table and
writes it to `--out` as Markdown, with a JSON file of all figures and a chart.

`train` runs the `train()` of the real trainers, all in one process, each in a thread that stops after every step until
its next turn. Other load on the machine therefore affects all of them alike. A step is the whole loop: collating,
forward, backward, optimizer and logging. Before the timed rounds each trainer goes through all its batches once,
because on a CPU a kernel is compiled for each new shape of a matrix product; the JSON file includes the rate of that
round. Batches are those that the trainers would form from the whole dataset. The few that are timed are chosen so that
their mean numbers of tokens equal the epoch's. Peak memory is measured first, in a process for each trainer.

With a GPU (or `--peak-flops`) the table includes the model FLOP utilisation. Useful floating-point operations are
counted for unique tokens only: 6 per trained weight (2 forward, 2 for the gradient of the activations, 2 for the
weight's own), 4 per frozen weight, as most are under LoRA; none for embeddings; and in attention 12 × layers × width
of all heads × keys that a token attends to. Recomputation by activation checkpointing is not useful and does not
count.
"""

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from disco_trl._version import versions_of

from .downloads import small_chat_lm
from .speed_counts import peak_flops
from .speed_dpo import VARIANTS as DPO_VARIANTS
from .speed_dpo import run_dpo, sweep_dpo
from .speed_parts import run_head, run_prepare, run_score
from .speed_report import PICTURES, TABLES, plot
from .speed_train import VARIANTS, quieten, run, sweep


KINDS_OF_SWEEP = {"train": "sweep", "dpo": "dpo-sweep"}
DEFAULT_STEPS = {"train": 3, "dpo": 2}


def make_parser() -> argparse.ArgumentParser:
    """Creates the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--model", help="Hub id or path of the model (default: a small chat LM from the package index)."
    )
    common.add_argument(
        "--out", type=Path, default=Path("runs/benchmark"), help="Folder for the figures (default: %(default)s)."
    )
    common.add_argument(
        "--rounds",
        type=int,
        default=3,
        help="Number of timed rounds, after one warm-up round (default: %(default)s).",
    )
    common.add_argument("--seed", type=int, default=0, help="Seed of all draws (default: %(default)s).")

    data = argparse.ArgumentParser(add_help=False)
    data.add_argument("--dataset", help="Hub id, folder or file of preference pairs.")
    data.add_argument("--split", default="train", help="Split of the dataset (default: %(default)s).")

    training = argparse.ArgumentParser(add_help=False)
    training.add_argument(
        "--batch-size", type=int, default=8, help="Number of pairs in a batch (default: %(default)s)."
    )
    training.add_argument(
        "--dtype",
        choices=("bfloat16", "mixed", "float32"),
        default="bfloat16",
        help="Dtype of weights and computation. `mixed` is float32 weights with bfloat16 autocast, as with TRL's "
        "defaults (default: %(default)s).",
    )
    training.add_argument("--lora", action="store_true", help="Train LoRA adapters of rank 16 on all linear layers.")
    training.add_argument(
        "--gradient-checkpointing",
        action="store_true",
        help="Use gradient checkpointing, which is TRL's default and off here.",
    )
    training.set_defaults(learning_rate=1e-5, max_tokens_per_batch=None)

    train = commands.add_parser("train", parents=[common, data, training], help="Compare the speed of trainers.")
    train.add_argument(
        "--max-length", type=int, help="Leave out pairs with a side of more tokens than this (default: no limit)."
    )
    train.add_argument("--steps", type=int, help="Number of batches in a round (default: 3, or 1 with --sweep).")
    train.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="Variants to measure (default: all)."
    )
    train.add_argument(
        "--max-tokens-per-batch",
        type=int,
        help="Token budget of the variant `budget` (default: batches as large as the others').",
    )
    train.add_argument(
        "--peak-flops",
        type=float,
        help="Peak FLOP/s of the device, for the utilisation (default: inferred from the name of a GPU).",
    )
    train.add_argument(
        "--sweep", action="store_true", help="Vary prompt share, length and batch size on random tokens instead."
    )

    dpo = commands.add_parser("dpo", parents=[common, data, training], help="Compare the speed of DPO trainers.")
    dpo.add_argument(
        "--max-length", type=int, help="Leave out pairs with a side of more tokens than this (default: no limit)."
    )
    dpo.add_argument("--steps", type=int, help="Number of batches in a round (default: 2, or 1 with --sweep).")
    dpo.add_argument("--pairs", type=int, default=400, help="Number of pairs to use (default: %(default)s).")
    dpo.add_argument(
        "--variants",
        nargs="+",
        choices=DPO_VARIANTS,
        default=list(DPO_VARIANTS),
        help="Variants to measure (default: all).",
    )
    dpo.add_argument(
        "--sweep", action="store_true", help="Vary prompt share, length and batch size on random tokens instead."
    )

    score = commands.add_parser(
        "score", parents=[common, data], help="Compare the speed of scoring with TRL's GRPO trainer."
    )
    score.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="Dtype of the model (default: %(default)s).",
    )
    score.add_argument(
        "--answers",
        type=int,
        nargs="+",
        default=[1, 2, 4, 8, 16],
        help="Numbers K of answers to a prompt (default: 1 2 4 8 16).",
    )
    score.add_argument(
        "--prompt-tokens",
        type=int,
        nargs=2,
        default=[100, 160],
        help="Smallest and largest number of tokens of a prompt (default: 100 160).",
    )
    score.add_argument("--prompts", type=int, default=4, help="Number of prompts in a call (default: %(default)s).")
    score.add_argument("--calls", type=int, default=3, help="Number of calls in a round (default: %(default)s).")
    score.add_argument(
        "--sweep", action="store_true", help="Measure shorter and longer prompts as well, at the largest K."
    )

    prepare = commands.add_parser(
        "prepare", parents=[common, data], help="Compare the speed of validating and tokenizing a dataset."
    )
    prepare.add_argument(
        "--max-length",
        type=int,
        default=1024,
        help="Maximum number of tokens of a side (default: %(default)s, as TRL's).",
    )
    prepare.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=[10_000, 100_000],
        help="Numbers of pairs (default: 10000 100000).",
    )
    prepare.add_argument("--num-proc", type=int, help="`dataset_num_proc` of both trainers (default: one process).")

    head = commands.add_parser("head", parents=[common, training], help="Measure the cost of the distribution.")
    head.add_argument(
        "--length", type=int, default=256, help="Mean number of tokens of a side (default: %(default)s)."
    )
    head.add_argument(
        "--prompt-share", type=float, default=0.7, help="Share of a side that is the prompt (default: %(default)s)."
    )
    head.add_argument(
        "--pairs",
        type=int,
        default=8000,
        help="Number of pairs in an epoch, for the posterior (default: %(default)s).",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """Measures what the command line selects."""
    args = make_parser().parse_args(argv)
    kind = KINDS_OF_SWEEP[args.command] if args.command in KINDS_OF_SWEEP and args.sweep else args.command
    if kind in ("train", "dpo", "score", "prepare") and args.dataset is None:
        sys.exit(f"benchmarks.speed {args.command}: pass --dataset, the pairs to measure on")
    if kind == "score" and args.model is None:
        sys.exit("benchmarks.speed score: pass --model, a trained disco checkpoint with its tokenizer")
    quieten()
    args.model = args.model or str(small_chat_lm())
    if args.command in KINDS_OF_SWEEP:
        args.steps = args.steps or (1 if args.sweep else DEFAULT_STEPS[args.command])
    if args.command == "train":
        args.peak_flops = args.peak_flops or peak_flops(args.dtype)
    runners = {
        "train": run,
        "sweep": sweep,
        "dpo": run_dpo,
        "dpo-sweep": sweep_dpo,
        "score": run_score,
        "prepare": run_prepare,
        "head": run_head,
    }
    try:
        result: dict[str, Any] = runners[kind](args)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"benchmarks.speed {args.command}: {error}")
    result["settings"] = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    result["machine"] = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU",
        "threads": torch.get_num_threads(),
        **versions_of(("disco-trl", "trl", "transformers", "torch", "datasets")),
    }

    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{kind}.json").write_text(json.dumps(result, indent=1))
    table = TABLES[kind](result) + "\n\n" + ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    (args.out / f"{kind}.md").write_text(table + "\n", encoding="utf-8")
    if kind in PICTURES:
        plot(kind, result, args.out / f"{kind}.png")
    print(f"\n{table}\n\n{args.out / kind}.json" + (", .md and .png" if kind in PICTURES else " and .md"))
    if kind in ("train", "dpo"):
        refuse_other_losses(result)


def refuse_other_losses(result: dict[str, Any]) -> None:
    """Exits with an error if a variant that minimizes TRL's loss on TRL's batches has different losses."""
    tolerance = 1e-4 if result["settings"]["dtype"] == "float32" else 0.05
    for variant in result["variants"].values():
        if variant["loss_difference"] is not None and not variant["loss_difference"] <= tolerance:
            sys.exit(
                f"{variant['label']}: its losses differ from TRL's by up to {variant['loss_difference']:.4f}, more "
                f"than rounding ({tolerance})"
            )


if __name__ == "__main__":
    main()
