"""Loader thread of models, replaced where a load is slow or hangs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

from els_service.errors import LoadError

T = TypeVar("T")

SLOW_S = 5.0
"""A load that takes longer no longer keeps the next ones waiting."""
_CLOSE_S = 5.0
"""How long the load under way may take to end when the loader closes."""


class Loader:
    """Runs loads in turn: one at a time, so that memory is needed for one, unless one is slow.

    After ``slow_s`` the next load begins in another thread. After ``limit_s`` a load is given up,
    and its daemon thread ends by itself or with the process. A name whose load was given up and
    still runs is refused, so that threads cannot pile up.

    Use from one event loop.

    Args:
        limit_s: seconds that a load may take.
        slow_s: seconds after which it counts as slow.
    """

    def __init__(self, limit_s: float, slow_s: float = SLOW_S) -> None:
        self.slow_s = min(slow_s, limit_s)
        self._limit_s = limit_s
        self._turn = asyncio.Lock()
        self._worker: _Worker | None = None
        self._given_up: dict[str, asyncio.Future[Any]] = {}
        """Loads that still run, by name."""

    async def run(self, name: str, work: Callable[[], T]) -> T:
        """Return what ``work`` returns; it runs in a thread.

        Args:
            name: of what is loaded.
            work: raises what ``run`` shall raise.

        Raises:
            LoadError: It takes longer than the limit, or one of this name that was given up does,
                or ``work`` would end the process.
        """
        if name in self._given_up:
            raise LoadError(name, "expected an earlier load to end, but it hangs")
        async with self._turn:
            if self._worker is None:
                self._worker = _Worker()
            done = asyncio.wrap_future(self._worker.submit(work))
            # Nobody may be there any more to hear of a failure.
            done.add_done_callback(lambda one: one.cancelled() or one.exception())
            try:
                await asyncio.wait((done,), timeout=self.slow_s)
            finally:
                # Also where the caller left: the next load must not queue behind this one.
                if not done.done():
                    self._worker.close()
                    self._worker = None
        await asyncio.wait((done,), timeout=self._limit_s - self.slow_s)
        if not done.done():
            self._give_up(name, done)
            expected = f"expected to be loaded within {self._limit_s:g} s, the setting load_s"
            raise LoadError(name, f"{expected}; it was given up")
        error = done.exception()
        if error is not None and not isinstance(error, Exception):
            # SystemExit and the like would end the event loop.
            raise LoadError(name, f"ends in {error!r}")
        result: T = done.result()
        return result

    def close(self) -> None:
        """End the thread; waits a few seconds for a load under way."""
        if self._worker is not None:
            self._worker.close(_CLOSE_S)

    def _give_up(self, name: str, done: asyncio.Future[Any]) -> None:
        self._given_up[name] = done
        done.add_done_callback(lambda _: self._given_up.pop(name, None))


class _Worker:
    """A daemon thread: one that hangs cannot keep the process alive."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._thread = Thread(target=self._work, name="els-loader", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()
        self._jobs.put((future, work))
        return future

    def close(self, wait_s: float = 0.0) -> None:
        """End the thread after its work; wait so long for that."""
        self._jobs.put(None)
        self._thread.join(wait_s)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, work = job
            try:
                future.set_result(work())
            except BaseException as error:
                # Any error goes to the caller.
                future.set_exception(error)
            del job, future, work  # while idle, nothing is held
