"""Messages use about their size of memory, compressed or not, accepted or rejected."""

from __future__ import annotations

import functools
import gzip
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tests.support.bad_requests import denoise, tensor
from tests.support.messages import large
from tests.support.processes import ServerProcess, serving
from tests.support.refusals import TIMEOUT_S, assert_answers, assert_refused, refused

from els_proto.denoise.v1.denoise_pb2_grpc import DenoiserServiceStub

MIB = 1 << 20
DENOISE = "/denoise.v1.DenoiserService/Denoise"
HEALTH = "/grpc.health.v1.Health/Check"


@functools.cache
def structure() -> bytes:
    """Return a request whose shape has sixty million numbers."""
    return large(2, large(2, b"\1" * (60 * MIB)))


@pytest.fixture(scope="module")
def fresh(models: Path) -> Iterator[ServerProcess]:
    """A server that no other test has made large."""
    with serving("--models", models, "--threads", 1, ELS_HEALTH_PORT="0") as process:
        yield process


@pytest.fixture
def zipping(fresh: ServerProcess) -> Iterator[grpc.Channel]:
    """A channel that compresses everything."""
    options = [("grpc.max_send_message_length", -1)]
    gzip_ = grpc.Compression.Gzip
    with grpc.insecure_channel(fresh.target, options, compression=gzip_) as channel:
        assert_answers(channel)
        yield channel


def memory(process: ServerProcess, field: str) -> float:
    """Return a figure of the process's memory in MiB."""
    status = Path(f"/proc/{process.process.pid}/status").read_text()
    found = re.search(rf"{field}:\s+(\d+) kB", status)
    assert found
    return int(found[1]) / 1024


def raw(channel: grpc.Channel, method: str, data: bytes) -> Any:
    call: Any = channel.unary_unary(method)
    return call(data, timeout=TIMEOUT_S)


def test_a_client_may_compress(zipping: grpc.Channel) -> None:
    x = np.random.default_rng(0).random((64, 3, 32, 32), np.float32)
    request = denoise(model="gaussian", x=tensor(shape=x.shape, data=x.tobytes()))
    plain = DenoiserServiceStub(zipping).Denoise(
        request, timeout=TIMEOUT_S, compression=grpc.Compression.NoCompression
    )
    assert DenoiserServiceStub(zipping).Denoise(request, timeout=TIMEOUT_S) == plain


def test_compressed_structure_allocates_no_more_than_its_size(
    fresh: ServerProcess, zipping: grpc.Channel
) -> None:
    before = memory(fresh, "VmRSS")
    assert len(gzip.compress(structure())) < MIB
    for _ in range(3):
        call = refused(lambda: raw(zipping, DENOISE, structure()))
        assert_refused(call, "INVALID_ARGUMENT", "request", "a message of this method", "")
    # The parser made 500 MiB of each.
    assert memory(fresh, "VmHWM") - before < 250
    assert_answers(zipping)


def test_a_message_above_the_limit_after_decompression_is_rejected(
    fresh: ServerProcess, zipping: grpc.Channel
) -> None:
    before = memory(fresh, "VmRSS")
    call = refused(lambda: raw(zipping, DENOISE, bytes(400 * MIB)))
    expected = "at most 67108864 bytes after decompression"
    assert_refused(call, "RESOURCE_EXHAUSTED", "request", expected, "419430400")
    assert memory(fresh, "VmHWM") - before < 250


@pytest.mark.parametrize("model", ["nowhere", "gaussian"])
def test_the_memory_of_a_rejected_request_is_freed_at_once(
    fresh: ServerProcess, zipping: grpc.Channel, model: str
) -> None:
    data = bytes(32 * MIB)
    request = denoise(model=model, x=tensor(shape=(8, 1, 1024, 1024), data=data))
    stub, none = DenoiserServiceStub(zipping), grpc.Compression.NoCompression
    refused(lambda: stub.Denoise(request, timeout=TIMEOUT_S, compression=none))
    before = memory(fresh, "VmRSS")
    for _ in range(5):
        refused(lambda: stub.Denoise(request, timeout=TIMEOUT_S, compression=none))
    # Each left 60 MiB until garbage was collected.
    assert memory(fresh, "VmRSS") - before < 60


def test_health_accepts_small_messages_only(fresh: ServerProcess, zipping: grpc.Channel) -> None:
    call = refused(lambda: raw(zipping, HEALTH, large(1, b"a" * MIB)))
    assert call.code() is grpc.StatusCode.NOT_FOUND
    with grpc.insecure_channel(f"127.0.0.1:{fresh.ready['health_port']}") as probes:
        call = refused(lambda: raw(probes, HEALTH, large(1, b"a" * MIB)))
        assert call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert raw(probes, HEALTH, b"") == raw(zipping, HEALTH, b"")


def test_compression_can_be_turned_off(models: Path) -> None:
    with (
        serving("--models", models, ELS_COMPRESSION="false") as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        assert_answers(channel)
        stub = DenoiserServiceStub(channel)
        request, zipped = denoise(), grpc.Compression.Gzip
        call = refused(lambda: stub.Denoise(request, timeout=TIMEOUT_S, compression=zipped))
        assert call.code() is grpc.StatusCode.UNIMPLEMENTED


def test_connections_are_bounded(models: Path) -> None:
    with serving("--models", models, ELS_MAX_CONNECTIONS="2") as server:
        own = [("grpc.use_local_subchannel_pool", 1)]
        held = [grpc.insecure_channel(server.target, own) for _ in range(2)]
        for channel in held:
            assert_answers(channel)
        with grpc.insecure_channel(server.target, own) as third:
            call = refused(lambda: raw(third, HEALTH, b""))
            assert call.code() in (
                grpc.StatusCode.UNAVAILABLE,
                grpc.StatusCode.DEADLINE_EXCEEDED,
            )
        for channel in held:
            assert_answers(channel)
            channel.close()
