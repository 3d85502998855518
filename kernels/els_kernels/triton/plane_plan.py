"""Work of the plane kernels, as data: scales of a level, rings of displacements, tiles, chunks.

Everything but ``PlaneLevel`` depends on sizes alone, so that results do not depend on a batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from els_kernels.control import checkpoint
from els_kernels.fold_plan import OUTSIDE, Axis, Cell, crop
from els_kernels.geometry import Geometry
from els_kernels.torch_fold import decoded, within
from els_kernels.triton.tuning import PROGRAMS, Arch, Config

_SLAB_BYTES = 1 << 28
"""Maximum float32 images of one launch in memory."""
FOLD_VALUES, PRODUCT_VALUES = 3, (2, 1)
"""Most channels that a program of the fold has sums of, and of Jacobian products for windows of a
single block and others; more of them spill."""
_MIN_SHIFTS = 32
"""Minimum planes of one program, where there are enough: its start costs as much as a few."""

PlaneKernel = Literal[
    "normaliser", "fold", "entropy", "moments", "ranking", "jvp", "vjp",
    "fold entropy", "fold moments", "fold ranking", "fold scalars jvp",
    "fold scalars vjp", "fold jvp", "fold vjp",
]  # fmt: skip
_TILE = Config(32, 32, 32, 2, 1)
_FOUR, _EIGHT = replace(_TILE, num_warps=4), replace(_TILE, num_warps=8)
_LARGE: dict[PlaneKernel, Config] = {
    "normaliser": _TILE,
    "fold": _FOUR,
    "entropy": _FOUR,
    "moments": _TILE,
    "ranking": _FOUR,
    "jvp": _FOUR,
    "vjp": _FOUR,
    "fold entropy": _FOUR,
    "fold moments": _FOUR,
    "fold ranking": _FOUR,
    "fold scalars jvp": _FOUR,
    "fold scalars vjp": _FOUR,
    "fold jvp": _FOUR,
    "fold vjp": _FOUR,
}
_SUMS: dict[PlaneKernel, Config] = {"fold entropy": _EIGHT, "fold moments": _EIGHT}
LARGE_WINDOWS: dict[Arch, dict[PlaneKernel, Config]] = {
    "sm80": {**_LARGE, **_SUMS},
    "sm90": {**_LARGE, "ranking": _TILE, "fold scalars jvp": _TILE},
    "sm100": {**_LARGE, "entropy": _TILE, "ranking": _EIGHT},
    "gfx942": dict.fromkeys(_LARGE, _TILE),
}
"""Block of pixels of each kernel for windows that a single one does not serve: more warps compute
some numbers twice, and need fewer registers. Larger blocks spill."""
SMALL_WINDOWS: dict[Arch, dict[PlaneKernel, Config]] = {
    "sm80": {},
    "sm90": {"fold moments": _FOUR},
    "sm100": {},
    "gfx942": {},
}
"""The same for windows of a single block, where it is not that of all others."""
LOOPED: frozenset[PlaneKernel] = frozenset(
    {"fold scalars jvp", "fold scalars vjp", "fold jvp", "fold vjp"}
)
"""Kernels that have one binary for all windows, which loops over blocks: unrolled ones spill."""
BLOCK = 32
"""Side of a block of pixels, on every chip: tiles, and so bits, depend on the shapes alone."""


class PlaneLevel(NamedTuple):
    """Scales of one query: a distance fits half precision, a logit is exact to 2^-22 of itself."""

    a: float
    s: float
    exponent: int
    """Squared distances of pixels are at most 2^15 in units of 2^exponent bits."""
    window: int

    def tensor(self) -> Tensor:
        """Return the scales that kernels load, [5] float32.

        a, what float32 loses of a, the root of the factor of a squared distance, the factor of a
        sum over one axis, and that of a sum over both.
        """
        high = float(torch.tensor(self.a, dtype=torch.float32, device="cpu"))
        root = math.sqrt(math.log2(math.e) / 2) / self.s * 2.0 ** (-self.exponent / 2)
        shrink = math.ceil(math.log2(self.window))
        grow = -(2.0 ** (shrink + self.exponent))
        return torch.tensor([high, self.a - high, root, 2.0**-shrink, grow], dtype=torch.float32)


def plane_level(
    a: float, s: float, window: int, channels: int, query: float, key: float
) -> PlaneLevel:
    """Return the scales of a query whose largest |pixel| is ``query``, that of the bank ``key``."""
    gap = (query + a * key) / s
    largest = max(channels * gap * gap * math.log2(math.e) / 2, 1e-30)
    # Even, so that the square root of the unit is a power of two.
    exponent = 2 * math.ceil((math.log2(largest) - 14.9) / 2)
    return PlaneLevel(a, s, min(exponent, 112), window)


class Ring(NamedTuple):
    """Displacements along one axis: rows of keys are counted modulo ``length``."""

    length: int
    shifts: int
    """1 where sources are the same place, else ``length``."""
    keys: Tensor
    """int64: place in the image of each row of the crop of keys; -1 outside of it."""
    sources: int
    """Patches that are sources: those that start at one of the first rows."""
    image: int
    """Length of the bank image."""

    def continued(self, pixels: int, before: int = 0) -> Tensor:
        """Return the places of the rows that ``pixels`` rows meet at all displacements; or -1.

        Of the rows, ``before`` are before the first of the crop.
        """
        gap = self.keys.new_full((self.length - len(self.keys),), OUTSIDE)
        return torch.cat([self.keys, gap])[self.rows(pixels, before)]

    def rows(self, pixels: int, before: int = 0) -> Tensor:
        """Return the same as rows of the ring, from 0."""
        met = torch.arange(self.shifts + pixels - 1, device=self.keys.device)
        return (met - before) % self.length


def ring(axis: Axis, length: int, torus: bool) -> Ring:
    """Return the ring of an axis for bank images of a length.

    On the torus every row starts a patch, and the image itself is the ring.
    """
    if torus:
        return Ring(length, length, torch.arange(length), length, length)
    keys = axis.keys(length)
    around = max(len(keys), len(axis.query))
    sources = len(keys) - axis.window + 1
    return Ring(around, 1 if axis.same else around, keys, sources, length)


@dataclass(frozen=True)
class Tiles:
    """Tiles of the patches of a crop, each with the pixels that its patches cover."""

    blocks: int
    """Blocks along each axis that the patches of a tile cover."""
    step: int
    """Side of the patches of a tile."""
    rows: int
    cols: int

    @property
    def count(self) -> int:
        """Number of tiles."""
        return self.rows * self.cols

    @property
    def pixels(self) -> tuple[int, int]:
        """Rows and columns of pixels of all tiles."""
        reach = self.reach
        return (self.rows - 1) * self.step + reach, (self.cols - 1) * self.step + reach

    @property
    def reach(self) -> int:
        """Side of the pixels of a tile."""
        return self.blocks * BLOCK

    def split(self, fields: Tensor, fill: float) -> Tensor:
        """Return numbers [K, Q, P] as [tiles, K, 32, 32]; ``fill`` is outside of a tile's own."""
        rows = (self.rows - 1) * self.step + BLOCK - fields.shape[1]
        cols = (self.cols - 1) * self.step + BLOCK - fields.shape[2]
        own = torch.arange(BLOCK, device=fields.device) < self.step
        every = pad(fields, (0, cols, 0, rows), value=fill)
        every = every.unfold(1, BLOCK, self.step).unfold(2, BLOCK, self.step)
        every = every.masked_fill(~(own[:, None] & own), fill)
        return every.flatten(1, 2).transpose(0, 1).contiguous()

    def joined(self, tiled: Tensor, size: tuple[int, ...]) -> Tensor:
        """Return numbers [..., *size] of those of tiles, [..., tiles, 32, 32]."""
        *others, _, _, _ = tiled.shape
        own = tiled[..., : self.step, : self.step]
        own = own.reshape(*others, self.rows, self.cols, self.step, self.step)
        rows, cols = self.rows * self.step, self.cols * self.step
        every: Tensor = own.transpose(-3, -2).reshape(*others, rows, cols)
        return every[..., : size[0], : size[1]]


