"""Image banks: the training images of analytic machines, and their file format.

A bank file is a safetensors file in one canonical byte layout: the tensors ``images`` and
``labels``, and the string metadata ``format``, ``version``, ``fingerprint``, ``source``,
``licence``, ``label_names`` (a JSON list) and ``checksum``. A bank that knows the names of its
images' files has version 2 and the tensor ``file_names``, others have version 1. A file that
differs in any byte from the output of ``save_bank`` is rejected, so every modification is detected.
Equal banks have equal bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as parse_safetensors

from els_service.denoisers.file_names import FileNames
from els_service.denoisers.files import write_atomically
from els_service.errors import InvalidArgumentError, LoadError

FORMAT = "els-bank"
VERSION, VERSION_WITH_FILE_NAMES = "1", "2"
UNLABELLED = -1

_SAFETENSORS_DTYPES = {"uint8": "U8", "float32": "F32", "int64": "I64"}


@dataclass(frozen=True, eq=False)
class Bank:
    """Images sorted by label, with their provenance; invalid banks cannot be constructed.

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
        _check_labels(self.labels, len(self.images))
        _check_texts(self)
        if self.file_names is not None and len(self.file_names) != len(self.images):
            expected = f"one for each of {len(self.images)} images"
            raise InvalidArgumentError("file_names", expected, len(self.file_names))
        object.__setattr__(self, "fingerprint", _fingerprint(self))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    @property
    def label_count(self) -> int:
        """The largest label plus one; 0 for an unlabelled bank."""
        return int(self.labels[-1]) + 1

    @property
    def numbers(self) -> int:
        """Numbers of all images together."""
        return int(self.images.size)

    def of_shape(self, shape: tuple[int, ...]) -> tuple[Bank, NDArray[np.int64]] | None:
        """Return this bank and the numbers of its images; None if they have another shape."""
        return (self, np.arange(len(self.images))) if shape == self.shape else None

    def label_range(self, label: int) -> tuple[int, int]:
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

    def pixels(self) -> torch.Tensor:
        """Return a float32 copy of the images, [N, C, H, W] in [−1, 1]; uint8 v → v/127.5 − 1."""
        return torch.from_numpy(self.pixels_of(slice(None)))

    def pixels_of(self, images: slice | NDArray[np.int64]) -> NDArray[np.float32]:
        """Return a copy of some images as ``pixels`` has them, [n, C, H, W] float32."""
        pixels = self.images[images].astype(np.float32)
        if self.images.dtype == np.uint8:
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
    labels = np.full(len(images), UNLABELLED) if labels is None else np.asarray(labels)
    # Other types could wrap around: a large uint64 would become a negative label.
    if not (np.issubdtype(labels.dtype, np.integer) and np.can_cast(labels.dtype, np.int64)):
        raise InvalidArgumentError("labels", "integers that fit int64", labels.dtype)
    if labels.shape != (len(images),):
        raise InvalidArgumentError("labels", f"shape ({len(images)},)", labels.shape)
    order = np.argsort(labels, kind="stable")
    sorted_labels = labels[order].astype(np.int64)
    sorted_images = np.ascontiguousarray(images[order])
    names = None
    if file_names is not None:
        if len(file_names) != len(images):
            expected = f"one for each of {len(images)} images"
            raise InvalidArgumentError("file_names", expected, len(file_names))
        names = FileNames.of(file_names[index] for index in order)
    return Bank(sorted_images, sorted_labels, tuple(label_names), source, licence, names)


