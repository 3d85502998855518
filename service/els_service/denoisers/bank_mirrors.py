"""Sources with the mirror image of each image, as training with flips has them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from els_service.denoisers.bank_selection import Pictures, Source

PROVENANCE = "each image and its mirror image"
"""Added to the origin of such a bank."""


def mirrored(source: Source) -> Source:
    """Return a source whose image 2i is image i, and image 2i + 1 its mirror image.

    Labels are those of the image, as are names of files.
    """
    labels = None if source.labels is None else np.repeat(source.labels, 2)
    if source.images is None:
        assert source.pictures is not None
        return replace(source, pictures=_Mirrored(source.pictures), labels=labels, mirrors=True)
    both = np.stack([source.images, source.images[:, :, ::-1]], axis=1)
    images = both.reshape(-1, *source.images.shape[1:])
    return replace(source, images=images, labels=labels, mirrors=True)


class _Mirrored:
    """Pictures, each followed by its mirror image, which is not decoded again."""

    def __init__(self, pictures: Pictures) -> None:
        self._pictures = pictures
        self._last: tuple[int, NDArray[np.uint8]] | None = None

    def __len__(self) -> int:
        return 2 * len(self._pictures)

    def read(self, index: int) -> NDArray[np.uint8]:
        """Return a picture or its mirror image, [H, W, C]; raises LoadError."""
        whole, is_mirror = divmod(index, 2)
        if self._last is None or self._last[0] != whole:
            self._last = whole, self._pictures.read(whole)
        picture: NDArray[Any] = self._last[1]
        return np.ascontiguousarray(picture[:, ::-1]) if is_mirror else picture

    def place(self, index: int) -> Path | str:
        """Return the place of the picture."""
        return self._pictures.place(index // 2)

    def name(self, index: int) -> str:
        """Return the name of the picture's file."""
        return self._pictures.name(index // 2)
