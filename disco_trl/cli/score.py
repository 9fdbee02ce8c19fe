"""Score every answer of a dataset: add its location, scale and reward to each row.

The rows may be preferences, prompts with completions, messages or texts. A run that was killed goes on where it was if
the same command is run again. On several processes:

  accelerate launch --num_processes 2 -m disco_trl.cli.score MODEL DATA OUTPUT_FILE
"""

from __future__ import annotations

import datetime
import sys
from dataclasses import dataclass, field
from pathlib import Path

from .arguments import OutputFileArguments, ScoringArguments, SplitArguments, TransformArguments, at_least_one


@dataclass(kw_only=True)
class Arguments(TransformArguments, OutputFileArguments, SplitArguments, ScoringArguments):
    """The arguments of `disco-trl score`."""

    prefix: str = field(default="", metadata={"help": "Prefix of the names of the new columns."})
    all_attributes: bool = field(
        default=False,
        metadata={
            "help": "Add the columns location_NAME and scale_NAME for each attribute that the model knows, whichever "
            "of its rewards is taken."
        },
    )
    rows_per_part: int = field(
        default=256, metadata={"help": "Rows that a kill can cost, and that are held at once (default: %(default)s)."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self, "rows_per_part")


def run(args: Arguments) -> None:
    """Score a dataset, in one process or in several."""
    from ..data.files import check_output, locked, open_rows
    from ..distributions.transforms import get_transform
    from ..models.distributed import process_state
    from ..rewards.annotate import Annotator, annotate_file, remove_parts

    # The timeout is for the slowest process: the default of ten minutes might be less than it needs for its last part.
    state = process_state(use_cpu=args.device == "cpu", timeout=datetime.timedelta(days=7))
    out = Path(args.output_file)
    parts = out.with_name(f"{out.name}.parts")
    is_complete = out.exists() and (parts / "settings.json").exists()
    state.wait_for_everyone()
    if is_complete:
        # Killed after the last step but one: the file gets its name when it is complete.
        if state.is_main_process:
            with locked(out):
                remove_parts(parts)
            print(f"{out} was complete")
        return
    check_output(out)
    transform = get_transform(args.transform, **args.transform_options)
    dataset = open_rows(args.dataset_name, args.dataset_config, args.dataset_split)
    annotator = Annotator(args.load_reward(), transform, args.prefix, args.all_attributes)
    rows, rows_before = annotate_file(dataset, out, annotator, args.rows_per_part)
    if state.is_main_process:
        print(f"{out}: {rows} rows, {rows_before} of them scored before")
    state.destroy_process_group()


if __name__ == "__main__":
    from .main import main

    raise SystemExit(main(["score", *sys.argv[1:]]))
