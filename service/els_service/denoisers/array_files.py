"""Readers of compressed array files that never decompress more than the header declares.

A few KiB of compressed zeros expand to gigabytes, so shape and type are read and validated before
the data is decompressed.
"""

from __future__ import annotations

import gzip
import math
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from els_service.denoisers.pictures import refusing
from els_service.errors import LoadError

GZIP = b"\x1f\x8b"
IDX = b"\x00\x00\x08"
"""Magic bytes: two zeros, then the type code of unsigned bytes."""
_CHUNK = 1 << 20
_LONGEST_HEADER = 1 << 16
"""Maximum bytes of shape and type in an npy file; numpy would read any length before parsing."""


def read_idx(path: Path, rank: int) -> NDArray[np.uint8]:
    """Return the array of an IDX file of unsigned bytes, plain or gzipped.

    Raises:
        LoadError: Not an IDX file, damaged, or not of the length declared by its header.
    """
    with refusing(path), _unzipped(path) as file:
        head = file.read(4 + 4 * rank)
        if not head.startswith(IDX + bytes([rank])) or len(head) < 4 + 4 * rank:
            raise LoadError(path, f"not an IDX file of unsigned bytes with {rank} dimensions")
        shape = struct.unpack(f">{rank}I", head[4:])
        # One additional byte detects trailing data without decompressing all of it.
        data = read_at_most(file, math.prod(shape) + 1)
        if len(data) != math.prod(shape):
            got = f"{len(data)} bytes" + (" or more" if len(data) > math.prod(shape) else "")
            raise LoadError(path, f"expected {math.prod(shape)} bytes of shape {shape}, got {got}")
        return np.frombuffer(data, np.uint8).reshape(shape)


def _unzipped(path: Path) -> IO[bytes]:
    """Return the open file, decompressed if it is gzipped."""
    with path.open("rb") as file:
        zipped = file.read(2) == GZIP
    return cast(IO[bytes], gzip.open(path)) if zipped else path.open("rb")


def read_at_most(file: IO[bytes], count: int) -> bytearray:
    """Return the next ``count`` bytes, or fewer at the end; allocates no more than is read."""
    data = bytearray()
    while chunk := file.read(min(_CHUNK, count - len(data))):
        data += chunk
    return data


class NpzFile:
    """The arrays of an npz file; each header is validated before its data is read.

    Args:
        archive: the file.
    """

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        names = archive.namelist()
        self.names = {name.removesuffix(".npy") for name in names if name.endswith(".npy")}
        """Names of the arrays."""

    def header(self, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Return shape and type of an array.

        Raises:
            ValueError: The header and the archive declare different sizes.
        """
        size = self._archive.getinfo(f"{name}.npy").file_size
        with self._archive.open(f"{name}.npy") as file:
            version = np.lib.format.read_magic(file)
            if version == (1, 0):
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            elif version == (2, 0):
                (length,) = struct.unpack("<I", cast(zipfile.ZipExtFile, file).peek(4)[:4])
                if length > _LONGEST_HEADER:
                    expected = f"expected a header of at most {_LONGEST_HEADER} bytes"
                    raise ValueError(f"{name}: {expected}, got {length}")
                shape, _, dtype = np.lib.format.read_array_header_2_0(file)
            else:
                raise ValueError(f"{name}: expected version 1.0 or 2.0 of npy, got {version}")
            announced = file.tell() + math.prod(shape) * dtype.itemsize
        if dtype.hasobject:
            raise ValueError("Object arrays are pickles, which are not read")
        if announced != size:
            raise ValueError(f"{name}: expected {announced} bytes for shape {shape}, got {size}")
        return shape, dtype

    def read(self, name: str) -> NDArray[Any]:
        """Return an array whose header was validated."""
        with self._archive.open(f"{name}.npy") as file:
            array: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
            # Reads to the end, where the checksum is verified.
            file.read(1)
            return array


@contextmanager
def opened_npz(path: Path) -> Iterator[NpzFile]:
    """Yield the open npz file.

    Raises:
        LoadError: Not an npz file.
    """
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise LoadError(path, "cannot be read: expected a zip of arrays; no pickle is read")
        with zipfile.ZipFile(file) as archive:
            yield NpzFile(archive)
