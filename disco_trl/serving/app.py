"""HTTP server for a reward model: the application behind `disco-trl serve`.

What flows: a body that [`Gate`] has let in → a request that `schemas` has validated → token ids, made in one thread →
location and scale, computed by the [`~disco_trl.serving.batching.Batcher`] in another → rewards. Nothing is truncated.
A client that disconnects gives up its place in the queue. A reward that is not finite is an error.

    disco-trl serve my-reward-model --port 8000
    curl localhost:8000/score -H 'Content-Type: application/json' -d '{"items": ["An answer.", "Another."]}'
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from .._version import __version__
from ..distributions.reward_distribution import RewardDistribution
from ..distributions.transforms import Transform, get_transform
from ..models.inference import TOKENS_PER_BATCH, most_positions
from ..rewards.disco_reward import DiscoReward
from ..rewards.reward_function import prompt_key
from .batching import Batcher, QueueFullError, TooLargeError
from .rendered import RenderedTexts


try:
    from fastapi import FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, PlainTextResponse
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

    from .middleware import Gate, Limits, Metrics, refusal_response
    from .schemas import (
        Answer,
        Message,
        RefusalError,
        Result,
        RewardRequest,
        RewardResponse,
        ScoreRequest,
        ScoreResponse,
        field_name,
    )
except ImportError as error:
    raise ImportError(f"disco-trl serve needs {error.name}: pip install 'disco-trl[serve]'") from error


class Scorer:
    """Connects the endpoints to the model: tokenization, limits, transforms and groups.

    Args:
        reward ([`DiscoReward`]):
            Reward function with the model, its tokenizer and the default transform.
        limits ([`~disco_trl.serving.middleware.Limits`]):
            Limits of the server.
        metrics ([`~disco_trl.serving.middleware.Metrics`]):
            Where batches and the length of the queue are reported.
    """

    def __init__(self, reward: DiscoReward, limits: Limits, metrics: Metrics):
        self.reward = reward
        self.limits = limits
        # A text longer than the model's positions would fail in the model, at the cost of a batch.
        bounds = filter(None, (limits.max_tokens, most_positions(reward.model)))
        self.max_tokens = min(bounds, default=TOKENS_PER_BATCH)
        self.batcher = Batcher(reward.model, limits.max_queue, limits.max_batch_tokens, metrics.observe_batch)
        metrics.queue.set_function(lambda: self.batcher.waiting_tokens)
        # One thread: tokenizers are not documented as thread-safe, and the event loop must not block on one.
        self._tokenizing = ThreadPoolExecutor(1, "disco-tokenizer")

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Context in which the tokenizer and model threads run. On exit, texts that are still queued are scored."""
        self.batcher.start()
        try:
            yield
        finally:
            # In the order of the flow: what is being tokenized still reaches the batcher.
            self._tokenizing.shutdown()
            self.batcher.close()

    async def distribution(self, field: str, contents: Sequence[Any], encode: Callable[[Any], list[int]]) -> Any:
        """Scores the contents of one field of a request.

        Args:
            field (`str`):
                Name of the field, for error messages.
            contents (`Sequence`):
                `N` contents, such as texts or items.
            encode (`Callable`):
                Function that maps one content to its token ids.

        Returns:
            [`RewardDistribution`]: Rewards of shape `(N,)`, in the order of `contents`.

        Raises:
            `RefusalError`: If there are too many texts (413), a text cannot be tokenized or is too long (422), the
            queue is full (503), or the model fails or returns values that are not finite (500).
        """
        if len(contents) > self.limits.max_texts_per_request:
            reason = f"{len(contents)} texts, and {self.limits.max_texts_per_request} are the most in one request"
            raise RefusalError(413, reason, field)
        # All of a request is tokenized before any of it is queued, so that an invalid text costs no time of the model.
        sequences = await asyncio.get_running_loop().run_in_executor(
            self._tokenizing, self._tokenize, field, contents, encode
        )
        try:
            rewards = await self.batcher.score(sequences)
        except QueueFullError as error:
            raise RefusalError(503, str(error), headers={"Retry-After": str(error.retry_after)}) from None
        except TooLargeError as error:
            raise RefusalError(413, str(error), field) from None
        except Exception as error:  # The batcher has logged it with its traceback.
            raise RefusalError(500, f"the model failed: {type(error).__name__}", field) from None
        self._check_finite(field, torch.stack([rewards.location, rewards.scale]), "is not finite; load it in float32")
        return rewards

    def _tokenize(self, field: str, contents: Sequence[Any], encode: Callable[[Any], list[int]]) -> list[list[int]]:
        sequences = []
        for index, content in enumerate(contents):
            name = f"{field}[{index}]"
            try:
                ids = encode(content)
            except Exception as error:  # A template may raise anything, and its only input is the client's.
                raise RefusalError(422, f"cannot be tokenized: {error}", name) from None
            if len(ids) > self.max_tokens:
                raise RefusalError(422, f"{len(ids)} tokens, and {self.max_tokens} are the most in one text", name)
            if not ids:
                raise RefusalError(422, "has no tokens", name)
            sequences.append(ids)
        return sequences

    def encode_item(self, item: str | list[Message] | Answer) -> list[int]:
        """Tokenizes an item of `/score` exactly as in training.

        Args:
            item (`str`, `list[Message]` or [`~disco_trl.serving.schemas.Answer`]):
                Validated item.

        Returns:
            `list[int]`: Token ids.
        """
        if not isinstance(item, Answer):
            # Its parts have been validated as parts of the request, so that it is built without validation.
            item = Answer.model_construct(completion=item)
        completion: Any = _plain(item.completion)
        prompt: Any = type(completion)() if item.prompt is None else _plain(item.prompt)
        [ids] = self.reward.tokenize(
            [prompt], [completion], tools=[item.tools], chat_template_kwargs=[item.chat_template_kwargs]
        )
        return ids

    def transform(self, request: ScoreRequest) -> Transform:
        """Resolves the transform of a request.

        Args:
            request ([`~disco_trl.serving.schemas.ScoreRequest`]):
                Request, which may name a transform and its options.

        Returns:
            [`~disco_trl.distributions.transforms.Transform`]: The requested transform. A request that names neither a
            transform nor an option gets the server's own.

        Raises:
            `RefusalError`: If the transform or an option is unknown, out of its domain, or undefined for the model's
            family (422).
        """
        default = self.reward.transform
        name, options = request.transform or default.name, request.options()
        if name == default.name and not options:
            return default
        if name == "sample":
            # A transform is built anew for each request: with a fixed seed, all of them would draw the same noise.
            options.setdefault("seed", secrets.randbits(63))
        try:
            transform = get_transform(name, **options)
            transform.check_family(self.reward.family.name)
        except ValueError as error:
            raise RefusalError(422, str(error), "transform") from None
        return transform

    def rewards(
        self, field: str, transform: Transform, distribution: RewardDistribution, keys: Sequence[Any]
    ) -> list[float]:
        """Applies a transform to the rewards of a request.

        Args:
            field (`str`):
                Name of the field, for error messages.
            transform ([`~disco_trl.distributions.transforms.Transform`]):
                Transform to apply.
            distribution ([`RewardDistribution`]):
                Rewards of shape `(N,)`.
            keys (`Sequence`):
                `N` hashable keys. Rows with equal keys answer the same prompt; `None` marks a row whose prompt is
                unknown.

        Returns:
            `list[float]`: `N` transformed rewards.

        Raises:
            `RefusalError`: If a transform that compares the answers to one prompt finds no prompt, or no two answers
            to one prompt, or if a transformed reward is not finite (422).
        """
        group = None
        if transform.needs_groups:
            if None in keys:
                raise RefusalError(
                    422,
                    f"transform {transform.name!r} compares the answers to one prompt: name it by 'prompt' or 'group'",
                    f"{field}[{keys.index(None)}]",
                )
            # Keys may be strings or hashes of prompts; the transform compares small integers.
            numbers: dict[Any, int] = {}
            group = torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys])
            if len(numbers) == len(keys):
                raise RefusalError(
                    422,
                    f"transform {transform.name!r} compares the answers to one prompt, and no two of these are; send "
                    "the answers to one prompt together, or take another transform",
                    field,
                )
        try:
            rewards = transform(distribution, group)
        except ValueError as error:
            raise RefusalError(422, str(error), "transform") from None
        # Location and scale are finite here, so a value that is not comes from the client's option: 422, not 500.
        self._check_finite(field, rewards[None], f"is not finite after the transform {transform.name!r}", 422)
        return rewards.tolist()

    def _check_finite(self, field: str, rows: torch.Tensor, what: str, status: int = 500) -> None:
        bad = torch.nonzero(~rows.isfinite().all(dim=0)).flatten().tolist()
        if bad:
            raise RefusalError(status, f"the reward {rows[:, bad[0]].tolist()} {what}", f"{field}[{bad[0]}]")


