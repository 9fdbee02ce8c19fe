"""What the commands that score (`score`, `filter`, `best-of-n`) have in common: their arguments, and the model."""

from __future__ import annotations

import argparse
from typing import Any

from ..distributions.transforms import TRANSFORMS
from ..evaluation.report import EXAMPLES
from ..models.inference import TOKENS_PER_BATCH
from ..rewards.disco_reward import DiscoReward


TRANSFORM_OPTIONS = ("k", "q", "beta", "seed", "total")


def add_data_arguments(parser: argparse.ArgumentParser, what: str) -> None:
    """DATA, --config, --split and --out."""
    parser.add_argument("data", metavar="DATA", help=f"{what}: .jsonl, .json, .parquet, .csv, a folder, or a Hub id")
    parser.add_argument("--config", help="configuration of a Hub dataset")
    parser.add_argument("--split", help="split to read; needed where there are several")
    parser.add_argument("--out", required=True, help="file to write, .parquet or .jsonl")


def add_model_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """--model, --dtype, --device and --tokens-per-batch."""
    parser.add_argument(
        "--model", required=required, help="disco checkpoint, adapter or scalar reward model: a path or a Hub id"
    )
    add_loading_arguments(parser)
    parser.add_argument(
        "--tokens-per-batch",
        type=int,
        default=TOKENS_PER_BATCH,
        help="tokens that go through the model at once, padding counted (default: %(default)s)",
    )


def add_loading_arguments(parser: argparse.ArgumentParser) -> None:
    """--dtype and --device."""
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="of the language model (default: the checkpoint's)",
    )
    parser.add_argument("--device", help="cpu, cuda:1, ... (default: an accelerator if there is one)")


def add_transform_arguments(parser: argparse.ArgumentParser) -> None:
    """--transform and the transforms' options."""
    parser.add_argument(
        "--transform",
        default="mean",
        choices=list(TRANSFORMS),
        help="what the reward is (default: the location)",
    )
    parser.add_argument("--k", type=float, help="of lower_bound: location - k * scale")
    parser.add_argument("--q", type=float, help="of quantile: its level")
    parser.add_argument("--beta", type=float, help="of certainty_equivalent: the risk tolerance")
    parser.add_argument("--seed", type=int, help="of sample")
    parser.add_argument(
        "--total", action="store_const", const=True, help="count what the model does not know into the scale"
    )


def transform_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of the transform that were given."""
    return {name: getattr(args, name) for name in TRANSFORM_OPTIONS if getattr(args, name) is not None}


def load_reward(args: argparse.Namespace) -> DiscoReward:
    """
    The model that the arguments name, with its tokenizer; scalar reward models are read as Bradley–Terry.

    Raises:
        ValueError: the model has no trained reward head.
    """
    if args.tokens_per_batch < 1:
        raise ValueError(f"--tokens-per-batch {args.tokens_per_batch} must be at least 1")
    return DiscoReward(args.model, dtype=args.dtype, device=args.device, tokens_per_batch=args.tokens_per_batch)


def add_examples(parser: argparse.ArgumentParser) -> None:
    """Have a command ask how many examples its report shows."""
    parser.add_argument(
        "--examples",
        type=int,
        default=EXAMPLES,
        metavar="N",
        help="of each kind, whose texts the report shows; 0 if they are not to be passed on (default: %(default)s)",
    )
