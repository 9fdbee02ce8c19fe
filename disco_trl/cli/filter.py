"""`disco-trl filter`: keep, drop or flip preference pairs by predicted probability and uncertainty."""

from __future__ import annotations

import argparse
import array
import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, Value
from transformers.utils import logging

from ..data.files import Row, RowWriter, check_output, chunks, open_rows, parquet_features, refuse_clash
from ..rewards.annotate import Annotator, find_answers
from ..rewards.filter import PairFilter, Report, Rules
from .arguments import add_data_arguments, add_model_arguments, load_reward


def main(argv: list[str]) -> None:
    """Run `disco-trl filter`."""
    parser = argparse.ArgumentParser(
        prog="disco-trl filter",
        description="Keep, drop or flip preference pairs by what a reward model thinks of their labels.",
        epilog="The rules apply in the order in which they stand above. p is P(chosen beats rejected).",
        allow_abbrev=False,
    )
    add_data_arguments(parser, "preference pairs, scored by `disco-trl score` or, with --model, here")
    rules = parser.add_argument_group("rules")
    rules.add_argument("--flip-below", type=float, metavar="P", help="swap the answers where p is below P")
    rules.add_argument("--min-prob", type=float, metavar="P", help="drop pairs whose label is less likely than P")
    rules.add_argument("--max-prob", type=float, metavar="P", help="drop pairs whose label is more likely than P")
    scale = rules.add_mutually_exclusive_group()
    scale.add_argument("--max-scale", type=float, metavar="S", help="drop pairs with an answer whose scale is above S")
    scale.add_argument(
        "--max-scale-quantile",
        type=float,
        metavar="Q",
        help="the same, with S such that a share Q of all pairs read is not above it",
    )
    parser.add_argument("--prefix", default="", help="what `disco-trl score --prefix` put before the names")
    parser.add_argument("--report", help="JSON file for what was done")
    add_model_arguments(parser, required=False)
    args = parser.parse_args(argv)
    try:
        report = _run(args)
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        sys.exit(f"{parser.prog}: {error}")
    print(report)


def _run(args: argparse.Namespace) -> Report:
    out = Path(args.out)
    check_output(out)
    rules = Rules(
        flip_below=args.flip_below,
        min_prob=args.min_prob,
        max_prob=args.max_prob,
        # To be read from the data.
        max_scale=args.max_scale if args.max_scale_quantile is None else math.inf,
    )
    if args.max_scale_quantile is not None:
        if args.model is not None:
            raise ValueError("--max-scale-quantile reads the scores twice; run `disco-trl score` first")
        if not 0 < args.max_scale_quantile < 1:
            raise ValueError(f"--max-scale-quantile {args.max_scale_quantile} must be strictly between 0 and 1")
    dataset = open_rows(args.data, args.config, args.split)
    first_row = next(iter(dataset), None)
    if first_row is None:
        raise ValueError("the data is empty; check its path and split")

    new_columns: list[str] = []
    annotator = layout = None
    if args.model is not None:
        layout = find_answers(first_row)
        if not layout.is_pair:
            raise ValueError(f"the rows hold one answer each, in {layout.columns[0]!r}; only pairs can be filtered")
        annotator = Annotator(load_reward(args), prefix=args.prefix)
        new_columns = annotator.column_names(layout)
        refuse_clash(list(first_row), new_columns, "leave out --model to filter by it, or pass --prefix")
    pair_filter = PairFilter(rules, [*first_row, *new_columns], args.prefix)
    if args.max_scale_quantile is not None:
        # One number a pair is all that is held of it.
        numbered = (pair for rows in _with_bar(dataset, "reading scales") for pair in rows)
        scales = array.array("d", (pair_filter.scale(row, number) for number, row in enumerate(numbered)))
        threshold = float(np.quantile(scales, args.max_scale_quantile, method="inverted_cdf"))
        pair_filter.rules = dataclasses.replace(rules, max_scale=threshold)
    features = _features(dataset, pair_filter, new_columns) if out.suffix == ".parquet" else None

    with RowWriter(out, features) as writer:
        for rows in _with_bar(dataset, "filtering"):
            first = pair_filter.report.read
            if annotator is not None and layout is not None:
                scores = annotator(rows, layout, first)
                rows = [
                    row | dict(zip(scores, numbers, strict=True))
                    for row, numbers in zip(rows, zip(*scores.values(), strict=True), strict=True)
                ]
            writer.write(pair_filter(rows, first))
        report = pair_filter.report
        if args.report is not None:
            Path(args.report).write_text(
                json.dumps({"rules": vars(pair_filter.rules), **vars(report)}, indent=2) + "\n"
            )
        if report.kept == 0:
            raise ValueError(f"no pair is left, so {out} is not written\n{report}")
    return report


def _with_bar(dataset: Dataset | IterableDataset, what: str) -> Iterator[list[Row]]:
    with logging.tqdm(desc=what, unit="row") as bar:
        for rows in chunks(dataset):
            yield rows
            bar.update(len(rows))


def _features(dataset: Dataset | IterableDataset, pair_filter: PairFilter, new_columns: list[str]) -> Features:
    added: dict[str, Any] = dict.fromkeys(new_columns, Value("float32"))
    if pair_filter.rules.flip_below is not None:
        added["flipped"] = Value("bool")
    features = parquet_features(dataset, added)
    if pair_filter.rules.flip_below is not None:
        for one, other in pair_filter.swaps.items():
            if features[one] != features[other]:
                raise ValueError(
                    f"columns {one!r} and {other!r} are of different types, so their values cannot be swapped in a "
                    "Parquet file; write to a .jsonl file instead"
                )
    return features
