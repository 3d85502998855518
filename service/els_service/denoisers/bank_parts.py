"""Banks in parts: bank files in a folder, and a manifest that makes them one bank.

The manifest, ``manifest.json``, has the shape, type, labels, provenance and fingerprint of the
whole bank, and name, number of images and fingerprint of each part. The parts are bank files whose
images follow one another in the order of the whole, sorted by label. The fingerprint of the whole
is that of the same bank in one file. A manifest that was edited, and a part that is missing,
truncated or changed, are rejected by name.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from els_service.denoisers.bank_files import fingerprint_start, read_bank
from els_service.denoisers.banks import Bank, Labelled, one_size_from
from els_service.denoisers.file_names import FileNames
from els_service.errors import InvalidArgumentError, LoadError

MANIFEST = "manifest.json"
FORMAT, VERSION = "els-bank-parts", 1
_LARGEST = 1 << 26
"""Largest manifest in bytes; that of a thousand parts and labels has 200 KB."""


@dataclass(frozen=True)
class Part:
    """One bank file of a bank in parts: its name, number of images and fingerprint."""

    file: str
    images: int
    fingerprint: str


@dataclass(frozen=True)
class Manifest:
    """Description of a bank in parts.

    Attributes:
        dtype: ``uint8`` or ``float32``.
        shape: (C, H, W) of every image.
        labels: (label, number of images) of each label in rising order; ((-1, N),) if unlabelled.
        parts: in the order of their images.
        fingerprint: SHA-256 (hex) of the whole, as ``Bank.fingerprint``.
        label_names: one for each label, or empty.
        source: origin of the images.
        licence: licence of the images.
        built_from: source and options of the command that built it.
        skipped: number of pictures of the source that could not be read.
    """

    dtype: str
    shape: tuple[int, int, int]
    labels: tuple[tuple[int, int], ...]
    parts: tuple[Part, ...]
    fingerprint: str
    label_names: tuple[str, ...] = ()
    source: str = ""
    licence: str = ""
    built_from: dict[str, Any] = field(default_factory=dict)
    skipped: int = 0

    @property
    def images(self) -> int:
        """Number of images N."""
        return sum(part.images for part in self.parts)

    def encode(self) -> bytes:
        """Return the bytes of the manifest; equal manifests have equal bytes."""
        content = {"format": FORMAT, "version": VERSION, "images": self.images, **asdict(self)}
        return (json.dumps({**content, "checksum": _checksum(content)}, indent=1) + "\n").encode()

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Return the manifest in a file.

        Raises:
            LoadError: It is missing, damaged, edited, or of another format or version.
        """
        try:
            with path.open("rb") as file:
                data = file.read(_LARGEST + 1)
            if len(data) > _LARGEST:
                raise ValueError(f"expected at most {_LARGEST} bytes, got more")
            content = json.loads(data)
            _check_header(content)
            found = cls(
                **{name: content[name] for name in ("dtype", "fingerprint", "source", "licence")},
                shape=tuple(content["shape"]),
                labels=tuple((label, count) for label, count in content["labels"]),
                parts=tuple(Part(**part) for part in content["parts"]),
                label_names=tuple(content["label_names"]),
                built_from=content["built_from"],
                skipped=content["skipped"],
            )
            if found.encode() != data:
                raise ValueError("checksum: expected that of the contents: damaged or edited")
            _check_consistent(found)
            return found
        except OSError as error:
            raise LoadError(path, error.strerror or str(error)) from error
        except KeyError as error:
            raise LoadError(path, f"not a manifest of a bank: {error} is missing") from error
        except (TypeError, ValueError, RecursionError) as error:
            raise LoadError(path, f"not a manifest of a bank: {error}") from error


def manifest_of(path: str | os.PathLike[str]) -> Path | None:
    """Return the manifest that a path names, itself or by its folder; None for a bank file."""
    path = Path(path)
    if path.name.endswith(".json"):
        return path
    return path / MANIFEST if path.is_dir() else None


def is_in_parts(path: Path) -> bool:
    """Return whether a path names a manifest, or the folder of one."""
    return path.name == MANIFEST or (path / MANIFEST).is_file()


