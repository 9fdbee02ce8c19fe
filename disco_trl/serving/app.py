"""A reward model behind HTTP: `disco-trl serve`.

What flows: a body that :class:`Gate` has let in → a request that `wire` has checked → token ids, made in one thread →
location and scale, by the :class:`~disco_trl.serving.batching.Batcher` in another → rewards. Nothing is truncated, no
place in the queue is held for a client that has gone, and a reward that is not a number is an error and not an answer.

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
from transformers import PreTrainedTokenizerBase

from .._version import __version__
from ..data.tokenization import tokenize
from ..distributions.reward_distribution import RewardDistribution
from ..distributions.transforms import Transform, get_transform
from ..models.inference import TOKENS_PER_BATCH, most_positions
from ..rewards.disco_reward import DiscoReward
from ..rewards.reward_function import prompt_key
from .batching import Batcher, QueueFullError, TooLargeError


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


class RenderedTexts:
    """Token ids of texts that a chat template has already rendered, as an RLHF engine sends them.

    A text in which an answer begins as the tokenizer's chat template has it is a rendered conversation. It gets no
    special token beyond those it shows (a second beginning-of-text token would be one), and it is brought to the
    template's ending, because a policy stops at its end-of-turn token and training went on to what the template writes
    after it, often a line break. Any other text is tokenized as training does with plain text.

    The ids equal those of training if the template writes messages as they are; where it trims them or drops their
    reasoning, the text as the policy wrote it counts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.start = self.ending = ""
        if tokenizer.chat_template is not None:
            question, answer = {"role": "user", "content": "<Q>"}, {"role": "assistant", "content": "<A>"}
            prompt: Any = tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
            whole: Any = tokenizer.apply_chat_template([question, answer], tokenize=False)
            self.start = prompt.rpartition("<Q>")[2]
            self.ending = whole.rpartition("<A>")[2]
        bos = tokenizer.bos_token_id
        self._adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]

    def __call__(self, text: str) -> list[int]:
        """Token ids of one text."""
        eos, pad = self.tokenizer.eos_token, self.tokenizer.pad_token
        while pad and pad != eos and text.endswith(pad):
            text = text.removesuffix(pad)
        if not self.start or self.start not in text:
            # Tokenizing adds it.
            return tokenize(self.tokenizer, text.removeprefix(self.tokenizer.bos_token) if self._adds_bos else text)
        for mark in (self.ending, self.ending.rstrip(), eos):
            if mark and text.endswith(mark):
                text = text.removesuffix(mark)
                break
        return self.tokenizer(text + self.ending, add_special_tokens=False)["input_ids"]


