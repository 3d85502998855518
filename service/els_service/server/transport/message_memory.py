"""Memory of complete messages and their responses, reserved in the budget of all callers."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from typing import Any

from els_service.engine.budget import Budget, Holding
from els_service.errors import QueueFullError
from els_service.server.requests.message_structure import announced_bytes, inflated
from els_service.server.transport.tcp_info import shut_down

_COPIES = 2
"""Reserved multiple of a message's size: the message and its response."""
_UNREAD_S = 1.0
"""Time after which a response that was not sent may be evicted, by closing its connection."""
_RETRY_S = 1.0
_DECOMPRESSIONS = 1
"""Messages decompressed at once, in a thread: one core of the machine at most, at 1 GB/s or so."""

_log = logging.getLogger(__name__)
_NO_VARIABLES = contextvars.Context()


class MessageMemory:
    """Reservations for large messages, decompression, and responses that are being sent.

    Args:
        budget: in bytes; shared with queues and trajectories.
    """

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self._decompressing = asyncio.Semaphore(_DECOMPRESSIONS)

    def reserve(self, caller: str, size: int) -> Holding:
        """Return the reservation for a message and its response.

        Raises:
            QueueFullError: The budget is exhausted.
        """
        holding = self.budget.reserve(caller, _COPIES * size)
        if holding is None:
            raise self.exhausted(f"a message of {size} bytes")
        return holding

    def release_when_sent(self, holding: Holding, task: asyncio.Task[Any], peer: str) -> None:
        """Release a reservation once the response of a call has been sent.

        gRPC cannot withdraw a response that the client does not read. If other callers need the
        memory, its connection is closed.

        Args:
            holding: released at the end of the task.
            task: of the call.
            peer: of the call.
        """

        def evict() -> None:
            _log.warning("connection closed: its responses are not read", extra={"peer": peer})
            shut_down(peer)

        timer = asyncio.get_running_loop().call_later(
            _UNREAD_S, self.budget.allow_eviction, holding, evict, context=_NO_VARIABLES
        )

        def sent(_: object) -> None:
            timer.cancel()
            self.budget.release(holding)

        task.add_done_callback(sent, context=_NO_VARIABLES)

    async def decompressed(self, caller: str, data: bytes, max_bytes: int) -> bytes:
        """Return a message for which ``is_large_gzip``, decompressed off the event loop.

        Args:
            caller: charged for the memory.
            data: the message.
            max_bytes: maximum size after decompression.

        Raises:
            QueueFullError: The budget has no room for the announced size.
            MessageStructureError: As ``inflated``.
        """
        holding = self.reserve(caller, max(len(data), min(announced_bytes(data), max_bytes)))
        try:
            await self._decompressing.acquire()
        except BaseException:
            self.budget.release(holding)
            raise
        work = asyncio.get_running_loop().run_in_executor(None, inflated, data, max_bytes)

        def done(_: object) -> None:
            self.budget.release(holding)
            self._decompressing.release()

        # The thread continues after a disconnect, and its memory stays reserved until it ends.
        work.add_done_callback(done)
        return await asyncio.shield(work)

    def exhausted(self, what: str) -> QueueFullError:
        """Return the error for ``what``, which exceeds the budget."""
        budget = self.budget
        return QueueFullError(
            f"no memory for {what}: messages, queues and trajectories of all callers hold "
            f"{budget.used:.0f} of {budget.capacity:.0f} bytes",
            retry_after_s=_RETRY_S,
        )
