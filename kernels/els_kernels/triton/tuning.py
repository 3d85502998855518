"""Tile shapes and the form to take, as data: nothing is tuned while a request waits.

Chosen from the static roofline (``benchmarks/results/static.md``): the largest tiles that neither
spill nor pass the chip's shared memory. Results do not depend on the batch, as no entry does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Arch = Literal["sm80", "sm90", "sm100", "gfx942"]


@dataclass(frozen=True)
class Config:
    """Tile of query places × keys × inner size, and how it is run."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


SHARED_BYTES: dict[Arch, int] = {"sm80": 166912, "sm90": 232448, "sm100": 232448, "gfx942": 65536}
"""Largest shared memory of one program: what a driver lets a block opt in to."""

DIRECT_DEPTHS = (16, 32, 64, 128)
"""Inner sizes of the direct form: k²C rounded up."""

DIRECT_UP_TO: dict[Arch, dict[int, int]] = {
    "sm80": {1: 5, 2: 3, 3: 3, 4: 3},
    "sm90": {},
    "sm100": {1: 3, 2: 3, 3: 3, 4: 3},
    "gfx942": {1: 3, 2: 3, 3: 3, 4: 3},
}
"""Channels → the largest window (1 if not named) for which the direct form issues less a pair."""

_WIDE = Config(64, 128, 32, 4, 1)
_NARROW = Config(64, 64, 32, 4, 1)

DIRECT: dict[Arch, dict[int, Config]] = {
    "sm80": {16: _WIDE, 32: _WIDE, 64: _NARROW, 128: _NARROW},
    "sm90": {16: _WIDE, 32: _WIDE, 64: _NARROW, 128: _NARROW},
    "sm100": {16: _WIDE, 32: _WIDE, 64: _NARROW, 128: _NARROW},
    "gfx942": {16: _WIDE, 32: _WIDE, 64: _NARROW, 128: _NARROW},
}
"""Inner size → tile; the inner size is not tiled."""

Steps = tuple[tuple[int, Config], ...]
"""(largest inner size, tile) in rising order."""

_ANY = 1 << 30
_PAIRS_942: Steps = ((_ANY, Config(64, 128, 32, 4, 1)),)

DIAGONAL: dict[Arch, dict[int, Steps]] = {
    "sm80": {
        2: ((_ANY, Config(64, 64, 32, 4, 2)),),
        8: (
            (64, Config(64, 64, 32, 4, 2)),
            (112, Config(64, 64, 16, 4, 2)),
            (128, Config(64, 64, 16, 4, 1)),
            (_ANY, Config(64, 64, 16, 4, 2)),
        ),
    },
    "sm90": {
        2: (
            (16, Config(64, 128, 16, 4, 2)),
            (48, Config(64, 128, 16, 4, 1)),
            (_ANY, Config(64, 64, 32, 4, 2)),
        ),
        8: (
            (48, Config(64, 128, 16, 4, 2)),
            (96, Config(64, 128, 32, 4, 1)),
            (_ANY, Config(64, 128, 16, 4, 1)),
        ),
    },
    "sm100": {
        2: ((32, Config(64, 128, 16, 4, 1)), (_ANY, Config(64, 64, 16, 4, 1))),
        # Few matmuls a step: triton 3.6 compiles eight of the wide ones to nothing.
        8: (
            (96, Config(64, 128, 32, 4, 1)),
            (128, Config(64, 128, 64, 4, 1)),
            (_ANY, Config(64, 64, 64, 4, 1)),
        ),
    },
    "gfx942": {2: _PAIRS_942, 8: _PAIRS_942},
}
"""Channels of a pair of rows (those of 2: gray images; of 8: coloured ones and all others)."""

SAME_PLACE: dict[Arch, Config] = {
    "sm80": Config(32, 32, 32, 8, 1),
    "sm90": Config(32, 32, 32, 8, 1),
    "sm100": Config(32, 32, 32, 8, 1),
    "gfx942": Config(32, 32, 32, 4, 1),
}

SHIFTS: dict[Arch, Config] = {
    "sm80": Config(64, 64, 32, 4, 2),
    "sm90": Config(64, 64, 32, 4, 2),
    "sm100": Config(64, 64, 32, 4, 2),
    "gfx942": Config(64, 64, 32, 4, 1),
}

PROGRAMS = 1024
"""Programs that one image should give: several for each of a chip's 108 to 304 processors."""
MIN_KEYS = 1024
"""Keys (of one row) that a program takes at least."""


def form(channels: int, window: int, arch: Arch) -> Literal["direct", "diagonal"]:
    """Return how every place meets every place."""
    fits = window * window * channels <= DIRECT_DEPTHS[-1]
    return "direct" if fits and window <= DIRECT_UP_TO[arch].get(channels, 1) else "diagonal"


def diagonal_depth(depth: int, pair: int, arch: Arch) -> tuple[int, Config]:
    """Return the padded inner size and the tile of the diagonal form."""
    for largest, config in DIAGONAL[arch][2 if pair == 2 else 8]:
        if depth <= largest:
            return -(-depth // config.block_k) * config.block_k, config
    raise AssertionError("the last step serves any depth")


def direct_depth(depth: int) -> int:
    """Return the padded inner size of the direct form.

    Raises:
        ValueError: the patch is too large for one tile.
    """
    for size in DIRECT_DEPTHS:
        if depth <= size:
            return size
    raise ValueError(f"direct form: expected at most {DIRECT_DEPTHS[-1]} elements, got {depth}")


def chunk_images(images: int, cols: int, tiles: int, elements: int) -> int:
    """Return how many images of a bank one program takes: from sizes alone, never the batch.

    Args:
        images: of the bank that answer.
        cols: keys of one image in one pass of a program.
        tiles: programs that share a chunk.
        elements: the most that one image has in any tensor; a chunk has less than 2^31 of them.
    """
    chunks = max(1, -(-PROGRAMS // tiles))
    wanted = max(-(-images // chunks), -(-MIN_KEYS // cols))
    return max(1, min(images, wanted, (1 << 30) // elements))
