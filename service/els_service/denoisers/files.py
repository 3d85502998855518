"""Atomic file writes: a temporary file in the same folder, then a rename.

The temporary file has a random name and is locked while its writer runs, so that writers do not
collide, and files left by a killed writer can be distinguished from those in use.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from els_service.errors import LoadError

REMAINS_S = 600.0
"""Minimum age in seconds of an unlocked temporary file to be removed. The file of a running writer
is unlocked only between its creation and its lock."""

_TEMPORARY = re.compile(
    r"\.els-[0-9a-f]{16}\.tmp|\..+\.(safetensors|yaml|json|csv|png)\.[0-9]+\.tmp"
)
"""Current names, and those of earlier versions, which contained a process id."""
UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
"""Errors of a lock on a file system without locks."""


def check_temporary_folder() -> None:
    """Check that a temporary folder is writable: torch's compiler needs one at import.

    Without it that import fails halfway at the first network, and differently at the next.

    Raises:
        LoadError: There is none; names the variable and the folders tried.
    """
    try:
        tempfile.gettempdir()
    except OSError as error:
        expected = "expected a temporary folder that can be written, got none"
        remedy = "mount one at /tmp, or name one here"
        raise LoadError("TMPDIR", f"{expected}: {error.strerror}; {remedy}") from error


def write_atomically(path: Path, *content: bytes | memoryview) -> None:
    """Write a file atomically and durably; removes old temporary files of killed writers.

    Args:
        path: file in an existing folder. Its mode follows the umask.
        content: new content of the file, in parts.

    Raises:
        OSError: The file cannot be written; names it. An existing file is unchanged.
    """
    remove_remains(path.parent)
    try:
        # In the same folder, because a rename is atomic only within one file system.
        with _temporary(path.parent) as (name, file):
            file.writelines(content)
            file.flush()
            os.fsync(file.fileno())
            os.replace(name, path)
    except OSError as error:
        # The system names the temporary file, or none where the disk is full.
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    _sync_folder(path.parent)


def remove_remains(folder: Path, age_s: float = REMAINS_S) -> None:
    """Remove temporary files of killed writers from a folder.

    A file is removed if it has a temporary name, is older than ``age_s`` seconds, and is not
    locked. Files that cannot be inspected or removed are skipped.
    """
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if _TEMPORARY.fullmatch(entry.name):
                with contextlib.suppress(OSError):
                    _remove_if_abandoned(entry.path, age_s)


def _remove_if_abandoned(name: str, age_s: float) -> None:
    # Without following links, and without blocking on a pipe.
    descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if time.time() - os.fstat(descriptor).st_mtime < age_s:
            return
        # BlockingIOError, an OSError, if a writer holds the lock.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(name)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _temporary(folder: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """Yield a new locked file, which is removed on exit unless it was renamed."""
    name = folder / f".els-{secrets.token_hex(8)}.tmp"
    try:
        # Not tempfile: its mode 0600 would remain after the rename.
        with name.open("xb") as file:
            try:
                fcntl.flock(file.fileno(), fcntl.LOCK_EX)
            except OSError as error:
                # A file system without locks; no file is removed there either.
                if error.errno not in UNSUPPORTED:
                    raise
            yield name, file
    finally:
        name.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable, if the file system supports it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
