"""Calls of a message that is made once: sending it again costs its caller next to nothing."""

from __future__ import annotations

import gzip
import struct
import time

from tests.support import frames
from tests.support.flow import Flow


class PreparedCalls:
    """Message as it is sent, with its compression flag and size.

    A client of gRPC would compress it again for every call.

    Args:
        path: of the method.
        message: serialised.
        compressed: whether ``message`` is gzip.
    """

    def __init__(self, path: str, message: bytes, *, compressed: bool) -> None:
        encoding = {"grpc_encoding": "gzip"} if compressed else {}
        self._block = frames.headers(path, **encoding)
        self._data = memoryview(bytes([compressed]) + struct.pack(">I", len(message)) + message)

    def run(self, port: int, until: float) -> int:
        """Call, one call after the other, until a time of the monotonic clock.

        Returns:
            How many calls have ended.
        """
        ended = 0
        while time.monotonic() < until:
            try:
                with frames.connected(port, frames.BEGINNING) as peer:
                    flow = Flow(peer)
                    for stream in range(1, 1 << 20, 2):
                        if not self._call(flow, stream, until):
                            break
                        ended += 1
            except OSError:
                time.sleep(0.01)  # rejected: like a client, it does not reconnect at once
        return ended

    def _call(self, flow: Flow, stream: int, until: float) -> bool:
        """Return whether the call ended, rather than the connection or the time."""
        flow.open(stream, self._block)
        at = 0
        while stream not in flow.ended:
            if flow.closed or time.monotonic() > until:
                return False
            sent = flow.send(stream, self._data[at:], last=True)
            at += sent
            flow.take(0.02 if not sent else 0.0)
        del flow.rooms[stream]
        return True


def zipped(message: bytes) -> bytes:
    """Return a message as gzip of the smallest size."""
    return gzip.compress(message, 9)
