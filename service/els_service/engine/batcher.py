"""Turns the queries that wait for one model into one launch, on a thread of its own.

    submit ──► waiting (deque) ──► batch of at most MAX_BATCH_S ──► worker thread ──► each its rows

Everything but the computation itself happens on the event loop, so there are no locks. While a
batch is computed the next one gathers; a query costlier than a batch is cut into several, so that
others get between and a cancelled caller's remainder is never computed.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
import torch

from els_service.denoisers.base import Denoised, Denoiser, Query, concatenate
from els_service.engine.observer import Observer
from els_service.errors import DeadlineExceededError

INLINE_S = 1e-4
"""Shorter work runs on the event loop: handing it over would take as long."""
MAX_BATCH_S = 0.25
"""Predicted time of a batch (a single image may take longer)."""


@dataclass(frozen=True, eq=False, slots=True)
class _Item:
    query: Query
    seconds: float
    answer: asyncio.Future[Denoised]
    deadline: float
    since: float


class Batcher:
    """One model's queue.

    Args:
        name: the model's, for the observer.
        denoiser: computes; called by one thread at a time.
        executor: where it computes; shared by models of one device.
        observer: told of queueing and computing.
    """

    def __init__(
        self, name: str, denoiser: Denoiser, executor: Executor, observer: Observer
    ) -> None:
        self.denoiser = denoiser
        self._name, self._executor, self._observer = name, executor, observer
        self._waiting: deque[_Item] = deque()
        self._busy = False

    async def submit(self, query: Query, deadline: float) -> Denoised:
        """Return the answer to a checked query.

        Args:
            query: passed ``denoiser.check``.
            deadline: on ``time.monotonic``'s clock, or infinity.

        Raises:
            DeadlineExceededError: The deadline passed before the last part was begun.
        """
        seconds = self.denoiser.predict_seconds(query)
        if seconds < INLINE_S and not self._busy:
            return self._inline(query, seconds)
        # Each part queues when the one before it is done, behind those who came meanwhile.
        answers = [
            await self._enqueue(part, cost, deadline) for part, cost in _parts(query, seconds)
        ]
        return answers[0] if len(answers) == 1 else _join(answers)

    def _inline(self, query: Query, cost: float) -> Denoised:
        start = time.monotonic()
        answer = self.denoiser.denoise(query)
        self._observer.computed(self._name, time.monotonic() - start, len(query), cost)
        return answer

    def _enqueue(self, query: Query, seconds: float, deadline: float) -> asyncio.Future[Denoised]:
        answer = asyncio.get_running_loop().create_future()
        self._waiting.append(_Item(query, seconds, answer, deadline, time.monotonic()))
        if not self._busy:
            self._launch()
        return answer

    def _launch(self) -> None:
        """Start the next batch, if any item is still worth computing."""
        batch = self._next_batch()
        if not batch:
            return
        self._busy = True
        for item in batch:
            self._observer.queued(self._name, time.monotonic() - item.since)
        queries = [item.query for item in batch]
        loop = asyncio.get_running_loop()
        running = loop.run_in_executor(self._executor, self._compute, queries)
        running.add_done_callback(lambda done: self._finish(batch, done))

    def _next_batch(self) -> list[_Item]:
        batch: list[_Item] = []
        seconds, now = 0.0, time.monotonic()
        while self._waiting:
            item = self._waiting[0]
            if item.answer.done():
                self._waiting.popleft()
            elif now > item.deadline:
                self._waiting.popleft()
                late = f"waited {now - item.since:.3f} s in the queue of {self._name}"
                item.answer.set_exception(DeadlineExceededError(late))
            elif batch and seconds + item.seconds > MAX_BATCH_S:
                break
            else:
                batch.append(self._waiting.popleft())
                seconds += item.seconds
        return batch

    def _compute(self, queries: list[Query]) -> tuple[Denoised, float]:
        start = time.monotonic()
        with torch.inference_mode():
            answer = self.denoiser.denoise(concatenate(queries))
        return answer, time.monotonic() - start

    def _finish(self, batch: list[_Item], done: asyncio.Future[tuple[Denoised, float]]) -> None:
        self._busy = False
        error = done.exception()
        if error is None:
            answer, seconds = done.result()
            cost = sum(item.seconds for item in batch)
            self._observer.computed(self._name, seconds, len(answer.pixels), cost)
        first = 0
        for item in batch:
            rows = slice(first, first + len(item.query))
            first = rows.stop
            if item.answer.done():
                continue
            if error is not None:
                item.answer.set_exception(error)
            else:
                item.answer.set_result(answer[rows])
        self._launch()


def _parts(query: Query, seconds: float) -> Iterator[tuple[Query, float]]:
    """Yield the query in slices of at most a batch's time, with each slice's."""
    images = len(query)
    step = max(1, min(images, int(images * MAX_BATCH_S / max(seconds, 1e-9))))
    for first in range(0, images, step):
        part = query[first : first + step]
        yield part, seconds * len(part) / images


def _join(answers: list[Denoised]) -> Denoised:
    evidence = [answer.log_evidence for answer in answers if answer.log_evidence is not None]
    return Denoised(
        np.concatenate([answer.pixels for answer in answers]),
        torch.cat(evidence) if evidence else None,
    )
