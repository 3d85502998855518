"""Banks whose files are mapped while they are read, so that their memory is the page cache's."""

from __future__ import annotations

import os
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from els_service.denoisers.bank_parts import BankReader, digest
from els_service.denoisers.banks import Labelled, pixels_from
from els_service.denoisers.file_names import FileNames
from els_service.errors import LoadError


class MappedBank(Labelled):
    """Images of one size sorted by label, which this process does not hold.

    Files are verified whole, then unmapped; where images are needed, they are mapped and verified
    again. Thread-safe.

    Args:
        path: a bank file of images of one size, a manifest, or the folder of one.

    Attributes:
        labels: int64 [N], non-decreasing; all −1 if unlabelled.
        label_names: one for each label, or empty.
        source: origin of the images.
        licence: licence of the images.
        file_names: one for each image; None if they are not known.
        fingerprint: SHA-256 (hex) of the bank.
        shape: (C, H, W) of every image.
        dtype: type of the stored images, uint8 or float32.

    Raises:
        LoadError: A file is missing, damaged or changed; names it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path, self._lock = path, Lock()
        self._reader: BankReader | None = None
        reader = BankReader(path)
        reader.verify()
        # Copies, as those of a bank file are its memory.
        self.labels: NDArray[np.int64] = reader.labels.copy()
        self.file_names: FileNames | None = reader.file_names()
        self.label_names, self.fingerprint = reader.label_names, reader.fingerprint
        self.source, self.licence = reader.source, reader.licence
        self.shape, self.dtype = reader.shape, reader.dtype

    @property
    def extents(self) -> NDArray[np.int64]:
        """Height and width of each image, int64 [N, 2]; read-only."""
        return np.broadcast_to(np.array(self.shape[1:]), (len(self), 2))

    @property
    def size(self) -> int:
        """Numbers of all images together."""
        return len(self) * int(np.prod(self.shape))

    @property
    def nbytes(self) -> int:
        """Bytes of the stored images."""
        return self.size * self.dtype.itemsize

    def digests(self, limits: list[tuple[int, int]]) -> list[str]:
        """Return SHA-256 (hex) of the stored images of each range; raises as ``groups``."""
        # Of another reader, so that they are unmapped again.
        reader = self._open()
        return [digest(reader.images(lo, hi)) for lo, hi in limits]

    @property
    def groups(self) -> list[NDArray[Any]]:
        """Stored images of each file in order, [n, C, H, W], mapped.

        Raises:
            LoadError: A file was changed since it was verified.
        """
        with self._lock:
            return self._opened().groups()

    def images(self, start: int, stop: int) -> NDArray[Any]:
        """Return the stored images of a range: see ``BankReader``; raises as ``groups``."""
        with self._lock:
            return self._opened().images(start, stop)

    def image(self, index: int) -> NDArray[np.float32]:
        """Return a copy of one image, float32 [C, H, W] in [−1, 1]; raises as ``groups``."""
        return pixels_from(self.images(index, index + 1)[0])

    def stored(self) -> torch.Tensor:
        """Return the stored images, [N, C, H, W]; those of several files are copied."""
        return torch.from_numpy(self.images(0, len(self)))

    def _opened(self) -> BankReader:
        if self._reader is None:
            self._reader = self._open()
        return self._reader

    def _open(self) -> BankReader:
        reader = BankReader(self._path)
        if reader.fingerprint != self.fingerprint:
            expected = f"fingerprint: expected {self.fingerprint}, as it was loaded"
            raise LoadError(self._path, f"{expected}, got {reader.fingerprint}")
        return reader
