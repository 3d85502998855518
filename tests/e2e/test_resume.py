"""Trajectories that stop and go on: the same bits on any server, and no token is believed."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tests.support.bad_requests import denoise
from tests.support.messages import denoiser
from tests.support.models_folder import write_models
from tests.support.processes import ServerProcess, serving
from tests.support.refusals import TIMEOUT_S, assert_refused, refused, violation

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_proto.denoise.v1.denoise_pb2_grpc import DenoiserServiceStub
from els_service.server.requests.resume_token import sealed

START = pb.Tensor(dtype=pb.DTYPE_U8, shape=[1, 1, 6, 5], data=bytes(range(30)))
SAMPLERS: dict[str, dict[str, Any]] = {
    "ddim": {"sampler": pb.SAMPLER_DDIM},
    "released": {"sampler": pb.SAMPLER_DDIM_RELEASED, "steps": 6},
    "ddpm": {"sampler": pb.SAMPLER_DDPM, "eta": 0.7},
    "heun": {"sampler": pb.SAMPLER_HEUN, "churn": 3},
    "euler": {
        "sampler": pb.SAMPLER_EULER,
        "churn": 9,
        "churn_noise": 1.01,
        "churn_min_sigma": 0.01,
        "churn_max_sigma": 60,
    },
    "dpmpp_2m": {"sampler": pb.SAMPLER_DPMPP_2M},
    "from a start": {
        "sampler": pb.SAMPLER_DPMPP_2M,
        "start": START,
        "start_time": 0.6,
        "first_image": 4,
    },
    "at times": {"start": START, "steps": 0, "times": [0.7, 0.5, 0.3, 0.2, 0.1]},
}
STATE = 32
"""Where a token's state begins."""
CHECKSUM = -16
"""Where its checksum begins."""


@pytest.fixture
async def aio(server: ServerProcess) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(server.target) as channel:
        yield channel


def drawn(**changes: Any) -> pb.SampleRequest:
    """Return a request of two images in five steps that asks for everything."""
    fields: dict[str, Any] = {
        "model": "zeros",
        "count": 2,
        "seed": 9,
        "steps": 5,
        "labels": [1, -1],
        "return_x": True,
        "return_denoised": True,
        "return_resume_token": True,
    }
    return pb.SampleRequest(**{**fields, **changes})


async def steps(channel: grpc.aio.Channel, request: pb.SampleRequest) -> list[pb.SampleResponse]:
    return [step async for step in denoiser(channel).Sample(request, timeout=60)]


@pytest.mark.parametrize("options", SAMPLERS.values(), ids=SAMPLERS)
async def test_a_token_of_any_step_goes_on_with_the_same_bits_on_any_server(
    aio: grpc.aio.Channel, fault_server: ServerProcess, options: dict[str, Any]
) -> None:
    whole = await steps(aio, drawn(**options))
    assert [step.index for step in whole] == [1, 2, 3, 4, 5]
    assert [bool(step.resume_token) for step in whole] == [True] * 4 + [False]
    async with grpc.aio.insecure_channel(fault_server.target) as other:
        for channel in (aio, other):
            for taken in range(1, 5):
                token = whole[taken - 1].resume_token
                rest = await steps(channel, drawn(**options, resume_token=token))
                assert rest == whole[taken:]


@pytest.fixture(scope="module")
def token(channel: grpc.Channel) -> bytes:
    """A token of ``drawn()`` after two steps."""
    calls = DenoiserServiceStub(channel).Sample(drawn(), timeout=TIMEOUT_S)
    return next(bytes(step.resume_token) for step in calls if step.index == 2)


OTHER_REQUESTS: dict[str, dict[str, Any]] = {
    "seed": {"seed": 10},
    "model": {"model": "circular"},
    "steps": {"steps": 6},
    "sampler": {"sampler": pb.SAMPLER_DDPM},
    "labels": {"labels": [1, 2]},
    "no labels": {"labels": []},
    "churn": {"sampler": pb.SAMPLER_HEUN, "churn": 1},
    "guidance": {"guidance": 2.0},
    "windows": {"windows": [3]},
    "eta": {"eta": 0.0},
    "timesteps": {"timesteps": pb.TIMESTEPS_ALIGNED},
    "start": {"start": START, "start_time": 1.0},
    "times": {"times": [1.0, 0.8, 0.6, 0.4, 0.2]},
    "first image": {"first_image": 1},
    "churn noise": {"sampler": pb.SAMPLER_HEUN, "churn_noise": 1.0},
}


