"""A world in which time passes only when nothing else is left to do: hours in milliseconds."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from tests.engine.conftest import SHAPE, Observed, query

from els_kernels import Control
from els_service.config import Scheduling
from els_service.denoisers.base import Denoised, DenoiserInfo, Query
from els_service.denoisers.query_checks import check_query
from els_service.engine.device import DeviceLostError, Outcome, breaks_device
from els_service.engine.engine import Engine
from els_service.engine.request_context import RequestContext

T = TypeVar("T")


class SimulatedLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer once nothing is ready."""

    now = 0.0

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        waiting: Any = self
        while waiting._scheduled and waiting._scheduled[0]._cancelled:
            # As the loop does itself, but before time jumps to what will not happen.
            waiting._timer_cancelled_count -= 1
            heapq.heappop(waiting._scheduled)._scheduled = False
        if not waiting._ready and waiting._scheduled:
            self.now = max(self.now, waiting._scheduled[0]._when)
        super()._run_once()  # type: ignore[misc]  # asyncio's own name for one turn of the loop


def simulate(main: Coroutine[Any, Any, T]) -> T:
    """Return what ``main`` does, in simulated time."""
    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        return runner.run(main)


def now() -> float:
    """Return the simulated time."""
    return asyncio.get_running_loop().time()


class SimulatedDevice:
    """Computes in no time and says when it would have been done."""

    def __init__(self, name: str = "sim") -> None:
        self.name, self.busy_s, self.work_s = name, 0.0, 0.0
        self.running = False

    @property
    def running_s(self) -> float:
        return 0.0

    @property
    def stalled_s(self) -> float:
        return 0.0

    def run(
        self,
        work: Callable[[], T],
        watchdog_s: float,
        *,
        predicted_s: float = 0.0,
        control: Control | None = None,
    ) -> asyncio.Future[Outcome[T]]:
        assert not self.running, "one batch at a time"
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Outcome[T]] = loop.create_future()
        self.running, self.work_s, began = True, 0.0, loop.time()
        try:
            result: T | Exception = work()
        except Exception as error:
            result = error

        def finish() -> None:
            self.running = False
            self.busy_s += self.work_s
            if isinstance(result, Exception):
                lost = breaks_device(result)
                done.set_exception(DeviceLostError(str(result)) if lost else result)
            else:
                done.set_result(Outcome(result, began, loop.time()))

        loop.call_later(self.work_s, finish)
        return done

    def close(self) -> None:
        pass


class SimulatedDenoiser:
    """Answers 2x; an image takes ``image_s`` and a launch ``launch_s``; fails where it is told to.

    Args:
        device: whose time it takes.
        image_s: real seconds of an image.
        launch_s: real seconds that a launch adds.
        estimate_s: what it predicts of an image, right or wrong.
        memory: images that fit the memory.
    """

    def __init__(
        self,
        device: SimulatedDevice,
        image_s: float,
        launch_s: float = 0.0,
        estimate_s: float | None = None,
        memory: int = 1 << 30,
    ) -> None:
        self._device, self.image_s, self._launch_s = device, image_s, launch_s
        self._estimate_s = image_s if estimate_s is None else estimate_s
        self._memory = memory
        self.faults: dict[float, Exception] = {}
        """By an image's number."""
        self.begun: list[tuple[float, list[float]]] = []
        """When each batch was begun, and its images' numbers."""

    @property
    def info(self) -> DenoiserInfo:
        return DenoiserInfo(kind="simulated", shape=SHAPE, has_log_evidence=True)

    def check(self, query: Query) -> None:
        check_query(self.info, query)

    def predict_seconds(self, query: Query) -> float:
        return self._estimate_s * len(query)

    def denoise(self, query: Query) -> Denoised:
        numbers = query.pixels[:, 0, 0, 0].tolist()
        self.begun.append((now(), numbers))
        if len(query) > self._memory:
            raise torch.OutOfMemoryError("as told")
        for number in numbers:
            if number in self.faults:
                raise self.faults[number]
        self._device.work_s += self._launch_s + self.image_s * len(query)
        return Denoised(2 * query.pixels, np.sum(query.pixels, 1))


@dataclass
class World:
    """An engine on simulated devices."""

    scheduling: Scheduling = field(default_factory=Scheduling)
    count: int = 1
    """Of devices."""
    observed: Observed = field(default_factory=Observed)

    def __post_init__(self) -> None:
        self.devices = [SimulatedDevice(f"sim:{i}") for i in range(self.count)]
        self.device = self.devices[0]
        loop = asyncio.get_running_loop()
        self.engine = Engine(self.observed, self.scheduling, self.devices, loop.time)

    def serve(self, name: str, *denoisers: SimulatedDenoiser) -> None:
        self.engine.models.add(name, *denoisers)

    async def ask(self, *numbers: float, model: str = "model", **context: object) -> Denoised:
        given = RequestContext(**context)  # type: ignore[arg-type]  # the tests name its fields
        answer = self.engine.denoise(self.engine.models.find(model), query(*numbers), given)
        return answer if isinstance(answer, Denoised) else await answer

    def is_idle(self) -> bool:
        loaded_models = [entry.loaded for entry in self.engine.models if entry.loaded]
        return not self.engine.memory.used and all(
            (len(loaded.queue), loaded.queue.cost, loaded.queue.size, loaded.running)
            == (0, 0, 0, 0)
            and not any(room.budget.used for room in loaded.budgets)
            for loaded in loaded_models
        )
