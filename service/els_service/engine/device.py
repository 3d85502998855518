"""A device: one worker thread that computes for all models on it, and a watchdog beside it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread
from typing import Any, Generic, Protocol, TypeVar

import torch

from els_service.errors import UnavailableError

T = TypeVar("T")


class DeviceLostError(UnavailableError):
    """A device hangs or its context is broken; nothing can be computed on it any more."""


@dataclass(frozen=True, slots=True)
class Outcome(Generic[T]):
    """A result, and when the work began and ended (seconds on the device's clock)."""

    value: T
    began: float
    ended: float


class Device(Protocol):
    """Computes, one piece of work at a time."""

    @property
    def name(self) -> str:
        """As torch names it."""
        ...

    @property
    def busy_s(self) -> float:
        """Seconds spent computing so far."""
        ...

    @property
    def running_s(self) -> float:
        """Seconds since the work under way began; 0 where there is none. From any thread."""
        ...

    def run(self, work: Callable[[], T], limit_s: float) -> asyncio.Future[Outcome[T]]:
        """Return the outcome to come, or what ``work`` raised.

        The future fails with DeviceLostError if ``work`` takes longer than ``limit_s`` or breaks
        the device.
        """
        ...

    def close(self) -> None:
        """End the thread once it has nothing to do; does not wait for one that hangs."""
        ...


@dataclass(slots=True, eq=False)
class _Job:
    work: Callable[[], Any]
    done: asyncio.Future[Outcome[Any]]
    watchdog: asyncio.TimerHandle | None = None
    begun: bool = False


class WorkerDevice:
    """The real one: a daemon thread, so that one that hangs cannot keep the process alive.

    Use from one event loop.

    Args:
        name: ``cpu``, ``cuda:0`` and so on.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.busy_s = 0.0
        self.lost: str = ""
        """Why nothing can be computed here any more; empty while all is well."""
        self._began: float | None = None
        """When the work under way began."""
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._thread = Thread(target=self._work, name=f"els-{name}", daemon=True)
        self._thread.start()

    @property
    def running_s(self) -> float:
        """Seconds since the work under way began; see ``Device``."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    def run(self, work: Callable[[], T], limit_s: float) -> asyncio.Future[Outcome[T]]:
        """Return the outcome to come; see ``Device``."""
        job = _Job(work, self._loop.create_future())
        if self.lost:
            job.done.set_exception(DeviceLostError(self.lost))
            return job.done
        job.watchdog = self._loop.call_later(limit_s, self._hangs, job, limit_s)
        self._jobs.put(job)
        return job.done

    def close(self) -> None:
        """End the thread; waits for the work under way unless the device is lost."""
        self._jobs.put(None)
        if not self.lost:
            self._thread.join()

    def _work(self) -> None:
        if self.name.startswith("cuda"):
            torch.cuda.set_device(self.name)
        with torch.inference_mode():
            while (job := self._jobs.get()) is not None:
                job.begun, began = True, time.monotonic()
                self._began = began
                try:
                    result: Any = job.work()
                except BaseException as error:
                    # Whatever it is: the thread must go on, and the caller must be told.
                    result = error
                outcome = Outcome(result, began, time.monotonic())
                self._began = None
                try:
                    self._loop.call_soon_threadsafe(self._deliver, job, outcome)
                except RuntimeError:
                    return  # the loop is closed: nobody waits
                del job, result, outcome  # while idle, nothing is held

    def _deliver(self, job: _Job, outcome: Outcome[Any]) -> None:
        assert job.watchdog is not None
        job.watchdog.cancel()
        self.busy_s += outcome.ended - outcome.began
        if job.done.done():
            return
        error = outcome.value
        if not isinstance(error, BaseException):
            job.done.set_result(outcome)
        elif breaks_device(error):
            self.lost = f"{self.name} is broken: {error}"
            job.done.set_exception(DeviceLostError(self.lost))
        elif isinstance(error, Exception) and not isinstance(error, StopIteration):
            job.done.set_exception(error)
        else:
            # SystemExit and the like would end the event loop.
            job.done.set_exception(RuntimeError(f"the worker was told {error!r}"))

    def _hangs(self, job: _Job, limit_s: float) -> None:
        if not job.begun and not self.lost:
            # It waits for other work, which has a watchdog of its own.
            job.watchdog = self._loop.call_later(limit_s, self._hangs, job, limit_s)
        elif not job.done.done():
            self.lost = f"{self.name} hangs: a batch was not done after {limit_s:.1f} s"
            job.done.set_exception(DeviceLostError(self.lost))


def breaks_device(error: BaseException) -> bool:
    """Return whether an error is of the kind after which a CUDA context answers nothing more."""
    if isinstance(error, torch.OutOfMemoryError):
        return False
    return isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error)


def free_memory() -> None:
    """Give cached blocks of device memory back, after an allocation failed."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