def _plain(content: str | list[Message]) -> str | list[dict[str, Any]]:
    return content if isinstance(content, str) else [message.model_dump(exclude_unset=True) for message in content]


def _group_key(item: str | list[Message] | Answer) -> Any:
    if not isinstance(item, Answer) or (item.group is None and item.prompt is None):
        return None
    return item.group if item.group is not None else prompt_key(_plain(item.prompt))  # type: ignore[arg-type]


def create_app(reward: DiscoReward, limits: Limits, token: str | None = None, name: str = "reward model") -> FastAPI:
    """Creates the ASGI application of the server.

    Args:
        reward ([`DiscoReward`]):
            Reward function with the model, its tokenizer and the transform of requests that name none.
        limits ([`~disco_trl.serving.middleware.Limits`]):
            Limits on bodies, texts and the queue.
        token (`str`, *optional*, defaults to `None`):
            Token that clients have to send, as a bearer token or as the password of basic authentication. If `None`,
            every client is served.
        name (`str`, *optional*, defaults to `"reward model"`):
            Name of the model in the answer of `/health`.

    Returns:
        `fastapi.FastAPI`: The application. Its lifespan starts and stops the model's thread.
    """
    metrics = Metrics()
    scorer = Scorer(reward, limits, metrics)
    encode_rendered = RenderedTexts(reward.processing_class)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with scorer.running():
            yield

    # FastAPI's documentation pages load scripts from a CDN, so they are off. /openapi.json is served.
    app = FastAPI(title="disco-trl", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Gate, limits=limits, metrics=metrics, token=token)

    @app.exception_handler(RefusalError)
    async def refuse(request: Request, refusal: RefusalError) -> JSONResponse:
        return refusal_response(refusal)

    @app.exception_handler(RequestValidationError)
    async def refuse_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first, *others = error.errors()
        if first["type"] == "json_invalid":
            return refusal_response(RefusalError(400, f"the body is not JSON: {first['ctx']['error']}"))
        field, reason = field_name(first["loc"]), first["msg"]
        if field is None:
            reason = "the body must be a JSON object, sent with Content-Type: application/json"
        if others:
            reason += f" (and {len(others)} more)"
        return refusal_response(RefusalError(422, reason, field))

    async def refuse_plainly(request: Request, error: Any) -> JSONResponse:
        return refusal_response(RefusalError(error.status_code, error.detail, headers=error.headers))

    for status in (400, 404, 405):  # FastAPI's own errors: an unreadable body, a wrong path or method
        app.add_exception_handler(status, refuse_plainly)

    @app.post("/score")
    async def score(request: ScoreRequest) -> ScoreResponse:
        transform = scorer.transform(request)
        found = await scorer.distribution("items", request.items, scorer.encode_item)
        rewards = scorer.rewards("items", transform, found, [_group_key(item) for item in request.items])
        first, second = torch.tensor(request.pairs, dtype=torch.long).reshape(-1, 2).T
        fields = ("location", "scale", "shape", "location_error")
        columns = {name: getattr(found, name).tolist() for name in fields if getattr(found, name) is not None}
        rows = zip(*columns.values(), rewards, strict=True)
        return ScoreResponse(
            family=found.family,
            transform=transform.name,
            results=[Result(**dict(zip([*columns, "reward"], row, strict=True))) for row in rows],
            prob_greater=found[first].prob_greater(found[second]).tolist(),
        )

    @app.post("/get_reward")
    async def get_reward(request: RewardRequest) -> RewardResponse:
        prompts: list[Any] = [None] * len(request.query) if request.prompts is None else request.prompts
        texts = list(zip(request.query, prompts, strict=True))
        found = await scorer.distribution("query", texts, lambda text: encode_rendered(*text))
        keys = [None if request.prompts is None else prompt_key(prompt) for prompt in prompts]
        rewards = scorer.rewards("query", reward.transform, found, keys)
        logs = {"location": found.location.tolist(), "scale": found.scale.tolist()}
        return RewardResponse(rewards=rewards, scores=rewards, extra_logs=logs)

    @app.get("/health")
    async def health() -> JSONResponse:
        is_ready = scorer.batcher.is_alive
        content = {
            "status": "ready" if is_ready else "the model's thread has died; restart the server",
            "model": name,
            "family": reward.family.name,
            "transform": reward.transform.name,
            "max_texts_per_request": limits.max_texts_per_request,
            "max_body_bytes": limits.max_body_bytes,
            "max_tokens": scorer.max_tokens,
            "queue_tokens": scorer.batcher.waiting_tokens,
        }
        return JSONResponse(content, 200 if is_ready else 503)

    @app.get("/metrics")
    async def prometheus() -> PlainTextResponse:
        return PlainTextResponse(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app
