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

DIRECT_UP_TO: dict[int, int] = {1: 5, 2: 3, 3: 3, 4: 3}
"""Channels → the largest window for which the direct form issues fewer instructions a pair."""

DIRECT: dict[Arch, dict[int, Config]] = {
    "sm80": {depth: Config(64, 64, depth, 4, 2) for depth in DIRECT_DEPTHS},
    "sm90": {depth: Config(64, 64, depth, 4, 2) for depth in DIRECT_DEPTHS},
    "sm100": {depth: Config(64, 64, depth, 4, 2) for depth in DIRECT_DEPTHS},
    "gfx942": {depth: Config(64, 64, depth, 4, 1) for depth in DIRECT_DEPTHS},
}

DIAGONAL: dict[Arch, dict[int, Config]] = {
    "sm80": {depth: Config(64, 64, min(depth, 32), 4, 2) for depth in (16, 32, 64, 96, 128)},
    "sm90": {depth: Config(64, 64, min(depth, 32), 4, 2) for depth in (16, 32, 64, 96, 128)},
    "sm100": {depth: Config(64, 64, min(depth, 32), 4, 2) for depth in (16, 32, 64, 96, 128)},
    "gfx942": {depth: Config(64, 64, min(depth, 32), 4, 1) for depth in (16, 32, 64, 96, 128)},
}
"""Inner size 2kC → tile; the largest entry not above it serves what lies between."""

SAME_PLACE: dict[Arch, Config] = {
    "sm80": Config(32, 32, 32, 4, 1),
    "sm90": Config(32, 32, 32, 4, 1),
    "sm100": Config(32, 32, 32, 4, 1),
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


def form(channels: int, window: int) -> Literal["direct", "diagonal"]:
    """Return how every place meets every place."""
    return "direct" if window <= DIRECT_UP_TO.get(channels, 1) else "diagonal"


def diagonal_depth(depth: int, arch: Arch) -> tuple[int, Config]:
    """Return the padded inner size and the tile of the diagonal form."""
    table = DIAGONAL[arch]
    config = table[max([16, *(size for size in table if size <= depth)])]
    return -(-depth // config.block_k) * config.block_k, config


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
