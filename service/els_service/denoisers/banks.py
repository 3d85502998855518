"""Image banks: the training images of analytic machines.

A ``Bank`` has images of one size; those of ``mixed_banks.MixedBank`` have several.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from els_service.denoisers.bank_files import BankContent, fingerprint_of, read_bank, save_bank
from els_service.denoisers.file_names import FileNames
from els_service.errors import InvalidArgumentError, LoadError

__all__ = ["UNLABELLED", "Bank", "load_bank", "make_bank", "pixels_from", "save_bank"]

UNLABELLED = -1


class HasLabels(Protocol):
    """Labels of images, for the methods of ``Labelled``."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """Labels, int64 [N], non-decreasing."""
        ...

    @property
    def label_count(self) -> int:
        """The largest label plus one; 0 for an unlabelled bank."""
        ...


class Labelled:
    """Images sorted by label: what banks of images of one size and of several share."""

    def __len__(self: HasLabels) -> int:
        """Return the number of images N."""
        return len(self.labels)

    @property
    def label_count(self: HasLabels) -> int:
        """The largest label plus one; 0 for an unlabelled bank."""
        return int(self.labels[-1]) + 1

    def label_range(self: HasLabels, label: int) -> tuple[int, int]:
        """Return the half-open range of the images of one label; −1 means all, (0, N).

        Raises:
            InvalidArgumentError: the bank is unlabelled, or no image has this label.
        """
        if label == UNLABELLED:
            return 0, len(self.labels)
        if self.label_count == 0:
            raise InvalidArgumentError("label", "-1, as the bank is unlabelled", label)
        if not 0 <= label < self.label_count:
            raise InvalidArgumentError("label", f"-1 to {self.label_count - 1}", label)
        start = int(np.searchsorted(self.labels, label, "left"))
        stop = int(np.searchsorted(self.labels, label, "right"))
        if start == stop:
            raise InvalidArgumentError("label", "a label with images in the bank", label)
        return start, stop


@dataclass(frozen=True, eq=False)
class Bank(Labelled):
    """Images of one size sorted by label, with their provenance.

    Invalid banks cannot be constructed.

    Attributes:
        images: [N, C, H, W], each at least 1, C-contiguous; uint8, or float32 in [−1, 1].
        labels: int64 [N], non-decreasing, from 0; all −1 in an unlabelled bank.
        label_names: one for each label, or empty; printable, like the next two.
        source: origin of the images: a title or a URL.
        licence: licence of the images.
        file_names: one for each image; None if they are not known.
        fingerprint: SHA-256 (hex) over dtype, shape, images, labels and label names.

    Raises:
        InvalidArgumentError: for any other dtype, rank, order or value.
    """

    images: NDArray[Any]
    labels: NDArray[np.int64]
    label_names: tuple[str, ...] = ()
    source: str = ""
    licence: str = ""
    file_names: FileNames | None = None
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        _check_images(self.images)
        check_labels(self, len(self.images))
        description = [self.images.dtype.name, self.images.shape, self.label_names]
        fingerprint = fingerprint_of(description, (self.images, self.labels))
        object.__setattr__(self, "fingerprint", fingerprint)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    @property
    def extents(self) -> NDArray[np.int64]:
        """Height and width of each image, int64 [N, 2]; read-only."""
        return np.broadcast_to(np.array(self.shape[1:]), (len(self), 2))

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
        """Stored images in order, those of one size in a row together: [N, C, H, W], no copy."""
        return [self.images]

    @property
    def content(self) -> BankContent:
        """Content of the bank's file."""
        # The wider type first, so that both are aligned.
        arrays: dict[str, NDArray[Any]] = {"labels": self.labels, "images": self.images}
        return content_of(self, arrays)

    def image(self, index: int) -> NDArray[np.float32]:
        """Return a copy of one image, float32 [C, H, W] in [−1, 1]."""
        return pixels_from(self.images[index])

    def pixels(self) -> torch.Tensor:
        """Return a float32 copy of the images, [N, C, H, W] in [−1, 1]; uint8 v → v/127.5 − 1."""
        return torch.from_numpy(self.pixels_of(slice(None)))

    def stored(self) -> torch.Tensor:
        """Return the images as they are stored, [N, C, H, W] uint8 or float32; do not write them.

        Shares their memory unless that is read-only.
        """
        images = self.images if self.images.flags.writeable else self.images.copy()
        return torch.from_numpy(images)

    def pixels_of(self, images: slice | NDArray[np.int64]) -> NDArray[np.float32]:
        """Return a copy of some images as ``pixels`` has them, [n, C, H, W] float32."""
        return pixels_from(self.images[images])


def pixels_from(images: NDArray[Any]) -> NDArray[np.float32]:
    """Return a float32 copy of stored images, in [−1, 1]; uint8 v → v/127.5 − 1."""
    pixels = images.astype(np.float32)
    if images.dtype == np.uint8:
        pixels /= 127.5
        pixels -= 1
    return pixels


def make_bank(
    images: ArrayLike,
    labels: ArrayLike | None = None,
    *,
    label_names: tuple[str, ...] = (),
    source: str = "",
    licence: str = "",
    file_names: Sequence[str] | None = None,
) -> Bank:
    """Return a bank of a copy of the images, stably sorted by label.

    Args:
        images: [N, C, H, W]; uint8, or float32 in [−1, 1].
        labels: [N] integers from 0, in any order; None for an unlabelled bank.
        label_names: one for each label up to the largest, or empty.
        source: origin of the images.
        licence: licence of the images.
        file_names: one for each image, in the order of ``images``; None if they are not known.

    Raises:
        InvalidArgumentError: an argument has another dtype, shape or range.
    """
    images = np.asarray(images)
    _check_images(images)
    given = labels_of(labels, len(images))
    order = np.argsort(given, kind="stable")
    return Bank(
        np.ascontiguousarray(images[order]),
        given[order],
        tuple(label_names),
        source,
        licence,
        names_of(file_names, order),
    )


