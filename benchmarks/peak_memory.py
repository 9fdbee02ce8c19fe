"""Peak memory of a process. The benchmarks measure it in a new process, because memory is seldom returned once used.

This module has no command line; `benchmarks.speed`, `benchmarks.estimate` and `benchmarks.long_run` use it.
"""

import re
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from disco_trl.evaluation.child import peak_bytes


SECONDS_BETWEEN_LOOKS = 0.005


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a new process.

    Args:
        function (`Callable`):
            Function at the top of a module, so that it can be pickled.
        *arguments:
            Arguments of the function, which are pickled as well.

    Returns:
        Result of the function.
    """
    # Spawned, because a forked process would start with the memory of this one.
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


class PeakMemory:
    """Context manager that records the peak memory of this process, above what it held on entry, as `peak_bytes`.

    On Linux only anonymous memory (`RssAnon`) is counted, because the kernel may drop the pages of a memory-mapped
    dataset or checkpoint at any time. Elsewhere it is the resident set, including such pages.

    Args:
        on_gpu (`bool`, *optional*, defaults to `False`):
            Whether to measure torch's allocations on the GPU instead.
    """

    peak_bytes = 0

    def __init__(self, on_gpu: bool = False):
        self.on_gpu = on_gpu

    def __enter__(self) -> "PeakMemory":
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            return self
        self._before = self._at_most = held_bytes()
        self._is_over = threading.Event()
        self._looker = threading.Thread(target=self._look, daemon=True)
        self._looker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.on_gpu:
            self.peak_bytes = torch.cuda.max_memory_allocated() - self._before
            return
        self._is_over.set()
        self._looker.join()
        self.peak_bytes = max(self._at_most, held_bytes()) - self._before

    def _look(self) -> None:
        while not self._is_over.wait(SECONDS_BETWEEN_LOOKS):
            self._at_most = max(self._at_most, held_bytes())


def held_bytes() -> int:
    """Current memory of this process in bytes, see [`PeakMemory`]."""
    status = Path("/proc/self/status")
    found = re.search(r"RssAnon:\s+(\d+) kB", status.read_text()) if status.exists() else None
    if found:
        return int(found[1]) * 1024
    return peak_bytes()
