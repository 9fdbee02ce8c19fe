"""Convert preferences of another format to the columns that disco-trl reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..data.curation.formats import FORMATS, rated_answers_of_ultrafeedback, ultrafeedback_with_aspects
from .arguments import OutputFileArguments, SplitArguments, at_least_one


if TYPE_CHECKING:
    from datasets import Features

    from ..data.files import Row


@dataclass(kw_only=True)
class Arguments(OutputFileArguments, SplitArguments):
    """The arguments of `disco-trl data convert`."""

    format: str = field(
        default="auto",
        metadata={
            "choices": ["auto", *FORMATS],
            "metavar": "FORMAT",
            "help": "What the rows are: auto (the default), which is inferred from the columns; "
            + "; ".join(f"{name}: {known.what}" for name, known in FORMATS.items())
            + ".",
        },
    )
    rename: list[str] = field(
        default_factory=list,
        metadata={"metavar": "OLD=NEW", "help": "Read column OLD as if it were called NEW; any number of them."},
    )
    plain_text: bool = field(
        default=False,
        metadata={
            "help": "Leave prompts and answers as text. Without it they become messages, for the chat template."
        },
    )
    skip_bad: bool = field(default=False, metadata={"help": "Skip and count rows that cannot be converted."})
    pairs: int | None = field(
        default=None, metadata={"help": "For ratings: the number of pairs (default: each answer is in one)."}
    )
    seed: int = field(default=0, metadata={"help": "For ratings: the seed of the pairs (default: %(default)s)."})
    to: Literal["rankings", "pairs", "attributes"] | None = field(
        default=None,
        metadata={
            "help": "For ultrafeedback: rankings (the default), pairs with ratings, or rankings with the scores of "
            "all aspects as ratings of attributes."
        },
    )
    score: str | None = field(
        default=None,
        metadata={
            "help": "For ultrafeedback: overall_score (the default), fine-grained_score, or an aspect such as "
            "helpfulness."
        },
    )

    strength_words: str | None = field(
        default=None,
        metadata={
            "metavar": "WORDS=LEVEL,...",
            "help": 'For strengths in words: the level of each, such as "slightly better=1,better=2,much better=3". '
            "By default they are inferred from the usual scales.",
        },
    )

    def __post_init__(self) -> None:
        at_least_one(self, "pairs")


def run(args: Arguments) -> None:
    """Convert a dataset, and print how many rows were read and written."""
    from ..data.curation.convert import (
        Converter,
        Report,
        convert_long,
        convert_pairs,
        convert_rows,
        detect_format,
        levels_of_words,
        rename,
        why_unsigned,
    )
    from ..data.curation.strength_words import parse_levels
    from ..data.files import RowWriter, check_output, choose_split, load_preferences, open_rows

    out = Path(args.output_file)
    check_output(out)
    renamed = dict(_renaming(argument) for argument in args.rename)
    dataset = open_rows(args.dataset_name, args.dataset_config, args.dataset_split)
    first_row = next(iter(dataset), None)
    if first_row is None:
        raise ValueError("the data is empty; check its path and split")
    if unknown := [old for old in renamed if old not in first_row]:
        there = ", ".join(map(repr, first_row))
        raise ValueError(f"--rename {unknown[0]}={renamed[unknown[0]]}: there is no such column (there are {there})")
    name = args.format
    if name == "auto":
        name = detect_format(rename(first_row, renamed))
    if name == "strengths" and (unsigned := why_unsigned(rename(row, renamed) for row in dataset)) is not None:
        if args.format == "auto":
            raise ValueError(
                f"--format auto: {unsigned}; if these are sizes and another column says which answer is better, name "
                "the better one 'chosen' and the other 'rejected'; if they are right, pass --format strengths"
            )
        print(f"warning: {unsigned}")
    rated = ("ratings", "attributes", "long")
    owners = {
        "pairs": rated,
        "to": ("ultrafeedback",),
        "score": ("ultrafeedback",),
        "strength_words": ("strengths",),
    }
    for option, of_option in owners.items():
        if getattr(args, option) is not None and name not in of_option:
            raise ValueError(
                f"--{option} is for the format {' or '.join(of_option)}, and this is {name}; leave it out"
            )

    convert = FORMATS[name].convert
    if args.to == "pairs":
        convert = rated_answers_of_ultrafeedback
    elif args.to == "attributes":
        convert = ultrafeedback_with_aspects
    if args.score is not None:
        convert = partial(convert, score=args.score)
    report = Report(name)
    if name == "strengths":
        words = args.strength_words
        report.words = (
            levels_of_words(rename(row, renamed) for row in dataset) if words is None else parse_levels(words)
        )
        convert = partial(convert, words=report.words)
    flat = out.suffix == ".parquet"
    converter = Converter(
        convert, report, args.plain_text, renamed, args.skip_bad, flat, judged_in=FORMATS[name].judged_in
    )
    if name in rated:
        # Which answer meets which is drawn from all of them, so they are read in any order: from disk.
        splits = load_preferences(args.dataset_name, args.dataset_config)
        stored = choose_split(splits, args.dataset_split or next(iter(splits)), "--dataset_split").with_format(None)
        of_rated = convert_long if name == "long" else convert_pairs
        groups = of_rated(stored, converter, args.pairs, args.seed)
    else:
        groups = convert_rows(dataset, converter, rated=args.to == "pairs")
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
    print(report)


def _renaming(argument: str) -> tuple[str, str]:
    old, equals, new = argument.partition("=")
    if not (old and equals and new):
        raise ValueError(f"--rename {argument}: write it as OLD=NEW")
    return old, new


def _is_by_attribute(value: Any) -> bool:
    return any(isinstance(one, dict) for one in (value if isinstance(value, list) else [value]))


def _features(row: Row) -> Features:
    from datasets import Features, List, Value

    from ..data.columns import RANKED_RATINGS, RATINGS
    from ..data.curation.convert import MESSAGES, TYPES

    types: dict[str, Any] = {}
    for name, value in row.items():
        if name in (*RATINGS, RANKED_RATINGS) and _is_by_attribute(value):
            raise ValueError(
                f"{name!r} holds ratings by attribute, for which Parquet needs to know all attributes beforehand; "
                "write to a .jsonl file instead"
            )
        if name in TYPES:
            types[name] = TYPES[name]
        elif name == "completions":
            types[name] = List(MESSAGES if isinstance(value[0], list) else Value("string"))
        else:
            types[name] = MESSAGES if isinstance(value, list) else Value("string")
    return Features(types)
