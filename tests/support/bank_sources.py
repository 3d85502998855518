"""Small images as the sources of banks hold them."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from els_service.denoisers.banks import Bank

GREY = np.arange(6 * 4 * 5, dtype=np.uint8).reshape(6, 4, 5)
COLOUR = np.arange(6 * 4 * 5 * 3, dtype=np.uint16).astype(np.uint8).reshape(6, 4, 5, 3)
LABELS = np.array([1, 0, 1, 2, 0, 1])
BY_LABEL = [1, 4, 0, 2, 5, 3]


def idx(array: NDArray[Any]) -> bytes:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def save_picture(file: Path, pixels: NDArray[np.uint8]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)


def assert_holds(bank: Bank, images: NDArray[Any], labels: NDArray[Any] | list[int]) -> None:
    """The bank's images are these, [N, H, W, C]."""
    assert bank.images.dtype == images.dtype
    np.testing.assert_array_equal(bank.images.transpose(0, 2, 3, 1), images)
    np.testing.assert_array_equal(bank.labels, labels)
