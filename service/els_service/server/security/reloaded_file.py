"""Files reloaded on change; a broken one leaves the last good content in place."""

from __future__ import annotations

import contextlib
import logging
import stat
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock, Thread
from typing import Generic, TypeVar

from els_service.errors import LoadError

_log = logging.getLogger(__name__)

STALE = "changed file cannot be used; its last good content still counts"
_RETRY_S = 1.0
_REPEAT_S = 60.0
"""How often the same failure is logged."""

_T = TypeVar("_T")
_Signature = tuple[tuple[int, ...] | None, ...]


class ReloadedFile(Generic[_T]):
    """Content of some files, read again when they change; may be asked from any thread.

    Files that are emptied, removed or broken are stale: the last good content still counts, an
    error is logged, repeated once a minute while it lasts, and they are tried again every second.

    Args:
        paths: Files that are read together.
        read: Turns them into a value.
        every_s: How often they are looked at, at most.
        background: Whether ``current`` leaves reading to a thread and returns at once, for callers
            on an event loop: a file of thousands of entries takes seconds.
        clock: Monotonic, in seconds.

    Raises:
        LoadError: They cannot be read at the beginning.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        read: Callable[[], _T],
        *,
        every_s: float = 0.0,
        background: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._paths, self._read, self._every_s = paths, read, every_s
        self._background, self._clock = background, clock
        self._lock = Lock()
        self._seen = _signature(paths)
        self._value = read()
        self._next_look = clock() + every_s
        self._stale: _Stale | None = None

    def current(self) -> _T:
        """Return the last value that could be read."""
        if self._clock() >= self._next_look:
            if not self._background:
                self._look()
            elif not self._lock.locked():
                self._next_look = self._clock() + self._every_s
                Thread(target=self._look, name="els-reload", daemon=True).start()
        return self._value

    def stale_s(self) -> float:
        """Return for how long the files have not been readable, 0.0 where they are; looks first."""
        if self._background or self._clock() >= self._next_look:
            self._look()
        stale = self._stale
        return 0.0 if stale is None else self._clock() - stale.since

    def _look(self) -> None:
        with self._lock:
            self._look_locked()

    def _look_locked(self) -> None:
        now = self._clock()
        self._next_look = now + self._every_s
        found, stale = _signature(self._paths), self._stale
        # A file whose permissions are put right looks the same, so a stale one is tried again.
        if found == self._seen and (stale is None or now < stale.next_try):
            return
        try:
            _check_regular(self._paths)
            value = self._read()
        except LoadError as error:
            if _signature(self._paths) == found:
                self._fail(str(error), now, changed=found != self._seen)
                self._seen = found
            return
        if _signature(self._paths) != found:
            # Still being written: the next look finds it changed once more.
            return
        self._seen, self._value, self._stale = found, value, None
        _log.info("read anew", extra={"files": self._names()})

    def _fail(self, reason: str, now: float, *, changed: bool) -> None:
        stale = self._stale
        if stale is None:
            stale = self._stale = _Stale(now, datetime.now(UTC).isoformat(timespec="seconds"))
        stale.next_try = now + _RETRY_S
        if not changed and now < stale.next_word:
            return
        stale.next_word = now + _REPEAT_S
        extra = {
            "files": self._names(),
            "reason": reason,
            "stale_since": stale.told,
            "stale_s": round(now - stale.since, 1),
        }
        _log.error(STALE, extra=extra)

    def _names(self) -> str:
        return ", ".join(map(str, self._paths))


@dataclass
class _Stale:
    """Files that cannot be read: since when, on the clock and as an ISO date."""

    since: float
    told: str
    next_try: float = 0.0
    next_word: float = 0.0


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


def _check_regular(paths: Sequence[Path]) -> None:
    """Raise LoadError for a path that is there and no file: opening a FIFO waits for a writer."""
    for path in paths:
        # One that cannot be looked at is reported by whoever reads it.
        with contextlib.suppress(OSError):
            if not stat.S_ISREG(path.stat().st_mode):
                raise LoadError(path, "expected a file, got another kind of path")


def warn_if_public(path: Path) -> None:
    """Log a warning where anybody on this machine can read a file that is nobody's business."""
    # It may be gone by now; whoever reads it next is told.
    with contextlib.suppress(OSError):
        if path.stat().st_mode & 0o004:
            _log.warning("readable by everybody", extra={"file": str(path)})