def tiles(cell: Cell) -> Tiles:
    """Return the tiles of a cell: one block of pixels each, unless its window fills half of it."""
    window = cell.rows.window
    longest = max(len(cell.rows.query), len(cell.cols.query))
    single = longest <= BLOCK or 2 * (window - 1) <= BLOCK
    step = BLOCK - window + 1 if single else BLOCK
    return Tiles(
        -(-(step + window - 1) // BLOCK),
        step,
        -(-cell.rows.places // step),
        -(-cell.cols.places // step),
    )


def tap_blocks(taps: Tensor, pixels: Tensor, patches: Tensor, own: tuple[int, int]) -> Tensor:
    """Return the weights of the fold along one axis between blocks, [..., 2, 32, 32] float16.

    Pixels of a block by patches of a block, in two terms, the lower 2^11 times as large.

    Args:
        taps: [X, k] of ``Axis.taps``; 0 beyond.
        pixels: the first pixel of each pair of blocks, [...].
        patches: its first patch.
        own: pixels and patches of a block that count.
    """
    place = torch.arange(BLOCK, device=taps.device)
    pixel = pixels[..., None, None] + place[:, None]
    offset = pixel - patches[..., None, None] - place
    inside = (offset >= 0) & (offset < taps.shape[1]) & (pixel < len(taps))
    inside = inside & (place < own[0])[:, None] & (place < own[1])
    chosen = taps[pixel.clamp(max=len(taps) - 1), offset.clamp(0, taps.shape[1] - 1)]
    values = (chosen * inside).float()
    high = values.half()
    return torch.stack([high, ((values - high.float()) * 2048).half()], -3)


class Slab(NamedTuple):
    """Bank images of one size in one launch."""

    first: int
    """Index of the first image in the bank."""
    keys: Tensor
    """[n, C, rows, cols] float32: their crops on the ring, continued for all tiles."""
    rows: Ring
    cols: Ring


def slabs(
    groups: Sequence[Tensor],
    limits: tuple[int, int],
    cell: Cell,
    geometry: Geometry,
    shape: Tiles,
    before: tuple[int, int] = (0, 0),
) -> Iterator[Slab]:
    """Yield the images of a range of a bank, slab by slab.

    Tiles start ``before`` rows and columns before the crop.
    """
    torus = geometry.padding == "circular" and geometry.sources == "every"
    first = limits[0]
    for group in within(groups, limits):
        rows = ring(cell.rows, group.shape[2], torus)
        cols = ring(cell.cols, group.shape[3], torus)
        # Centres of patches are read beyond the last pixels of tiles.
        margin = cell.rows.window // 2
        places = [
            axis.continued(n + margin, extra)
            for axis, n, extra in zip((rows, cols), shape.pixels, before, strict=True)
        ]
        each = 4 * group.shape[1] * len(places[0]) * len(places[1])
        together = max(1, _SLAB_BYTES // each)
        for start in range(0, len(group), together):
            checkpoint()
            images = decoded(group[start : start + together])
            yield Slab(first + start, crop(images, *places).contiguous(), rows, cols)
        first += len(group)


class Chunks(NamedTuple):
    """Chunks of the work of a tile: displacements × images."""

    shifts: int
    each_shift: int
    images: int
    each_image: int

    @property
    def total(self) -> int:
        """Number of chunks."""
        return self.shifts * self.images


def chunks(slab: Slab, programs: int, most: int = PROGRAMS) -> Chunks:
    """Return chunks so that all programs are about ``most``, of which a chunk has ``programs``."""
    images, shifts = len(slab.keys), slab.rows.shifts * slab.cols.shifts
    wanted = max(1, min(most // programs, -(-images * shifts // _MIN_SHIFTS)))
    each_image = -(-images // wanted)
    parts = -(-images // each_image)
    each_shift = -(-shifts // max(1, wanted // parts))
    return Chunks(-(-shifts // each_shift), each_shift, parts, each_image)


def values_of(channels: int, most: int) -> int:
    """Return the channels that one program has sums of, ``most`` at most."""
    return -(-channels // -(-channels // most))


def sizes(cell: Cell, slab: Slab, work: Chunks, shape: Tiles) -> tuple[int, ...]:
    """Return the sizes of a launch, in the order of ``normaliser_kernel``."""
    rows, cols = slab.keys.shape[2:]
    return (
        cols, shape.pixels[0] * cols, rows * cols,
        cell.rows.places, cell.cols.places, slab.rows.sources, slab.cols.sources,
        slab.rows.length, slab.cols.length, cell.rows.window,
        len(slab.keys), work.each_image, slab.rows.shifts * slab.cols.shifts, work.each_shift,
        slab.cols.shifts, shape.step, shape.cols, shape.blocks, 0,
    )  # fmt: skip


def config_of(kernel: PlaneKernel, arch: Arch, single: bool) -> Config:
    """Return the block of pixels of a kernel, with warps and stages."""
    return SMALL_WINDOWS[arch].get(kernel, _TILE) if single else LARGE_WINDOWS[arch][kernel]


def options(kernel: PlaneKernel, shape: Tiles, arch: Arch) -> dict[str, Any]:
    """Return the constants of a launch that depend on the tile."""
    single = shape.blocks == 1 and kernel not in LOOPED
    return {
        "BLOCK": BLOCK,
        "SINGLE": int(single),
        **config_of(kernel, arch, single).options(),
    }


def extremes(windows: Iterable[int]) -> list[int]:
    """Return windows that take every binary that any of them takes: the smallest, the largest."""
    every = list(windows)
    return sorted({min(every), max(every)})


def on_device(tensor: Tensor) -> Any:
    """Return a context in which Triton launches on a tensor's device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
