"""
Lending another library a function or class of ours, in the place of a global of its module, and to one thread only.

TRL and accelerate look up a class and a function as globals where they offer no argument for another one. A global is
one for the whole process. What stands in its place while it is lent is therefore a stand-in that asks a context
variable: the code that borrows gets ours, and every other thread the original.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any


_LENT: ContextVar[Mapping[StandIn, Any]] = ContextVar("disco_trl_lent", default=MappingProxyType({}))
_lock = threading.Lock()


class StandIn:
    """
    What a module has under a name while something is lent in its place, in any thread.

    Calls and attributes are those of what is lent in threads that borrow, and those of the original in all others.

    Args:
        original (`Any`):
            Function or class that the module has otherwise.
    """

    def __init__(self, original: Any):
        self.original = original
        self.borrowers = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(_LENT.get().get(self, self.original), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _LENT.get().get(self, self.original)(*args, **kwargs)


@contextlib.contextmanager
def lend(namespace: dict[str, Any], name: str, lent: Any) -> Iterator[None]:
    """
    Lend something in the place of a global, in this thread, for as long as the context lasts.

    Args:
        namespace (`dict[str, Any]`):
            Globals of the module, its `__dict__`.
        name (`str`):
            Name of the global.
        lent (`Any`):
            What the name stands for in this thread.

    Raises:
        `KeyError`: If the module has no such global.
    """
    with _lock:
        held = namespace[name]
        stand_in = held if isinstance(held, StandIn) else StandIn(held)
        stand_in.borrowers += 1
        namespace[name] = stand_in
    token = _LENT.set({**_LENT.get(), stand_in: lent})
    try:
        yield
    finally:
        _LENT.reset(token)
        with _lock:
            stand_in.borrowers -= 1
            # Unless another library has replaced it meanwhile
            if not stand_in.borrowers and namespace.get(name) is stand_in:
                namespace[name] = stand_in.original
