"""Stop flag and progress counter of a computation, shared with the thread that monitors it.

The control is in a context variable, so that no signature has to pass it on; it is checked at every
tile::

    control = Control()
    with control:                 # the thread that computes
        attention(x, …)
    control.stop()                # any other thread: the computation raises ComputationStoppedError
"""

from __future__ import annotations

import ctypes
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Any, Self

_CACHE_LINE = 64


class ComputationStoppedError(Exception):
    """A computation was stopped by another thread and has no result."""


class _Shared(ctypes.Structure):
    """``Control`` of problem.hpp; the counter is on a cache line apart from the flag."""

    _fields_ = (
        ("stop", ctypes.c_int32),
        ("apart", ctypes.c_char * (_CACHE_LINE - ctypes.sizeof(ctypes.c_int32))),
        ("progress", ctypes.c_int64),
    )


class Control:
    """Stop flag and progress counter of one computation; any thread may use it at any time.

    As a context manager it is the ``current`` control of the thread; not reentrant.

    Args:
        memory: writable memory of ``Control.BYTES`` or more, which other processes may map too;
            None for memory of its own. Native code reads it, so it must stay mapped.
    """

    BYTES = ctypes.sizeof(_Shared)

    __slots__ = ("_shared", "_token")

    def __init__(self, memory: Any = None) -> None:
        self._shared = _Shared() if memory is None else _Shared.from_buffer(memory)
        self._token: Token[Control | None] | None = None

    def __enter__(self) -> Self:
        self._token = _CURRENT.set(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._token is not None
        _CURRENT.reset(self._token)

    @property
    def address(self) -> int:
        """Address of the ``Control`` that native code reads and writes; valid while this lives."""
        return ctypes.addressof(self._shared)

    @property
    def progress(self) -> int:
        """Units of work started so far: tiles, or batches of a network."""
        return int(self._shared.progress)

    @property
    def stopped(self) -> bool:
        """Whether a stop was requested."""
        return bool(self._shared.stop)

    def stop(self) -> None:
        """Stop the computation at its next tile, or at its first if it has not started."""
        self._shared.stop = 1

    def resume(self) -> None:
        """Withdraw a stop, for another computation."""
        self._shared.stop = 0

    def advance(self) -> None:
        """Count a unit of work that starts.

        Raises:
            ComputationStoppedError: A stop was requested.
        """
        if self._shared.stop:
            raise ComputationStoppedError("the computation was stopped")
        self._shared.progress += 1


_CURRENT: ContextVar[Control | None] = ContextVar("els_control", default=None)


def current() -> Control | None:
    """Return the control of this thread's current computation, or None."""
    return _CURRENT.get()


def checkpoint() -> None:
    """Count a unit of work that starts, if the computation has a control.

    Raises:
        ComputationStoppedError: A stop was requested.
    """
    control = _CURRENT.get()
    if control is not None:
        control.advance()
