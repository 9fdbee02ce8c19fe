"""Choose the best of several answers to each prompt.

A row of DATA has a prompt and a list of answers, its candidates. A row of OUTPUT_FILE has, besides, the best of them
with its position, and the reward, location and scale of each.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import OutputFileArguments, ScoringArguments, SplitArguments, TransformArguments


if TYPE_CHECKING:
    from ..data.files import Row

ROWS_AT_ONCE = 64
NEW_COLUMNS = ["best", "best_index", "rewards", "locations", "scales"]


@dataclass(kw_only=True)
class Arguments(TransformArguments, OutputFileArguments, SplitArguments, ScoringArguments):
    """The arguments of `disco-trl best-of-n`."""

    prompt_column: str = field(
        default="prompt", metadata={"help": "Column with a prompt, text or messages (default: %(default)s)."}
    )
    candidates_column: str = field(
        default="candidates", metadata={"help": "Column with a list of answers (default: %(default)s)."}
    )


def check_candidates(row: Row, number: int, prompt_column: str, candidates_column: str) -> None:
    """Raise a `ValueError` naming row, column and fix unless the row is a prompt and answers of the same kind."""
    prompt, candidates = row[prompt_column], row[candidates_column]
    if not isinstance(prompt, str | list):
        raise ValueError(
            f"row {number}, column {prompt_column!r}: {prompt!r} is no text or list of messages; drop the row"
        )
    if not isinstance(candidates, list) or not candidates:
        raise ValueError(
            f"row {number}, column {candidates_column!r}: a list of at least one answer should be here; drop the row "
            "or fill in its answers"
        )
    for index, candidate in enumerate(candidates):
        if type(candidate) is not type(prompt):
            raise ValueError(
                f"row {number}, column {candidates_column!r}: answer {index} is a {type(candidate).__name__} and the "
                f"prompt a {type(prompt).__name__}; make both texts, or both lists of messages"
            )


def run(args: Arguments) -> None:
    """Write the best answer to each prompt of a dataset."""
    from datasets import List, Value
    from transformers.utils import logging

    from ..data.files import RowWriter, check_output, chunks, open_rows, parquet_features, refuse_clash
    from ..rewards.best_of_n import best_of_n

    out = Path(args.output_file)
    check_output(out)
    dataset = open_rows(args.dataset_name, args.dataset_config, args.dataset_split)
    first_row: Row = next(iter(dataset), {})
    for column in (args.prompt_column, args.candidates_column):
        if column not in first_row:
            raise ValueError(
                f"column {column!r}: missing (there are {', '.join(map(repr, first_row)) or 'no rows'}); name the "
                "columns with --prompt_column and --candidates_column"
            )
    refuse_clash(list(first_row), NEW_COLUMNS, "rename it in the data")
    features = None
    if out.suffix == ".parquet":
        check_candidates(first_row, 0, args.prompt_column, args.candidates_column)
        numbers = List(Value("float32"))
        types = [Value("string"), Value("int64"), numbers, numbers, numbers]
        features = parquet_features(dataset, dict(zip(NEW_COLUMNS, types, strict=True)))
        candidates = features[args.candidates_column]
        # A column of mixed messages is of one type, Json.
        features["best"] = getattr(candidates, "feature", candidates)
    options = args.transform_options
    reward = args.load_reward()
    with RowWriter(out, features) as writer, logging.tqdm(desc="best of n", unit="row") as bar:
        for rows in chunks(dataset, ROWS_AT_ONCE):
            for number, row in enumerate(rows, start=writer.rows):
                check_candidates(row, number, args.prompt_column, args.candidates_column)
            if args.transform == "sample":
                # A stream of its own for each chunk, or all would draw the same.
                options["seed"] = ((args.seed or 0) + 1_000_003 * writer.rows) % 2**63
            results = best_of_n(
                [row[args.prompt_column] for row in rows],
                [row[args.candidates_column] for row in rows],
                args.transform,
                model=reward.model,
                processing_class=reward.processing_class,
                columns={
                    name: [row[name] for row in rows]
                    for name in ("tools", "chat_template_kwargs")
                    if name in first_row
                },
                tokens_per_batch=args.tokens_per_batch,
                **args.view_options,
                **options,
            )
            writer.write(
                [
                    row
                    | {
                        "best": best.candidate,
                        "best_index": best.index,
                        "rewards": best.rewards.tolist(),
                        "locations": best.distribution.location.tolist(),
                        "scales": best.distribution.scale.tolist(),
                    }
                    for row, best in zip(rows, results, strict=True)
                ]
            )
            bar.update(len(rows))
    print(f"{out}: the best answers to {writer.rows} prompts")
