"""Connections of the server, from their opening to a complete head and from a complete answer to their end.

A stranger can occupy the server before [`~disco_trl.serving.middleware.Gate`] asks for a token: with heads that never
end, with connections that send nothing, and with answers that it does not read. If httptools is installed, uvicorn
parses heads with it, and it has no limit. uvicorn's h11 protocol limits the size of a head. Neither limits the time
from the opening of a connection to the end of a head, the number of connections (`limit_concurrency` counts them after
the head, and closes none), or the time in which a client has to take an answer. This module adds these limits to the
h11 protocol.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from dataclasses import dataclass, field, replace
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from .middleware import Limits


logger = logging.getLogger(__name__)

MAX_HEAD_BYTES = 2**14
# Connections that the system has opened and the server has not accepted yet. The server accepts all of them at once,
# before it closes any that are too many.
BACKLOG = 256
# Files that the process has open beside its connections: the model's, the log's, the event loop's.
OTHER_FILES = 64


@dataclass
class Crowd:
    """What the connections of one server share.

    Args:
        limits ([`~disco_trl.serving.middleware.Limits`]):
            Limits to enforce.
    """

    limits: Limits
    # The connections without a request, longest wait first, with the timers that end their wait.
    waiting: dict[BoundedProtocol, asyncio.TimerHandle] = field(default_factory=dict)
    next_warning: float = 0.0

    def drop_one(self, count: int) -> None:
        """Closes the connection that has waited longest. Strangers can cause this at any rate, so that it is logged at
        most once a minute.

        Args:
            count (`int`):
                Number of open connections.
        """
        longest = next(iter(self.waiting), None)
        if longest is not None:  # The newest one waits, unless its client has left already.
            longest.drop()
        now = time.monotonic()
        if now >= self.next_warning:
            self.next_warning = now + 60
            logger.warning(
                "%d connections are open, and %d are the most: those that have waited longest for a request are "
                "closed. If they are your clients', raise --max_connections",
                count,
                self.limits.max_connections,
            )


class BoundedProtocol(H11Protocol):
    """uvicorn's h11 protocol with limits on the number of connections and on the time that a client may take.

    A connection *waits* while the server has no complete head from it: from its opening, or from the end of the
    previous answer. It may wait for `head_seconds`. If there are too many connections, the one that has waited longest
    is closed, so that clients that open connections and send nothing cannot keep out those that send their request at
    once. Connections with a request are never closed for others; `Gate` limits their number.

    Args:
        crowd ([`Crowd`]):
            Shared by all connections of the server.
        **kwargs:
            Those of uvicorn's protocol.
    """

    def __init__(self, *, crowd: Crowd, **kwargs: Any):
        super().__init__(**kwargs)
        self._crowd = crowd
        self._answer_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        # `pause_writing` is then called as soon as a byte has to wait for the client, and `resume_writing` when the
        # client has taken all of them.
        transport.set_write_buffer_limits(high=0)
        self._note_wait()
        if len(self.connections) > self._crowd.limits.max_connections:
            self._crowd.drop_one(len(self.connections))

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._note_wait()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._note_wait()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._end_wait()
        self.resume_writing()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._answer_timer = self.loop.call_later(self._crowd.limits.answer_seconds, self.drop)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._answer_timer is not None:
            self._answer_timer.cancel()
            self._answer_timer = None

    def drop(self) -> None:
        """Closes the connection without waiting for the client."""
        self._end_wait()
        self.transport.abort()

    def _note_wait(self) -> None:
        has_request = self.cycle is not None and not self.cycle.response_complete
        if has_request or self.transport.is_closing():
            self._end_wait()
        elif self not in self._crowd.waiting:
            self._crowd.waiting[self] = self.loop.call_later(self._crowd.limits.head_seconds, self.drop)

    def _end_wait(self) -> None:
        timer = self._crowd.waiting.pop(self, None)
        if timer is not None:
            timer.cancel()


def server_settings(limits: Limits) -> dict[str, Any]:
    """Settings of uvicorn with which the application runs.

    Args:
        limits ([`~disco_trl.serving.middleware.Limits`]):
            Limits on connections, and on the time that a shutdown takes.

    Returns:
        `dict[str, Any]`: Arguments of `uvicorn.run` and `uvicorn.Config`.
    """
    return {
        "http": functools.partial(BoundedProtocol, crowd=Crowd(limits)),
        # A WebSocket would take messages of megabytes past the gate. There is no endpoint for one.
        "ws": "none",
        "h11_max_incomplete_event_size": MAX_HEAD_BYTES,
        "backlog": BACKLOG,
        "timeout_graceful_shutdown": limits.shutdown_seconds,
        # The client's address, which these headers would change, is not used.
        "proxy_headers": False,
        "access_log": False,
    }


def fit_open_files(limits: Limits) -> Limits:
    """Raises the number of files that the process may open to what its connections need.

    A server that runs out of file descriptors accepts nobody, and cannot even close the connections that are too many.

    Args:
        limits ([`~disco_trl.serving.middleware.Limits`]):
            Limits of the server.

    Returns:
        [`~disco_trl.serving.middleware.Limits`]: The same, with fewer connections if the system's hard limit allows no
        more. A warning is logged in that case.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit.
        return limits
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = limits.max_connections + BACKLOG + OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return limits
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed == needed:
        return limits
    # Never none, where the limit is absurdly low.
    connections = max(allowed - BACKLOG - OTHER_FILES, 8)
    logger.warning(
        "%d connections are served instead of --max_connections %d, because a process may open %d files here; raise "
        "the hard limit (ulimit -Hn) for more",
        connections,
        limits.max_connections,
        hard,
    )
    return replace(limits, max_connections=connections)