def load_bank(path: str | os.PathLike[str]) -> Bank:
    """Return the bank in a file of images of one size.

    Raises:
        LoadError: the file is missing, truncated, modified, of another format or version, does
            not contain a valid bank, or has images of several sizes; names the file and the reason.
    """
    return read_bank(path, one_size_from(path))


def one_size_from(path: str | os.PathLike[str]) -> Callable[[BankContent], Bank]:
    """Return ``bank_from``, which raises LoadError for images of several sizes; names the file."""

    def construct(content: BankContent) -> Bank:
        if "extents" in content.arrays:
            raise LoadError(path, "extents: expected images of one size, got several sizes")
        return bank_from(content)

    return construct


def bank_from(content: BankContent) -> Bank:
    """Return the bank of the content of a file of version 1 or 2; raises as ``read_bank`` says."""
    arrays = content.arrays
    return Bank(arrays["images"], arrays["labels"], *provenance_of(content))


def provenance_of(
    content: BankContent,
) -> tuple[tuple[str, ...], str, str, FileNames | None]:
    """Return label names, source, licence and file names of a content."""
    text = content.arrays.get("file_names")
    names = None if text is None else FileNames(text)
    return content.label_names, content.source, content.licence, names


class _Described(HasLabels, Protocol):
    """A bank of either class, before it has a fingerprint."""

    @property
    def label_names(self) -> tuple[str, ...]: ...
    @property
    def source(self) -> str: ...
    @property
    def licence(self) -> str: ...
    @property
    def file_names(self) -> FileNames | None: ...
    @property
    def fingerprint(self) -> str: ...


def content_of(bank: _Described, arrays: dict[str, NDArray[Any]]) -> BankContent:
    """Return the content of the file of a bank with these arrays, and its names of files."""
    if bank.file_names is not None:
        arrays = {**arrays, "file_names": bank.file_names.text}
    return BankContent(arrays, bank.fingerprint, bank.label_names, bank.source, bank.licence)


def labels_of(labels: ArrayLike | None, count: int) -> NDArray[np.int64]:
    """Return labels int64 [count], as given or -1 for None; raises InvalidArgumentError."""
    given = np.full(count, UNLABELLED) if labels is None else np.asarray(labels)
    # Other types could wrap around: a large uint64 would become a negative label.
    if not (np.issubdtype(given.dtype, np.integer) and np.can_cast(given.dtype, np.int64)):
        raise InvalidArgumentError("labels", "integers that fit int64", given.dtype)
    if given.shape != (count,):
        raise InvalidArgumentError("labels", f"shape ({count},)", given.shape)
    return given.astype(np.int64)


def names_of(file_names: Sequence[str] | None, order: NDArray[np.int64]) -> FileNames | None:
    """Return names of files in an order; raises InvalidArgumentError if there are more or fewer."""
    if file_names is None:
        return None
    if len(file_names) != len(order):
        expected = f"one for each of {len(order)} images"
        raise InvalidArgumentError("file_names", expected, len(file_names))
    return FileNames.of(file_names[index] for index in order)


def check_pixels(images: NDArray[Any]) -> None:
    """Check type and range of stored images of any rank; raises InvalidArgumentError."""
    if images.dtype not in (np.uint8, np.float32):
        raise InvalidArgumentError("images", "uint8 or float32", images.dtype)
    # Negated, so that NaN is rejected too.
    if (
        images.dtype == np.float32
        and images.size
        and not (images.min() >= -1 and images.max() <= 1)
    ):
        got = f"{images.min()} to {images.max()}"
        raise InvalidArgumentError("images", "float values from -1 to 1", got)


def _check_images(images: NDArray[Any]) -> None:
    check_pixels(images)
    if images.ndim != 4 or 0 in images.shape:
        raise InvalidArgumentError("images", "shape [N, C, H, W], none of them 0", images.shape)


def check_labels(bank: _Described, count: int) -> None:
    """Check labels and texts of a bank of ``count`` images; raises InvalidArgumentError."""
    labels, names = bank.labels, bank.file_names
    if labels.dtype != np.int64 or labels.shape != (count,):
        got = f"{labels.dtype} of shape {labels.shape}"
        raise InvalidArgumentError("labels", f"int64 of shape ({count},)", got)
    if np.any(labels[1:] < labels[:-1]):
        raise InvalidArgumentError("labels", "labels in increasing order", "labels out of order")
    if labels[0] < 0 and not np.all(labels == UNLABELLED):
        raise InvalidArgumentError("labels", "all -1, or all at least 0", f"{labels[0]}")
    _check_texts(bank)
    if names is not None and len(names) != count:
        expected = f"one for each of {count} images"
        raise InvalidArgumentError("file_names", expected, len(names))


def _check_texts(bank: _Described) -> None:
    texts = {"source": [bank.source], "licence": [bank.licence], "label_names": bank.label_names}
    for name, lines in texts.items():
        # Printable only: no control sequences in terminals and logs.
        if not all(isinstance(line, str) and line.isprintable() for line in lines):
            raise InvalidArgumentError(name, "printable text on one line", ascii(lines))
    if len(bank.label_names) not in (0, bank.label_count):
        expected = f"none or {bank.label_count}, one for each label"
        raise InvalidArgumentError("label_names", expected, len(bank.label_names))
