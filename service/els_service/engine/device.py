"""Device: one worker thread that computes for all models on it, and its watchdog.

On a CPU the watchdog judges progress: the counter of the computation's ``Control``, which grows
with every tile, or else the CPU time of the worker thread. A computation that is slow, on a
throttled machine say, shows one of them; a deadlock, a sleep or an endless wait shows neither. Time
in which the event loop itself did not run (SIGSTOP, a frozen container, a suspended laptop) does
not count. Computations on other devices show no progress, so only elapsed time is judged.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread, get_ident
from typing import Any, Generic, Protocol, TypeVar

import torch

from els_kernels import Control
from els_service.errors import LoadError, UnavailableError

T = TypeVar("T")

_CHECKS = 8
"""Minimum number of checks of a job within its limit."""
_MAX_INTERVAL_S = 1.0
_LEAST_SHARE = 1e-3
"""Share of a core that counts as progress. A cgroup grants at least 1 %; a thread that polls ten
times a second takes less than a thousandth."""
_BURNED = 10.0
"""Multiple of its limit of CPU time without a tile after which a job counts as an endless loop."""


def choose_devices(device: str) -> list[str]:
    """Return ``cpu``, or every GPU by name; ``auto`` takes GPUs where there are any.

    Raises:
        LoadError: ``cuda`` is requested and there is none.
    """
    count = torch.cuda.device_count()
    if device == "cuda" and not count:
        raise LoadError("device", "expected a CUDA device, found none")
    return [f"cuda:{i}" for i in range(count)] if count and device != "cpu" else ["cpu"]


class DeviceLostError(UnavailableError):
    """The device hangs or its context is broken; it cannot compute any more."""


@dataclass(frozen=True, slots=True)
class Outcome(Generic[T]):
    """Result with the begin and end of its computation, in seconds on the device's clock."""

    value: T
    began: float
    ended: float


class Device(Protocol):
    """Executor that runs one job at a time."""

    @property
    def name(self) -> str:
        """Name of the device in torch."""
        ...

    @property
    def busy_s(self) -> float:
        """Seconds spent computing so far."""
        ...

    @property
    def running_s(self) -> float:
        """Seconds since the current job began; 0 if idle. May be read from any thread."""
        ...

    @property
    def stalled_s(self) -> float:
        """Seconds since the current job last made observable progress."""
        ...

    def run(
        self,
        work: Callable[[], T],
        watchdog_s: float,
        *,
        predicted_s: float = 0.0,
        control: Control | None = None,
    ) -> asyncio.Future[Outcome[T]]:
        """Return the future outcome of ``work``, which fails with what ``work`` raised.

        The future fails with DeviceLostError if ``work`` hangs or breaks the device. It hangs on a
        CPU if it makes no progress for ``watchdog_s``, or burns ten times its limit of CPU time
        without a tile; elsewhere if it takes longer than its limit.

        Args:
            work: called on the device's thread, with ``control`` as the current one.
            watchdog_s: seconds without progress after which the work counts as hung.
            predicted_s: predicted seconds; the limit is ``watchdog_s`` plus ten times as much.
            control: stops the work between two tiles; it then fails with ComputationStoppedError.
        """
        ...

    def close(self) -> None:
        """End the thread after its jobs; does not wait for one that hangs."""
        ...


@dataclass(slots=True, eq=False)
class _Job:
    work: Callable[[], Any]
    done: asyncio.Future[Outcome[Any]]
    control: Control
    watchdog_s: float
    limit_s: float
    timer: asyncio.TimerHandle | None = None
    begun: bool = False
    ended: bool = False


@dataclass(slots=True)
class _Watch:
    """Observations of the watchdog of one job; times in seconds."""

    at: float
    """Time of the latest check."""
    progress: int = 0
    cpu_s: float = 0.0
    """CPU time of the worker at its latest progress."""
    idle_s: float = 0.0
    """Seconds since then, without time in which the event loop did not run."""
    tile_cpu_s: float = 0.0
    """CPU time of the worker at its latest tile."""


