"""Workaround for a memory leak of grpc.aio (grpc/grpc#43360).

grpc.aio frees a batch of operations only if the task that awaits it sees it succeed. One that
fails, or whose task is cancelled meanwhile, is never freed: a few hundred bytes per cancelled call.
Here every batch succeeds for its task. A failed batch means that the client has disconnected, and
then the call is cancelled, too. The cancellation takes effect after the batch, which ends at once
on a dead call: code that awaits a batch calls ``check_cancelled`` afterwards.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

import grpc


def make_server(options: Sequence[tuple[str, int]]) -> grpc.aio.Server:
    """Return a server for the running loop; code that awaits its batches calls ``check_cancelled``.

    Args:
        options: gRPC's channel arguments.
    """
    loop = asyncio.get_running_loop()
    stand_in = _StandIn(loop)
    # A server has no argument for the loop: it uses the running one.
    # mypy cannot see the methods of a loop that ``__getattr__`` provides.
    asyncio._set_running_loop(stand_in)  # type: ignore[arg-type]
    try:
        server = grpc.aio.server(options=options)
    finally:
        asyncio._set_running_loop(loop)
    # Not earlier: the futures that a server creates for itself are not batches.
    stand_in.create_future = partial(_CompletionFuture, loop=loop)
    return server


class _StandIn:
    """Proxy of the event loop that creates other futures."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        # Used by every call: faster as an attribute than by ``__getattr__``.
        self.create_task = loop.create_task
        self.create_future: Any = loop.create_future

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    def __eq__(self, other: object) -> bool:
        # With two unequal loops gRPC would transfer each event from one to the other.
        return other is self or other is self._loop

    def __hash__(self) -> int:
        return hash(self._loop)


class _CompletionFuture(asyncio.Future[None]):
    """Future that is done when gRPC's core is, even if the batch failed or the task was cancelled.

    It has no ``__init__``, which would double its cost: each call creates several.
    """

    __slots__ = ()

    def set_exception(self, exception: type | BaseException) -> None:
        """Resume the task if the batch failed."""
        if isinstance(exception, grpc.aio.InternalError):
            self.set_result(None)
        else:
            super().set_exception(exception)

    def cancel(self, msg: Any = None) -> bool:
        """Ignore the cancellation, which ``check_cancelled`` finds in the task."""
        return True
