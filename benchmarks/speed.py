"""
How many times faster than TRL, and why: training, scoring, preparing a dataset, and what the distribution costs.

    python -m benchmarks.speed train --dataset path/to/pairs.jsonl.gz --max-length 512     # 15 minutes on 2 cores
    python -m benchmarks.speed train --sweep                                              # 15 minutes
    python -m benchmarks.speed score --model path/to/disco-model --dataset path/to/pairs.jsonl.gz
    python -m benchmarks.speed prepare --dataset path/to/pairs.jsonl.gz
    python -m benchmarks.speed head

Model and dataset are Hub ids or local paths; the dataset has pairs of any type that TRL's `RewardTrainer` takes.
Without `--model` a small chat LM is fetched from the package index. Each command prints a table and leaves it in
`--out` as Markdown, with a JSON file of all figures and a picture.

`train` runs the real trainers' own `train()`, all in one process, each in a thread that stops after every step until
it is its turn again; so whatever else the machine does falls on all of them. A step is the whole loop: collating,
forward, backward, optimizer and logging. Before the timed rounds each goes once through all of its batches, because on
a CPU the first time that a shape of a matrix product is met a kernel is compiled for it; the JSON file has the rate of
that round too. Batches are those that the trainers themselves would form from the whole dataset; the few that are
timed are chosen so that their mean tokens are the epoch's. Peak memory is measured first, in a process for each.

With a GPU (or `--peak-flops`) the table has the model FLOP utilisation. Useful floating-point operations are counted
for unique tokens alone: 6 for each weight that is trained (2 forward, 2 for the gradient of the activations, 2 for its
own), 4 for one that is not, as most under LoRA; embeddings none; in attention 12 × layers × width of all heads × keys
that a token sees. What activation checkpointing computes a second time is not useful and does not count.
"""

import argparse
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import disco_trl

from .human_ratings import small_chat_lm
from .speed_counts import peak_flops
from .speed_parts import run_head, run_prepare, run_score
from .speed_report import PICTURES, TABLES, plot
from .speed_train import VARIANTS, quieten, run, sweep


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--model", help="Hub id or path [a small chat LM from the package index]")
    common.add_argument("--out", type=Path, default=Path("runs/benchmark"), help="folder [%(default)s]")
    common.add_argument("--rounds", type=int, default=3, help="timed rounds, after one to warm up [%(default)s]")
    common.add_argument("--seed", type=int, default=0)

    data = argparse.ArgumentParser(add_help=False)
    data.add_argument("--dataset", help="Hub id, folder or file of preference pairs")
    data.add_argument("--split", default="train", help="[%(default)s]")

    training = argparse.ArgumentParser(add_help=False)
    training.add_argument("--batch-size", type=int, default=8, help="pairs in a batch [%(default)s]")
    training.add_argument(
        "--dtype",
        choices=("bfloat16", "mixed", "float32"),
        default="bfloat16",
        help="weights and computing in bfloat16; weights in float32, computing in bfloat16 (what TRL's defaults come "
        "to); or both in float32 [%(default)s]",
    )
    training.add_argument("--lora", action="store_true", help="LoRA of rank 16 on all linear layers")
    training.add_argument("--gradient-checkpointing", action="store_true", help="TRL's default, here off")
    training.set_defaults(learning_rate=1e-5, max_tokens_per_batch=None)

    train = commands.add_parser("train", parents=[common, data, training], help="trainers against each other")
    train.add_argument("--max-length", type=int, help="leave out pairs with a longer side, in tokens [none]")
    train.add_argument("--steps", type=int, help="batches in a round [3; with --sweep 1]")
    train.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="[all]")
    train.add_argument("--max-tokens-per-batch", type=int, help="of the token budget [as large as the other batches]")
    train.add_argument("--peak-flops", type=float, help="FLOP/s of the device at most [by its name, if it is a GPU]")
    train.add_argument("--sweep", action="store_true", help="vary prompt share, length and batch size instead")

    score = commands.add_parser("score", parents=[common, data], help="scoring, against TRL's GRPO")
    score.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    score.add_argument("--answers", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="K, to a prompt [1 2 4 8 16]")
    score.add_argument(
        "--prompt-tokens", type=int, nargs=2, default=[100, 160], help="prompts of so many tokens [100 160]"
    )
    score.add_argument("--prompts", type=int, default=4, help="in a call [%(default)s]")
    score.add_argument("--calls", type=int, default=3, help="in a round [%(default)s]")
    score.add_argument("--sweep", action="store_true", help="shorter and longer prompts too, at the largest K")

    prepare = commands.add_parser("prepare", parents=[common, data], help="tokenizing and checking a dataset")
    prepare.add_argument("--max-length", type=int, default=1024, help="as TRL's [%(default)s]")
    prepare.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000], help="pairs [10000 100000]")
    prepare.add_argument("--num-proc", type=int, help="`dataset_num_proc` of both [one process]")

    head = commands.add_parser("head", parents=[common, training], help="the distribution's own cost")
    head.add_argument("--length", type=int, default=256, help="tokens in a side, on average [%(default)s]")
    head.add_argument("--prompt-share", type=float, default=0.7, help="of a side [%(default)s]")
    head.add_argument("--pairs", type=int, default=8000, help="in an epoch, for the posterior [%(default)s]")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Measure as the command line says."""
    args = make_parser().parse_args(argv)
    kind = "sweep" if args.command == "train" and args.sweep else args.command
    if kind in ("train", "score", "prepare") and args.dataset is None:
        sys.exit(f"benchmark.py {args.command}: pass --dataset, the pairs to measure on")
    if kind == "score" and args.model is None:
        sys.exit("benchmark.py score: pass --model, a trained disco checkpoint with its tokenizer")
    quieten()
    args.model = args.model or str(small_chat_lm())
    if args.command == "train":
        args.steps = args.steps or (1 if args.sweep else 3)
        args.peak_flops = args.peak_flops or peak_flops(args.dtype)
    runners = {"train": run, "sweep": sweep, "score": run_score, "prepare": run_prepare, "head": run_head}
    try:
        result: dict[str, Any] = runners[kind](args)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"benchmark.py {args.command}: {error}")
    result["settings"] = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    result["machine"] = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU",
        "threads": torch.get_num_threads(),
        "disco-trl": disco_trl.__version__,
        **{name: version(name) for name in ("trl", "transformers", "torch", "datasets")},
    }

    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{kind}.json").write_text(json.dumps(result, indent=1))
    table = TABLES[kind](result) + "\n\n" + ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    (args.out / f"{kind}.md").write_text(table + "\n", encoding="utf-8")
    if kind in PICTURES:
        plot(kind, result, args.out / f"{kind}.png")
    print(f"\n{table}\n\n{args.out / kind}.json" + (", .md and .png" if kind in PICTURES else " and .md"))
    if kind == "train":
        refuse_other_losses(result)


def refuse_other_losses(result: dict[str, Any]) -> None:
    """Exit where a variant that minimizes TRL's loss on TRL's batches gives other numbers."""
    tolerance = 1e-4 if result["settings"]["dtype"] == "float32" else 0.05
    for variant in result["variants"].values():
        if variant["loss_difference"] is not None and not variant["loss_difference"] <= tolerance:
            sys.exit(
                f"{variant['label']}: its losses differ from TRL's by up to {variant['loss_difference']:.4f}, more "
                f"than rounding ({tolerance})"
            )


if __name__ == "__main__":
    main()
