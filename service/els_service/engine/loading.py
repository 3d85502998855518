"""Thread that loads models, replaced when a load is slow or hangs."""

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
"""Seconds after which the next load no longer waits for the current one."""
_CLOSE_S = 5.0
"""Seconds that closing the loader waits for the current load."""


class Loader:
    """Runs loads one at a time, to bound memory, unless one is slow.

    After ``slow_s`` the next load begins in another thread. After ``limit_s`` a load is abandoned;
    its daemon thread ends by itself or with the process. While an abandoned load still runs, loads
    of the same name are rejected, to bound the number of threads.

    Use from one event loop.

    Args:
        limit_s: maximum seconds of a load.
        slow_s: seconds after which it counts as slow.
    """

    def __init__(self, limit_s: float, slow_s: float = SLOW_S) -> None:
        self.slow_s = min(slow_s, limit_s)
        self._limit_s = limit_s
        self._turn = asyncio.Lock()
        self._worker: _Worker | None = None
        self._abandoned: dict[str, asyncio.Future[Any]] = {}
        """Name → abandoned load that still runs."""

    async def run(self, name: str, work: Callable[[], T]) -> T:
        """Return the result of ``work``, called in the thread; raises what it raises.

        Args:
            name: name in errors.
            work: the load.

        Raises:
            LoadError: The load exceeds the limit, an abandoned load of this name still runs, or
                ``work`` raised an exception that would end the process.
        """
        if name in self._abandoned:
            raise LoadError(name, "expected an earlier load to end, but it hangs")
        async with self._turn:
            if self._worker is None:
                self._worker = _Worker()
            done = asyncio.wrap_future(self._worker.submit(work))
            # Retrieved, because the caller may have left, and asyncio logs other exceptions.
            done.add_done_callback(lambda one: one.cancelled() or one.exception())
            try:
                await asyncio.wait((done,), timeout=self.slow_s)
            finally:
                # Also if the caller left: the next load must not queue behind this one.
                if not done.done():
                    self._worker.close()
                    self._worker = None
        await asyncio.wait((done,), timeout=self._limit_s - self.slow_s)
        if not done.done():
            self._abandon(name, done)
            expected = f"expected to be loaded within {self._limit_s:g} s, the setting load_s"
            raise LoadError(name, f"{expected}; the load was abandoned")
        error = done.exception()
        if error is not None and not isinstance(error, Exception):
            # SystemExit and the like would end the event loop.
            raise LoadError(name, f"ends in {error!r}")
        result: T = done.result()
        return result

    def close(self) -> None:
        """End the thread; waits a few seconds for the current load."""
        if self._worker is not None:
            self._worker.close(_CLOSE_S)

    def _abandon(self, name: str, done: asyncio.Future[Any]) -> None:
        self._abandoned[name] = done
        done.add_done_callback(lambda _: self._abandoned.pop(name, None))


class _Worker:
    """Daemon thread, so that a hanging load does not keep the process alive."""

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
        """End the thread after its work; wait up to ``wait_s`` for that."""
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
            del job, future, work  # an idle thread holds no references
