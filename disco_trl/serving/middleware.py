"""What stands before the server's endpoints: the token, limits on bodies, a watch for clients that leave, metrics."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hmac
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from ..models.inference import TOKENS_PER_BATCH
from .schemas import RefusalError


PATHS = ("/score", "/get_reward", "/health", "/metrics")


@dataclass(frozen=True)
class Limits:
    """What the server takes on. Beyond them it refuses, and says so.

    Attributes:
        max_queue: tokens that may wait for the model, of all clients together.
        max_batch_tokens: tokens that go through the model at once, padding counted; a longer text goes alone.
        max_body_bytes: of one request.
        max_texts_per_request: items or queries of one request.
        max_tokens: of one text; longer ones are refused and not truncated. None: what the model's positions allow.
        body_seconds: time for a request's body to arrive.
        max_bodies_bytes: of all requests that are being read or answered.
    """

    max_queue: int = 2**20
    max_batch_tokens: int = TOKENS_PER_BATCH
    max_body_bytes: int = 2**20
    max_texts_per_request: int = 1024
    max_tokens: int | None = None
    body_seconds: float = 30.0
    max_bodies_bytes: int = 2**26


class Metrics:
    """What Prometheus is told."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "disco_requests_total",
            "Requests answered; a status of 'disconnected' is a client that did not wait.",
            ["path", "status"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "disco_request_seconds",
            "From the first byte of a request to the end of its answer.",
            ["path"],
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120),
            registry=self.registry,
        )
        self.texts = Counter("disco_texts_total", "Texts scored.", registry=self.registry)
        self.tokens = Counter("disco_tokens_total", "Tokens scored, without padding.", registry=self.registry)
        self.batch_texts = Histogram(
            "disco_batch_texts",
            "Texts that the model was given together.",
            buckets=[2**power for power in range(11)],
            registry=self.registry,
        )
        self.model_seconds = Counter("disco_model_seconds_total", "Seconds the model ran.", registry=self.registry)
        self.queue = Gauge("disco_queue_tokens", "Tokens waiting for the model.", registry=self.registry)

    def observe_batch(self, texts: int, tokens: int, seconds: float) -> None:
        """Count what went through the model."""
        self.texts.inc(texts)
        self.tokens.inc(tokens)
        self.batch_texts.observe(texts)
        self.model_seconds.inc(seconds)


class ClientLeft(Exception):
    """The client closed its connection before the end of its request."""


class Gate:
    """ASGI middleware: lets in requests of known clients whose body is within the limits, and watches them leave.

    A body is read whole before anything else sees it, and counted while it is read: `Content-Length` may be missing or
    wrong. A client that disconnects has its request cancelled. One that is refused may go on sending for what is left
    of `body_seconds`, and nobody looks at it: a connection closed on bytes that were not read is reset, and the answer
    may be lost with it (RFC 9112, 9.6).
    """

    def __init__(self, app: Any, limits: Limits, metrics: Metrics, token: str | None):
        self.app = app
        self.limits = limits
        self.metrics = metrics
        self.token = token
        self._bodies_bytes = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one connection's request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start = time.perf_counter()
        path = scope["path"] if scope["path"] in PATHS else "other"
        status = "disconnected"

        async def send_and_note_status(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        chunks = _chunks(receive, asyncio.get_running_loop().time() + self.limits.body_seconds)
        try:
            await self._admit(scope, receive, send_and_note_status, chunks)
        except RefusalError as refusal:
            await _refuse(refusal, send_and_note_status, chunks)
        except ClientLeft:
            pass
        except Exception:
            status = "500"
            raise
        finally:
            self.metrics.requests.labels(path, status).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - start)

    async def _admit(self, scope: Any, receive: Any, send: Any, chunks: AsyncIterator[bytes]) -> None:
        headers = dict(scope["headers"])
        self._check_token(scope["path"], headers)
        body = bytearray()
        try:
            await self._read(chunks, headers, body)
            await self._answer(scope, receive, send, bytes(body))
        finally:
            self._bodies_bytes -= len(body)

    def _check_token(self, path: str, headers: dict[bytes, bytes]) -> None:
        if self.token is None or path == "/health":
            return
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"basic":  # https://any:TOKEN@host, for engines that take a URL and nothing else
            with contextlib.suppress(binascii.Error):
                given = base64.b64decode(given).partition(b":")[2]
        elif scheme.lower() != b"bearer":
            given = b""
        if not hmac.compare_digest(given.strip(), self.token.encode()):
            raise RefusalError(
                401,
                "this server wants its token, as 'Authorization: Bearer TOKEN'",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _read(self, chunks: AsyncIterator[bytes], headers: dict[bytes, bytes], body: bytearray) -> None:
        limit = self.limits.max_body_bytes
        too_large = RefusalError(413, f"the body is larger than {limit} bytes; send fewer texts at once")
        announced = headers.get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > limit:
            raise too_large
        try:
            async for chunk in chunks:
                if len(body) + len(chunk) > limit:
                    raise too_large
                if self._bodies_bytes + len(chunk) > self.limits.max_bodies_bytes:
                    raise RefusalError(503, "too many requests at once", headers={"Retry-After": "1"})
                self._bodies_bytes += len(chunk)
                body += chunk
        except TimeoutError:
            raise RefusalError(408, f"the body did not arrive in {self.limits.body_seconds:g} s") from None

    async def _answer(self, scope: Any, receive: Any, send: Any, body: bytes) -> None:
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_body() -> Any:
            return messages.pop() if messages else await asyncio.Future()

        answering = asyncio.create_task(self.app(scope, receive_body, send))
        leaving = asyncio.create_task(receive())  # after its body a client can only disconnect
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                answering.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await answering
        finally:
            answering.cancel()
            leaving.cancel()


async def _chunks(receive: Any, deadline: float) -> AsyncIterator[bytes]:
    """A request's body as it arrives; who iterates again goes on where the last one stopped.

    Raises:
        TimeoutError: the event loop's clock reached `deadline` before the body's end.
        ClientLeft: the client left before its end.
    """
    more = True
    while more:
        async with asyncio.timeout_at(deadline):
            message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        yield message.get("body", b"")
        more = message.get("more_body", False)


async def _refuse(refusal: RefusalError, send: Any, chunks: AsyncIterator[bytes]) -> None:
    """Send all of the refusal, let the rest of the body go by, and only then end the answer and the connection."""
    response = refusal_response(refusal, {"Connection": "close"})
    await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": response.body, "more_body": True})
    with contextlib.suppress(TimeoutError, ClientLeft):
        async for _ in chunks:
            pass
    await send({"type": "http.response.body"})


def refusal_response(refusal: RefusalError, headers: dict[str, str] | None = None) -> JSONResponse:
    """A refusal as an HTTP response."""
    return JSONResponse(refusal.content(), refusal.status, {**(refusal.headers or {}), **(headers or {})})
