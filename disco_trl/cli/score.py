"""`disco-trl score`: add location, scale and reward to each row of a dataset."""

from __future__ import annotations

import argparse
import datetime
import sys
from pathlib import Path

from ..data.files import (
    ROWS_AT_ONCE,
    check_output,
    open_rows,
)
from ..distributions.transforms import get_transform
from ..models.distributed import process_state
from ..rewards.annotate import Annotator, _remove, annotate_file
from .arguments import add_data_arguments, add_model_arguments, add_transform_arguments, load_reward, transform_options


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="disco-trl score",
        description="Score every answer of a data set. Run again after a kill, it goes on where it was.",
        epilog="Several processes: accelerate launch --num_processes N -m disco_trl.cli.score DATA ...",
        allow_abbrev=False,
    )
    add_data_arguments(parser, "preferences, prompts with completions, messages or texts")
    add_model_arguments(parser)
    add_transform_arguments(parser)
    parser.add_argument("--prefix", default="", help="put before the names of the new columns")
    parser.add_argument(
        "--rows-per-part", type=int, default=ROWS_AT_ONCE, help="rows that a kill can cost (default: %(default)s)"
    )
    return parser


def main(argv: list[str]) -> None:
    """Run `disco-trl score`."""
    parser = _make_parser()
    args = parser.parse_args(argv)
    # The timeout is for the slowest process: the default of ten minutes might be less than it needs for its last part.
    state = process_state(use_cpu=args.device == "cpu", timeout=datetime.timedelta(days=7))
    try:
        out = Path(args.out)
        parts = out.with_name(f"{out.name}.parts")
        is_complete = out.exists() and (parts / "settings.json").exists()
        state.wait_for_everyone()
        if is_complete:
            # Killed after the last step but one: the file gets its name when it is complete.
            if state.is_main_process:
                _remove(parts)
                print(f"{out} was complete")
            return
        check_output(out)
        if args.rows_per_part < 1:
            raise ValueError(f"--rows-per-part {args.rows_per_part} must be at least 1")
        transform = get_transform(args.transform, **transform_options(args))
        dataset = open_rows(args.data, args.config, args.split)
        annotator = Annotator(load_reward(args), transform, args.prefix)
        rows, rows_before = annotate_file(dataset, out, annotator, args.rows_per_part)
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        sys.exit(f"{parser.prog}: {error}")
    if state.is_main_process:
        print(f"{out}: {rows} rows, {rows_before} of them scored before")
    state.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
