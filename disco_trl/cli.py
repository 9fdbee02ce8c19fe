"""The `disco-trl` command. Each subcommand imports what it needs when it runs, so that `--help` comes at once."""

import argparse
import sys
from collections.abc import Sequence

from . import __version__


def run_train(argv: list[str]) -> None:
    """
    Start `disco_trl.train` through `accelerate launch`, as `trl reward` starts its script.

    What the training parser does not know (`--num_processes 2`, `--accelerate_config zero2`, on the command line or in
    the YAML file) goes to the launcher, the rest to the training processes.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    from .train import make_parser, refuse_unknown_arguments

    parser = make_parser(prog="disco-trl train")
    *_, launcher_keys, launcher_argv = parser.parse_args_and_config(
        argv, return_remaining_strings=True, separate_remaining_strings=True
    )
    refuse_unknown_arguments(parser, launcher_keys + launcher_argv)

    # The parser leaves the launcher's arguments in their order, so one pass over both lists separates them.
    training_argv, position = [], 0
    for argument in argv:
        if position < len(launcher_argv) and argument == launcher_argv[position]:
            position += 1
        else:
            training_argv.append(argument)

    # Started as a module: by its path, the package's folder would come first on sys.path and hide other modules named
    # `data` or `config`. `--quiet`: the training process has told its error; the launcher's own adds nothing.
    launch_args = launch_command_parser().parse_args(
        [
            *resolve_accelerate_config_argument(launcher_keys + launcher_argv),
            "--quiet",
            "--module",
            "disco_trl.train",
            *training_argv,
        ]
    )
    if launch_args.training_script != "disco_trl.train":
        sys.exit(f"{parser.prog}: {launch_args.training_script!r} belongs to no argument.")
    launch_command(launch_args)


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
    commands.add_parser(
        "train",
        help="train a reward model; takes the arguments of `trl reward` and those of DiscoRewardConfig",
        add_help=False,  # `train --help` is the training parser's
    )

    args, rest = parser.parse_known_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    run_train(rest)
    return 0
