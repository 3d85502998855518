"""Files that are read anew when they change; a broken one leaves what was read before."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock
from typing import Generic, TypeVar

from els_service.errors import LoadError

_log = logging.getLogger(__name__)

_T = TypeVar("_T")
_Signature = tuple[tuple[int, ...] | None, ...]


class Watched(Generic[_T]):
    """What some files say now; may be asked from any thread.

    Args:
        paths: the files, which are read together.
        read: turns them into a value.
        every_s: how often they are looked at, at most.

    Raises:
        LoadError: They cannot be read at the beginning.
    """

    def __init__(
        self, paths: Sequence[Path], read: Callable[[], _T], *, every_s: float = 0.0
    ) -> None:
        self._paths, self._read, self._every_s = paths, read, every_s
        self._lock = Lock()
        self._seen = _signature(paths)
        self._value = read()
        self._next_look = time.monotonic() + every_s

    def current(self) -> _T:
        """Return the last value that could be read."""
        if time.monotonic() >= self._next_look:
            with self._lock:
                self._look()
        return self._value

    def _look(self) -> None:
        self._next_look = time.monotonic() + self._every_s
        now = _signature(self._paths)
        if now == self._seen:
            return
        names = ", ".join(map(str, self._paths))
        value, fault = self._value, None
        try:
            value = self._read()
        except LoadError as error:
            fault = error
        if _signature(self._paths) != now:
            # Still being written: the next look finds it changed once more.
            return
        self._seen, self._value = now, value
        if fault is None:
            _log.info("read anew", extra={"files": names})
        else:
            _log.error("kept as it was", extra={"files": names, "reason": str(fault)})


def _signature(paths: Sequence[Path]) -> _Signature:
    return tuple(map(_mark, paths))


def _mark(path: Path) -> tuple[int, ...] | None:
    """Return what changes when the file does; None where there is none."""
    try:
        # Links are followed: mounted secrets change by a link that turns elsewhere.
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def warn_if_public(path: Path) -> None:
    """Log a warning where anybody on this machine can read a file that is nobody's business."""
    # It may be gone by now; whoever reads it next is told.
    with contextlib.suppress(OSError):
        if path.stat().st_mode & 0o004:
            _log.warning("readable by everybody", extra={"file": str(path)})
