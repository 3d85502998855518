"""Hostile callers: python -m benchmarks.hostile.callers KIND TARGET SECONDS.

Only connects to loopback, for a limited time. Prints a line once its message is made, and begins
when it reads one.
"""

from __future__ import annotations

import sys
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TypeAlias

from tests.support import frames
from tests.support.messages import large
from tests.support.unfinished import DENOISE, HEALTH, Sender

from benchmarks.hostile.prepared import PreparedCalls, zipped
from els_proto.denoise.v1 import denoise_pb2 as pb

MIB = 1 << 20
_CALLS = 40
_RETRY_S = 0.1
_HOLD_S = 5.0
"""Seconds for which the calls of a connection are left unfinished before new ones."""


def zeros(size: int) -> bytes:
    """Return ``size`` bytes of zeros as gzip."""
    packer = zlib.compressobj(9, wbits=31)
    parts = [packer.compress(bytes(16 * MIB)) for _ in range(size // (16 * MIB))]
    return b"".join((*parts, packer.flush()))


Run: TypeAlias = Callable[[float], int]
"""Calls until a time of the monotonic clock; returns the number of calls."""


def _asking(make: Callable[[], bytes], *, compressed: bool) -> Callable[[int], Run]:
    def prepare(port: int) -> Run:
        return partial(PreparedCalls(DENOISE, make(), compressed=compressed).run, port)

    return prepare


def _unfinished(path: str) -> Callable[[int], Run]:
    def hold(port: int, until: float) -> int:
        begun = 0
        while time.monotonic() < until:
            with suppress(OSError), frames.connected(port, frames.BEGINNING) as peer:
                Sender(peer, path, _CALLS).run(min(_HOLD_S, max(0.0, until - time.monotonic())))
            begun += _CALLS
            time.sleep(_RETRY_S)
        return begun

    return lambda port: partial(hold, port)


def _structure() -> bytes:
    return zipped(large(2, large(2, b"\1" * (60 * MIB))))


def _zeros() -> bytes:
    return zeros(1024 * MIB)


def _nowhere() -> bytes:
    x = pb.Tensor(dtype=pb.DTYPE_F32, shape=(8, 1, 1024, 1024), data=bytes(32 * MIB))
    request = pb.DenoiseRequest(model="nowhere", x=x)
    request.level.sigma.append(1.0)
    return request.SerializeToString()


KINDS: dict[str, Callable[[int], Run]] = {
    "structure": _asking(_structure, compressed=True),
    "zeros": _asking(_zeros, compressed=True),
    "not found": _asking(_nowhere, compressed=False),
    "unfinished": _unfinished(DENOISE),
    "unfinished health": _unfinished(HEALTH),
}
"""Kind → function of a port that makes the message."""


if __name__ == "__main__":
    _kind, _target, _seconds = sys.argv[1:]
    _run = KINDS[_kind](int(_target.rpartition(":")[2]))
    print("ready", flush=True)
    sys.stdin.readline()
    print(_run(time.monotonic() + float(_seconds)))