class BankReader(Labelled):
    """Ranges of the images of a bank, mapped from its files.

    A part is mapped and verified when a range of it is read first, and stays mapped as long as the
    reader and the arrays that it returned. Not thread-safe.

    Args:
        path: a bank file of images of one size, a manifest, or the folder of one.

    Attributes:
        path: the bank file or the manifest.
        shape: (C, H, W) of every image.
        dtype: type of the stored images, uint8 or float32.
        labels: int64 [N], non-decreasing; all -1 if unlabelled.
        label_names: one for each label, or empty.
        source: origin of the images.
        licence: licence of the images.
        fingerprint: SHA-256 (hex) of the whole bank.
        manifest: the manifest; None for a bank file.

    Raises:
        LoadError: A file is missing, damaged or changed; names it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        named = manifest_of(path)
        self.path = Path(path) if named is None else named
        self._mapped: dict[int, Bank] = {}
        self.manifest = None if named is None else Manifest.read(named)
        if self.manifest is None:
            bank = self._mapped[0] = map_part(self.path)
            self.labels = bank.labels
            described: Bank | Manifest = bank
            self._parts: Sequence[Part] = [Part(self.path.name, len(bank), bank.fingerprint)]
        else:
            values, counts = zip(*self.manifest.labels, strict=True)
            self.labels = np.repeat(np.array(values, np.int64), counts)
            described, self._parts = self.manifest, self.manifest.parts
        self.shape, self.dtype = described.shape, np.dtype(described.dtype)
        self.label_names, self.fingerprint = described.label_names, described.fingerprint
        self.source, self.licence = described.source, described.licence
        self._starts = [0, *itertools.accumulate(part.images for part in self._parts)]

    def images(self, start: int, stop: int) -> NDArray[Any]:
        """Return the stored images of a range, [stop - start, C, H, W] uint8 or float32.

        A view of the mapped file if the range lies within one part, otherwise a copy. The view can
        be written to, but must not be: ``torch.from_numpy`` takes no other without a copy.

        Raises:
            LoadError: A part is missing, truncated or changed; names it.
            InvalidArgumentError: The range is empty or not of the bank.
        """
        pieces = list(self._pieces(start, stop))
        if len(pieces) == 1:
            bank, lo, hi = pieces[0]
            return bank.images[lo:hi]
        images = np.empty((stop - start, *self.shape), self.dtype)
        done = 0
        for bank, lo, hi in pieces:
            images[done : done + hi - lo] = bank.images[lo:hi]
            done += hi - lo
        return images

    def bank(self, start: int = 0, stop: int | None = None) -> Bank:
        """Return the bank of a range; raises as ``images``.

        Its images are those of ``images``; labels stay as they are, and its fingerprint is its own.
        """
        stop = len(self) if stop is None else stop
        images, labels = self.images(start, stop), self.labels[start:stop]
        names = joined_names(
            None if bank.file_names is None else bank.file_names.part(lo, hi)
            for bank, lo, hi in self._pieces(start, stop)
        )
        label_names = self.label_names[: int(labels[-1]) + 1]
        return Bank(images, labels, label_names, self.source, self.licence, names)

    def groups(self) -> list[NDArray[Any]]:
        """Return the stored images of each file in order, mapped; raises as ``images``."""
        return [bank.images for bank, _, _ in self._pieces(0, len(self))]

    def file_names(self) -> FileNames | None:
        """Return a copy of the names of the files of all images; raises as ``images``."""
        return joined_names(bank.file_names for bank in self._one_by_one())

    def verify(self) -> None:
        """Read every part and compare all fingerprints; one part is mapped at a time.

        Raises:
            LoadError: A part is missing, truncated or changed, or the whole differs from its
                fingerprint; names the file.
        """
        banks = self._one_by_one()
        found = fingerprint_of_parts(banks, self.labels, self.label_names, self.shape, self.dtype)
        if found != self.fingerprint:
            _refuse_whole(self.path, self.fingerprint, found)

    def _one_by_one(self) -> Iterator[Bank]:
        """Yield the parts, of which those that are not mapped yet are unmapped again."""
        for index in range(len(self._parts)):
            yield self._mapped.get(index) or self._map(index)

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[Bank, int, int]]:
        """Yield the parts of a range, each with its range of the part's images."""
        if not 0 <= start < stop <= len(self):
            expected = f"0 <= start < stop <= {len(self)}"
            raise InvalidArgumentError("range", expected, f"{start} to {stop}")
        for index, (lo, hi) in enumerate(itertools.pairwise(self._starts)):
            if start < hi and lo < stop:
                if index not in self._mapped:
                    self._mapped[index] = self._map(index)
                yield self._mapped[index], max(start, lo) - lo, min(stop, hi) - lo

    def _map(self, index: int) -> Bank:
        """Return a part, mapped and verified."""
        part, folder = self._parts[index], self.path.parent
        path = folder / part.file
        if path.parent != folder or path.resolve().parent != folder.resolve():
            raise LoadError(self.path, f"parts: expected names of files in its folder, got {path}")
        bank = map_part(path, part.fingerprint)
        start, stop = self._starts[index : index + 2]
        expected_of = (stop - start, *self.shape), self.dtype
        if (bank.images.shape, bank.dtype) != expected_of or not np.array_equal(
            bank.labels, self.labels[start:stop]
        ):
            got = f"{bank.dtype} of shape {bank.images.shape}, or other labels"
            raise LoadError(path, f"expected {self.dtype} of shape {expected_of[0]}, got {got}")
        return bank


