"""Selection of the images of a data set, decoded and resized one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from els_service.denoisers.file_names import printable_name
from els_service.denoisers.pictures import read_picture
from els_service.errors import InvalidArgumentError, LoadError

Refuse = Callable[[LoadError], None]
"""Callback for a picture that cannot be read: raises the error, or skips the picture."""
Report = Callable[[int, int], None]
"""Callback with the number of images done, and the maximum number to do."""


def refuse(error: LoadError) -> None:
    """Raise the error."""
    raise error


class Pictures(Protocol):
    """Pictures that are decoded on demand; fastest in rising order."""

    def __len__(self) -> int:
        """Return the number of pictures N."""
        ...

    def read(self, index: int) -> NDArray[np.uint8]:
        """Return one picture, [H, W, C]; raises LoadError with its ``place``."""
        ...

    def place(self, index: int) -> Path | str:
        """Return the file of a picture, or a name of its place in a file, for errors."""
        ...

    def name(self, index: int) -> str:
        """Return the name of a picture, relative to the source, as ``FileNames`` accepts it."""
        ...


class FolderPictures:
    """Pictures that are files below a folder.

    Args:
        folder: the folder.
        names: of the files, relative to it; strings, as a million of ``Path`` take half a gigabyte.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self._folder, self._names = folder, names

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> NDArray[np.uint8]:
        """Return one picture, as ``read_picture``."""
        return read_picture(self.place(index))

    def place(self, index: int) -> Path:
        """Return the file of a picture."""
        return self._folder / self._names[index]

    def name(self, index: int) -> str:
        """Return the name of the file, relative to the folder."""
        return printable_name(self.place(index), self._folder)


@dataclass(frozen=True)
class Source:
    """Images in file order: an array, or pictures that are decoded on demand.

    ``images`` is [N, H, W, C], uint8 or float32 in [−1, 1]; ``labels`` is [N], from 0, or None;
    ``label_names`` may be longer than the number of labels.
    """

    path: Path
    images: NDArray[Any] | None = None
    pictures: Pictures | None = None
    labels: NDArray[np.int64] | None = None
    label_names: tuple[str, ...] = ()
    mirrors: bool = False
    """Whether images 2i and 2i + 1 are an image and its mirror image, see ``mirrored``."""

    @property
    def count(self) -> int:
        """N."""
        return len(self.images if self.images is not None else self.pictures or ())

    def is_mirror(self, index: int) -> bool:
        """Return whether an image is the mirror image of the one before."""
        return self.mirrors and index % 2 == 1

    def image(self, index: int) -> NDArray[Any]:
        """Return one image, [H, W, C]."""
        if self.pictures is not None:
            return self.pictures.read(index)
        assert self.images is not None
        image: NDArray[Any] = self.images[index]
        return image

    def place(self, index: int) -> Path | str:
        """Return the path of an image, or a name of its place in a file."""
        return self.path if self.pictures is None else self.pictures.place(index)

    def file_names(self, indices: Sequence[int]) -> list[str] | None:
        """Return the names of the files of some images, relative to the source; None for arrays."""
        if self.pictures is None:
            return None
        return [self.pictures.name(index) for index in indices]


class Choice:
    """Selection of images: the first of each label, and of these the first.

    Args:
        source: the source.
        limit: maximum number of images, beside mirror images.
        per_label: maximum number of images of each label, beside mirror images.

    Raises:
        InvalidArgumentError: A number is less than 1, or there are no labels.
    """

    def __init__(self, source: Source, limit: int | None, per_label: int | None) -> None:
        labels, count = source.labels, source.count
        for field, value in (("limit", limit), ("per_label", per_label)):
            if value is not None and value < 1:
                raise InvalidArgumentError(field, "at least 1", value)
        if per_label is not None and labels is None:
            raise InvalidArgumentError("per_label", "a labelled source", "an unlabelled one")
        if source.mirrors:
            limit, per_label = (None if most is None else 2 * most for most in (limit, per_label))
        self._labels, self._count = labels, count
        self.most = count if limit is None else min(limit, count)
        """Maximum number of selected images."""
        if per_label is not None and labels is not None:
            _, counts = np.unique(labels, return_counts=True)
            self.most = min(self.most, int(np.minimum(counts, per_label).sum()))
        self.per_label = per_label
        """Maximum number of selected images of each label, with mirror images."""

    def indices(self, taken: Sequence[int]) -> Iterator[int]:
        """Yield candidates in file order; the caller appends accepted ones to ``taken``."""
        counts: Counter[int] = Counter()
        for index in range(self._count):
            if len(taken) == self.most:
                return
            label = -1 if self._labels is None else int(self._labels[index])
            if self.per_label is not None and counts[label] == self.per_label:
                continue
            before = len(taken)
            yield index
            counts[label] += len(taken) - before


