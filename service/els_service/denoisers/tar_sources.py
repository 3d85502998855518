"""Tar archives of pictures: folders of labels, or the samples of WebDataset.

Only the headers are read beforehand, and each picture when it is needed, so an archive may be
larger than memory: about 60 bytes a picture are kept. Archives are not compressed, as a picture
within a compressed one cannot be read without all that precede it.
"""

from __future__ import annotations

import os
import posixpath
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from els_service.denoisers.bank_selection import Source
from els_service.denoisers.file_names import printable_name
from els_service.denoisers.pictures import decode_picture, refusing
from els_service.errors import LoadError

MAX_PICTURE_BYTES = 1 << 28
"""Largest picture file in bytes: one of ``pictures.MAX_PIXELS`` in three bytes each fits."""
_ENDINGS = {"bmp", "jpeg", "jpg", "pgm", "png", "ppm", "tif", "tiff", "webp"}
_LABEL = "cls"
_LONGEST_LABEL = 20


def read_tar(path: Path) -> Source:
    """Return the pictures of an archive, or of all archives of a folder in the order of names.

    A member ``KEY.cls`` beside ``KEY.jpg`` is its label, a whole number from 0 (WebDataset).
    Without any, the folders within the archive are labels, numbered in sorted order; in one folder
    pictures have no labels. Members of other types are ignored.

    Raises:
        LoadError: A file is damaged, or only some pictures have labels; names the file.
    """
    index = _Index()
    files = sorted(path.glob("*.tar")) if path.is_dir() else [path]
    for number, file in enumerate(files):
        with refusing(file):
            index.add(number, file)
    pictures = TarPictures(files, index)
    if index.labelled:
        if index.labelled < len(pictures):
            place = pictures.place(index.labels.index(-1))
            raise LoadError(place, "expected a .cls file beside each picture, got none")
        return Source(path, pictures=pictures, labels=np.array(index.labels, np.int64))
    return _by_folder(path, pictures, index)


class _Index:
    """Places of pictures in archives, in arrays: a Python object each would take gigabytes."""

    def __init__(self) -> None:
        self.files, self.begins, self.sizes = array("I"), array("Q"), array("Q")
        self.labels, self.folder_of = array("q"), array("I")
        self.labelled = 0
        self.folders: dict[str, int] = {}
        self.text = bytearray()
        self.ends = array("Q")

    def add(self, number: int, file: Path) -> None:
        """Add the pictures of one archive."""
        key, first, label = "", len(self.ends), -1
        with tarfile.open(file, "r:") as archive:
            for member in _members(archive):
                folder, base = posixpath.split(member.name)
                stem, _, ending = base.partition(".")
                ending = ending.rpartition(".")[2].lower()
                if base.startswith("."):
                    continue
                if (current := posixpath.join(folder, stem)) != key:
                    self._label(file, key, first, label)
                    key, first, label = current, len(self.ends), -1
                if ending in _ENDINGS:
                    self._picture(number, member, folder)
                elif ending == _LABEL:
                    label = _label(archive, member, file)
            self._label(file, key, first, label)

    def _picture(self, number: int, member: tarfile.TarInfo, folder: str) -> None:
        self.files.append(number)
        self.begins.append(member.offset_data)
        self.sizes.append(member.size)
        self.labels.append(-1)
        self.folder_of.append(self.folders.setdefault(folder, len(self.folders)))
        self.text += member.name.encode("utf-8", "surrogateescape")
        self.ends.append(len(self.text))

    def _label(self, file: Path, key: str, first: int, label: int) -> None:
        """Set the label of the pictures from ``first``, which have one key."""
        if label < 0:
            return
        if len(self.ends) - first != 1:
            got = f"{len(self.ends) - first} pictures"
            raise LoadError(f"{file}: {key}", f"expected one picture beside a .cls file, got {got}")
        self.labels[first] = label
        self.labelled += 1

    def member(self, index: int) -> str:
        """Return the name of a member."""
        begin = self.ends[index - 1] if index else 0
        return self.text[begin : self.ends[index]].decode("utf-8", "surrogateescape")


class TarPictures:
    """Pictures within archives.

    Args:
        files: the archives.
        index: places of the pictures in them.
    """

    def __init__(self, files: Sequence[Path], index: _Index) -> None:
        self._files, self._index = files, index

    def __len__(self) -> int:
        return len(self._index.ends)

    def read(self, index: int) -> NDArray[np.uint8]:
        """Return one picture, as ``decode_picture``."""
        place, size = self.place(index), self._index.sizes[index]
        if size > MAX_PICTURE_BYTES:
            raise LoadError(place, f"expected at most {MAX_PICTURE_BYTES} bytes, got {size}")
        with refusing(place), self._files[self._index.files[index]].open("rb", 0) as file:
            data = os.pread(file.fileno(), size, self._index.begins[index])
            if len(data) < size:
                raise ValueError(f"expected {size} bytes, got {len(data)}: truncated")
        return decode_picture(data, place)

    def place(self, index: int) -> str:
        """Return the archive and the name in it."""
        return f"{self._files[self._index.files[index]]}: {self._index.member(index)}"

    def name(self, index: int) -> str:
        """Return the name in the archive."""
        return printable_name(Path("/", self._index.member(index)), Path("/"))


def _by_folder(path: Path, pictures: TarPictures, index: _Index) -> Source:
    """Return a source whose labels are the folders of the pictures, or without labels."""
    folders = list(index.folders)
    if len(folders) < 2:
        return Source(path, pictures=pictures)
    common = posixpath.commonpath(folders)
    names = [str(PurePosixPath(folder).relative_to(common)) for folder in folders]
    if "." in names:
        place = pictures.place(index.folder_of.index(names.index(".")))
        raise LoadError(place, "expected only sub-folders, which are labels, got a file")
    order = sorted(names, key=int if all(name.isdecimal() for name in names) else None)
    numbers = np.array([order.index(name) for name in names])
    labels = numbers[np.frombuffer(index.folder_of, f"u{index.folder_of.itemsize}")]
    return Source(path, pictures=pictures, labels=labels, label_names=tuple(order))


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the plain files of an archive; it keeps no member, each of which takes a kilobyte."""
    kept: list[tarfile.TarInfo] = vars(archive)["members"]
    while (member := archive.next()) is not None:
        kept.clear()
        if member.isfile() and not member.issparse():
            yield member


def _label(archive: tarfile.TarFile, member: tarfile.TarInfo, file: Path) -> int:
    content = archive.extractfile(member)
    text = b"" if content is None else content.read(_LONGEST_LABEL).strip()
    if member.size > _LONGEST_LABEL or not text.isdigit():
        got = f"{member.size} bytes, {text!r}"
        raise LoadError(f"{file}: {member.name}", f"expected a whole number from 0, got {got}")
    return int(text)
