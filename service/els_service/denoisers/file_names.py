"""File names of a bank's images, stored as one text: 60,000 Python strings would take megabytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from els_service.errors import InvalidArgumentError

MAX_NAME_BYTES = 255
"""Largest name in bytes of UTF-8, as in most file systems."""
_END = b"\n"
"""After each name: no printable text has it."""


class FileNames:
    """Names of files, in the order of the images of a bank.

    Args:
        text: uint8 [M]: UTF-8 of all names, with a line feed after each.

    Attributes:
        text: as given.
        longest: bytes of the longest name.

    Raises:
        InvalidArgumentError: The text is of another type, is no UTF-8, does not end with a line
            feed, or a name is not printable or has more than ``MAX_NAME_BYTES`` bytes.
    """

    def __init__(self, text: NDArray[np.uint8]) -> None:
        if text.dtype != np.uint8 or text.ndim != 1:
            got = f"{text.dtype} of shape {text.shape}"
            raise InvalidArgumentError("file_names", "uint8 of one dimension", got)
        ends = np.flatnonzero(text == ord(_END))
        if not len(ends) or ends[-1] != len(text) - 1:
            raise InvalidArgumentError("file_names", "a line feed after each name", "none")
        self.text, self._ends = text, ends
        self.longest = int(np.diff(ends, prepend=-1).max()) - 1
        if self.longest > MAX_NAME_BYTES:
            expected = f"at most {MAX_NAME_BYTES} bytes each"
            raise InvalidArgumentError("file_names", expected, f"{self.longest} bytes")
        try:
            lines = text.tobytes().decode()
        except UnicodeDecodeError:
            raise InvalidArgumentError("file_names", "UTF-8", "other bytes") from None
        # Printable only: no control sequences in terminals and logs.
        if not lines.replace(_END.decode(), "").isprintable():
            raise InvalidArgumentError("file_names", "printable text", "other characters")

    @classmethod
    def of(cls, names: Iterable[str]) -> FileNames:
        """Return the names of an iterable; raises the errors of the constructor."""
        listed = list(names)
        if any(_END.decode() in name for name in listed):
            raise InvalidArgumentError("file_names", "printable text", "other characters")
        text = b"".join(name.encode() + _END for name in listed)
        return cls(np.frombuffer(text, np.uint8))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"expected 0 to {len(self) - 1}, got {index}")
        begin = 0 if index == 0 else int(self._ends[index - 1]) + 1
        return self.text[begin : int(self._ends[index])].tobytes().decode()

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def part(self, start: int, stop: int) -> FileNames:
        """Return the names from ``start`` to before ``stop``, at least one; shares the text."""
        begin = 0 if start == 0 else int(self._ends[start - 1]) + 1
        return FileNames(self.text[begin : int(self._ends[stop - 1]) + 1])

    @property
    def nbytes(self) -> int:
        """Memory of the text and of the positions in it."""
        return self.text.nbytes + self._ends.nbytes


def printable_name(file: Path, folder: Path) -> str:
    """Return the path of a file relative to a folder, as a name that ``FileNames`` accepts.

    Characters that are not printable become ``?``; of a path that is too long the file's name
    remains, or the end of that.
    """
    relative = file.relative_to(folder).as_posix()
    for name in (relative, file.name):
        text = "".join(one if one.isprintable() else "?" for one in name)
        if len(text.encode()) <= MAX_NAME_BYTES:
            return text
    ellipsis = "…"
    kept = text.encode()[len(ellipsis.encode()) - MAX_NAME_BYTES :]
    # A character that is cut in two is left out.
    return ellipsis + kept.decode(errors="ignore")