class Scorer:
    """Between the endpoints and the model: tokens, limits, transforms and groups; see `create_app`."""

    def __init__(self, reward: DiscoReward, limits: Limits, metrics: Metrics):
        self.reward = reward
        self.limits = limits
        bounds = filter(None, (limits.max_tokens, most_positions(reward.model)))
        self.max_tokens = min(bounds, default=TOKENS_PER_BATCH)
        self.batcher = Batcher(reward.model, limits.max_queue, limits.max_batch_tokens, metrics.observe_batch)
        metrics.queue.set_function(lambda: self.batcher.waiting_tokens)
        # One thread: tokenizers do not promise to be safe in several, and the event loop must not wait for one.
        self._tokenizing = ThreadPoolExecutor(1, "disco-tokenizer")

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """While it lasts, there are threads to tokenize and to run the model; at its end what waits is scored."""
        self.batcher.start()
        try:
            yield
        finally:
            self._tokenizing.shutdown()
            self.batcher.close()

    async def distribution(self, field: str, contents: Sequence[Any], encode: Callable[[Any], list[int]]) -> Any:
        """The rewards of the contents of a request's field, `[N]`; a `RefusalError` says why there are none."""
        if len(contents) > self.limits.max_texts_per_request:
            reason = f"{len(contents)} texts, and {self.limits.max_texts_per_request} are the most in one request"
            raise RefusalError(413, reason, field)
        sequences = await asyncio.get_running_loop().run_in_executor(
            self._tokenizing, self._tokenize, field, contents, encode
        )
        try:
            rewards = await self.batcher.score(sequences)
        except QueueFullError as error:
            raise RefusalError(503, str(error), headers={"Retry-After": str(error.retry_after)}) from None
        except TooLargeError as error:
            raise RefusalError(413, str(error), field) from None
        except Exception as error:  # the batcher has logged it
            raise RefusalError(500, f"the model failed: {type(error).__name__}", field) from None
        self._check_finite(field, torch.stack([rewards.location, rewards.scale]), "is not finite; load it in float32")
        return rewards

    def _tokenize(self, field: str, contents: Sequence[Any], encode: Callable[[Any], list[int]]) -> list[list[int]]:
        sequences = []
        for index, content in enumerate(contents):
            name = f"{field}[{index}]"
            try:
                ids = encode(content)
            except Exception as error:  # templates raise what they like, and all of it is about the client's input
                raise RefusalError(422, f"cannot be tokenized: {error}", name) from None
            if len(ids) > self.max_tokens:
                raise RefusalError(422, f"{len(ids)} tokens, and {self.max_tokens} are the most in one text", name)
            if not ids:
                raise RefusalError(422, "has no tokens", name)
            sequences.append(ids)
        return sequences

    def encode_item(self, item: str | list[Message] | Answer) -> list[int]:
        """Token ids of an item of `/score`, as training makes them."""
        if not isinstance(item, Answer):
            item = Answer.model_construct(completion=item)
        completion: Any = _plain(item.completion)
        prompt: Any = type(completion)() if item.prompt is None else _plain(item.prompt)
        [ids] = self.reward.tokenize(
            [prompt], [completion], tools=[item.tools], chat_template_kwargs=[item.chat_template_kwargs]
        )
        return ids

    def transform(self, request: ScoreRequest) -> Transform:
        """The transform that a request asks for."""
        default = self.reward.transform
        name, options = request.transform or default.name, request.options()
        if name == default.name and not options:
            return default
        if name == "sample":
            options.setdefault("seed", secrets.randbits(63))  # else every request would draw the same noise
        try:
            transform = get_transform(name, **options)
            transform.check_family(self.reward.family.name)
        except ValueError as error:
            raise RefusalError(422, str(error), "transform") from None
        return transform

    def rewards(
        self, field: str, transform: Transform, distribution: RewardDistribution, keys: Sequence[Any]
    ) -> list[float]:
        """Transformed rewards; rows with equal `keys` answer the same prompt, and None is a row without one."""
        group = None
        if transform.needs_groups:
            if None in keys:
                raise RefusalError(
                    422,
                    f"transform {transform.name!r} compares the answers to one prompt: name it by 'prompt' or 'group'",
                    f"{field}[{keys.index(None)}]",
                )
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
        # Location and scale are finite, so it is the transform's option that takes them out of bounds.
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
    """
    The server's ASGI application.

    Args:
        reward: the model, its tokenizer and the transform that requests get if they do not name one.
        limits: see `Limits`.
        token: what clients must show, as a bearer token (or as the password of basic authentication).
        name: what `/health` calls the model.
    """
    metrics = Metrics()
    scorer = Scorer(reward, limits, metrics)
    encode_rendered = RenderedTexts(reward.processing_class)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with scorer.running():
            yield

    # No pages of documentation: they load scripts from elsewhere. /openapi.json is there.
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

    for status in (400, 404, 405):  # FastAPI's own: an odd body, a wrong path or method
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
        found = await scorer.distribution("query", request.query, encode_rendered)
        keys = [None] * len(found) if request.prompts is None else [prompt_key(prompt) for prompt in request.prompts]
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
