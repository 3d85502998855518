"""Whatever callers do to a real server, each gets its own rows or a failure of its own making."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tests.support.bad_inferences import SIGMA, infer
from tests.support.fault_server import FAULT, FaultyDenoiser
from tests.support.messages import Pixels, array, asked, denoiser, images, inference

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_service.config import Settings
from els_service.denoisers.samplers import Options, sample
from els_service.server.server import Server

STEPS = 3
WAIT_S = 30
IDLE_S = 10
"""Far more than any of this takes."""


@dataclass(frozen=True)
class Act:
    """One caller's call, and what becomes of it."""

    kind: str
    connection: int
    model: str
    count: int
    """Of images, and of a stream's messages."""
    priority: int
    after_s: float
    deadline_s: float | None
    leaves_s: float | None
    faulty: bool


ACTS = st.lists(
    st.builds(
        Act,
        kind=st.sampled_from(["denoise", "score", "infer", "stream", "sample"]),
        connection=st.integers(0, 2),
        model=st.sampled_from(["slow", "small"]),
        count=st.integers(1, 6),
        priority=st.integers(0, 3),
        after_s=st.sampled_from([0.0, 0.0, 0.002, 0.01]),
        deadline_s=st.sampled_from([None, None, None, 0.002, 0.01, 0.05]),
        leaves_s=st.sampled_from([None, None, None, 0.0, 0.002, 0.01]),
        faulty=st.sampled_from([False] * 5 + [True]),
    ),
    min_size=1,
    max_size=16,
)


class World:
    """A server in this process and three connections to it; all on the runner's loop."""

    def __init__(self, models: Path, runner: asyncio.Runner) -> None:
        self.runner = runner
        self.settings = Settings(models=models, port=0, metrics_port=0, queue_s=0.02, threads=1)

    async def start(self) -> None:
        self.server = Server(self.settings)
        self.models = self.server._engine.models
        self.models.add("slow", FaultyDenoiser(image_s=0.002))
        self.models.add("small", FaultyDenoiser(image_s=0.001, memory=3))
        target = f"127.0.0.1:{(await self.server.start()).grpc_port}"
        own = [("grpc.use_local_subchannel_pool", 1)]
        self.channels = [grpc.aio.insecure_channel(target, own) for _ in range(3)]

    async def stop(self) -> None:
        for channel in self.channels:
            await channel.close()
        await self.server.drain()
        await self.server.close()

    async def is_idle(self) -> None:
        """Wait until nothing is left of any call."""
        engine, calls = self.server._engine, self.server._calls
        scheduler, until = engine._scheduler, self.runner.get_loop().time() + IDLE_S
        left = None
        while left != (0, 0, 0, 0):
            assert self.runner.get_loop().time() < until, left
            await asyncio.sleep(0.001)
            left = (
                *(scheduler.waiting(), len(scheduler._running)),
                *(engine._trajectories, calls._in_flight),
            )
        models = [entry.loaded for entry in self.models if entry.loaded]
        assert [(len(model.queue), model.queue.size, model.running) for model in models] == [
            (0, 0, 0) for _ in models
        ]


@pytest.fixture
def world(models: Path) -> Iterator[World]:
    with asyncio.Runner() as runner:
        world = World(models, runner)
        runner.run(world.start())
        yield world
        runner.run(world.stop())


