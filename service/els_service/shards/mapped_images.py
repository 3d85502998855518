"""Images of a bank's files, mapped and read by range; the caller compares their digests."""

from __future__ import annotations

import itertools
import json
import math
import mmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from els_service.denoisers.bank_files import mapped_file
from els_service.denoisers.bank_parts import Manifest, manifest_of
from els_service.errors import LoadError

_DTYPES: dict[str, np.dtype[Any]] = {"U8": np.dtype("<u1"), "F32": np.dtype("<f4")}
_MOST_HEADER = 100 << 20


class MappedImages:
    """Stored images of a bank of images of one size, [N, C, H, W] uint8 or float32.

    Only ranges that are read take memory, that of the page cache.

    Args:
        path: a bank file, a manifest, or the folder of one.

    Raises:
        LoadError: The file is no bank of images of one size.
        OSError: It cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        named = manifest_of(path)
        paths = [Path(path)]
        if named is not None:
            paths = [named.parent / part.file for part in Manifest.read(named).parts]
        self._files = [_mapped_images(each) for each in paths]
        self._starts = [0, *itertools.accumulate(len(images) for _, images in self._files)]
        self.shape = self._starts[-1], *self._files[0][1].shape[1:]
        """[N, C, H, W]."""

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, images: slice) -> NDArray[Any]:
        """Return a range: a view within one file, otherwise a copy. It must not be written."""
        lo, hi, _ = images.indices(len(self))
        pieces = [
            stored[max(lo, start) - start : min(hi, stop) - start]
            for (_, stored), (start, stop) in zip(
                self._files, itertools.pairwise(self._starts), strict=True
            )
            if lo < stop and start < hi
        ]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def release(self) -> None:
        """Give up the memory of what was read; it is read again where it is needed."""
        for data, _ in self._files:
            data.madvise(mmap.MADV_DONTNEED)


def _mapped_images(path: Path) -> tuple[mmap.mmap, NDArray[Any]]:
    try:
        data = mapped_file(path)
        length = int.from_bytes(data[:8], "little")
        if length > _MOST_HEADER:
            raise ValueError(f"header: expected at most {_MOST_HEADER} bytes, got {length}")
        entry = json.loads(data[8 : 8 + length])["images"]
        dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
        if len(shape) != 4:
            raise ValueError(f"images: expected shape [N, C, H, W], got {list(shape)}")
        offset = 8 + length + entry["data_offsets"][0]
        return data, np.frombuffer(data, dtype, math.prod(shape), offset).reshape(shape)
    except (ValueError, KeyError, TypeError) as error:
        raise LoadError(path, f"not a bank: {error}") from error
