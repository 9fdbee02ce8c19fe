"""`disco-trl data check`: what a preference dataset holds, and what is wrong with it."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import AutoTokenizer

from ..data.columns import find_layout
from ..data.curation.check import check_dataset, named, require_answers
from ..data.curation.check_report import draw, render, rows_of
from ..data.curation.survey import SHORTEST_LEAK, Fingerprints, texts_of
from ..data.files import chunks, load_preferences, open_rows
from ..data.records import read_record
from ..data.values import BadRow


def main(argv: list[str]) -> None:
    """Run `disco-trl data check`; the exit status is 1 if a row is bad."""
    parser = argparse.ArgumentParser(
        prog="disco-trl data check",
        description="Check a preference dataset: its columns, rows and judgements, and what can be learned from it.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "data", metavar="DATA", help="preferences: .jsonl, .json, .parquet, .csv, a folder, or a Hub id"
    )
    parser.add_argument("--config", help="configuration of a Hub dataset")
    parser.add_argument("--split", help="split to read; needed where there are several")
    parser.add_argument(
        "--against",
        metavar="SPLIT_OR_DATA",
        help="what should have nothing in common with DATA: a split of it, a file",
    )
    parser.add_argument(
        "--model", metavar="TOKENIZER", help="measure lengths in tokens of this model, a path or Hub id"
    )
    parser.add_argument("--plot", metavar="FILE.png", help="draw a picture")
    parser.add_argument("--json", metavar="FILE", help="write the figures")
    args = parser.parse_args(argv)
    try:
        found = _run(args)
    except (ValueError, TypeError, OSError, ImportError) as error:
        sys.exit(f"{parser.prog}: {error}")
    if found["errors"]:
        sys.exit(1)


def _run(args: argparse.Namespace) -> dict[str, Any]:
    tokenizer = None if args.model is None else AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    other = None if args.against is None else _open_other(args)
    found, survey = check_dataset(open_rows(args.data, args.config, args.split), tokenizer)
    if other is not None:
        overlap = survey.fingerprints.overlap(_fingerprints(other))
        found["in_common"] = {"with": args.against, **overlap}
        for what, of in {"prompt": "a prompt", "answer": f"an answer of {SHORTEST_LEAK} or more characters"}.items():
            if count := overlap[what]["rows"]:
                found["warnings"].append(
                    f"{rows_of(count)} with {of} that {args.against} has too ({named(overlap[what]['first'])})"
                )
    print(render(found, args.data))
    if args.json is not None:
        Path(args.json).write_text(json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    if args.plot is not None:
        draw(survey, Path(args.plot))
    return found


def _open_other(args: argparse.Namespace) -> Dataset | IterableDataset:
    """The dataset of --against, a split of DATA if there is one of this name."""
    if not Path(args.against).exists():
        splits = load_preferences(args.data, args.config, streaming=True, argument="DATA")
        if args.against in splits:
            return open_rows(args.data, args.config, args.against)
    return open_rows(args.against)


def _fingerprints(dataset: Dataset | IterableDataset) -> Fingerprints:
    fingerprints = Fingerprints()
    number = 0
    layout = None
    for rows in chunks(dataset):
        for row in rows:
            if layout is None:
                require_answers(row)
                layout = find_layout(row)
            # A bad row has no texts to compare; it is for the other dataset's own check to count it.
            with contextlib.suppress(BadRow):
                fingerprints.add(*texts_of(read_record(row, layout)), number)
            number += 1
    return fingerprints
