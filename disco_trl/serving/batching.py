"""Dynamic batching: texts of many requests wait in a bounded queue and go through the model together.

A single thread runs the model. Whenever it is idle it takes the texts that have arrived in the meantime, in order of
arrival, up to a budget of tokens. The batch size therefore follows the load, and no request waits for a batch to fill
up.

A batch is scored for all attributes that the model knows. Which reward a request asks for does not matter here, so
requests that ask for different ones share batches.
"""

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..models.inference import TOKENS_PER_BATCH, score_by_attribute
from ..models.reward_view import RewardsByAttribute


logger = logging.getLogger(__name__)


class QueueFullError(Exception):
    """Raised when the queue has no room for the texts of a request at the moment.

    Args:
        retry_after (`int`):
            Estimated number of seconds until there is room.
    """

    def __init__(self, retry_after: int):
        super().__init__(f"the queue is full; try again in {retry_after} s")
        self.retry_after = retry_after


class TooLargeError(Exception):
    """Raised when a request exceeds the capacity of the queue, even an empty one."""


@dataclass(eq=False)
class _Job:
    """The texts of one request on their way through the model."""

    sequences: list[list[int]]
    answer: asyncio.Future[RewardsByAttribute]
    taken: int = 0  # number of sequences, from the front, that have left the queue
    scored: list[RewardsByAttribute] = field(default_factory=list)  # rewards of finished sequences, part by part

    def tokens_waiting(self) -> int:
        return sum(map(len, self.sequences[self.taken :]))


