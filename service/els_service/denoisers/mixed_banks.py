"""Banks of images of several sizes, stored one after another.

Not padded to one size: memory is that of the pixels, and kernels, which take patches of each image
in its own coordinates, need no masks. One panorama among photographs would make padding double
their memory.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from els_service.denoisers.bank_files import BankContent, fingerprint_of, read_bank
from els_service.denoisers.bank_parts import load_parts, manifest_of
from els_service.denoisers.banks import (
    Bank,
    Labelled,
    bank_from,
    check_labels,
    check_pixels,
    content_of,
    labels_of,
    make_bank,
    names_of,
    pixels_from,
    provenance_of,
)
from els_service.denoisers.file_names import FileNames
from els_service.denoisers.source_banks import SourceBank
from els_service.errors import InvalidArgumentError


@dataclass(frozen=True, eq=False)
class MixedBank(Labelled):
    """Images of several sizes sorted by label, with their provenance.

    Invalid banks cannot be constructed, and neither can those of images of one size, which are a
    ``Bank``: equal banks have equal bytes.

    Attributes:
        images: [M], all images one after another, each [C, H, W] in C order; uint8, or float32 in
            [−1, 1].
        extents: int64 [N, 2], height and width of each image, at least 1; two sizes or more.
        labels, label_names, source, licence, file_names: as those of a ``Bank``.
        fingerprint: SHA-256 (hex) over dtype, number of images, channels, extents, images, labels
            and label names.

    Raises:
        InvalidArgumentError: for any other dtype, rank, order or value.
    """

    images: NDArray[Any]
    extents: NDArray[np.int64]
    labels: NDArray[np.int64]
    label_names: tuple[str, ...] = ()
    source: str = ""
    licence: str = ""
    file_names: FileNames | None = None
    fingerprint: str = field(init=False)
    _starts: NDArray[np.int64] = field(init=False, repr=False)
    """[N + 1]: where each image begins in ``images``."""

    def __post_init__(self) -> None:
        check_pixels(self.images)
        if self.images.ndim != 1:
            raise InvalidArgumentError("images", "shape [M]", self.images.shape)
        areas = _areas(self.extents, self.images.size)
        check_labels(self, len(self.extents))
        pixels = int(areas.sum())
        channels, rest = divmod(self.images.size, pixels)
        if rest or not channels:
            expected = f"a multiple of the {pixels} pixels of all extents"
            raise InvalidArgumentError("images", expected, f"{self.images.size} numbers")
        starts = channels * np.concatenate([[0], np.cumsum(areas)])
        object.__setattr__(self, "_starts", starts)
        description = [self.dtype.name, [len(self), channels], self.label_names]
        arrays = self.extents, self.images, self.labels
        object.__setattr__(self, "fingerprint", fingerprint_of(description, arrays))

    @property
    def channels(self) -> int:
        """C of every image."""
        return int(self._starts[1] // self.extents[0].prod())

    @property
    def shape(self) -> tuple[int, int, int]:
        """C, and the most frequent (H, W); of equally frequent ones that of most pixels."""
        sizes, counts = np.unique(self.extents, axis=0, return_counts=True)
        ranked = zip(counts.tolist(), sizes.prod(1).tolist(), sizes.tolist(), strict=True)
        *_, (height, width) = max(ranked)
        return self.channels, height, width

    @property
    def sides(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Lowest and highest height, and lowest and highest width."""
        (low, wide_low), (high, wide_high) = self.extents.min(0), self.extents.max(0)
        return (int(low), int(high)), (int(wide_low), int(wide_high))

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the stored images: uint8 or float32."""
        return self.images.dtype

    @property
    def size(self) -> int:
        """Numbers of all images together."""
        return int(self.images.size)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored images."""
        return self.images.nbytes

    @property
    def groups(self) -> list[NDArray[Any]]:
        """Stored images in order, those of one size in a row together: [n, C, H, W], no copies."""
        changes = np.flatnonzero((self.extents[1:] != self.extents[:-1]).any(1)) + 1
        ends = [0, *changes.tolist(), len(self)]
        return [self._stored(first, last) for first, last in itertools.pairwise(ends)]

    @property
    def content(self) -> BankContent:
        """Content of the bank's file."""
        # The wider types first, so that all are aligned.
        arrays = {"labels": self.labels, "extents": self.extents, "images": self.images}
        return content_of(self, arrays)

    def image(self, index: int) -> NDArray[np.float32]:
        """Return a copy of one image, float32 [C, H, W] in [−1, 1]."""
        index = range(len(self))[index]
        return pixels_from(self._stored(index, index + 1)[0])

    def _stored(self, first: int, last: int) -> NDArray[Any]:
        """Return a view of the images ``first`` to ``last``, which have one size: [n, C, H, W]."""
        numbers = self.images[self._starts[first] : self._starts[last]]
        return numbers.reshape(last - first, self.channels, *self.extents[first].tolist())


