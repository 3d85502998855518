"""Banks of pictures at every scale of a pyramid."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from els_kernels import grouped
from els_service.denoisers.banks import Labelled
from els_service.denoisers.base import Integers
from els_service.denoisers.file_names import FileNames
from els_service.denoisers.pyramids import Size, resized, scale_sizes
from els_service.errors import InvalidArgumentError


@dataclass(frozen=True, eq=False)
class PictureBank(Labelled):
    """Pictures at every scale, float32 [C, h, w] in [-1, 1]; those of one scale in a row.

    The label of an image is its scale.

    Args:
        groups: [n, C, h, w], images of one size in a row: of scale 0, the coarsest, then of scale
            1, and so on.
        pictures: number of pictures, at least 1.
        source: origin of the pictures.
        licence: licence of the pictures.
        names: of the files of the pictures; empty if they are not known.
        part: name of the patches that answer, for the fingerprint; empty for all.
    """

    groups: tuple[npt.NDArray[np.float32], ...]
    pictures: int
    source: str = ""
    licence: str = ""
    names: tuple[str, ...] = ()
    part: str = ""

    @cached_property
    def images(self) -> tuple[Tensor, ...]:
        """Every image in order, [C, h, w]; views."""
        return tuple(image for group in self.groups for image in torch.from_numpy(group))

    @cached_property
    def labels(self) -> Integers:
        """Scale of each image."""
        return np.repeat(np.arange(len(self.images) // self.pictures), self.pictures)

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Size of the first picture at each scale, coarsest first."""
        return tuple((im.shape[1], im.shape[2]) for im in self.images[:: self.pictures])

    @property
    def label_names(self) -> tuple[str, ...]:
        """Size of the first picture at each scale, as text; empty if they do not differ."""
        sizes = self.sizes
        return tuple(f"{h}x{w}" for h, w in sizes) if len(set(sizes)) > 1 else ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """C, and the height and width of the first picture at the finest scale."""
        return (self.images[0].shape[0], *self.sizes[-1])

    @cached_property
    def extents(self) -> Integers:
        """Height and width of each image, [N, 2]."""
        return np.array([image.shape[1:] for image in self.images])

    @property
    def size(self) -> int:
        """Numbers of all images together."""
        return sum(group.size for group in self.groups)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored images."""
        return sum(group.nbytes for group in self.groups)

    @cached_property
    def file_names(self) -> FileNames | None:
        """Name of the file of each image: of the picture that was resampled to its scale."""
        return FileNames.of(self.names * self.label_count) if self.names else None

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of sizes and pixels, and of the part that answers."""
        digest = hashlib.sha256()
        for image in self.images:
            digest.update(repr(tuple(image.shape)).encode())
            digest.update(image.numpy().astype("<f4", copy=False).tobytes())
        found = digest.hexdigest()
        return hashlib.sha256(f"{found} {self.part}".encode()).hexdigest() if self.part else found

    def image(self, index: int) -> npt.NDArray[np.float32]:
        """Return a copy of one image, float32 [C, h, w]."""
        pixels: npt.NDArray[np.float32] = self.images[index].numpy().copy()
        return pixels


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
    images = list(itertools.chain.from_iterable(zip(*grids, strict=True)))
    groups = tuple(group.numpy() for group in grouped(images))
    return PictureBank(groups, len(pictures), source, licence, tuple(names))


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
