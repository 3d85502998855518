"""Deadlines: admission plans with what the caller has, not with what gRPC rounds it up to."""

from __future__ import annotations

import math
import time
from typing import Any

import grpc
import pytest

from els_service.errors import DeadlineExceededError
from els_service.server.transport.call_context import unrounded_s
from els_service.server.transport.status import status_of

GRANTED_S = (0.2501, 0.9984, 1.0003, 2.5001, 7.7777, 12.3456, 100.31, 3333.3)
"""None is a multiple of what a timeout is rounded to."""


class Recorder(grpc.GenericRpcHandler):
    """Handler of every method, which notes the time that a call has left."""

    def __init__(self) -> None:
        self.left_s: list[float] = []

    def service(self, _: grpc.HandlerCallDetails) -> Any:
        async def answer(_: bytes, context: Any) -> bytes:
            left_s = context.time_remaining()
            assert left_s is not None
            self.left_s.append(left_s)
            return b""

        return grpc.unary_unary_rpc_method_handler(answer)


async def test_a_call_is_planned_with_no_more_time_than_its_caller_has_and_little_less() -> None:
    recorder = Recorder()
    server = grpc.aio.server(handlers=(recorder,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    rounded_up = 0
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call: Any = channel.unary_unary("/any/Method")
        await channel.channel_ready()
        for granted_s in GRANTED_S * 3:
            began = time.monotonic()
            await call(b"", timeout=granted_s)
            took_s = time.monotonic() - began
            (left_s,), recorder.left_s = recorder.left_s, []
            rounded_up += left_s > granted_s
            assert unrounded_s(left_s) <= granted_s
            assert unrounded_s(left_s) >= granted_s - took_s - _unit_s(granted_s)
    await server.stop(None)
    assert rounded_up > len(GRANTED_S)


def _unit_s(granted_s: float) -> float:
    """Return the most that a timeout may be taken for less than it is: 1 % of it and one step."""
    return 1e-3 + 0.012 * granted_s


@pytest.mark.parametrize(
    ("left_s", "expected"),
    [(0.5, 0.499), (0.97, 0.969), (1.0, 0.99), (9.7, 9.69), (9.9, 9.8), (500.0, 499.0)],
)
def test_a_deadline_is_taken_for_a_step_of_its_rounding_less(
    left_s: float, expected: float
) -> None:
    assert unrounded_s(left_s) == pytest.approx(expected)


def test_a_distant_deadline_remains_distant_and_a_passed_one_passed() -> None:
    assert 0.989e9 < unrounded_s(1e9) < 1e9
    assert unrounded_s(-1.0) < -1.0
    assert not math.isnan(unrounded_s(0.0))


@pytest.mark.parametrize(("left_s", "left"), [(0.25, "0.25 s are left"), (-0.001, "0 s are left")])
def test_an_error_of_too_short_a_deadline_names_what_to_raise_and_no_negative_time(
    left_s: float, left: str
) -> None:
    error = DeadlineExceededError("predicted in 1 s", left_s=left_s)
    text = f"predicted in 1 s; {left} of the time allowed: raise the call's deadline"
    assert status_of(error).message == f"{text} (timeout_s, --timeout)"
    assert status_of(error, "Request-Timeout").message == f"{text} (Request-Timeout)"
    assert status_of(DeadlineExceededError("late")).message == "late"