class Batcher:
    """Scores token sequences for many concurrent callers.

    A batcher belongs to one event loop and is used between [`~Batcher.start`] and [`~Batcher.close`]. Two threads
    share it: the event loop's, which queues texts, and the model's, which scores them. A condition variable
    guards the queue. `waiting_tokens` is also read without it, for reporting.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model as accepted by [`disco_trl.models.inference.score_by_attribute`].
        max_queue_tokens (`int`):
            Maximum number of tokens that wait for the model.
        max_batch_tokens (`int`, *optional*, defaults to `TOKENS_PER_BATCH`):
            Maximum number of tokens in one batch, padding included. A longer text is scored alone.
        on_batch (`Callable[[int, int, float], None]`, *optional*):
            Callback invoked in the model's thread after each batch, with the number of texts, the number of tokens and
            the seconds that the batch took.
    """

    def __init__(
        self,
        model: Any,
        max_queue_tokens: int,
        max_batch_tokens: int = TOKENS_PER_BATCH,
        on_batch: Callable[[int, int, float], None] = lambda texts, tokens, seconds: None,
    ):
        self.model = model
        self.max_queue_tokens = max_queue_tokens
        self.max_batch_tokens = max_batch_tokens
        self.waiting_tokens = 0
        self._on_batch = on_batch
        self._seconds_per_token = 0.0  # exponential moving average, for `retry_after`
        # Jobs with sequences in the queue, in order of arrival. A dict serves as an ordered set with fast removal.
        self._jobs: dict[_Job, None] = {}
        self._changed = threading.Condition()
        self._is_closing = False
        # A daemon thread, so that killing the server does not wait for a batch.
        self._thread = threading.Thread(target=self._run, name="disco-model", daemon=True)

    def start(self) -> None:
        """Starts the model's thread."""
        self._thread.start()

    def close(self) -> None:
        """Stops the model's thread after the batch that it is scoring. What is queued is given up: whoever shuts the
        server down waits for its requests first, as long as they may take.
        """
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether the model's thread is running."""
        return self._thread.is_alive()

    async def score(self, sequences: list[list[int]]) -> RewardsByAttribute:
        """Scores token sequences. If the call is cancelled, those of its sequences that are still queued are removed.

        Args:
            sequences (`list[list[int]]`):
                `N >= 1` sequences of token ids.

        Returns:
            [`~disco_trl.models.reward_view.RewardsByAttribute`]: All `N` rewards, in the order of `sequences`.

        Raises:
            `QueueFullError`: If the queue has no room at the moment.
            `TooLargeError`: If the sequences exceed the capacity of the queue.
            `Exception`: Any error that the model raises on these sequences. An error on the sequences of another
            request is raised there only.
        """
        job = _Job(sequences, asyncio.get_running_loop().create_future())
        tokens = job.tokens_waiting()
        if tokens > self.max_queue_tokens:
            raise TooLargeError(
                f"{tokens} tokens in one request, and the queue holds {self.max_queue_tokens}; send fewer at once"
            )
        with self._changed:
            if self.waiting_tokens + tokens > self.max_queue_tokens:
                seconds = math.ceil(self.waiting_tokens * self._seconds_per_token)
                raise QueueFullError(retry_after=min(max(seconds, 1), 600))
            self._jobs[job] = None
            self.waiting_tokens += tokens
            self._changed.notify()
        try:
            return await job.answer
        finally:
            # Also reached by cancellation: a client that has left must not hold its place in the queue.
            self._forget(job)

    def _forget(self, job: _Job) -> None:
        with self._changed:
            if job in self._jobs:
                del self._jobs[job]
                self.waiting_tokens -= job.tokens_waiting()

    # The methods below run in the model's thread.

    def _run(self) -> None:
        while parts := self._take():
            self._score(parts)

    def _take(self) -> list[tuple[_Job, list[list[int]]]]:
        """The next sequences within the budget, grouped by job. Empty only when the batcher is closing."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._is_closing)
            if self._is_closing:
                return []
            parts: list[tuple[_Job, list[list[int]]]] = []
            budget = self.max_batch_tokens
            for job in list(self._jobs):
                first = job.taken
                # A large request may straddle batches: what does not fit stays first in the queue. The first sequence
                # of a batch is always taken, or one longer than the budget would block the queue for ever.
                for sequence in job.sequences[first:]:
                    if len(sequence) > budget and (parts or job.taken > first):
                        break
                    budget -= len(sequence)
                    self.waiting_tokens -= len(sequence)
                    job.taken += 1
                if job.taken > first:
                    parts.append((job, job.sequences[first : job.taken]))
                if job.taken < len(job.sequences):
                    break
                del self._jobs[job]
            return parts

    def _score(self, parts: list[tuple[_Job, list[list[int]]]]) -> None:
        sequences = [sequence for _, part in parts for sequence in part]
        tokens = sum(map(len, sequences))
        start = time.perf_counter()
        try:
            rewards = score_by_attribute(self.model, sequences, self.max_batch_tokens)
        except Exception as error:
            if len(parts) > 1:
                # Score each request alone, so that one request's error, or its size, does not fail the others.
                for single in parts:
                    self._score([single])
            else:
                logger.exception("the model failed on %d texts of one request", len(sequences))
                self._forget(parts[0][0])
                self._deliver(parts[0][0], error)
            return
        seconds = time.perf_counter() - start
        # The first batch sets the average; later ones move it by a tenth.
        share = 0.1 if self._seconds_per_token else 1.0
        self._seconds_per_token += share * (seconds / tokens - self._seconds_per_token)
        self._on_batch(len(sequences), tokens, seconds)
        first = 0
        for job, part in parts:
            job.scored.append(rewards[first : first + len(part)])
            first += len(part)
            if sum(map(len, job.scored)) == len(job.sequences):
                self._deliver(job, RewardsByAttribute.cat(job.scored))

    def _deliver(self, job: _Job, result: RewardsByAttribute | Exception) -> None:
        def settle() -> None:
            if job.answer.done():  # The caller has cancelled it.
                return
            if isinstance(result, Exception):
                job.answer.set_exception(result)
            else:
                job.answer.set_result(result)

        # asyncio futures are not thread-safe: they may be settled by the thread of their event loop only.
        job.answer.get_loop().call_soon_threadsafe(settle)
