"""gRPC server whose operations are all awaited, so that their memory is freed.

grpc.aio frees a batch of operations when a task sees it end well. One that fails, or whose task is
cancelled meanwhile, is never freed: some hundred bytes for each call that its caller leaves
(grpc/grpc#43360). Here every batch ends well for its task. That it failed means that the caller is
gone, which the call's own cancellation says; and a cancellation takes effect after the batch, which
on a dead call is at once: whoever awaited the batch calls ``check_cancelled``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

import grpc


def make_server(options: Sequence[tuple[str, int]]) -> grpc.aio.Server:
    """Return a server for the running loop; what awaits its batches calls ``check_cancelled``.

    Args:
        options: gRPC's channel arguments.
    """
    loop = asyncio.get_running_loop()
    stand_in = _StandIn(loop)
    # There is no argument for it: a server takes the loop that runs.
    # It has all of a loop's methods, though none that mypy can see.
    asyncio._set_running_loop(stand_in)  # type: ignore[arg-type]
    try:
        server = grpc.aio.server(options=options)
    finally:
        asyncio._set_running_loop(loop)
    # Not before: what was made until now is no batch.
    stand_in.create_future = partial(_CompletionFuture, loop=loop)
    return server


def check_cancelled() -> asyncio.Task[Any]:
    """Return the current task; raise CancelledError if it is to end.

    To be asked after every read and write: a task that only reads or writes is not told otherwise.
    """
    task = asyncio.current_task()
    assert task is not None
    if task.cancelling():
        # The task keeps the error, whose traceback has this frame: a cycle for the collector.
        del task
        raise asyncio.CancelledError("the caller is gone")
    return task


class _StandIn:
    """The event loop as a server sees it: the same, but for its futures."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        # Asked for at every call.
        self.create_task = loop.create_task
        self.create_future: Any = loop.create_future

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    def __eq__(self, other: object) -> bool:
        # Were they two loops, gRPC would hand every event from one to the other.
        return other is self or other is self._loop

    def __hash__(self) -> int:
        return hash(self._loop)


class _CompletionFuture(asyncio.Future[None]):
    """Done when the core is, and not before.

    No ``__init__``: there are several of these in every call, and it would double what they cost.
    """

    __slots__ = ()

    def set_exception(self, exception: type | BaseException) -> None:
        """Let the task go on where the batch failed."""
        if isinstance(exception, grpc.aio.InternalError):
            self.set_result(None)
        else:
            super().set_exception(exception)

    def cancel(self, msg: Any = None) -> bool:
        """Leave it to ``check_cancelled``: the task counts that it is to end."""
        return True
