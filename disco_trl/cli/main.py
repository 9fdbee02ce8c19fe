"""The `disco-trl` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .._version import __version__
from .commands import COMMANDS, run


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run `disco-trl`.

    Args:
        argv (`Sequence[str]`, *optional*):
            The command and its arguments, by default those of this process.

    Returns:
        `int`: The exit status.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if " ".join(argv[:2]) in COMMANDS:
        argv[:2] = [" ".join(argv[:2])]
    parser = argparse.ArgumentParser(
        prog="disco-trl",
        description="Reward models that give a distribution in place of a number.",
        epilog="disco-trl COMMAND --help lists the arguments of a command.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"disco-trl {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for command in COMMANDS.values():
        commands.add_parser(command.name, help=command.help, add_help=False)

    # What follows the command is its own, words that look like ours included.
    name = parser.parse_args(argv[:1]).command
    if name is None:
        parser.print_help()
        return 0
    if COMMANDS[name].is_launched:
        from .launch import launch  # imports nothing of weight itself, but for the one command

        return launch(COMMANDS[name], argv[1:])
    return run(COMMANDS[name], argv[1:])
