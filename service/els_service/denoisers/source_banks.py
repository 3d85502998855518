"""Banks of images that answers are made of: of one size, of several, or pictures at scales."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from els_service.denoisers.file_names import FileNames


class SourceBank(Protocol):
    """Images sorted by label, whose pixels are sources of answers."""

    def __len__(self) -> int:
        """Return the number of images N."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the images."""
        ...

    @property
    def source(self) -> str:
        """Origin of the images."""
        ...

    @property
    def licence(self) -> str:
        """Licence of the images."""
        ...

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """Label of each image, [N], non-decreasing; −1 for none."""
        ...

    @property
    def label_count(self) -> int:
        """The largest label plus one; 0 without labels."""
        ...

    @property
    def label_names(self) -> tuple[str, ...]:
        """One for each label, or empty."""
        ...

    @property
    def file_names(self) -> FileNames | None:
        """Name of each image's file; None if they are not known."""
        ...

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image, or a typical one."""
        ...

    @property
    def extents(self) -> npt.NDArray[np.int64]:
        """Height and width of each image, [N, 2]."""
        ...

    @property
    def size(self) -> int:
        """Numbers of all images together: Σ C·H·W."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of the stored images."""
        ...

    @property
    def groups(self) -> Sequence[npt.NDArray[Any]]:
        """Stored images in order, those of one size in a row together: [n, C, H, W], no copies."""
        ...

    def label_range(self, label: int) -> tuple[int, int]:
        """Return the half-open range of the images of one label; −1 means all, (0, N).

        Raises:
            InvalidArgumentError: The bank is unlabelled, or no image has this label.
        """
        ...

    def image(self, index: int) -> npt.NDArray[np.float32]:
        """Return a copy of one image, float32 [C, H, W] in [−1, 1]."""
        ...
