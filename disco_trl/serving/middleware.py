"""What a request passes before it reaches the endpoints: its head, authentication, limits on bodies, detection of
disconnects, metrics.
"""

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
MAX_HEADERS = 100
# Refused clients whose unread bodies are discarded at the same time. More are closed at once.
MAX_DISCARDING = 64


@dataclass(frozen=True)
class Limits:
    """Limits of the server. A request beyond them is refused with a reason.

    Args:
        max_queue (`int`, *optional*, defaults to `2**20`):
            Maximum number of tokens that wait for the model, over all clients.
        max_batch_tokens (`int`, *optional*, defaults to `TOKENS_PER_BATCH`):
            Maximum number of tokens in one batch, padding included. A longer text is scored alone.
        max_body_bytes (`int`, *optional*, defaults to `2**20`):
            Maximum size of one request's body in bytes.
        max_texts_per_request (`int`, *optional*, defaults to `1024`):
            Maximum number of items or queries in one request.
        max_tokens (`int`, *optional*, defaults to `None`):
            Maximum number of tokens of one text. A longer text is refused, not truncated. If `None`, the number of
            positions of the model is the limit.
        max_pairs_per_request (`int`, *optional*, defaults to `2**16`):
            Maximum number of probabilities P(a ≻ b) that one request asks for: its pairs, and the pairs of answers to
            one prompt if its transform compares them.
        max_connections (`int`, *optional*, defaults to `4096`):
            Maximum number of open connections. Seven eighths of them may have a request that is being read or
            answered.
        head_seconds (`float`, *optional*, defaults to `10.0`):
            Number of seconds in which the head of a request has to arrive, from the opening of a connection or from
            the previous answer.
        body_seconds (`float`, *optional*, defaults to `30.0`):
            Number of seconds in which the body of a request has to arrive.
        answer_seconds (`float`, *optional*, defaults to `30.0`):
            Number of seconds in which a client has to take what the server has sent. After that its connection is
            closed.
        shutdown_seconds (`int`, *optional*, defaults to `60`):
            Number of seconds in which a server that shuts down answers the requests that it has accepted. After that
            they are given up.
        max_bodies_bytes (`int`, *optional*, defaults to `2**26`):
            Maximum total size in bytes of the bodies of all requests that are being read or answered.
    """

    max_queue: int = 2**20
    max_batch_tokens: int = TOKENS_PER_BATCH
    max_body_bytes: int = 2**20
    max_texts_per_request: int = 1024
    max_tokens: int | None = None
    max_pairs_per_request: int = 2**16
    max_connections: int = 4096
    head_seconds: float = 10.0
    body_seconds: float = 30.0
    answer_seconds: float = 30.0
    shutdown_seconds: int = 60
    max_bodies_bytes: int = 2**26


class Metrics:
    """Prometheus metrics of the server.

    They live in a registry of their own, so that several applications in one process do not share them.
    """

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
        """Records a batch.

        Args:
            texts (`int`):
                Number of texts in the batch.
            tokens (`int`):
                Number of tokens in the batch, without padding.
            seconds (`float`):
                Number of seconds that the model took.
        """
        self.texts.inc(texts)
        self.tokens.inc(tokens)
        self.batch_texts.observe(texts)
        self.model_seconds.inc(seconds)


class ClientLeft(Exception):
    """Raised when a client closes its connection before it has sent its whole request."""