AnyBank = Bank | MixedBank


def make_mixed_bank(
    images: Sequence[ArrayLike],
    labels: ArrayLike | None = None,
    *,
    label_names: tuple[str, ...] = (),
    source: str = "",
    licence: str = "",
    file_names: Sequence[str] | None = None,
) -> AnyBank:
    """Return a bank of a copy of images; a ``Bank`` if all have one size.

    Stably sorted by label, and images of one label by height and width: kernels take images of one
    size together.

    Args:
        images: one or more, [C, H, W] of equal C; all uint8, or all float32 in [−1, 1].
        labels: [N] integers from 0, in any order; None for an unlabelled bank.
        label_names: one for each label up to the largest, or empty.
        source: origin of the images.
        licence: licence of the images.
        file_names: one for each image, in the order of ``images``; None if they are not known.

    Raises:
        InvalidArgumentError: an argument has another dtype, shape or range.
    """
    arrays = [np.asarray(image) for image in images]
    _check_alike(arrays)
    extents = np.array([image.shape[1:] for image in arrays], np.int64)
    if (extents == extents[0]).all():
        return make_bank(
            np.stack(arrays),
            labels,
            label_names=label_names,
            source=source,
            licence=licence,
            file_names=file_names,
        )
    given = labels_of(labels, len(arrays))
    order = np.lexsort((extents[:, 1], extents[:, 0], given))
    return MixedBank(
        np.concatenate([arrays[index].reshape(-1) for index in order]),
        np.ascontiguousarray(extents[order]),
        given[order],
        tuple(label_names),
        source,
        licence,
        names_of(file_names, order),
    )


def one_size(bank: SourceBank, user: str) -> Bank:
    """Return a bank whose images have one size.

    Raises:
        InvalidArgumentError: They have several; names ``user``, what needs one.
    """
    if isinstance(bank, Bank):
        return bank
    (low, wide_low), (high, wide_high) = bank.extents.min(0), bank.extents.max(0)
    got = f"heights from {low} to {high} and widths from {wide_low} to {wide_high}"
    raise InvalidArgumentError("bank", f"images of one size for {user}", got)


def load_any_bank(path: str | os.PathLike[str]) -> AnyBank:
    """Return the bank in a file, of images of one size or of several; raises as ``load_bank``.

    A folder or a ``.json`` file is a bank in parts, see ``bank_parts``.
    """
    return read_bank(path, _any_from) if manifest_of(path) is None else load_parts(path)


def _any_from(content: BankContent) -> AnyBank:
    arrays = content.arrays
    if "extents" not in arrays:
        return bank_from(content)
    return MixedBank(arrays["images"], arrays["extents"], arrays["labels"], *provenance_of(content))


def _check_alike(arrays: Sequence[NDArray[Any]]) -> None:
    """Check that images have one type and number of channels, and none is empty."""
    if not arrays:
        raise InvalidArgumentError("images", "at least one", "none")
    for image in arrays:
        if image.ndim != 3 or 0 in image.shape:
            raise InvalidArgumentError("images", "shape [C, H, W], none of them 0", image.shape)
    kinds = {(image.dtype.name, image.shape[0]) for image in arrays}
    if len(kinds) > 1:
        got = ", ".join(f"{dtype} of {channels} channels" for dtype, channels in sorted(kinds))
        raise InvalidArgumentError("images", "one type and number of channels", got)


def _areas(extents: NDArray[np.int64], numbers: int) -> NDArray[np.int64]:
    """Return H·W of each image, [N]; raises InvalidArgumentError if the extents are none."""
    if extents.dtype != np.int64 or extents.ndim != 2 or extents.shape[1] != 2:
        got = f"{extents.dtype} of shape {extents.shape}"
        raise InvalidArgumentError("extents", "int64 of shape [N, 2]", got)
    if not len(extents) or (extents == extents[0]).all():
        raise InvalidArgumentError("extents", "two sizes or more", "fewer")
    # In float64 first: products of sides of a hostile file may exceed int64.
    if extents.min() < 1 or extents.astype(np.float64).prod(1).sum() > numbers:
        got = f"sides from {extents.min()} to {extents.max()}"
        expected = f"sides from 1, of images of at most {numbers} numbers together"
        raise InvalidArgumentError("extents", expected, got)
    areas: NDArray[np.int64] = extents.prod(1)
    return areas
