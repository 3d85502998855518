"""Banks of pictures at every scale of a pyramid."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from torch import Tensor

from els_service.denoisers.banks import Bank, make_bank
from els_service.denoisers.base import Integers
from els_service.denoisers.file_names import FileNames
from els_service.denoisers.pyramids import Size, resized, scale_sizes
from els_service.errors import InvalidArgumentError


@dataclass(frozen=True, eq=False)
class PictureBank:
    """Pictures at every scale, float32 [C, h, w] in [-1, 1]; those of one scale in a row.

    Args:
        images: of scale 0, the coarsest, then of scale 1, and so on.
        pictures: number of pictures, at least 1.
        source: origin of the pictures.
        licence: licence of the pictures.
        names: of the files of the pictures; empty if they are not known.
    """

    images: tuple[Tensor, ...]
    pictures: int
    source: str = ""
    licence: str = ""
    names: tuple[str, ...] = ()

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Size of the first picture at each scale, coarsest first."""
        return tuple((im.shape[1], im.shape[2]) for im in self.images[:: self.pictures])

    @property
    def size(self) -> Size:
        """Largest height and largest width of the images."""
        heights, widths = zip(*(image.shape[1:] for image in self.images), strict=True)
        return max(heights), max(widths)

    @property
    def numbers(self) -> int:
        """Numbers of all images together."""
        return sum(image.numel() for image in self.images)

    @property
    def label_count(self) -> int:
        """Number of scales."""
        return len(self.images) // self.pictures

    @property
    def labels(self) -> Integers:
        """Scale of each image."""
        return np.repeat(np.arange(self.label_count), self.pictures)

    @cached_property
    def file_names(self) -> FileNames | None:
        """Name of the file of each image: of the picture that was resampled to its scale."""
        return FileNames.of(self.names * self.label_count) if self.names else None

    def pixels_of(self, images: Integers) -> npt.NDArray[np.float32]:
        """Return some images, [n, C, h, w], smaller ones padded by −1 below and on the right.

        h and w are the largest of them, so that places are those of each image.
        """
        chosen = [self.images[index].cpu().numpy() for index in images.tolist()]
        if not chosen:
            return np.empty((0, self.images[0].shape[0], *self.size), np.float32)
        height, width = (max(image.shape[axis] for image in chosen) for axis in (1, 2))
        pixels = np.full((len(chosen), len(chosen[0]), height, width), -1, np.float32)
        for own, image in zip(pixels, chosen, strict=True):
            own[:, : image.shape[1], : image.shape[2]] = image
        return pixels

    def of_shape(self, shape: tuple[int, ...]) -> tuple[Bank, Integers] | None:
        """Return the images of a shape [C, H, W] as a bank, and their numbers; None for none."""
        numbers = [i for i, image in enumerate(self.images) if tuple(image.shape) == shape]
        if not numbers:
            return None
        bank = make_bank(np.stack([self.images[index].cpu().numpy() for index in numbers]))
        return bank, np.array(numbers)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of sizes and pixels."""
        digest = hashlib.sha256()
        for image in self.images:
            digest.update(repr(tuple(image.shape)).encode())
            digest.update(image.numpy().astype("<f4", copy=False).tobytes())
        return digest.hexdigest()

    def of(self, label: int) -> tuple[int, int]:
        """Return the range of images of a scale; -1 means all scales."""
        if label < 0:
            return 0, len(self.images)
        return label * self.pictures, (label + 1) * self.pictures


def picture_bank(
    pictures: Sequence[Tensor],
    *,
    coarsest: int,
    scales: int,
    source: str = "",
    licence: str = "",
    names: Sequence[str] = (),
) -> PictureBank:
    """Return pictures at every scale.

    Args:
        pictures: [C, H, W] in [-1, 1], of equal C, at the finest scale.
        coarsest: short side of the coarsest scale, in pixels.
        scales: number of scales.
        source: origin of the pictures.
        licence: licence of the pictures.
        names: of the files of the pictures, or empty.
    """
    grids = [
        [
            # Bicubic resampling may leave the range.
            resized(picture.double()[None], size)[0].clamp(-1, 1).float().contiguous()
            for size in scale_sizes((picture.shape[1], picture.shape[2]), coarsest, scales)
        ]
        for picture in pictures
    ]
    images = tuple(itertools.chain.from_iterable(zip(*grids, strict=True)))
    return PictureBank(images, len(pictures), source, licence, tuple(names))


def check_pictures(pictures: Sequence[Tensor], patch: int) -> None:
    """Check that pictures have equal channels, and hold a patch.

    Raises:
        InvalidArgumentError: One has not, or does not.
    """
    channels = {picture.shape[0] for picture in pictures}
    if len(channels) > 1:
        raise InvalidArgumentError(
            "pictures", "all grey or all RGB", f"{sorted(channels)} channels"
        )
    for picture in pictures:
        height, width = picture.shape[1:]
        if min(height, width) < patch:
            expected = f"sides of at least {patch} pixels, the patch"
            raise InvalidArgumentError("pictures", expected, f"{height} x {width}")
