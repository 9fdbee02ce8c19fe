"""Commands that train: started by `accelerate launch` in as many processes as asked for, as `trl` starts its scripts.

`disco-trl train ARGUMENTS` reads its arguments once to take out those of the launcher, and has
`python -m disco_trl.cli.launch train ARGUMENTS` launched with the rest. In each process that is :func:`run_launched`;
`scripts/disco_reward.py`, which users launch themselves, runs the same. The module of such a command has, besides
`Arguments`,

- `make_trainer(*arguments)`, where a mistake of the user shows,
- `train(trainer, *arguments)`, whose errors keep their traceback, as they may be the machine's or a bug,
- `how_to_go_on(*arguments)`, what to do after Ctrl-C.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from .commands import COMMANDS, Command, interrupts, user_errors


def launch(command: Command, words: Sequence[str]) -> int:
    """
    Run a command in processes of its own.

    What is not among the command's own arguments but among those of `accelerate launch` (`--num_processes 2`,
    `--accelerate_config zero2`), on the command line or in the YAML file, goes to the launcher.

    Args:
        command ([`~disco_trl.cli.commands.Command`]):
            One with `is_launched`.
        words (`Sequence[str]`):
            Its command line.

    Returns:
        `int`: The exit status.
    """
    prog = f"disco-trl {command.name}"
    with interrupts(prog), user_errors(prog):
        from accelerate.commands.launch import launch_command
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from trl.cli.accelerate_config import resolve_accelerate_config_argument

        launcher = _launcher_parser()
        # The processes parse the arguments once more, and it is for them to warn.
        with warnings.catch_warnings(action="ignore"):
            logging.disable(logging.WARNING)
            try:
                parsed = command.parser().parse(words, launcher._option_string_actions)
            finally:
                logging.disable(logging.NOTSET)
        # Started as a module: by its path, the package's folder would come first on sys.path and hide other modules
        # named `data` or `models`. `--quiet`: the training process has told its error, and the launcher's own adds
        # nothing.
        arguments = launcher.parse_args(
            [
                *resolve_accelerate_config_argument([*parsed.launcher_config, *parsed.launcher_words]),
                "--quiet",
                "--module",
                __name__,
                command.name,
                *parsed.words,
            ]
        )
        try:
            launch_command(arguments)
        except (KeyboardInterrupt, SignalException) as stop:
            # torch's launcher of several processes turns signals into an exception of its own.
            if isinstance(stop, SignalException) and stop.sigval != signal.SIGINT:
                raise
            raise KeyboardInterrupt(command.load().how_to_go_on(*parsed.arguments)) from None
    return 0


def main(name: str) -> None:
    """
    What a script that users launch themselves runs: the command in this process, with the arguments of `sys.argv`.

    Args:
        name (`str`):
            The command.
    """
    prog = Path(sys.argv[0]).name
    with interrupts(prog):
        run_launched(name, sys.argv[1:], prog)


def run_launched(name: str, words: Sequence[str], prog: str | None = None) -> None:
    """
    Run a command in this process, which is one of those that were launched, or the only one.

    Args:
        name (`str`):
            The command.
        words (`Sequence[str]`):
            Its command line.
        prog (`str`, *optional*):
            What it is called in messages, by default `disco-trl NAME`.

    Raises:
        `KeyboardInterrupt`: On Ctrl-C, with what to do to go on.
    """
    command = COMMANDS[name]
    prog = prog or f"disco-trl {name}"
    with user_errors(prog):
        module = command.load()
        parser = command.parser(prog)
        parsed = parser.parse(words, _launcher_parser()._option_string_actions)
        # A config file may also hold what `accelerate launch` takes: by now the launcher has read that. On this
        # command line such an argument comes too late.
        if parsed.launcher_words:
            late = " ".join(parsed.launcher_words)
            parser.error(
                f"{late} came too late: it belongs to the launcher, before the script's name (accelerate launch "
                f"{late} {prog} ...), or to `disco-trl {name}`"
            )
    try:
        with user_errors(prog):
            trainer = module.make_trainer(*parsed.arguments)
        module.train(trainer, *parsed.arguments)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(module.how_to_go_on(*parsed.arguments)) from None


def _launcher_parser() -> argparse.ArgumentParser:
    """The parser of `accelerate launch`, with the option that `trl` adds to it."""
    from accelerate.commands.launch import launch_command_parser

    parser = launch_command_parser()
    parser.add_argument("--accelerate_config")
    return parser


if __name__ == "__main__":
    try:
        run_launched(sys.argv[1], sys.argv[2:])
    except KeyboardInterrupt:
        # The launcher got the same Ctrl-C, and tells of it.
        sys.exit(130)
