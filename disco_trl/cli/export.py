"""`disco-trl export`: write a reward model in a form that other tools take."""

from __future__ import annotations

import argparse
import sys

from ..models.export import DTYPES, TARGETS, ProofError, export


def main(argv: list[str]) -> None:
    """Run `disco-trl export` with these arguments."""
    parser = argparse.ArgumentParser(
        prog="disco-trl export",
        description="Write a reward model in a form that other tools take as it is; adapters are merged.",
        allow_abbrev=False,
    )
    parser.add_argument("model", help="path or Hub id of a disco checkpoint, a scalar reward model or an adapter")
    parser.add_argument("output", help="directory to write")
    parser.add_argument(
        "--to",
        choices=TARGETS,
        required=True,
        help="scalar: a plain reward model, the location; two-logit: a plain classifier with location and raw scale, "
        "for engines such as vLLM; disco: a full disco checkpoint",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is in OUTPUT")
    args = parser.parse_args(argv)
    try:
        report = export(args.model, args.output, args.to, args.dtype, args.overwrite)
    except (ValueError, OSError, ProofError) as error:
        sys.exit(f"{parser.prog}: {error}")
    print(f"{args.output}: {report}")
