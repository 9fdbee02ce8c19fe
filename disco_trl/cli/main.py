"""The `disco-trl` command. Each subcommand is a module with a `main(argv)`, imported when it runs."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from .._version import __version__


# name: (module, what it does)
COMMANDS = {
    "train": ("train", "train a reward model; takes the arguments of `trl reward` and those of DiscoRewardConfig"),
    "estimate": ("estimate", "say how many parameters and how much memory training will need"),
    "evaluate": ("evaluate", "say how good a reward model is on held-out data, and how honest; with a report"),
    "compare": ("compare", "train Bradley-Terry and our variants alike, and say which is better"),
    "score": ("score", "add location, scale and reward to each row of a dataset"),
    "filter": ("filter", "keep, drop or flip preference pairs by predicted probability and uncertainty"),
    "best-of-n": ("best_of_n", "pick the best of several answers to each prompt"),
    "data": ("data", "check a preference dataset, or convert another format to one"),
    "export": ("export", "merge an adapter; write a plain scalar, a two-logit or a disco checkpoint"),
    "serve": ("serve", "answer requests for rewards over HTTP"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `disco-trl` with `argv` (default: the command line) and return its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="disco-trl",
        description="Reward models that give a distribution in place of a number.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"disco-trl {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (_, help_text) in COMMANDS.items():
        # `disco-trl train --help` is the training parser's own.
        commands.add_parser(name, help=help_text, add_help=False)

    # What follows the command is its own, words that look like ours included.
    args, rest = parser.parse_known_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    module, _ = COMMANDS[args.command]
    try:
        command = importlib.import_module(f".{module}", __package__)
    except ImportError as error:  # of an optional dependency; the message names the extra
        sys.exit(f"disco-trl {args.command}: {error}")
    try:
        command.main(rest)
    except RecursionError:
        sys.exit(f"disco-trl {args.command}: a value in a file is nested too deeply to be read")
    return 0
