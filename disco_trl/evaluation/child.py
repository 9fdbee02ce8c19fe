"""A process that ends when the one that started it does, however that ends, and that says how much memory it has held.

The parent holds one end of a pipe, which the system closes with it, on SIGKILL too; the child reads the other end as
its standard input.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import IO


def run_child(command: Sequence[str], log: IO[str]) -> int:
    """Runs a command that calls [`end_with_parent`], and waits for it.

    Args:
        command (`Sequence[str]`):
            Program and arguments.
        log (file):
            File that gets all output.

    Returns:
        `int`: Exit status.
    """
    # Leaving the block, by an exception too, closes the pipe and waits for the child.
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT) as child:
        return child.wait()


def peak_bytes() -> int:
    """Largest memory that this process has held so far, in bytes."""
    # `ru_maxrss` is in KiB on Linux and in bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def end_with_parent() -> None:
    """Ends this process at once, whatever it is doing, when its standard input is closed."""
    threading.Thread(target=_end_at_end_of_input, name="end with parent", daemon=True).start()


def _end_at_end_of_input() -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGKILL)
