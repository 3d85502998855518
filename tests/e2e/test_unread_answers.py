"""Responses that are not read: their memory is bounded, and other callers are admitted."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import grpc
import pytest
from tests.e2e.test_unfinished_messages import BUDGET, MIB, memory, port_of
from tests.support import frames
from tests.support.bad_requests import denoise, tensor
from tests.support.metrics import value
from tests.support.processes import ServerProcess, serving
from tests.support.refusals import TIMEOUT_S
from tests.support.unfinished import DENOISE, Sender

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_proto.denoise.v1.denoise_pb2_grpc import DenoiserServiceStub

_OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]


@pytest.fixture
def tight(models: Path) -> Iterator[ServerProcess]:
    """A server of which all callers together may hold 256 MiB."""
    with serving("--models", models, "--threads", 1, ELS_IN_FLIGHT_BYTES=str(BUDGET)) as process:
        yield process


def images(count: int) -> pb.DenoiseRequest:
    shape = count, 3, 32, 32
    return denoise(model="gaussian", x=tensor(shape=shape, data=bytes(count * 12288)))


class Deaf(Sender):
    """Peer that sends whole messages and leaves no room for a byte of their answers."""

    def run(self, seconds: float) -> None:
        message = images(64).SerializeToString()
        until = time.monotonic() + seconds
        data = memoryview(b"\0" + struct.pack(">I", len(message)) + message)
        while time.monotonic() < until and any(
            sent < len(data) for stream, sent in self.sent.items() if stream not in self.ended
        ):
            for stream in self.sent.keys() - self.ended.keys():
                if self.sent[stream] < len(data):
                    rest = data[self.sent[stream] :]
                    self.sent[stream] += self.send(stream, rest, last=True)
            self.take()


def test_unary_answers_hold_no_more_than_the_budget_and_give_way(tight: ServerProcess) -> None:
    before = memory(tight, "VmRSS")
    with frames.connected(port_of(tight), frames.WITHOUT_WINDOW) as peer:
        with suppress(ConnectionError):  # it may be ended
            Deaf(peer, DENOISE, 600, announced=None).run(20)
        with grpc.insecure_channel(tight.target) as channel:
            for _ in range(3):
                DenoiserServiceStub(channel).Denoise(images(85), timeout=TIMEOUT_S)
        # The budget, and memory that is free but not yet returned. It was 942 MiB uncounted.
        assert memory(tight, "VmHWM") - before < 2 * BUDGET / MIB


def test_streams_give_way_to_a_caller_within_its_share(tight: ServerProcess) -> None:
    over, calls = threading.Event(), []

    def requests() -> Iterator[pb.DenoiseRequest]:
        yield from (images(86) for _ in range(80))
        over.wait(30)

    with ExitStack() as stack:
        stack.callback(over.set)
        for _ in range(6):
            channel = stack.enter_context(grpc.insecure_channel(tight.target, _OWN_CONNECTION))
            # Kept, as a call without a reference is cancelled.
            calls.append(DenoiserServiceStub(channel).DenoiseStream(requests()))
        # Until their answers fill what they may hold.
        before, held = -1.0, 0.0
        while held == 0 or held != before:
            time.sleep(0.3)
            before, held = held, value(tight, "els_memory_in_flight_bytes")
        channel = stack.enter_context(grpc.insecure_channel(tight.target, _OWN_CONNECTION))
        for count in (1, 40, 85, 85, 85):
            DenoiserServiceStub(channel).Denoise(images(count), timeout=TIMEOUT_S)
