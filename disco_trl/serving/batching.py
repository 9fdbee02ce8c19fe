"""Many requests, one model: texts wait in a bounded queue and go through the model together.

One thread runs the model. Whenever it is free it takes what has come in meanwhile, first come first served, up to a
budget of tokens. So a batch is as large as the load makes it, and nobody waits for a batch to fill up.
"""

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..distributions.reward_distribution import RewardDistribution
from ..models.inference import TOKENS_PER_BATCH, score


logger = logging.getLogger(__name__)


class QueueFullError(Exception):
    """There is no room for more texts; `retry_after` is in how many seconds there may be, a whole number."""

    def __init__(self, retry_after: int):
        super().__init__(f"the queue is full; try again in {retry_after} s")
        self.retry_after = retry_after


class TooLargeError(Exception):
    """A request that the queue could not hold even if it were empty."""


@dataclass(eq=False)
class _Job:
    """The texts of one request, on their way through the model."""

    sequences: list[list[int]]
    answer: asyncio.Future[RewardDistribution]
    taken: int = 0  # how many of the sequences, from the front, have left the queue
    scored: list[RewardDistribution] = field(default_factory=list)  # of those that are through, in parts

    def tokens_waiting(self) -> int:
        return sum(map(len, self.sequences[self.taken :]))


class Batcher:
    """Scores token sequences for many callers at once; use it in one event loop, between `start` and `close`.

    Args:
        model: as for `disco_trl.models.inference.score`.
        max_queue_tokens: tokens that may wait for the model.
        max_batch_tokens: tokens that go through the model at once, padding counted; a longer text goes alone.
        on_batch: called from the model's thread with the number of texts, of tokens, and the seconds they took.
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
        self._seconds_per_token = 0.0  # running mean, for `retry_after`
        self._jobs: dict[_Job, None] = {}  # those with sequences in the queue, in order of arrival
        self._changed = threading.Condition()
        self._is_closing = False
        # A daemon: whoever kills the server does not wait for a batch.
        self._thread = threading.Thread(target=self._run, name="disco-model", daemon=True)

    def start(self) -> None:
        """Start the model's thread."""
        self._thread.start()

    def close(self) -> None:
        """Score what is waiting, then stop the model's thread."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether the model's thread runs."""
        return self._thread.is_alive()

    async def score(self, sequences: list[list[int]]) -> RewardDistribution:
        """
        Rewards of token sequences, one or more, `[N]`, in their order. Cancelling it takes out of the queue what still
        waits there.

        Raises:
            QueueFullError: if there is no room at the moment.
            TooLargeError: if there never will be.
            Exception: whatever the model raises on these sequences. (What it raises on those of others is theirs.)
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
            self._forget(job)

    def _forget(self, job: _Job) -> None:
        with self._changed:
            if job in self._jobs:
                del self._jobs[job]
                self.waiting_tokens -= job.tokens_waiting()

    # From here on, the model's thread

    def _run(self) -> None:
        while parts := self._take():
            self._score(parts)

    def _take(self) -> list[tuple[_Job, list[list[int]]]]:
        """The next sequences up to the budget, by job; none when the queue is empty and closing."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._is_closing)
            parts: list[tuple[_Job, list[list[int]]]] = []
            budget = self.max_batch_tokens
            for job in list(self._jobs):
                first = job.taken
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
            rewards = score(self.model, sequences, self.max_batch_tokens)
        except Exception as error:
            if len(parts) > 1:
                # One request's fault (or size) is not to cost the others their answers.
                for single in parts:
                    self._score([single])
            else:
                logger.exception("the model failed on %d texts of one request", len(sequences))
                self._forget(parts[0][0])
                self._deliver(parts[0][0], error)
            return
        seconds = time.perf_counter() - start
        share = 0.1 if self._seconds_per_token else 1.0
        self._seconds_per_token += share * (seconds / tokens - self._seconds_per_token)
        self._on_batch(len(sequences), tokens, seconds)
        first = 0
        for job, part in parts:
            job.scored.append(rewards[first : first + len(part)])
            first += len(part)
            if sum(map(len, job.scored)) == len(job.sequences):
                self._deliver(job, RewardDistribution.cat(job.scored))

    def _deliver(self, job: _Job, result: RewardDistribution | Exception) -> None:
        def settle() -> None:
            if job.answer.done():  # its caller is gone
                return
            if isinstance(result, Exception):
                job.answer.set_exception(result)
            else:
                job.answer.set_result(result)

        job.answer.get_loop().call_soon_threadsafe(settle)