class WorkerDevice:
    """Device with a daemon thread, so that a hanging job does not keep the process alive.

    Use from one event loop.

    Args:
        name: ``cpu``, ``cuda:0`` and so on.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.busy_s = 0.0
        self.lost: str = ""
        """Reason for the loss of the device; empty while it works."""
        self._began: float | None = None
        """Begin of the current job."""
        self._cpu_clock = 0
        """CPU clock of the worker thread."""
        self._idle_s = 0.0
        """Seconds since the current job last made progress, as of the latest check."""
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._thread = Thread(target=self._work, name=f"els-{name}", daemon=True)
        self._thread.start()

    @property
    def running_s(self) -> float:
        """Seconds since the current job began; see ``Device``."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    @property
    def stalled_s(self) -> float:
        """Seconds without progress of the current job; see ``Device``."""
        if self._began is None:
            return 0.0
        return self._idle_s if self.name == "cpu" else self.running_s

    def run(
        self,
        work: Callable[[], T],
        watchdog_s: float,
        *,
        predicted_s: float = 0.0,
        control: Control | None = None,
    ) -> asyncio.Future[Outcome[T]]:
        """Return the future outcome; see ``Device``."""
        limit_s = watchdog_s + 10 * predicted_s
        job = _Job(work, self._loop.create_future(), control or Control(), watchdog_s, limit_s)
        if self.lost:
            job.done.set_exception(DeviceLostError(self.lost))
            return job.done
        self._schedule_check(job, _Watch(time.monotonic()))
        self._jobs.put(job)
        return job.done

    def close(self) -> None:
        """End the thread; waits for the current job unless the device is lost."""
        self._jobs.put(None)
        if not self.lost:
            self._thread.join()

    def _work(self) -> None:
        if self.name.startswith("cuda"):
            torch.cuda.set_device(self.name)
        self._cpu_clock = time.pthread_getcpuclockid(get_ident())
        with torch.inference_mode():
            while (job := self._jobs.get()) is not None:
                began = time.monotonic()
                self._idle_s, self._began, job.begun = 0.0, began, True
                try:
                    with job.control as control:
                        control.advance()
                        result: Any = job.work()
                except BaseException as error:
                    # Any error goes to the caller; the thread goes on.
                    result = error
                outcome = Outcome(result, began, time.monotonic())
                self._began, job.ended = None, True
                try:
                    self._loop.call_soon_threadsafe(self._deliver, job, outcome)
                except RuntimeError:
                    return  # the loop is closed
                del job, control, result, outcome  # an idle thread holds no references

    def _deliver(self, job: _Job, outcome: Outcome[Any]) -> None:
        assert job.timer is not None
        job.timer.cancel()
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
            job.done.set_exception(RuntimeError(f"the computation raised {error!r}"))

    def _schedule_check(self, job: _Job, watch: _Watch) -> None:
        job.timer = self._loop.call_later(_interval_s(job), self._check, job, watch)

    def _check(self, job: _Job, watch: _Watch) -> None:
        """Check whether a job hangs, and schedule the next check."""
        now = time.monotonic()
        passed_s, late_s = now - watch.at, 2 * _interval_s(job)
        watch.at = now
        if job.ended:
            return  # its outcome is about to be delivered
        if self.lost:
            reason = self.lost
        elif not job.begun:
            # It waits for another job, which has a watchdog of its own.
            return self._schedule_check(job, watch)
        elif passed_s > late_s:
            # The event loop did not run, nor perhaps the worker: ready callbacks run first.
            watch.idle_s += late_s / 2
            return self._schedule_check(job, watch)
        else:
            watch.idle_s += passed_s
            reason = self._why_lost(job, watch)
        if not reason:
            return self._schedule_check(job, watch)
        self.lost = reason
        if not job.done.done():
            job.done.set_exception(DeviceLostError(reason))

    def _why_lost(self, job: _Job, watch: _Watch) -> str:
        """Return the reason why a job counts as hung; empty if it does not."""
        if self.name != "cpu":
            if watch.idle_s < job.limit_s:
                return ""
            return f"{self.name} hangs: a batch was not done after {job.limit_s:.1f} s"
        cpu_s, progress = time.clock_gettime(self._cpu_clock), job.control.progress
        if progress != watch.progress:
            watch.progress, watch.tile_cpu_s = progress, cpu_s
            watch.cpu_s, watch.idle_s = cpu_s, 0.0
        elif cpu_s - watch.cpu_s > _LEAST_SHARE * job.watchdog_s:
            watch.cpu_s, watch.idle_s = cpu_s, 0.0
        self._idle_s = watch.idle_s
        if watch.idle_s >= job.watchdog_s:
            return (
                f"{self.name} hangs: a batch was not done after {self.running_s:.1f} s and made no"
                f" progress for {job.watchdog_s:.1f} s"
            )
        burned_s = cpu_s - watch.tile_cpu_s
        if burned_s > _BURNED * job.limit_s:
            return (
                f"{self.name} hangs: a batch was not done after {self.running_s:.1f} s and "
                f"{burned_s:.1f} s of CPU time without a tile"
            )
        return ""


def _interval_s(job: _Job) -> float:
    """Return the seconds between two checks of a job."""
    return min(_MAX_INTERVAL_S, job.watchdog_s / _CHECKS)


_DRIVER_ERRORS = "CUDA error", "Triton Error ["
"""Beginnings of the texts of errors of the driver: torch's, and Triton's at a launch."""


def breaks_device(error: BaseException) -> bool:
    """Return whether an error makes a CUDA context unusable."""
    if is_memory_shortage(error):
        return False
    text = str(error)
    return isinstance(error, torch.AcceleratorError) or any(one in text for one in _DRIVER_ERRORS)


def is_memory_shortage(error: BaseException) -> bool:
    """Return whether the memory of the host or of the device does not suffice."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return "Triton Error [" in text and "out of memory" in text


def free_memory() -> None:
    """Release cached blocks of device memory, after an allocation failed."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