class Gate:
    """ASGI middleware that checks heads, authenticates clients, enforces the limits on requests and their bodies, and
    cancels the requests of clients that disconnect.

    A body is read completely before the application sees it. Its bytes are counted as they arrive, because
    `Content-Length` may be missing or wrong. A refused client may continue to send for the rest of `body_seconds`, and
    what it sends is discarded: closing a connection with unread bytes resets it, and a reset may destroy the answer
    (RFC 9112, section 9.6). Only `MAX_DISCARDING` clients at a time have that, because anybody can be refused.

    `GET /health` is the only request that needs no token. It needs no place among the requests either, so that load
    balancers get an answer from a server that is busy.

    Args:
        app (ASGI application):
            Application to protect.
        limits ([`Limits`]):
            Limits to enforce.
        metrics ([`Metrics`]):
            Where requests are counted and timed.
        token (`str` or `None`):
            Token that clients have to send. If `None`, every client is served.
    """

    def __init__(self, app: Any, limits: Limits, metrics: Metrics, token: str | None):
        self.app = app
        self.limits = limits
        self.metrics = metrics
        self.token = token
        # Changed by the event loop's thread alone, and never across an `await`, so that they need no lock.
        self._bodies_bytes = 0
        self._requests = 0
        self._discarding = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serves one connection's request, as the ASGI specification prescribes."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start = time.perf_counter()
        # Every label value is a time series of its own in Prometheus, so that unknown paths share one.
        path = scope["path"] if scope["path"] in PATHS else "other"
        status = "disconnected"

        async def send_and_note_status(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        # One iterator for both readers: a refusal may discard the rest of a body that was read in part, within the
        # same deadline.
        chunks = _chunks(receive, asyncio.get_running_loop().time() + self.limits.body_seconds)
        try:
            await self._admit(scope, receive, send_and_note_status, chunks)
        except RefusalError as refusal:
            await self._refuse(refusal, send_and_note_status, chunks)
        except asyncio.CancelledError:
            # By a server that shuts down and has waited long enough.
            if status != "disconnected":
                raise  # The answer has begun, and its rest will never be taken.
            shutdown = RefusalError(503, "the server is shutting down", headers={"Retry-After": "10"})
            await self._refuse(shutdown, send_and_note_status, chunks)
        except ClientLeft:
            pass  # Nobody is left to answer. The request is counted as disconnected.
        except Exception:
            status = "500"
            raise
        finally:
            self.metrics.requests.labels(path, status).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - start)

    async def _admit(self, scope: Any, receive: Any, send: Any, chunks: AsyncIterator[bytes]) -> None:
        headers = dict(scope["headers"])
        # Before the body is read, so that a stranger cannot occupy memory.
        _check_head(scope["headers"], headers)
        if _asks_for_health(scope, headers):  # Load balancers query the health without a token.
            await self._read(chunks, headers, bytearray())  # its end: what comes after that is a disconnect
            await self._answer(scope, receive, send, b"")
            return
        self._check_token(headers)
        # The rest are for connections that wait for a request or for their answer to be taken, and for `/health`.
        if self._requests >= max(self.limits.max_connections * 7 // 8, 1):
            raise RefusalError(503, "too many requests at once", headers={"Retry-After": "1"})
        self._requests += 1
        body = bytearray()
        try:
            await self._read(chunks, headers, body)
            await self._answer(scope, receive, send, bytes(body))
        finally:
            self._requests -= 1
            # `body` is filled in place, so that its length is what `_read` has counted, even if that was interrupted.
            self._bodies_bytes -= len(body)

    def _check_token(self, headers: dict[bytes, bytes]) -> None:
        if self.token is None:
            return
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"basic":  # https://any:TOKEN@host, for engines that accept a URL but no headers
            with contextlib.suppress(binascii.Error):
                given = base64.b64decode(given).partition(b":")[2]
        elif scheme.lower() != b"bearer":
            given = b""
        # Compared in constant time: an ordinary comparison reveals by its duration how many bytes are right.
        if not hmac.compare_digest(given.strip(), self.token.encode()):
            raise RefusalError(
                401,
                "this server wants its token, as 'Authorization: Bearer TOKEN'",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _read(self, chunks: AsyncIterator[bytes], headers: dict[bytes, bytes], body: bytearray) -> None:
        limit = self.limits.max_body_bytes
        too_large = RefusalError(413, f"the body is larger than {limit} bytes; send fewer texts at once")
        # A body that is announced as too large is refused without waiting for it. Otherwise its bytes are counted.
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
            # The application gets the whole body at once. Further messages never come: a disconnect is handled below.
            return messages.pop() if messages else await asyncio.Future()

        answering = asyncio.create_task(self.app(scope, receive_body, send))
        leaving = asyncio.create_task(receive())  # After its body a client has nothing left to send but a disconnect.
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                answering.cancel()  # The client has left, and its texts leave the queue (see `Batcher.score`).
            # Awaited, so that an error of the application is raised here and the cancellation has run to its end.
            with contextlib.suppress(asyncio.CancelledError):
                await answering
        finally:
            answering.cancel()
            leaving.cancel()

    async def _refuse(self, refusal: RefusalError, send: Any, chunks: AsyncIterator[bytes]) -> None:
        """Sends the refusal, discards the rest of the body, and only then ends the answer and the connection."""
        response = refusal_response(refusal, {"Connection": "close"})
        await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
        # `more_body` keeps the connection open: the server closes it when the last part of the answer is sent.
        await send({"type": "http.response.body", "body": response.body, "more_body": True})
        if self._discarding < MAX_DISCARDING:
            self._discarding += 1
            try:
                with contextlib.suppress(TimeoutError, ClientLeft):
                    async for _ in chunks:
                        pass
            finally:
                self._discarding -= 1
        await send({"type": "http.response.body"})


async def _chunks(receive: Any, deadline: float) -> AsyncIterator[bytes]:
    """The body of a request as it arrives. Iterating again continues where the previous iteration stopped.

    Raises:
        `TimeoutError`: If the event loop's clock reaches `deadline` before the body is complete.
        `ClientLeft`: If the client disconnects before the body is complete.
    """
    more = True
    while more:
        async with asyncio.timeout_at(deadline):
            message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        yield message.get("body", b"")
        more = message.get("more_body", False)


def _check_head(items: list[tuple[bytes, bytes]], headers: dict[bytes, bytes]) -> None:
    if len(items) > MAX_HEADERS:
        raise RefusalError(431, f"{len(items)} headers, and {MAX_HEADERS} are the most")
    if b"content-length" in headers and b"transfer-encoding" in headers:
        # A proxy that reads the other one sees the end of this request, and the next one, elsewhere (RFC 9112, 6.3).
        raise RefusalError(400, "Content-Length and Transfer-Encoding contradict each other; send one of them")


def _asks_for_health(scope: Any, headers: dict[bytes, bytes]) -> bool:
    """Whether this is exactly `GET /health`, without a body: an encoded path, for instance, is another one."""
    has_body = headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers
    return scope["method"] == "GET" and scope["raw_path"] == b"/health" and not has_body


def refusal_response(refusal: RefusalError, headers: dict[str, str] | None = None) -> JSONResponse:
    """Converts a refusal to an HTTP response.

    Args:
        refusal ([`~disco_trl.serving.schemas.RefusalError`]):
            Refusal to convert.
        headers (`dict[str, str]`, *optional*, defaults to `None`):
            Headers to add to those of the refusal.

    Returns:
        `fastapi.responses.JSONResponse`: The response.
    """
    return JSONResponse(refusal.content(), refusal.status, {**(refusal.headers or {}), **(headers or {})})
