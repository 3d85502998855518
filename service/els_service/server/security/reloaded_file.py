"""Files reloaded on change; while one is invalid, its last valid content is used."""

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

STALE = "changed file is invalid; its last valid content is used"
_RETRY_S = 1.0
_REPEAT_S = 60.0
"""Interval at which a lasting failure is logged."""

_T = TypeVar("_T")
_Signature = tuple[tuple[int, ...] | None, ...]


class ReloadedFile(Generic[_T]):
    """Content of a group of files, reloaded when they change; thread-safe.

    Files that become empty, missing or invalid are stale: the last valid content is used, an error
    is logged once and then every minute, and reading is retried every second.

    Args:
        paths: files that are read together.
        read: returns their content.
        every_s: minimum time between checks.
        background: whether ``current`` leaves reading to a thread and returns at once, for callers
            on an event loop: a file of thousands of entries takes seconds.
        clock: monotonic, in seconds.

    Raises:
        LoadError: The first read failed.
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
        self._next_check = clock() + every_s
        self._stale: _Stale | None = None

    def current(self) -> _T:
        """Return the last valid content."""
        if self._clock() >= self._next_check:
            if not self._background:
                self._check()
            elif not self._lock.locked():
                self._next_check = self._clock() + self._every_s
                Thread(target=self._check, name="els-reload", daemon=True).start()
        return self._value

    def stale_s(self) -> float:
        """Check the files; return for how many seconds they have been invalid, 0.0 if valid."""
        if self._background or self._clock() >= self._next_check:
            self._check()
        stale = self._stale
        return 0.0 if stale is None else self._clock() - stale.since

    def _check(self) -> None:
        with self._lock:
            self._check_locked()

    def _check_locked(self) -> None:
        now = self._clock()
        self._next_check = now + self._every_s
        found, stale = _signature(self._paths), self._stale
        # A change of permissions is not part of the signature, so stale files are retried.
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
            # Still being written: the next check reads it again.
            return
        self._seen, self._value, self._stale = found, value, None
        _log.info("reloaded", extra={"files": self._names()})

    def _fail(self, reason: str, now: float, *, changed: bool) -> None:
        stale = self._stale
        if stale is None:
            stale = self._stale = _Stale(now, datetime.now(UTC).isoformat(timespec="seconds"))
        stale.next_try = now + _RETRY_S
        if not changed and now < stale.next_log:
            return
        stale.next_log = now + _REPEAT_S
        extra = {
            "files": self._names(),
            "reason": reason,
            "stale_since": stale.since_text,
            "stale_s": round(now - stale.since, 1),
        }
        _log.error(STALE, extra=extra)

    def _names(self) -> str:
        return ", ".join(map(str, self._paths))


@dataclass
class _Stale:
    """Start of the staleness, on the clock and as an ISO date; times of the next retry and log."""

    since: float
    since_text: str
    next_try: float = 0.0
    next_log: float = 0.0


def _signature(paths: Sequence[Path]) -> _Signature:
    return tuple(map(_file_signature, paths))


def _file_signature(path: Path) -> tuple[int, ...] | None:
    """Return values that change with the file; None if it is missing."""
    try:
        # Links are followed: mounted secrets change by an update of a link.
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
    """Log a warning if every user of this machine can read a secret file."""
    # A file that is missing by now fails at its next read.
    with contextlib.suppress(OSError):
        if path.stat().st_mode & 0o004:
            _log.warning("secret file is readable by every user", extra={"file": str(path)})
