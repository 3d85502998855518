"""Files written whole or not at all: a temporary file in the same folder, then a rename.

The temporary file's name is random and the file is locked for as long as its writer lives, so that
writers never meet, and what a killed writer left can be told from what a live one holds.
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
"""Age in seconds from which a temporary file that nobody holds is removed. A live writer's file is
unlocked only between its creation and its lock."""

_TEMPORARY = re.compile(
    r"\.els-[0-9a-f]{16}\.tmp|\..+\.(safetensors|yaml|json|csv|png)\.[0-9]+\.tmp"
)
"""Today's names, and those of earlier versions, which held a process id."""
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


def check_temporary_folder() -> None:
    """Return if a temporary folder can be written: torch's compiler needs one when it is imported.

    Otherwise that import fails half way at the first network, and again, differently, at the next.

    Raises:
        LoadError: There is none; names the variable and the folders that were tried.
    """
    try:
        tempfile.gettempdir()
    except OSError as error:
        expected = "expected a temporary folder that can be written, got none"
        remedy = "mount one at /tmp, or name one here"
        raise LoadError("TMPDIR", f"{expected}: {error.strerror}; {remedy}") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, and durably; removes old remains of killed writers.

    Args:
        path: in a folder that is there. The file's mode follows the umask.
        content: of the file.

    Raises:
        OSError: The file cannot be written; what was there before is untouched.
    """
    remove_remains(path.parent)
    # In the same folder, because a rename is atomic only within one file system.
    with _temporary(path.parent) as (name, file):
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        os.replace(name, path)
    _sync_folder(path.parent)


def remove_remains(folder: Path, age_s: float = REMAINS_S) -> None:
    """Remove temporary files of killed writers from a folder.

    A file is removed if its name is a temporary one, it is older than ``age_s`` seconds, and no
    process holds its lock. What cannot be looked at or removed is left.
    """
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if _TEMPORARY.fullmatch(entry.name):
                with contextlib.suppress(OSError):
                    _remove_if_abandoned(entry.path, age_s)


def _remove_if_abandoned(name: str, age_s: float) -> None:
    # Not through a link, and without waiting where the name is a pipe's.
    descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if time.time() - os.fstat(descriptor).st_mtime < age_s:
            return
        # BlockingIOError, an OSError, where a writer lives.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(name)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _temporary(folder: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """Yield a new locked file; it is gone afterwards unless it was renamed."""
    name = folder / f".els-{secrets.token_hex(8)}.tmp"
    try:
        # Not tempfile's, which nobody but this user could read once it is renamed.
        with name.open("xb") as file:
            try:
                fcntl.flock(file.fileno(), fcntl.LOCK_EX)
            except OSError as error:
                # A file system without locks: there nothing is removed either.
                if error.errno not in _UNSUPPORTED:
                    raise
            yield name, file
    finally:
        name.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