def decode(
    source: Source,
    choice: Choice,
    size: Size | None,
    skipped: Refuse,
    progress: Report,
) -> tuple[NDArray[Any], list[int]]:
    """Return the selected images, [N, H, W, C], and their indices."""
    kept: list[int] = []
    if source.images is not None and (size is None or size.sides == source.images.shape[1:3]):
        for index in choice.indices(kept):
            kept.append(index)
        return source.images if len(kept) == source.count else source.images[kept], kept
    images: NDArray[Any] = np.empty((0, 0, 0, 0), np.uint8)
    for index in choice.indices(kept):
        try:
            image = resized(source.image(index), size)
        except LoadError as error:
            if not source.is_mirror(index):
                skipped(error)
            continue
        if not kept:
            # The operating system allocates the memory as it is written.
            images = np.empty((choice.most, *image.shape), image.dtype)
        elif image.shape != images.shape[1:]:
            sizes = f"{image.shape}, but {source.place(kept[0])} of {images.shape[1:]}"
            raise LoadError(source.place(index), f"of size and channels {sizes}; resize may help")
        images[len(kept)] = image
        kept.append(index)
        progress(len(kept), choice.most)
    return images[: len(kept)], kept


def decode_each(
    source: Source, choice: Choice, skipped: Refuse, progress: Report
) -> tuple[list[NDArray[Any]], list[int]]:
    """Return the selected pictures, [H, W, C] each, and their indices."""
    kept: list[int] = []
    images: list[NDArray[Any]] = []
    for index in choice.indices(kept):
        try:
            image = source.image(index)
        except LoadError as error:
            if not source.is_mirror(index):
                skipped(error)
            continue
        if images and image.shape[2] != images[0].shape[2]:
            channels = f"{image.shape[2]}, but {source.place(kept[0])} of {images[0].shape[2]}"
            raise LoadError(source.place(index), f"of channels {channels}: expected equal ones")
        images.append(image)
        kept.append(index)
        progress(len(kept), choice.most)
    return images, kept


@dataclass(frozen=True)
class Size:
    """Height and width to resize to, and whether to cut to their proportions first."""

    sides: tuple[int, int]
    crop: bool

    def box(self, height: int, width: int) -> tuple[float, float, float, float]:
        """Return the part of an image to keep: left, top, right, bottom."""
        if not self.crop:
            return 0, 0, width, height
        scale = min(height / self.sides[0], width / self.sides[1])
        top, left = (
            (side - scale * new) / 2 for side, new in zip((height, width), self.sides, strict=True)
        )
        return left, top, width - left, height - top


def resized(image: NDArray[Any], size: Size | None) -> NDArray[Any]:
    """Return an image, [H, W, C], cut and resized unless it has the size."""
    if size is None or image.shape[:2] == size.sides:
        return image
    height, width = size.sides
    box = size.box(*image.shape[:2])
    channels = [
        np.asarray(Image.fromarray(channel).resize((width, height), Image.Resampling.BILINEAR, box))
        for channel in np.moveaxis(image, -1, 0)
    ]
    # Still within [−1, 1]: Pillow accumulates in float64 and rounds to float32 once.
    return np.stack(channels, axis=-1)
