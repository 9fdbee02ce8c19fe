"""Keep, drop or flip preference pairs by what a reward model thinks of their labels.

DATA holds pairs that `disco-trl score` has scored, or pairs that --model_name_or_path scores here. p is the
probability that the chosen answer beats the rejected one. The rules apply in this order: flip_below, min_prob,
max_prob, max_scale.
"""

from __future__ import annotations

import array
import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import OutputFileArguments, ScoringArguments, SplitArguments


if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset

    from ..data.files import Row
    from ..rewards.filter import PairFilter


@dataclass(kw_only=True)
class Arguments(ScoringArguments, OutputFileArguments, SplitArguments):
    """The arguments of `disco-trl filter`."""

    model_name_or_path: str | None = field(  # type: ignore[assignment]  # here alone a model may be left out
        default=None,
        metadata={"help": "Reward model to score the pairs with, if `disco-trl score` has not done so."},
    )
    flip_below: float | None = field(
        default=None, metadata={"help": "Swap the answers of pairs whose p is below this."}
    )
    min_prob: float | None = field(default=None, metadata={"help": "Drop pairs whose p is below this."})
    max_prob: float | None = field(default=None, metadata={"help": "Drop pairs whose p is above this."})
    max_scale: float | None = field(
        default=None, metadata={"help": "Drop pairs with an answer whose scale is above this."}
    )
    max_scale_quantile: float | None = field(
        default=None,
        metadata={"help": "As max_scale, which is chosen such that this share of all pairs is not above it."},
    )
    prefix: str = field(default="", metadata={"help": "The prefix that `disco-trl score` was given, if any."})
    report: str | None = field(default=None, metadata={"help": "JSON file to write with what was done."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.minimum is not None or self.floor is not None:
            raise ValueError(
                "--minimum and --floor bound what a transform makes of a reward, and the rules look at p and the "
                "scale; leave them out"
            )
        if self.model_name_or_path is None and (self.attribute is not None or self.weights is not None):
            raise ValueError(
                "--attribute and --weights say which reward the model gives; pass --model_name_or_path, or, if "
                "`disco-trl score` has scored the pairs, pass them there"
            )
        if self.max_scale_quantile is None:
            return
        if self.max_scale is not None:
            raise ValueError("--max_scale and --max_scale_quantile exclude each other; give one of them")
        if self.model_name_or_path is not None:
            raise ValueError("--max_scale_quantile reads the scores twice; run `disco-trl score` first")
        if not 0 < self.max_scale_quantile < 1:
            raise ValueError(f"--max_scale_quantile {self.max_scale_quantile} must be strictly between 0 and 1")


def run(args: Arguments) -> None:
    """Write the pairs of a dataset that are to be kept."""
    import numpy as np

    from ..data.files import RowWriter, check_output, open_rows, refuse_clash, written_at_once
    from ..rewards.annotate import Annotator, find_answers
    from ..rewards.filter import PairFilter, Rules

    out = Path(args.output_file)
    check_output(out)
    rules = Rules(
        flip_below=args.flip_below,
        min_prob=args.min_prob,
        max_prob=args.max_prob,
        # To be read from the data.
        max_scale=args.max_scale if args.max_scale_quantile is None else math.inf,
    )
    dataset = open_rows(args.dataset_name, args.dataset_config, args.dataset_split)
    first_row = next(iter(dataset), None)
    if first_row is None:
        raise ValueError("the data is empty; check its path and split")

    new_columns: list[str] = []
    annotator = layout = None
    if args.model_name_or_path is not None:
        layout = find_answers(first_row)
        if not layout.is_pair:
            raise ValueError(f"the rows hold one answer each, in {layout.columns[0]!r}; only pairs can be filtered")
        annotator = Annotator(args.load_reward(), prefix=args.prefix)
        new_columns = annotator.column_names(layout)
        refuse_clash(list(first_row), new_columns, "leave out --model_name_or_path to filter by it, or pass --prefix")
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
            with written_at_once(Path(args.report)) as unfinished:
                unfinished.write_text(json.dumps({"rules": vars(pair_filter.rules), **vars(report)}, indent=2) + "\n")
        if report.kept == 0:
            raise ValueError(f"no pair is left, so {out} is not written\n{report}")
    print(report)


def _with_bar(dataset: Dataset | IterableDataset, what: str) -> Iterator[list[Row]]:
    from transformers.utils import logging

    from ..data.files import chunks

    with logging.tqdm(desc=what, unit="row") as bar:
        for rows in chunks(dataset):
            yield rows
            bar.update(len(rows))


def _features(dataset: Dataset | IterableDataset, pair_filter: PairFilter, new_columns: list[str]) -> Features:
    from datasets import Value

    from ..data.files import parquet_features

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
