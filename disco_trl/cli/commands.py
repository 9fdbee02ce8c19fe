"""The table of commands, and what happens around each of them.

A command is a line of :data:`COMMANDS` and a module in this folder with

- a docstring, which its `--help` begins with,
- `Arguments`, a dataclass (or several) that `disco_trl.cli.parser` reads from the command line and from YAML,
- `run`, which takes an instance of it, does the work, prints what came of it, and returns the exit status (or None
  for 0).

At their tops these modules import nothing that imports torch, transformers' models, `datasets` or PEFT: `--help` and a
mistake on the command line are answered before that takes its seconds. `train` and `dpo` are launched, and of another
kind: see `disco_trl.cli.launch`.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .parser import Parser


@dataclass(frozen=True)
class Command:
    """
    What there is to know of a command before its module is imported.

    Args:
        name (`str`):
            How it is called; one word or two.
        module (`str`):
            Its module in this folder.
        help (`str`):
            What it does, in a line.
        positionals (`str`):
            The arguments that may be given without their names: words of `MODEL DATA OUTPUT`, in this order.
        is_launched (`bool`, *optional*, defaults to `False`):
            Whether it runs in processes that `accelerate launch` starts.
        after_interrupt (`str`, *optional*, defaults to `""`):
            What to do after Ctrl-C to go on, where that is possible.
    """

    name: str
    module: str
    help: str
    positionals: str
    is_launched: bool = False
    after_interrupt: str = ""

    def load(self) -> ModuleType:
        """Import its module."""
        return importlib.import_module(f".{self.module}", __package__)

    def parser(self, prog: str | None = None) -> Parser:
        """Its parser; `prog` is what it is called in messages, by default `disco-trl NAME`."""
        from .parser import Parser  # imports TRL's, which takes 0.2 seconds

        module = self.load()
        return Parser(
            prog or f"disco-trl {self.name}", module.Arguments, self.positionals.split(), description=module.__doc__
        )


AGAIN = "run the same command again to go on"
COMMANDS = {
    command.name: command
    for command in (
        Command(
            "train",
            "train",
            "Train a reward model; takes the arguments of `trl reward` and those of DiscoRewardConfig.",
            "MODEL DATA OUTPUT_DIR",
            is_launched=True,
        ),
        Command(
            "dpo",
            "dpo",
            "Train a policy by DPO; takes the arguments of `trl dpo` and those of DiscoDPOConfig.",
            "MODEL DATA OUTPUT_DIR",
            is_launched=True,
        ),
        Command("estimate", "estimate", "Tell how much memory training will need.", "MODEL"),
        Command(
            "evaluate",
            "evaluate",
            "Tell how good a reward model is on held-out data, and how honest.",
            "MODEL DATA OUTPUT_DIR",
        ),
        Command(
            "compare",
            "compare",
            "Train Bradley–Terry and disco variants alike, and tell which is better.",
            "MODEL DATA OUTPUT_DIR",
            after_interrupt=AGAIN,
        ),
        Command(
            "score",
            "score",
            "Add location, scale and reward to each row of a dataset.",
            "MODEL DATA OUTPUT_FILE",
            after_interrupt=AGAIN,
        ),
        Command("filter", "filter", "Keep, drop or flip preference pairs by what a model says.", "DATA OUTPUT_FILE"),
        Command(
            "best-of-n", "best_of_n", "Choose the best of several answers to each prompt.", "MODEL DATA OUTPUT_FILE"
        ),
        Command(
            "data check", "data_check", "Tell what a preference dataset holds, and what is wrong with it.", "DATA"
        ),
        Command(
            "data convert",
            "data_convert",
            "Convert preferences of another format to the columns that disco-trl reads.",
            "DATA OUTPUT_FILE",
        ),
        Command(
            "export",
            "export",
            "Merge an adapter; write a scalar, a two-logit or a disco checkpoint.",
            "MODEL OUTPUT_DIR",
        ),
        Command("serve", "serve", "Answer requests for rewards over HTTP.", "MODEL"),
    )
}

USER_ERRORS = (ValueError, TypeError, OSError, ImportError, FloatingPointError)
"""What the user can put right: a value, a file, an optional dependency that is missing, a dtype that overflows."""


def run(command: Command, words: Sequence[str]) -> int:
    """
    Run a command in this process.

    Args:
        command ([`Command`]):
            One of :data:`COMMANDS`.
        words (`Sequence[str]`):
            Its command line.

    Returns:
        `int`: The exit status.
    """
    prog = f"disco-trl {command.name}"
    with interrupts(prog, command.after_interrupt), user_errors(prog):
        parsed = command.parser().parse(words)
        return command.load().run(*parsed.arguments) or 0


@contextlib.contextmanager
def user_errors(prog: str) -> Iterator[None]:
    """Exit with `PROG: MESSAGE` and status 1 where the user made a mistake; any other error keeps its traceback."""
    try:
        yield
    except RecursionError:
        sys.exit(f"{prog}: a value in a file is nested too deeply to be read")
    except Exception as error:
        # Errors that the package itself defines are written for the user, whatever they derive from.
        if not isinstance(error, USER_ERRORS) and not type(error).__module__.startswith("disco_trl."):
            raise
        sys.exit(f"{prog}: {error}")


@contextlib.contextmanager
def interrupts(prog: str, after_interrupt: str = "") -> Iterator[None]:
    """
    Say on Ctrl-C that the command was interrupted, and how to go on if that is possible, and exit with status 130.

    The message of a `KeyboardInterrupt` that has one stands in the place of `after_interrupt`.
    """
    try:
        yield
    except KeyboardInterrupt as interrupt:
        # Of several processes, which all get the signal, the first one speaks.
        if os.environ.get("RANK", "0") == "0":
            go_on = str(interrupt) or after_interrupt
            print(f"{prog}: interrupted{go_on and '; '}{go_on}", file=sys.stderr)
        raise SystemExit(130) from None  # 128 and the number of SIGINT, as shells count
