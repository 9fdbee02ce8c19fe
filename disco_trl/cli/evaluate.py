"""`disco-trl evaluate`: how good a reward model is on held-out data, and how honest."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from ..data.files import open_rows
from ..evaluation.evaluate import DRAWS, as_json, as_markdown, as_text, evaluate, plain_view, save_scores, versions
from ..evaluation.held_out import KINDS, HeldOut
from ..evaluation.report import Model, write_report
from ..models.inference import score
from ..models.model_card import add_evaluation
from .arguments import add_examples, add_model_arguments, load_reward


def main(argv: list[str]) -> None:
    """Run `disco-trl evaluate`."""
    parser = argparse.ArgumentParser(
        prog="disco-trl evaluate",
        description="Say how good a reward model is on held-out preferences or on a benchmark, and how honest.",
        allow_abbrev=False,
    )
    parser.add_argument("data", metavar="DATA", help=".jsonl, .json, .parquet, .csv, a folder, or a Hub id")
    parser.add_argument("--config", help="configuration of a Hub dataset")
    parser.add_argument("--split", help="split to read; needed where there are several")
    parser.add_argument(
        "--kind", default="auto", choices=["auto", *KINDS], help="of rows (default: what the first is)"
    )
    parser.add_argument("--max-length", type=int, help="leave out items with an answer of more tokens")
    parser.add_argument("--out", type=Path, required=True, help="folder of metrics.json, scores.parquet, report.html")
    parser.add_argument("--card", action="store_true", help="also put table and pictures into the model's README.md")
    parser.add_argument("--draws", type=int, default=DRAWS, help="of the bootstrap (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    add_examples(parser)
    parser.add_argument(
        "--plain", action="store_true", help="see a disco checkpoint as tools without disco-trl do: its logit alone"
    )
    add_model_arguments(parser)
    args = parser.parse_args(argv)
    try:
        print(_run(args))
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        sys.exit(f"{parser.prog}: {error}")


def _run(args: argparse.Namespace) -> str:
    if args.draws < 1:
        raise ValueError(f"--draws {args.draws} must be at least 1")
    rows = open_rows(args.data, args.config, args.split)
    reward = load_reward(args)
    held_out = HeldOut.read(rows, reward.processing_class, args.kind, args.max_length)
    start = time.perf_counter()
    rewards = score(reward.model, held_out.sequences, args.tokens_per_batch, description="Scoring")
    seconds = time.perf_counter() - start
    if args.plain:
        rewards = plain_view(rewards)
    found = evaluate(rewards, held_out, args.draws, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    save_scores(args.out / "scores.parquet", rewards, held_out)
    of_run = {
        "model": args.model,
        "data": args.data,
        "split": args.split,
        "family": rewards.family,
        "seconds": seconds,
        "versions": versions(),
    }
    figures = as_json(found)
    text = json.dumps(of_run | figures, indent=2, ensure_ascii=False)
    (args.out / "metrics.json").write_text(text + "\n", encoding="utf-8")
    title = f"{args.model} on {args.data}"
    setup = {"Model": args.model, "Data": args.data, "Family": rewards.family, "Scored in": f"{seconds:.1f} s"}
    setup |= {"Versions": ", ".join(f"{name} {number}" for name, number in versions().items())}
    report = write_report(
        args.out,
        f"{Path(args.model).name} on {Path(args.data).name}",
        [Model(Path(args.model).name, figures)],
        rewards,
        held_out,
        setup=setup,
        examples=args.examples,
    )
    if args.card:
        pictures = [args.out / f"{name}.png" for name in ("reliability", "risk-coverage")]
        add_evaluation(Path(args.model), as_markdown(found, args.data), pictures)
    return f"{as_text(found, title)}\n\n{report}"
