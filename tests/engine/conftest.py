from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
import torch

from els_service.denoisers.base import Denoised, DenoiserInfo, Query, make_query
from els_service.denoisers.levels import from_sigma
from els_service.denoisers.query_checks import check_query
from els_service.engine.costs import CostModel
from els_service.engine.engine import Engine
from els_service.engine.request_context import REASONS, BatchRecord, RequestContext

SHAPE = (1, 2, 3)
WAIT_S = 30
"""Far more than any of this takes."""


class Recorder:
    """Answers twice x and, as evidence, the sum over C; remembers every batch.

    Args:
        seconds: what it says an image costs.
    """

    def __init__(self, seconds: float = 1e-3) -> None:
        self.seconds = seconds
        self.batches: list[list[float]] = []
        """The first pixel of every image of every batch."""
        self.threads: list[int] = []
        self.fails_on: set[float] = set()
        self.entered = threading.Semaphore(0)
        self.go = threading.Event()
        self.go.set()

    @property
    def info(self) -> DenoiserInfo:
        return DenoiserInfo(kind="recorder", shape=SHAPE, has_log_evidence=True)

    def check(self, query: Query) -> None:
        check_query(self.info, query)

    def predict_seconds(self, query: Query) -> float:
        return self.seconds * len(query)

    def denoise(self, query: Query) -> Denoised:
        self.threads.append(threading.get_ident())
        first = query.x[:, 0, 0, 0].tolist()
        self.batches.append(first)
        self.entered.release()
        assert self.go.wait(WAIT_S)
        if self.fails_on & set(first):
            raise ZeroDivisionError("as told")
        return Denoised(2 * query.pixels, query.x.sum(1).numpy())

    async def until_entered(self) -> None:
        """Wait until the next batch is being computed."""
        assert await asyncio.to_thread(self.entered.acquire, True, WAIT_S)


class Steady(CostModel):
    """Predicts what the denoiser does: which batches there are is not up to a busy machine."""

    def learn(self, estimate: float, seconds: float, now: float) -> None:
        """Take no notice."""


class Observed:
    """What an engine told its observer."""

    def __init__(self) -> None:
        self.waits: list[float] = []
        self.images: list[int] = []
        self.reasons: list[str] = []
        self.launches: list[BatchRecord] = []

    def on_queued(self, model: str, seconds: float) -> None:
        self.waits.append(seconds)

    def on_computed(self, model: str, seconds: float, images: int, cost: float) -> None:
        self.images.append(images)

    def on_dropped(self, model: str, reason: str) -> None:
        assert reason in REASONS
        self.reasons.append(reason)

    def on_batch(self, launch: BatchRecord) -> None:
        self.launches.append(launch)


def query(*values: float) -> Query:
    """Return one image for each value, filled with it."""
    x = torch.tensor(values, dtype=torch.float32)[:, None, None, None].expand(-1, *SHAPE)
    return make_query(x.contiguous(), from_sigma(np.ones(1)))


def values(answer: Denoised) -> list[float]:
    """Return the value of each image of an answer."""
    assert answer.log_evidence is not None
    assert np.array_equal(answer.log_evidence * 2, answer.mean.sum(1).numpy())
    return [float(value) for value in answer.mean[:, 0, 0, 0]]


@pytest.fixture
def observed() -> Observed:
    """What the engine of the same test told."""
    return Observed()


@pytest.fixture
async def engine(observed: Observed) -> AsyncIterator[Engine]:
    """An engine without models; closed in any case."""
    engine = Engine(observed)
    yield engine
    engine.close()


def ask(
    engine: Engine, *numbers: float, model: str = "model", **context: Any
) -> asyncio.Task[Denoised]:
    """Return a call under way that asks for one image of each number."""

    async def call() -> Denoised:
        answer = engine.denoise(
            engine.models.find(model), query(*numbers), RequestContext(**context)
        )
        return answer if isinstance(answer, Denoised) else await answer

    return asyncio.ensure_future(call())


async def held(engine: Engine, recorder: Recorder) -> asyncio.Task[Denoised]:
    """Serve a recorder; return a call whose batch is computed until ``recorder.go`` is set."""
    engine.models.add("model", recorder)
    loaded = engine.models.find("model").loaded
    assert loaded is not None
    loaded.costs = Steady()
    recorder.go.clear()
    first = ask(engine, 0)
    await recorder.until_entered()
    return first


async def turns(count: int = 5) -> None:
    """Let every task that can run do so."""
    for _ in range(count):
        await asyncio.sleep(0)
