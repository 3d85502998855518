"""Hostile callers: python -m benchmarks.hostile.callers KIND TARGET SECONDS.

Only connects to loopback, for a limited time.
"""

from __future__ import annotations

import contextlib
import sys
import time
import zlib
from collections.abc import Callable

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


def _asking(make: Callable[[], bytes], *, compressed: bool) -> Callable[[str, float], int]:
    def ask(target: str, until: float) -> int:
        calls = PreparedCalls(DENOISE, make(), compressed=compressed)
        return calls.run(int(target.rpartition(":")[2]), until)

    return ask


def _unfinished(path: str) -> Callable[[str, float], int]:
    def hold(target: str, until: float) -> int:
        begun = 0
        while time.monotonic() < until:
            with (
                contextlib.suppress(OSError),
                frames.connected(int(target.rpartition(":")[2]), frames.BEGINNING) as peer,
            ):
                Sender(peer, path, _CALLS).run(min(_HOLD_S, max(0.0, until - time.monotonic())))
            begun += _CALLS
            time.sleep(_RETRY_S)
        return begun

    return hold


def _structure() -> bytes:
    return zipped(large(2, large(2, b"\1" * (60 * MIB))))


def _zeros() -> bytes:
    return zeros(1024 * MIB)


def _nowhere() -> bytes:
    x = pb.Tensor(dtype=pb.DTYPE_F32, shape=(8, 1, 1024, 1024), data=bytes(32 * MIB))
    request = pb.DenoiseRequest(model="nowhere", x=x)
    request.level.sigma.append(1.0)
    return request.SerializeToString()


KINDS: dict[str, Callable[[str, float], int]] = {
    "structure": _asking(_structure, compressed=True),
    "zeros": _asking(_zeros, compressed=True),
    "not found": _asking(_nowhere, compressed=False),
    "unfinished": _unfinished(DENOISE),
    "unfinished health": _unfinished(HEALTH),
}
"""Kind → function of address and end time (monotonic clock) that returns the number of calls."""


if __name__ == "__main__":
    _kind, _target, _seconds = sys.argv[1:]
    print(KINDS[_kind](_target, time.monotonic() + float(_seconds)))
