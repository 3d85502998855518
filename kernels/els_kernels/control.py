"""Stop flag and progress counter of a computation, shared with the thread that watches it.

A computation finds its control in a context variable, so that no signature has to carry it, and
looks at it at every tile::

    control = Control()
    with control:                 # the thread that computes
        attention(x, …)
    control.stop()                # any other thread: the computation raises ComputationStoppedError
"""

from __future__ import annotations

import ctypes
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Self

_CACHE_LINE = 64


class ComputationStoppedError(Exception):
    """A computation was stopped from outside; there is no answer."""


class _Shared(ctypes.Structure):
    """``Control`` of problem.hpp; the flag is read often, so the counter is on another line."""

    _fields_ = (
        ("stop", ctypes.c_int32),
        ("apart", ctypes.c_char * (_CACHE_LINE - ctypes.sizeof(ctypes.c_int32))),
        ("progress", ctypes.c_int64),
    )


class Control:
    """Stop flag and progress counter of one computation; any thread may use it at any time.

    As a context manager it is the ``current`` control of the thread; not reentrant.
    """

    __slots__ = ("_shared", "_token")

    def __init__(self) -> None:
        self._shared = _Shared()
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
        """Pieces of work begun so far: tiles, or batches of a network."""
        return int(self._shared.progress)

    @property
    def stopped(self) -> bool:
        """Whether the computation was told to stop."""
        return bool(self._shared.stop)

    def stop(self) -> None:
        """Let the computation end at its next tile, or at its first if it has not begun."""
        self._shared.stop = 1

    def advance(self) -> None:
        """Count a piece of work that begins.

        Raises:
            ComputationStoppedError: The computation was told to stop.
        """
        if self._shared.stop:
            raise ComputationStoppedError("nobody wants the answer any more")
        self._shared.progress += 1


_CURRENT: ContextVar[Control | None] = ContextVar("els_control", default=None)


def current() -> Control | None:
    """Return the control of the computation that this thread is in; None outside of one."""
    return _CURRENT.get()


def checkpoint() -> None:
    """Count a piece of work that begins, where a computation is watched.

    Raises:
        ComputationStoppedError: The computation was told to stop.
    """
    control = _CURRENT.get()
    if control is not None:
        control.advance()
