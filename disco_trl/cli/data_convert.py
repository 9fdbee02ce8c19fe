"""`disco-trl data convert`: preferences of another format as the columns that disco-trl reads."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from datasets import Features, List, Value

from ..data.curation.convert import MESSAGES, TYPES, Converter, Report, _converted, _paired, detect_format, rename
from ..data.curation.formats import FORMATS, rated_answers_of_ultrafeedback
from ..data.files import Row, RowWriter, check_output, choose_split, load_preferences, open_rows
from .arguments import add_data_arguments


def main(argv: list[str]) -> None:
    """Run `disco-trl data convert`."""
    parser = argparse.ArgumentParser(
        prog="disco-trl data convert",
        description="Convert preferences of another format to the columns that disco-trl reads.",
        epilog="formats:\n" + "\n".join(f"  {name:14} {known.what}" for name, known in FORMATS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_data_arguments(parser, "what to convert")
    parser.add_argument(
        "--from",
        dest="format",
        default="auto",
        choices=["auto", *FORMATS],
        help="the format; auto tells it by the columns (default)",
    )
    parser.add_argument(
        "--rename",
        action="append",
        default=[],
        metavar="OLD=NEW",
        help="read column OLD as if it were called NEW; may be given several times",
    )
    parser.add_argument(
        "--plain-text",
        action="store_true",
        help="leave prompts and answers as text; without it they become messages, for the chat template to join",
    )
    parser.add_argument("--skip-bad", action="store_true", help="skip and count rows that cannot be converted")
    parser.add_argument(
        "--pairs", type=int, metavar="N", help="of ratings: how many pairs (default: each answer once)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of ratings: seed of the pairs (default: 0)")
    parser.add_argument(
        "--to",
        choices=["rankings", "pairs"],
        help="of ultrafeedback: rankings (default), or pairs with ratings",
    )
    parser.add_argument(
        "--score",
        help="of ultrafeedback: overall_score (default), fine-grained_score, or an aspect such as helpfulness",
    )
    args = parser.parse_args(argv)
    try:
        report = _run(args)
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"{parser.prog}: {error}")
    print(report)


def _run(args: argparse.Namespace) -> Report:
    out = Path(args.out)
    check_output(out)
    renamed = dict(_renaming(argument) for argument in args.rename)
    dataset = open_rows(args.data, args.config, args.split)
    first_row = next(iter(dataset), None)
    if first_row is None:
        raise ValueError("the data is empty; check its path and split")
    if unknown := [old for old in renamed if old not in first_row]:
        there = ", ".join(map(repr, first_row))
        raise ValueError(f"--rename {unknown[0]}={renamed[unknown[0]]}: there is no such column (there are {there})")
    name = args.format
    if name == "auto":
        name = detect_format(rename(first_row, renamed))
    for option, owner in {"pairs": "ratings", "to": "ultrafeedback", "score": "ultrafeedback"}.items():
        if getattr(args, option) is not None and name != owner:
            raise ValueError(f"--{option} is for the format {owner}, and this is {name}; leave it out")
    if args.pairs is not None and args.pairs < 1:
        raise ValueError(f"--pairs {args.pairs} must be at least 1")

    convert = FORMATS[name].convert
    if args.to == "pairs":
        convert = rated_answers_of_ultrafeedback
    if args.score is not None:
        convert = partial(convert, score=args.score)
    report = Report(name)
    flat = out.suffix == ".parquet"
    converter = Converter(convert, report, args.plain_text, renamed, args.skip_bad, flat)
    if name == "ratings":
        # Which answer meets which is drawn from all of them, so they are read in any order: from disk.
        splits = load_preferences(args.data, args.config, argument="DATA")
        stored = choose_split(splits, args.split or next(iter(splits)), "--split").with_format(None)
        groups = _paired(stored, converter, args.pairs, args.seed)
    else:
        groups = _converted(dataset, converter, rated=args.to == "pairs")
    first = next(filter(None, groups), None)
    if first is None:
        raise ValueError(f"no row is left, so {out} is not written\n{report}")
    with RowWriter(out, _features(first[0]) if flat else None) as writer:
        buffer: list[Row] = []
        for rows in chain([first], groups):
            buffer += rows
            if len(buffer) >= 256:
                writer.write(buffer)
                buffer = []
        writer.write(buffer)
        report.written = writer.rows
    return report


def _renaming(argument: str) -> tuple[str, str]:
    old, equals, new = argument.partition("=")
    if not (old and equals and new):
        raise ValueError(f"--rename {argument}: write it as OLD=NEW")
    return old, new


def _features(row: Row) -> Features:
    types: dict[str, Any] = {}
    for name, value in row.items():
        if name in TYPES:
            types[name] = TYPES[name]
        elif name == "completions":
            types[name] = List(MESSAGES if isinstance(value[0], list) else Value("string"))
        else:
            types[name] = MESSAGES if isinstance(value, list) else Value("string")
    return Features(types)
