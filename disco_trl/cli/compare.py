"""`disco-trl compare`: train Bradley–Terry and disco variants alike, and say which is better."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from transformers import AutoTokenizer

from ..evaluation.compare import (
    Result,
    Variant,
    _mean_and_range,
    as_table,
    compare,
    find_settings,
    mean_over_seeds,
    parse_settings,
    run_all,
    verdict_table,
)
from ..evaluation.compare_run import BRADLEY_TERRY, TRAINERS, Run, read_data
from ..evaluation.evaluate import versions
from ..evaluation.held_out import HeldOut
from ..evaluation.report import Model, Verdict, write_report
from .arguments import add_examples


def main(argv: list[str]) -> None:
    """Run `disco-trl compare`."""
    parser = argparse.ArgumentParser(
        prog="disco-trl compare",
        description="Train Bradley–Terry with TRL's trainer, and variants of ours, alike; say which is better.",
        epilog="A variant is a family, perhaps with settings of its own: normal, normal:prefix_sharing=false, "
        "logistic:label_noise=0.05. In DATA, {seed} stands for the seed.",
        allow_abbrev=False,
    )
    parser.add_argument("data", metavar="DATA", help="preferences with a split to train on and one to test on")
    parser.add_argument("--model", required=True, help="language model or reward model to start from")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and the report")
    parser.add_argument("--variants", nargs="+", default=[BRADLEY_TERRY, "normal"], metavar="VARIANT")
    parser.add_argument(
        "--bradley-terry",
        choices=TRAINERS,
        default=TRAINERS[0],
        help="who trains Bradley–Terry: TRL's own trainer, or ours, the same likelihood in less time (default: trl; "
        "where data say more than who won, only ours can)",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="SEED")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", dest="settings", help="for all variants")
    parser.add_argument(
        "--search",
        type=int,
        default=0,
        metavar="TRIALS",
        help="first try so many learning rates and batch sizes for each variant, on a tenth of the training rows",
    )
    parser.add_argument("--lora-r", type=int, default=16, help="rank of LoRA adapters; 0 trains the whole model")
    parser.add_argument("--dtype", default="auto", help="of the language model (default: the checkpoint's)")
    parser.add_argument("--train-split", default="train")
    parser.add_argument("--test-split", default="test")
    parser.add_argument("--max-train", type=int, help="train on the first so many rows, shuffled by the seed")
    parser.add_argument("--max-length", type=int, help="leave out rows with a longer answer, in tokens")
    add_examples(parser)
    parser.add_argument("--keep-models", action="store_true", help="save what was trained")
    args = parser.parse_args(argv)
    try:
        _run(args)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        sys.exit(f"{parser.prog}: {error}")


def _run(args: argparse.Namespace) -> None:
    common = parse_settings(args.settings, "--set")
    variants = [Variant.parse(text) for text in args.variants]
    runs = [
        (
            variant,
            seed,
            Run(
                base=variant.base,
                bradley_terry=args.bradley_terry,
                settings=common | variant.settings,
                seed=seed,
                model=args.model,
                data=args.data.format(seed=seed),
                train_split=args.train_split,
                test_split=args.test_split,
                max_train=args.max_train,
                max_length=args.max_length,
                lora_r=args.lora_r,
                dtype=args.dtype,
                keep_model=args.keep_models,
                search=0,
                output=str(args.out / f"{variant.folder}-{seed}"),
            ),
        )
        for seed in args.seeds
        for variant in variants
    ]
    # What is wrong with the data is said before anything is trained.
    _, held_out = read_data(runs[0][2], AutoTokenizer.from_pretrained(args.model, trust_remote_code=False))
    if args.search:
        runs = find_settings(runs, args.search)
    results, failures = run_all(runs)
    for name, words in failures.items():
        print(f"{name} failed:\n{words}\n", file=sys.stderr)
    if not results:
        raise ValueError("no run succeeded; the folders in --out hold their logs")
    verdicts = compare(results, held_out)
    tables = as_table(results) + (f"\n\n{verdict_table(verdicts)}" if verdicts else "")
    (args.out / "table.md").write_text(f"{tables}\n", encoding="utf-8")
    report = _report(args, runs, results, failures, verdicts, held_out)
    print(f"\n{tables}\n\n{report}")


def _report(
    args: argparse.Namespace,
    runs: list[tuple[Variant, int, Run]],
    results: list[Result],
    failures: dict[str, str],
    verdicts: dict[str, dict[str, Verdict]],
    held_out: HeldOut,
) -> Path:
    by_variant: dict[str, list[Result]] = {}
    for result in results:
        by_variant.setdefault(result.variant.name, []).append(result)
    # Ours first: the examples are of the first model.
    order = sorted(by_variant, key=lambda name: by_variant[name][0].variant.base == BRADLEY_TERRY)
    settings = {variant.name: run.settings for variant, _, run in runs}
    models = [
        Model(
            name,
            mean_over_seeds(by_variant[name]),
            [tuple(point) for point in by_variant[name][0].figures["history"]],
            {
                "minutes": _mean_and_range([run.figures["minutes"] for run in by_variant[name]], "{:.1f}"),
                "peak memory, GiB": _mean_and_range([run.figures["peak_gib"] for run in by_variant[name]], "{:.1f}"),
                "trainer": by_variant[name][0].figures["trainer"],
                "settings": ", ".join(f"{key}={value}" for key, value in settings[name].items()) or "TRL's defaults",
            },
        )
        for name in order
    ]
    setup = {
        "Data": args.data,
        "Model": args.model,
        "LoRA rank": str(args.lora_r or "none, the whole model"),
        "Seeds": ", ".join(map(str, args.seeds)),
        "Versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
    }
    setup |= {f"{name} failed": words.splitlines()[-1] for name, words in failures.items()}
    title = f"{Path(args.model).name}: {len(results)} runs compared"
    ranges = {"brackets": "the range over seeds"} if len(args.seeds) > 1 else {}
    rewards = by_variant[order[0]][0].rewards
    return write_report(args.out, title, models, rewards, held_out, verdicts, setup, examples=args.examples, **ranges)