@pytest.mark.parametrize("changes", OTHER_REQUESTS.values(), ids=OTHER_REQUESTS)
def test_a_token_of_another_request_is_refused(
    channel: grpc.Channel, token: bytes, changes: dict[str, Any]
) -> None:
    request = drawn(**changes, resume_token=token)
    call = refused(lambda: DenoiserServiceStub(channel).Sample(request, timeout=TIMEOUT_S))
    assert_refused(call, "INVALID_ARGUMENT", "resume_token", "a token of this very", "another")


OTHER_SIZES: dict[str, tuple[dict[str, Any], int]] = {
    "fewer": ({"count": 1, "labels": [1]}, 288),
    "more": ({"count": 3, "labels": []}, 768),
    "of another shape": ({"model": "gaussian", "labels": []}, 49200),
}


@pytest.mark.parametrize(("changes", "size"), OTHER_SIZES.values(), ids=OTHER_SIZES)
def test_a_token_of_images_of_another_size_is_refused(
    channel: grpc.Channel, token: bytes, changes: dict[str, Any], size: int
) -> None:
    request = drawn(**changes, resume_token=token)
    call = refused(lambda: DenoiserServiceStub(channel).Sample(request, timeout=TIMEOUT_S))
    assert_refused(call, "INVALID_ARGUMENT", "resume_token", f"{size} bytes", "528 bytes")


GAUSSIAN = "kind: gaussian\nshape: [1, 8, 8]\nmean: 0.0\nvariance: {}\n"


async def test_a_token_is_refused_when_the_files_of_an_unloaded_model_have_changed(
    tmp_path: Path,
) -> None:
    root = write_models(tmp_path / "models", {"a": GAUSSIAN.format(1), "b": GAUSSIAN.format(1)})
    changed = GAUSSIAN.format(4)

    def request(model: str, **fields: Any) -> pb.SampleRequest:
        fields = {"steps": 5, "return_x": True, "return_resume_token": True, **fields}
        return pb.SampleRequest(model=model, **fields)

    # Room for one model: whichever is asked unloads the other.
    with serving("--models", root, "--threads", 1, ELS_MEMORY_BYTES="20") as server:
        async with grpc.aio.insecure_channel(server.target) as channel:
            whole = await steps(channel, request("a"))
            resumed = request("a", resume_token=whole[1].resume_token)
            await steps(channel, request("b"))
            assert await steps(channel, resumed) == whole[2:]
            await steps(channel, request("b"))
            # A trajectory that goes on keeps its model, and its tokens say so.
            call = denoiser(channel).Sample(resumed, timeout=60)
            await call.read()
            await steps(channel, request("b"))
            (root / "a" / "model.yaml").write_text(changed)
            with pytest.raises(grpc.RpcError, match="answered by the same model, got another"):
                await steps(channel, resumed)
            later = (await call.read()).resume_token
            with pytest.raises(grpc.RpcError, match="answered by the same model, got another"):
                await steps(channel, request("a", resume_token=later))
            assert (await steps(channel, request("a")))[-1].x != whole[-1].x


def test_no_flipped_bit_is_taken_for_the_token(channel: grpc.Channel, token: bytes) -> None:
    stub = DenoiserServiceStub(channel)
    for i, byte in enumerate(token):
        changed = token[:i] + bytes([byte ^ 1 << i % 8]) + token[i + 1 :]
        with pytest.raises(grpc.RpcError, match="INVALID_ARGUMENT") as caught:
            list(stub.Sample(drawn(resume_token=changed), timeout=TIMEOUT_S))
        assert isinstance(caught.value, grpc.Call)
        told = ("resume_token", "expected bytes as they were sent, got changed ones")
        assert violation(caught.value) == told


def test_a_token_is_valid_for_any_returned_fields_and_first_server(
    channel: grpc.Channel, token: bytes
) -> None:
    request = drawn(return_x=False, return_denoised=False, priority=1, resume_token=token)
    answers = DenoiserServiceStub(channel).Sample(request, timeout=TIMEOUT_S)
    assert [answer.index for answer in answers] == [3, 4, 5]


def _with(token: bytes, at: int, value: bytes) -> bytes:
    """Return a token with other bytes and their checksum, as who knows the format could make it."""
    return sealed((token[:at] + value + token[at + len(value) :])[:CHECKSUM])


def _state(token: bytes, value: float) -> bytes:
    return _with(token, STATE, struct.pack("<d", value))


def _step(token: bytes, index: int) -> bytes:
    return _with(token, STATE - 4, struct.pack("<I", index))