def test_every_caller_gets_its_own_rows_or_its_own_failure(world: World) -> None:
    seen: Counter[str] = Counter()

    @settings(
        max_examples=100,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(acts=ACTS)
    def callers_get_their_own(acts: list[Act]) -> None:
        seen.update(world.runner.run(all_at_once(world, acts)))

    callers_get_their_own()
    expected = {"OK", "INTERNAL", "DEADLINE_EXCEEDED", "left", "RESOURCE_EXHAUSTED"}
    assert seen.keys() == expected
    assert seen["OK"] > 50


async def all_at_once(world: World, acts: list[Act]) -> list[str]:
    outcomes = await asyncio.gather(
        *(outcome(world, act, first=10.0 * i) for i, act in enumerate(acts))
    )
    await world.is_idle()
    for act, code in zip(acts, outcomes, strict=True):
        allowed = {"RESOURCE_EXHAUSTED", "INTERNAL" if may_fail(act) else "OK"}
        allowed |= {"DEADLINE_EXCEEDED"} if act.deadline_s else set()
        allowed |= {"left"} if act.leaves_s is not None else set()
        assert code in allowed, act
    return outcomes


def may_fail(act: Act) -> bool:
    return act.faulty and act.kind != "sample"


async def outcome(world: World, act: Act, first: float) -> str:
    """Return how a call ends; an answer must be right."""
    await asyncio.sleep(act.after_s)
    values = [FAULT if may_fail(act) and i == 0 else first + i for i in range(act.count)]
    call = asyncio.ensure_future(_CALLS[act.kind](world.channels[act.connection], act, values))
    try:
        async with asyncio.timeout(act.leaves_s):
            await call
    except TimeoutError:
        return "left"
    except asyncio.CancelledError:
        # grpc's client cancels a stream that ended before all its messages were sent.
        assert act.kind == "stream"
        return "DEADLINE_EXCEEDED"
    except grpc.aio.AioRpcError as error:
        if act.kind == "stream" and "Internal error from Core" in str(error.details()):
            # Or it says so.
            return "DEADLINE_EXCEEDED"
        return str(error.code().name)
    return "OK"


def options(act: Act) -> dict[str, Any]:
    return {"model": act.model, "priority": act.priority}


def timeout_s(act: Act) -> float:
    return act.deadline_s or WAIT_S


async def _denoise(channel: grpc.aio.Channel, act: Act, values: list[float]) -> None:
    request = asked(images(*values), return_log_evidence=True, **options(act))
    answer = await denoiser(channel).Denoise(request, timeout=timeout_s(act))
    _is_of(answer, images(*values))


def _is_of(answer: pb.DenoiseResponse, x: Pixels) -> None:
    assert np.array_equal(array(answer.denoised), 2 * x)
    assert np.array_equal(array(answer.log_evidence), x.sum(1))


async def _score(channel: grpc.aio.Channel, act: Act, values: list[float]) -> None:
    """At a = s = 1 the score is x."""
    asking = asked(images(*values), **options(act), timeout_s=act.deadline_s or 0)
    request = pb.ScoreRequest.FromString(asking.SerializeToString())
    answer = await denoiser(channel).Score(request, timeout=WAIT_S)
    assert np.array_equal(array(answer.score), images(*values))


async def _infer(channel: grpc.aio.Channel, act: Act, values: list[float]) -> None:
    x = images(*values)
    request = infer(("x", "FP32", x.shape, x.tobytes()), SIGMA, model=act.model)
    request.parameters["priority"].int64_param = act.priority
    request.parameters["timeout"].int64_param = round(1e6 * (act.deadline_s or 0))
    answer = await inference(channel).ModelInfer(request, timeout=WAIT_S)
    assert answer.raw_output_contents[0] == (2 * x).tobytes()


async def _stream(channel: grpc.aio.Channel, act: Act, values: list[float]) -> None:
    """A faulty message fails alone; the outcome of the stream is its last failure."""
    requests = [asked(images(x), return_log_evidence=True, **options(act)) for x in values]
    call = denoiser(channel).DenoiseStream(iter(requests), timeout=timeout_s(act))
    failure, answers = None, []
    async with contextlib.aclosing(_until_left(call)) as stream:
        async for answer in stream:
            answers.append(answer)
    for value, answer in zip(values, answers, strict=True):
        if answer.WhichOneof("result") == "error":
            failure = _code(answer)
        else:
            assert value != FAULT
            _is_of(answer.response, images(value))
    if failure is not None:
        raise grpc.aio.AioRpcError(failure, grpc.aio.Metadata(), grpc.aio.Metadata())


async def _until_left(call: Any) -> AsyncGenerator[pb.DenoiseStreamResponse, None]:
    try:
        async for answer in call:
            yield answer
    finally:
        # Cancelling whoever waits for a stream does not always cancel its call.
        call.cancel()


def _code(answer: pb.DenoiseStreamResponse) -> grpc.StatusCode:
    return next(code for code in grpc.StatusCode if code.value[0] == answer.error.code)


async def _sample(channel: grpc.aio.Channel, act: Act, values: list[float]) -> None:
    seed = round(values[0])
    request = pb.SampleRequest(count=act.count, seed=seed, steps=STEPS, **options(act))
    call = denoiser(channel).Sample(request, timeout=timeout_s(act))
    messages = [message async for message in call]
    *_, last = sample(
        FaultyDenoiser(image_s=0),
        count=act.count,
        seed=seed,
        sampler="ddim",
        options=Options(steps=STEPS),
    )
    assert [message.index for message in messages] == [1, 2, 3]
    assert np.array_equal(array(messages[-1].x), last.x.float().numpy())


_CALLS = {
    "denoise": _denoise,
    "score": _score,
    "infer": _infer,
    "stream": _stream,
    "sample": _sample,
}
