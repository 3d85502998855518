"""A gRPC server that waits for what it asked of gRPC's core, so that all of it is freed.

grpc.aio frees a batch of operations only if whoever awaits it sees it end well: each one that fails
or whose task is cancelled leaves a few hundred bytes for ever (grpc/grpc#43360). Calls that their
callers leave do both. Here a batch always ends well for the server's tasks: a failure means that the
caller is gone, which the call's own cancellation says, and a cancellation is told when the batch is
done, which at a dead call is at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

import grpc


def make_server(options: Sequence[tuple[str, int]]) -> grpc.aio.Server:
    """Return a server for the running loop.

    Its tasks learn of a cancellation late: see ``check_cancelled``.

    Args:
        options: gRPC's channel arguments.
    """
    loop = asyncio.get_running_loop()
    stand_in = _StandIn(loop)
    # The only way to hand it over: a server asks for the loop that runs.
    asyncio._set_running_loop(stand_in)  # type: ignore[arg-type]
    try:
        server = grpc.aio.server(options=options)
    finally:
        asyncio._set_running_loop(loop)
    # Not before: what the server waits for itself is no batch.
    stand_in.create_future = partial(_Batch, loop=loop)
    return server


def check_cancelled() -> None:
    """Raise CancelledError if the current task is to end; ask after every batch, as in a loop of
    batches nothing else says so."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError("the caller is gone")


class _StandIn:
    """The event loop as a server sees it: equal to it, but its futures may be batches'."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        # Asked for at every call.
        self.create_task, self.create_future = loop.create_task, loop.create_future

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    def __eq__(self, other: object) -> bool:
        # Otherwise gRPC would take them for two loops and hand each event from one to the other.
        return other is self or other is self._loop

    def __hash__(self) -> int:
        return hash(self._loop)


class _Batch(asyncio.Future[None]):
    """Done when the core is; of the task that made it."""

    def __init__(self, *, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop=loop)
        self._task = asyncio.current_task()

    def set_exception(self, exception: type | BaseException) -> None:
        """Let the task go on if a batch failed."""
        if isinstance(exception, grpc.aio.InternalError):
            self.set_result(None)
        else:
            super().set_exception(exception)

    def cancel(self, msg: Any = None) -> bool:
        """Cancel what the task waits for next, even if the batch is done: it was not yet told."""
        # Runs after the task has gone on, as that was asked for first.
        self.add_done_callback(partial(_cancel_next, self._task, msg))
        return True


def _cancel_next(task: asyncio.Task[Any] | None, msg: Any, _: object) -> None:
    if task is not None:
        # It was counted already.
        task.uncancel()
        task.cancel(msg)