DAMAGES: dict[str, tuple[Any, str, str]] = {
    "truncated": (lambda t: t[:-1], "528 bytes", "527 bytes"),
    "longer": (lambda t: t + b"\0", "528 bytes", "529 bytes"),
    "twice": (lambda t: t + t, "528 bytes", "1056 bytes"),
    "a stub": (lambda t: b"els2", "528 bytes", "4 bytes"),
    "zeros": (lambda t: bytes(528), "bytes as they were sent", "changed ones"),
    "magic": (lambda t: _with(t, 0, b"els1"), "a token of this very request", "another"),
    "digest": (lambda t: _with(t, 4, bytes(16)), "a token of this very", "another"),
    "seed": (lambda t: _with(t, 20, b"\x08"), "a token of this very", "another"),
    "NaN": (lambda t: _state(t, float("nan")), "a finite state", "NaN"),
    "infinity": (lambda t: _state(t, float("-inf")), "a finite state", "NaN, infinity"),
    "huge": (lambda t: _state(t, 1e300), "a finite state", "NaN, infinity or more"),
    "step 0": (lambda t: _step(t, 0), "a step from 1 to 4", "0"),
    "last step": (lambda t: _step(t, 5), "a step from 1 to 4", "5"),
    "no step": (lambda t: _step(t, 2**32 - 1), "a step from 1 to 4", "4294967295"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_token_is_refused(
    channel: grpc.Channel, token: bytes, damage: tuple[Any, str, str]
) -> None:
    change, expected, got = damage
    request = drawn(resume_token=change(token))
    call = refused(lambda: DenoiserServiceStub(channel).Sample(request, timeout=TIMEOUT_S))
    assert_refused(call, "INVALID_ARGUMENT", "resume_token", expected, got)


async def test_a_server_that_must_end_hands_out_tokens_and_another_goes_on_with_the_same_bits(
    models: Path, aio: grpc.aio.Channel
) -> None:
    # None can end before the server: each stalls when 64 KiB of its 300 wait to be read.
    large: dict[str, Any] = {"count": 8, "labels": [1, -1] * 4, "return_resume_token": False}
    long: dict[str, Any] = {"steps": 150}
    times: dict[str, Any] = {
        "steps": 0,
        "times": np.linspace(0.9, 0.1, 150).tolist(),
        "start": pb.Tensor(dtype=pb.DTYPE_U8, shape=[8, 1, 6, 5], data=START.data * 8),
    }
    requests = [
        drawn(**{**options, **large, **(times if "times" in options else long)})
        for name, options in SAMPLERS.items()
        if name not in ("euler", "from a start")  # as heun and dpmpp_2m
    ]
    plain = {"return_denoised": False, "return_resume_token": False}
    requests.append(drawn(model="gaussian", count=8, labels=[], steps=100, **plain))
    with serving("--models", models, "--threads", 1, ELS_DRAIN_S="0") as server:
        async with grpc.aio.insecure_channel(server.target) as channel:
            calls = [denoiser(channel).Sample(request, timeout=60) for request in requests]
            begun = [[await call.read()] for call in calls]
            server.terminate()
            await asyncio.gather(*map(read_to_its_end, calls, begun))
            for call in calls:
                assert await call.code() is grpc.StatusCode.UNAVAILABLE
        assert await asyncio.to_thread(server.wait) == (0, "")
    for request, seen in zip(requests, begun, strict=True):
        last = seen.pop()
        assert last == pb.SampleResponse(resume_token=last.resume_token)
        assert last.resume_token
        request.ClearField("resume_token")
        whole = await steps(aio, request)
        assert seen == whole[: len(seen)]
        request.resume_token = last.resume_token
        assert await steps(aio, request) == whole[len(seen) :]


async def read_to_its_end(call: Any, seen: list[pb.SampleResponse]) -> None:
    with contextlib.suppress(grpc.aio.AioRpcError):  # its code is looked at by the caller
        while (message := await call.read()) is not grpc.aio.EOF:
            seen.append(message)


async def test_readers_that_stall_do_not_slow_another_caller_down(
    server: ServerProcess, aio: grpc.aio.Channel
) -> None:
    alone = await median_latency_s(aio)
    async with grpc.aio.insecure_channel(server.target) as other:
        big = pb.SampleRequest(
            model="gaussian", count=64, steps=1000, return_x=True, return_denoised=True
        )
        stalled = [denoiser(other).Sample(big, timeout=60) for _ in range(8)]
        for call in stalled:
            assert (await call.read()).index == 1
        await median_latency_s(aio)  # by now their buffers are full
        assert await median_latency_s(aio) < 3 * alone + 0.005
        for call in stalled:
            call.cancel()


async def median_latency_s(channel: grpc.aio.Channel) -> float:
    clock = asyncio.get_running_loop().time
    latencies = []
    for _ in range(100):
        began = clock()
        await denoiser(channel).Denoise(denoise(), timeout=TIMEOUT_S)
        latencies.append(clock() - began)
    return float(np.median(latencies))