def save_bank(bank: Bank, path: str | os.PathLike[str]) -> None:
    """Write the bank to a file atomically.

    Raises:
        OSError: the file cannot be written; an existing file is unchanged.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, _encode(bank))


def load_bank(path: str | os.PathLike[str]) -> Bank:
    """Return the bank in a file.

    Raises:
        LoadError: the file is missing, truncated, modified, of another format or version, or does
            not contain a valid bank; names the file and the reason.
    """
    try:
        return _decode(Path(path).read_bytes())
    except OSError as error:
        raise LoadError(path, error.strerror or str(error)) from error
    except KeyError as error:
        raise LoadError(path, f"not a bank: {error} is missing or of an unknown type") from error
    except (SafetensorError, TypeError, ValueError, RecursionError) as error:
        raise LoadError(path, f"not a bank: {error}") from error


def _decode(data: bytes) -> Bank:
    tensors = parse_safetensors(data)
    names = tensors.get("file_names")
    metadata = _read_metadata(data, VERSION if names is None else VERSION_WITH_FILE_NAMES)
    bank = Bank(
        tensors["images"],
        tensors["labels"],
        tuple(json.loads(metadata["label_names"])),
        metadata["source"],
        metadata["licence"],
        None if names is None else FileNames(names),
    )
    if bank.fingerprint != metadata["fingerprint"]:
        raise ValueError("the fingerprint does not match the contents")
    if _encode(bank) != data:
        raise ValueError("damaged or edited, not byte for byte what save_bank writes")
    return bank


def _read_metadata(data: bytes, version: str) -> dict[str, str]:
    """Return the metadata of a safetensors file whose header was validated.

    Raises:
        ValueError: It is of another format or version.
    """
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    metadata: dict[str, str] = header.get("__metadata__") or {}
    if metadata["format"] != FORMAT or metadata["version"] != version:
        got = f"{metadata['format']} version {metadata['version']}"
        raise ValueError(f"expected {FORMAT} version {version}, got {got}")
    return metadata


def _encode(bank: Bank) -> bytes:
    """Return the bytes of the bank's safetensors file; equal banks give equal bytes.

    Not written by the library, whose order of the metadata differs between processes.
    """
    names = None if bank.file_names is None else bank.file_names.text
    provenance = [bank.fingerprint, bank.source, bank.licence]
    if names is not None:
        provenance.append(hashlib.sha256(_little_endian(names)).hexdigest())
    header: dict[str, Any] = {
        "__metadata__": {
            "format": FORMAT,
            "version": VERSION if names is None else VERSION_WITH_FILE_NAMES,
            "fingerprint": bank.fingerprint,
            "source": bank.source,
            "licence": bank.licence,
            "label_names": json.dumps(bank.label_names),
            # The fingerprint covers the contents; the checksum also covers source, licence and
            # file names.
            "checksum": hashlib.sha256(json.dumps(provenance).encode()).hexdigest(),
        }
    }
    blocks, offset = [], 0
    # The wider type first, so that both are aligned.
    arrays: dict[str, NDArray[Any]] = {"labels": bank.labels, "images": bank.images}
    if names is not None:
        arrays["file_names"] = names
    for name, array in arrays.items():
        block = _little_endian(array)
        dtype = _SAFETENSORS_DTYPES[array.dtype.name]
        offsets = [offset, offset := offset + len(block)]
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": offsets}
        blocks.append(block)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join((len(text).to_bytes(8, "little"), text, *blocks))


def _fingerprint(bank: Bank) -> str:
    digest = hashlib.sha256()
    description = [bank.images.dtype.name, bank.images.shape, bank.label_names]
    for block in (
        json.dumps(description).encode(),
        _little_endian(bank.images),
        _little_endian(bank.labels),
    ):
        digest.update(block)
    return digest.hexdigest()


def _little_endian(array: NDArray[Any]) -> memoryview:
    """Return the array's bytes in little-endian order, without a copy if it has that order."""
    ordered = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return ordered.reshape(-1).view(np.uint8).data


def _check_images(images: NDArray[Any]) -> None:
    if images.dtype not in (np.uint8, np.float32):
        raise InvalidArgumentError("images", "uint8 or float32", images.dtype)
    if images.ndim != 4 or 0 in images.shape:
        raise InvalidArgumentError("images", "shape [N, C, H, W], none of them 0", images.shape)
    # Negated, so that NaN is rejected too.
    if images.dtype == np.float32 and not (images.min() >= -1 and images.max() <= 1):
        got = f"{images.min()} to {images.max()}"
        raise InvalidArgumentError("images", "float values from -1 to 1", got)


def _check_labels(labels: NDArray[np.int64], count: int) -> None:
    if labels.dtype != np.int64 or labels.shape != (count,):
        got = f"{labels.dtype} of shape {labels.shape}"
        raise InvalidArgumentError("labels", f"int64 of shape ({count},)", got)
    if np.any(labels[1:] < labels[:-1]):
        raise InvalidArgumentError("labels", "labels in increasing order", "labels out of order")
    if labels[0] < 0 and not np.all(labels == UNLABELLED):
        raise InvalidArgumentError("labels", "all -1, or all at least 0", f"{labels[0]}")


def _check_texts(bank: Bank) -> None:
    texts = {"source": [bank.source], "licence": [bank.licence], "label_names": bank.label_names}
    for name, lines in texts.items():
        # Printable only: no control sequences in terminals and logs.
        if not all(isinstance(line, str) and line.isprintable() for line in lines):
            raise InvalidArgumentError(name, "printable text on one line", ascii(lines))
    if len(bank.label_names) not in (0, bank.label_count):
        expected = f"none or {bank.label_count}, one for each label"
        raise InvalidArgumentError("label_names", expected, len(bank.label_names))
