"""Check a preference dataset: its columns, rows and judgements, and what can be learned from it.

The exit status is 1 if a row is bad.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import JsonArguments, SplitArguments


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from ..data.curation.survey import Fingerprints


@dataclass(kw_only=True)
class Arguments(JsonArguments, SplitArguments):
    """The arguments of `disco-trl data check`."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Measure lengths in tokens of this model's tokenizer; a folder, or an id on the Hub."},
    )
    against: str | None = field(
        default=None,
        metadata={
            "metavar": "SPLIT_OR_DATA",
            "help": "What should have nothing in common with DATA: a split of it, or other data.",
        },
    )
    plot: str | None = field(default=None, metadata={"metavar": "FILE.png", "help": "Picture to draw."})


def run(args: Arguments) -> int:
    """Check a dataset, and print what was found."""
    from transformers import AutoTokenizer

    from ..data.curation.check import check_dataset
    from ..data.curation.check_report import draw, render, rows_of
    from ..data.curation.survey import SHORTEST_LEAK
    from ..data.files import open_rows
    from ..data.findings import named
    from ..models.loading import check_found
    from .scale_advice import scale_advice

    tokenizer = None
    if args.model_name_or_path is not None:
        check_found(args.model_name_or_path)
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path, trust_remote_code=False)
    other = None if args.against is None else _open_other(args.against, args)
    found, survey = check_dataset(open_rows(args.dataset_name, args.dataset_config, args.dataset_split), tokenizer)
    if other is not None:
        overlap = survey.fingerprints.overlap(_fingerprints(other))
        found["in_common"] = {"with": args.against, **overlap}
        for what, of in {"prompt": "a prompt", "answer": f"an answer of {SHORTEST_LEAK} or more characters"}.items():
            if count := overlap[what]["rows"]:
                found["warnings"].append(
                    f"{rows_of(count)} with {of} that {args.against} has too ({named(overlap[what]['first'])})"
                )
    if any(found["asked"].values()):
        found["scale"] = scale_advice(found["asked"], found.get("strengths", {}).get("levels"))
    print(render(found, args.dataset_name))
    args.write_json(found)
    if args.plot is not None:
        draw(survey, Path(args.plot))
    return 1 if found["errors"] else 0


def _open_other(against: str, args: Arguments) -> Dataset | IterableDataset:
    """The dataset of --against, a split of DATA if there is one of this name."""
    from ..data.files import load_preferences, open_rows

    if not Path(against).exists():
        splits = load_preferences(args.dataset_name, args.dataset_config, streaming=True)
        if against in splits:
            return open_rows(args.dataset_name, args.dataset_config, against)
    return open_rows(against, argument="--against")


def _fingerprints(dataset: Dataset | IterableDataset) -> Fingerprints:
    from ..data.columns import find_layout
    from ..data.curation.check import require_answers
    from ..data.curation.survey import Fingerprints, texts_of
    from ..data.files import chunks
    from ..data.records import read_record
    from ..data.values import BadRow

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
