"""Concurrent queries share a pass over the pool: whatever waits while one search runs is the next search.

No timer is involved: an idle server answers a lone query at once, a busy one answers many for about the price of one.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

__all__ = ["Batcher", "Overloaded"]

Job = TypeVar("Job")
Answer = TypeVar("Answer")


class Overloaded(RuntimeError):
    """More requests wait than the batcher holds."""


@dataclass
class _Waiting(Generic[Job, Answer]):
    job: Job
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Answer] = field(repr=False)


class Batcher(Generic[Job, Answer]):
    """One thread that answers jobs in batches.

    Args:
        answer: batch of jobs → their answers in order; an exception in place of an answer is that job's own, one that
            is raised is everybody's.
        max_batch: jobs per call.
        max_waiting: jobs that may wait; more are refused.
        on_batch: told the size of each batch.

    Source: ours.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Job]], Sequence[Answer | Exception]],
        *,
        max_batch: int = 64,
        max_waiting: int = 1024,
        on_batch: Callable[[int], None] | None = None,
        name: str = "batcher",
    ) -> None:
        self._answer, self._max_batch, self._max_waiting = answer, max_batch, max_waiting
        self._on_batch = on_batch or (lambda size: None)
        self._queue: deque[_Waiting[Job, Answer]] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    async def ask(self, job: Job) -> Answer:
        """The answer to a job.

        Raises:
            Overloaded: too many jobs wait, or the batcher is closed.
        """
        loop = asyncio.get_running_loop()
        waiting: _Waiting[Job, Answer] = _Waiting(job, loop, loop.create_future())
        with self._wake:
            if self._closed or len(self._queue) >= self._max_waiting:
                raise Overloaded(f"{len(self._queue)} requests are waiting")
            self._queue.append(waiting)
            self._wake.notify()
        return await waiting.future

    def close(self) -> None:
        """Answer what waits, take nothing new."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._wake:
                while not self._queue and not self._closed:
                    self._wake.wait()
                if not self._queue:
                    return
                batch = [self._queue.popleft() for _ in range(min(self._max_batch, len(self._queue)))]
            batch = [waiting for waiting in batch if not waiting.future.cancelled()]  # the client has gone
            if not batch:
                continue
            self._on_batch(len(batch))
            try:
                answers = list(self._answer([waiting.job for waiting in batch]))
            except Exception as error:
                answers = [error] * len(batch)
            for waiting, answer in zip(batch, answers, strict=True):
                try:
                    waiting.loop.call_soon_threadsafe(_settle, waiting.future, answer)
                except RuntimeError:  # that loop has ended
                    continue


def _settle(future: asyncio.Future[Answer], answer: Answer | Exception) -> None:
    if future.done():
        return
    if isinstance(answer, Exception):
        future.set_exception(answer)
    else:
        future.set_result(answer)