def load_parts(path: str | os.PathLike[str]) -> Bank:
    """Return the whole bank of a manifest, or of the folder of one.

    One part is mapped; several are copied into one array, as kernels take one.

    Raises:
        LoadError: A file is missing, damaged or changed; names it.
    """
    reader = BankReader(path)
    bank = reader.bank()
    if bank.fingerprint != reader.fingerprint:
        _refuse_whole(reader.path, reader.fingerprint, bank.fingerprint)
    return bank


def joined_names(parts: Iterable[FileNames | None]) -> FileNames | None:
    """Return a copy of the names of several banks in order; None if those of one are not known."""
    found = [None if names is None else names.text.copy() for names in parts]
    texts = [text for text in found if text is not None]
    return FileNames(np.concatenate(texts)) if len(texts) == len(found) else None


def fingerprint_of_parts(
    parts: Iterator[Bank],
    labels: NDArray[np.int64],
    label_names: tuple[str, ...],
    shape: tuple[int, int, int],
    dtype: np.dtype[Any],
) -> str:
    """Return the fingerprint that ``Bank`` gives to the images of all parts in one bank."""
    digest = hashlib.sha256(fingerprint_start([dtype.name, (len(labels), *shape), label_names]))
    for part in parts:
        digest.update(part.images.reshape(-1).view(np.uint8).data)
        del part  # its memory, before the next one is mapped
    digest.update(labels.view(np.uint8).data)
    return digest.hexdigest()


def digest(images: NDArray[Any]) -> str:
    """Return SHA-256 (hex) of stored images."""
    return hashlib.sha256(np.ascontiguousarray(images).reshape(-1).view(np.uint8).data).hexdigest()


def map_part(path: Path, fingerprint: str | None = None) -> Bank:
    """Return the bank of a file of images of one size, mapped; its fingerprint is checked if given.

    Raises:
        LoadError: The file is missing, truncated, damaged or changed; names it.
    """
    bank = read_bank(path, one_size_from(path), mapped=True)
    if fingerprint not in (None, bank.fingerprint):
        raise LoadError(path, f"fingerprint: expected {fingerprint}, got {bank.fingerprint}")
    return bank


def _refuse_whole(path: Path, expected: str, got: str) -> None:
    raise LoadError(path, f"fingerprint: expected {expected}, that of all parts, got {got}")


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _check_header(content: Any) -> None:
    """Raise ValueError unless a document says that it is a manifest of this version."""
    if not isinstance(content, dict):
        raise ValueError(f"expected an object, got {type(content).__name__}")
    got = content.get("format"), content.get("version")
    if got != (FORMAT, VERSION):
        raise ValueError(f"version: expected {FORMAT} version {VERSION}, got {got[0]} {got[1]}")


def _check_consistent(manifest: Manifest) -> None:
    """Raise ValueError unless the parts have the images of the labels."""
    counts = [count for _, count in manifest.labels]
    labels = [label for label, _ in manifest.labels]
    numbers = [*counts, *(part.images for part in manifest.parts), *manifest.shape]
    if not manifest.parts or not all(type(number) is int and number > 0 for number in numbers):
        raise ValueError("parts, labels, shape: expected numbers from 1")
    if not all(type(label) is int and label < 1 << 62 for label in labels):
        raise ValueError("labels: expected integers")
    if labels != sorted(set(labels)):
        raise ValueError("labels: expected rising ones")
    if sum(counts) != manifest.images:
        raise ValueError(f"labels: expected {manifest.images} images, got {sum(counts)}")
    if manifest.dtype not in ("uint8", "float32") or len(manifest.shape) != 3:
        raise ValueError(f"dtype, shape: expected an image, got {manifest.dtype} {manifest.shape}")
