"""DenoiseStream on a real server: order, errors, back pressure, leaving, draining."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import code_pb2, error_details_pb2
from tests.support.bad_requests import denoise
from tests.support.messages import array, asked, denoiser, images, images_computed
from tests.support.processes import FAULT_SERVER, ServerProcess, serving
from tests.support.refusals import TIMEOUT_S

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_service.server.services.streams import WINDOW

MODELS = ("zeros", "circular", "wiener")


@pytest.fixture
async def aio(server: ServerProcess) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(server.target) as channel:
        yield channel


def raw_stream(channel: grpc.aio.Channel) -> Any:
    """Return a stream that takes any bytes for requests."""
    return channel.stream_stream(
        "/denoise.v1.DenoiserService/DenoiseStream",
        request_serializer=None,
        response_deserializer=pb.DenoiseStreamResponse.FromString,
    )(timeout=60)


async def send(call: Any, *requests: Any) -> None:
    for request in requests:
        await call.write(request)


async def read(call: Any, count: int) -> list[pb.DenoiseStreamResponse]:
    return [await call.read() for _ in range(count)]


def mixed(count: int) -> list[pb.DenoiseRequest]:
    """Return requests to several models at several levels, labels and sizes."""
    rng = np.random.default_rng(3)
    return [
        asked(
            rng.normal(size=(1 + i % 3, 1, 6, 5)).astype(np.float32),
            model=MODELS[i % len(MODELS)],
            level=pb.NoiseLevel(sigma=[float(rng.uniform(0.1, 5))]),
            labels=[i % 4 - 1],
            return_log_evidence=i % 3 == 0,
        )
        for i in range(count)
    ]


async def test_a_thousand_answers_come_in_order_and_are_those_of_single_calls(
    aio: grpc.aio.Channel,
) -> None:
    requests = mixed(1000)
    stub = denoiser(aio)
    call = stub.DenoiseStream(timeout=60)
    sending = asyncio.ensure_future(send(call, *requests))
    answers = await read(call, len(requests))
    await sending
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK
    single = await asyncio.gather(*(stub.Denoise(r, timeout=60) for r in requests))
    assert [answer.response.SerializeToString(deterministic=True) for answer in answers] == [
        answer.SerializeToString(deterministic=True) for answer in single
    ]


BAD = {
    "window": (denoise(windows=[2]).SerializeToString(), "INVALID_ARGUMENT", "windows"),
    "pixels": (denoise(x=pb.Tensor()).SerializeToString(), "INVALID_ARGUMENT", "x.dtype"),
    "priority": (denoise(priority=4).SerializeToString(), "INVALID_ARGUMENT", "priority"),
    "timeout": (denoise(timeout_s=-1).SerializeToString(), "INVALID_ARGUMENT", "timeout_s"),
    "model": (denoise(model="nobody").SerializeToString(), "NOT_FOUND", ""),
    "garbage": (b"\xff" * 32, "INVALID_ARGUMENT", "request"),
    "truncated": (denoise().SerializeToString()[:-3], "INVALID_ARGUMENT", "request"),
    "nothing": (b"", "NOT_FOUND", ""),
}


async def test_a_malformed_message_gets_its_error_and_affects_no_other(
    aio: grpc.aio.Channel,
) -> None:
    good = mixed(2 * len(BAD))
    expected = await asyncio.gather(*(denoiser(aio).Denoise(r, timeout=60) for r in good))
    call = raw_stream(aio)
    for i, (data, _, _) in enumerate(BAD.values()):
        before, after = (request.SerializeToString() for request in good[2 * i : 2 * i + 2])
        await send(call, before, data, after)
    await call.done_writing()
    answers = [answer async for answer in call]
    assert await call.code() is grpc.StatusCode.OK
    assert [a.response.denoised.data for i, a in enumerate(answers) if i % 3 != 1] == [
        answer.denoised.data for answer in expected
    ]
    for answer, (_, code, field) in zip(answers[1::3], BAD.values(), strict=True):
        assert code_pb2.Code.Name(answer.error.code) == code
        fields = []
        for detail in answer.error.details:
            request = error_details_pb2.BadRequest()
            assert detail.Unpack(request)
            fields += [violation.field for violation in request.field_violations]
        assert fields == ([field] if field else [])
        assert field in answer.error.message


@pytest.mark.parametrize(("images_each", "dtype"), [(85, pb.DTYPE_F32), (256, pb.DTYPE_U8)])
async def test_a_caller_that_does_not_read_is_not_read_from_and_gets_all_in_the_end(
    server: ServerProcess, aio: grpc.aio.Channel, images_each: int, dtype: pb.DType.ValueType
) -> None:
    # About 1 MiB each; an answer is as large as its request, or four times.
    x = np.random.default_rng(0).integers(0, 255, (images_each, 3, 32, 32)).astype(np.uint8)
    data = x.tobytes() if dtype == pb.DTYPE_U8 else x.astype("<f4").tobytes()
    request = denoise(model="gaussian", x=pb.Tensor(dtype=dtype, shape=x.shape, data=data))
    count = 2 * WINDOW
    before = resident_mib(server)
    call = denoiser(aio).DenoiseStream(timeout=120)
    written = 0

    async def write_all() -> None:
        nonlocal written
        for _ in range(count):
            await call.write(request)
            written += 1
        await call.done_writing()

    writing = asyncio.ensure_future(write_all())
    stalled_at = -1
    while stalled_at != written:  # that nothing happens is no event: it has to be waited for
        stalled_at = written
        await asyncio.sleep(0.5)
    assert written < WINDOW  # of those that were read, and a few in sockets
    async with grpc.aio.insecure_channel(server.target) as other:
        assert (await denoiser(other).Denoise(denoise(), timeout=TIMEOUT_S)).denoised.data
    # A window of 1 MiB each; half as much for the one read last, for sockets and the allocator.
    assert resident_mib(server) - before < 1.5 * WINDOW
    answers = [len(answer.response.denoised.data) async for answer in call]
    await writing
    assert answers == [4 * x.size] * count


def resident_mib(server: ServerProcess) -> float:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


async def test_requests_of_a_cancelled_stream_are_not_computed(
    fault_server: ServerProcess,
) -> None:
    async with grpc.aio.insecure_channel(fault_server.target) as channel:
        before = await images_computed(channel, "slow")
        call = denoiser(channel).DenoiseStream(timeout=60)
        await send(call, *(asked(images(i)) for i in range(60)))
        assert array((await call.read()).response.denoised)[0, 0, 0, 0] == 0
        call.cancel()
        async with grpc.aio.insecure_channel(fault_server.target) as other:
            answer = await denoiser(other).Denoise(asked(images(5)), timeout=TIMEOUT_S)
            assert np.array_equal(array(answer.denoised), images(10))
            # The one that was read, two batches at most that were under way, and this one.
            assert await images_computed(other, "slow") - before < 35


async def test_a_drain_completes_the_requests_read_of_a_stream_and_ends_it_unavailable(
    models: Path,
) -> None:
    with serving("--models", models, program=FAULT_SERVER) as server:
        async with grpc.aio.insecure_channel(server.target) as channel:
            ended, open_ = (denoiser(channel).DenoiseStream(timeout=60) for _ in range(2))
            for call in (ended, open_):
                await send(call, *(asked(images(i)) for i in range(20)))
            await ended.done_writing()
            for call in (ended, open_):
                await read(call, 3)
            server.terminate()
            for call in (ended, open_):
                rest = [first(answer) for answer in await read(call, 17)]
                assert rest == [2.0 * i for i in range(3, 20)]
            assert await ended.read() is grpc.aio.EOF
            assert await ended.code() is grpc.StatusCode.OK
            with pytest.raises(grpc.aio.AioRpcError) as refusal:
                await open_.read()
            assert refusal.value.code() is grpc.StatusCode.UNAVAILABLE
            assert "draining" in str(refusal.value.details())
        assert await asyncio.to_thread(server.wait) == (0, "")


def first(answer: pb.DenoiseStreamResponse) -> float:
    return float(array(answer.response.denoised)[0, 0, 0, 0])
