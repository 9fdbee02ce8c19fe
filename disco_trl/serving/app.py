"""HTTP server for a reward model: the application behind `disco-trl serve`.

What flows: a body that [`Gate`] has let in → a request that `reading` has validated → token ids and groups → all
rewards of the model, computed by the [`~disco_trl.serving.batching.Batcher`] → those that the request asks for,
transformed → the answer as JSON. The event loop only passes these on: bodies are read and tokenized in one thread, the
model runs in a second, and answers are computed in a third, so that the server talks to other clients meanwhile. Each
thread takes one request at a time, which limits the memory that requests need. Nothing is truncated. A client that
disconnects gives up its place in the queue. A reward that is not finite is an error.

    disco-trl serve my-reward-model --port 8000
    curl localhost:8000/score -H 'Content-Type: application/json' -d '{"items": ["An answer.", "Another."]}'
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from .._version import __version__
from ..distributions.reward_distribution import RewardDistribution
from ..distributions.transforms import Transform, get_transform
from ..models.inference import TOKENS_PER_BATCH, most_positions
from ..models.reward_view import RewardsByAttribute, RewardView
from ..rewards.disco_reward import DiscoReward
from ..rewards.reward_function import prompt_key
from .batching import Batcher, QueueFullError, TooLargeError
from .rendered import RenderedTexts


try:
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, PlainTextResponse, Response
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
    from pydantic import BaseModel
    from pydantic.json_schema import models_json_schema

    from .middleware import Gate, Limits, Metrics, refusal_response
    from .reading import read_request
    from .schemas import (
        Answer,
        Message,
        RefusalError,
        Result,
        RewardRequest,
        RewardResponse,
        ScoreRequest,
        ScoreResponse,
    )
    from .views import attribute_results, requested_view
except ImportError as error:
    raise ImportError(f"disco-trl serve needs {error.name}: pip install 'disco-trl[serve]'") from error


# More than the tokens of any text have on average. A single one, such as a run of spaces, may be longer.
CHARACTERS_PER_TOKEN = 64


@dataclass(frozen=True)
class Question:
    """What a request asks of the model and of its rewards.

    Args:
        name (`str`):
            Field of the request that holds the contents, for error messages.
        sequences (`list[list[int]]`):
            Token ids of its `N` contents.
        transform ([`~disco_trl.distributions.transforms.Transform`]):
            Transform of the rewards.
        view ([`~disco_trl.models.reward_view.RewardView`]):
            Which of the model's rewards.
        group (`torch.Tensor` of shape `(N,)`, *optional*):
            Number of the prompt that each content answers, if the transform compares the answers to one prompt.
        pairs (`list[list[int]]`):
            Pairs of positions whose probabilities P(first ≻ second) are asked for.
    """

    name: str
    sequences: list[list[int]]
    transform: Transform
    view: RewardView
    group: torch.Tensor | None
    pairs: list[list[int]] = field(default_factory=list)


class Scorer:
    """Connects the endpoints to the model: validation, tokenization, limits, transforms and groups.

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
        sizes = limits.max_queue, limits.max_batch_tokens
        self.batcher = Batcher(reward.model, *sizes, metrics.observe_batch)
        self._nothing = RewardsByAttribute.of_nothing(reward.model)
        metrics.queue.set_function(lambda: self.batcher.waiting_tokens)
        self._encode_rendered = RenderedTexts(reward.processing_class)
        # One thread each: tokenizers are not documented as thread-safe, and a body that has become Python objects, or
        # a comparison of many answers, takes far more memory than the body itself.
        self._reading = ThreadPoolExecutor(1, "disco-reading")
        self._writing = ThreadPoolExecutor(1, "disco-writing")

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Context in which the threads run. On exit, what they are doing is finished and what waits is given up."""
        self.batcher.start()
        try:
            yield
        finally:
            self._reading.shutdown(cancel_futures=True)
            self.batcher.close()
            self._writing.shutdown(cancel_futures=True)

    async def answer(
        self,
        request: Request,
        read: Callable[[str, bytes], Question],
        write: Callable[[Question, RewardsByAttribute], ScoreResponse | RewardResponse],
    ) -> Response:
        """Answers a request.

        Args:
            request (`fastapi.Request`):
                Request, whose body the gate has read.
            read (`Callable`):
                Function that maps content type and body to the question.
            write (`Callable`):
                Function that maps the question and all rewards of its `N` contents to the answer.

        Returns:
            `fastapi.Response`: The answer as JSON.

        Raises:
            `RefusalError`: If `read` or `write` refuses the request, the queue is full (503) or too small for the
            request (413), or the model fails (500).
        """
        loop = asyncio.get_running_loop()
        content_type = request.headers.get("content-type", "")
        question = await loop.run_in_executor(self._reading, read, content_type, await request.body())
        rewards = await self._score(question)
        content = await loop.run_in_executor(self._writing, _written, write, question, rewards)
        return Response(content, media_type="application/json")

    async def _score(self, question: Question) -> RewardsByAttribute:
        try:
            return await self.batcher.score(question.sequences)
        except QueueFullError as error:
            raise RefusalError(503, str(error), headers={"Retry-After": str(error.retry_after)}) from None
        except TooLargeError as error:
            raise RefusalError(413, str(error), question.name) from None
        except Exception as error:  # The batcher has logged it with its traceback.
            raise RefusalError(500, f"the model failed: {type(error).__name__}", question.name) from None

    # The methods below run in the reading thread.

    def read_score(self, content_type: str, body: bytes) -> Question:
        """Reads a request of `/score`. Arguments and errors are those of [`~Scorer.answer`]."""
        request = read_request(ScoreRequest, content_type, body, self.limits)
        transform = self.transform(request)
        view = requested_view(request, self.reward.view, self.reward.model, self._nothing)
        group = self._group("items", transform, [_group_key(item) for item in request.items], len(request.pairs))
        sequences = self._tokenize("items", request.items, self.encode_item)
        return Question("items", sequences, transform, view, group, request.pairs)

    def read_rendered(self, content_type: str, body: bytes) -> Question:
        """Reads a request of `/get_reward`. Arguments and errors are those of [`~Scorer.answer`]."""
        request = read_request(RewardRequest, content_type, body, self.limits)
        prompts = request.prompts or [None] * len(request.query)
        keys = [None if prompt is None else prompt_key(prompt) for prompt in prompts]
        group = self._group("query", self.reward.transform, keys)
        sequences = self._tokenize("query", request.query, self._encode_rendered, prompts)
        return Question("query", sequences, self.reward.transform, self.reward.view, group)

    # All of a request is tokenized before any of it is queued, so that an invalid text costs no time of the model.
    def _tokenize(
        self, name: str, contents: Sequence[Any], encode: Callable[..., list[int]], *further: Sequence[Any]
    ) -> list[list[int]]:
        """Token ids of contents. `encode` gets each with its part of what else there is, as from `map`."""
        sequences = []
        for index, (content, *rest) in enumerate(zip(contents, *further, strict=True)):
            place = f"{name}[{index}]"
            # A megabyte takes seconds to tokenize, in which no other request is read.
            characters = _characters(content)
            if characters > CHARACTERS_PER_TOKEN * self.max_tokens:
                reason = f"{characters} characters are more than {self.max_tokens} tokens, the most in one text"
                raise RefusalError(422, reason, place)
            try:
                ids = encode(content, *rest)
            except Exception as error:  # A template may raise anything, and its only input is the client's.
                raise RefusalError(422, f"cannot be tokenized: {error}", place) from None
            if len(ids) > self.max_tokens:
                raise RefusalError(422, f"{len(ids)} tokens, and {self.max_tokens} are the most in one text", place)
            if not ids:
                raise RefusalError(422, "has no tokens", place)
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

    def _group(self, name: str, transform: Transform, keys: Sequence[Any], pairs: int = 0) -> torch.Tensor | None:
        """The number of the prompt that each content answers, if the transform compares the answers to one prompt.

        Contents with equal keys answer the same prompt; `None` marks one whose prompt is unknown. `pairs` is the
        number of pairs that the request compares besides.
        """
        if not transform.needs_groups:
            return None
        if None in keys:
            raise RefusalError(
                422,
                f"transform {transform.name!r} compares the answers to one prompt: name it by 'prompt' or 'group'",
                f"{name}[{keys.index(None)}]",
            )
        sizes = Counter(keys)
        if len(sizes) == len(keys):
            raise RefusalError(
                422,
                f"transform {transform.name!r} compares the answers to one prompt, and no two of these are; send "
                "the answers to one prompt together, or take another transform",
                name,
            )
        pairs += sum(size * (size - 1) // 2 for size in sizes.values())
        if pairs > self.limits.max_pairs_per_request:
            raise RefusalError(
                413,
                f"transform {transform.name!r} compares {pairs} pairs of these, and "
                f"{self.limits.max_pairs_per_request} are the most in one request; send fewer answers to one prompt",
                name,
            )
        # Keys may be strings or hashes of prompts; the transform compares small integers.
        numbers = {key: number for number, key in enumerate(sizes)}
        return torch.tensor([numbers[key] for key in keys])

    # The methods below run in the writing thread.

    def write_score(self, question: Question, everything: RewardsByAttribute) -> ScoreResponse:
        """Makes the answer of `/score`. Arguments and errors are those of [`~Scorer.answer`]."""
        found = question.view.read(self.reward.model, everything)
        rewards = self._rewards(question, found, everything)
        first, second = torch.tensor(question.pairs, dtype=torch.long).reshape(-1, 2).T
        fields = ("location", "scale", "shape", "location_error")
        columns = {name: getattr(found, name).tolist() for name in fields if getattr(found, name) is not None}
        columns["reward"] = rewards
        if found.cap is not None:
            columns["cap"] = [cap if math.isfinite(cap) else None for cap in found.cap.tolist()]
        if everything.joint is not None:
            columns["attributes"] = attribute_results(everything)
        return ScoreResponse(
            family=found.family,
            transform=question.transform.name,
            results=[Result(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)],
            prob_greater=found.prob_greater_within(first, second).tolist(),
        )

    def write_rendered(self, question: Question, everything: RewardsByAttribute) -> RewardResponse:
        """Makes the answer of `/get_reward`. Arguments and errors are those of [`~Scorer.answer`]."""
        found = question.view.read(self.reward.model, everything)
        rewards = self._rewards(question, found, everything)
        logs = {"location": found.location.tolist(), "scale": found.scale.tolist()}
        logs |= {f"location_{name}": one.location.tolist() for name, one in everything.of_attributes().items()}
        return RewardResponse(rewards=rewards, scores=rewards, extra_logs=logs)

    def _rewards(self, question: Question, found: RewardDistribution, everything: RewardsByAttribute) -> list[float]:
        name, transform = question.name, question.transform
        shown = [found, *everything.of_attributes().values()]
        numbers = [number for rewards in shown for number in (rewards.location, rewards.scale)]
        _check_finite(name, torch.stack(numbers), "is not finite; load it in float32", 500)
        try:
            rewards = transform(found, question.group)
        except ValueError as error:
            raise RefusalError(422, str(error), "transform") from None
        # Location and scale are finite here, so a value that is not comes from the client's option: 422, not 500.
        _check_finite(name, rewards[None], f"is not finite after the transform {transform.name!r}", 422)
        return rewards.tolist()


def _written(
    write: Callable[[Question, RewardsByAttribute], ScoreResponse | RewardResponse],
    question: Question,
    rewards: RewardsByAttribute,
) -> bytes:
    return write(question, rewards).model_dump_json().encode()


def _check_finite(name: str, rows: torch.Tensor, what: str, status: int) -> None:
    bad = torch.nonzero(~rows.isfinite().all(dim=0)).flatten().tolist()
    if bad:
        raise RefusalError(status, f"the reward {rows[:, bad[0]].tolist()} {what}", f"{name}[{bad[0]}]")


def _plain(content: str | list[Message]) -> str | list[dict[str, Any]]:
    return content if isinstance(content, str) else [message.model_dump(exclude_unset=True) for message in content]


def _characters(content: Any) -> int:
    """Number of characters of everything in a content that a template may write, names of fields included."""
    if isinstance(content, str):
        return len(content)
    if isinstance(content, BaseModel):
        content = content.model_dump(exclude_unset=True)
    if isinstance(content, dict):
        return sum(map(_characters, (*content, *content.values())))
    return sum(map(_characters, content)) if isinstance(content, list) else 1


def _group_key(item: str | list[Message] | Answer) -> Any:
    if not isinstance(item, Answer) or (item.group is None and item.prompt is None):
        return None
    return item.group if item.group is not None else prompt_key(_plain(item.prompt))  # type: ignore[arg-type]


def _described(model: Any) -> dict[str, dict[str, Any]]:
    """Each attribute of the model: its weight in the overall reward, and the values that people rate it with."""
    return {
        name: {"weight": weight, "rating_values": model.likelihoods[name].get("rating_values")}
        for name, weight in model.attribute_weights.items()
    }


def _body_of(schema: type[BaseModel]) -> dict[str, Any]:
    """The request's body in `/openapi.json`. FastAPI itself would read and validate bodies in the event loop."""
    reference = f"#/components/schemas/{schema.__name__}"
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": {"$ref": reference}}}}}


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

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with scorer.running():
            yield

    # FastAPI's documentation pages load scripts from a CDN, so they are off. /openapi.json is served.
    app = FastAPI(
        title="disco-trl",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.add_middleware(Gate, limits=limits, metrics=metrics, token=token)

    @app.exception_handler(RefusalError)
    async def refuse(request: Request, refusal: RefusalError) -> JSONResponse:
        return refusal_response(refusal)

    async def refuse_plainly(request: Request, error: Any) -> JSONResponse:
        return refusal_response(RefusalError(error.status_code, error.detail, headers=error.headers))

    for status in (404, 405):  # FastAPI's own errors: a wrong path or method
        app.add_exception_handler(status, refuse_plainly)

    @app.post("/score", response_model=ScoreResponse, openapi_extra=_body_of(ScoreRequest))
    async def score(request: Request) -> Response:
        return await scorer.answer(request, scorer.read_score, scorer.write_score)

    @app.post("/get_reward", response_model=RewardResponse, openapi_extra=_body_of(RewardRequest))
    async def get_reward(request: Request) -> Response:
        return await scorer.answer(request, scorer.read_rendered, scorer.write_rendered)

    @app.get("/health")
    async def health() -> JSONResponse:
        is_ready = scorer.batcher.is_alive
        content = {
            "status": "ready" if is_ready else "the model's thread has died; restart the server",
            "model": name,
            "family": reward.family.name,
            "transform": reward.transform.name,
            "attributes": _described(reward.model),
            "view": dataclasses.asdict(reward.view),
            "max_texts_per_request": limits.max_texts_per_request,
            "max_body_bytes": limits.max_body_bytes,
            "max_tokens": scorer.max_tokens,
            "queue_tokens": scorer.batcher.waiting_tokens,
        }
        return JSONResponse(content, 200 if is_ready else 503)

    @app.get("/metrics")
    async def prometheus() -> PlainTextResponse:
        return PlainTextResponse(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    _, schemas = models_json_schema(
        [(ScoreRequest, "validation"), (RewardRequest, "validation")], ref_template="#/components/schemas/{model}"
    )
    app.openapi()["components"]["schemas"].update(schemas["$defs"])  # FastAPI returns the same dictionary each time
    return app
