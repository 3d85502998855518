"""Tile shapes and the choice of form, as data: nothing is tuned at run time.

Chosen from the static roofline (``benchmarks/results/static.md``): the largest tiles that do not
exceed the chip's shared memory, nor spill what a step changes. No entry depends on the batch, so
neither do results.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from els_kernels.triton import layout

Arch = Literal["sm80", "sm90", "sm100", "gfx942"]


@dataclass(frozen=True)
class Config:
    """Tile of query places × keys × inner size, with warps and stages."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, Any]:
        """Return the compiler's options; fused multiply-adds do not depend on Triton's default."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }


SHARED_BYTES: dict[Arch, int] = {"sm80": 101376, "sm90": 232448, "sm100": 232448, "gfx942": 65536}
"""Largest shared memory of one program, in bytes: the opt-in limit of a block, of the smallest chip
that takes these tiles. Capability 8.0 has 166912, but 8.6, 8.9 and 12.x have 101376."""

CAPABILITIES: dict[int, Arch] = {8: "sm80", 9: "sm90", 10: "sm100", 11: "sm100", 12: "sm80"}
"""Major compute capability of an NVIDIA chip → tiles. 12.x has neither the matrix units of Hopper
nor those of Blackwell's servers, only those of Ampere. Below 8 Triton emits no matrix instruction,
and hundreds of spills; newer chips than these take those of the newest."""

AMD_CHIPS = ("gfx942", "gfx950")
"""AMD chips, with 64 lanes a wave and matrix units, that the tiles of gfx942 suit."""

DIRECT_DEPTHS = (16, 32, 64, 128)
"""Inner sizes of the direct form: k²C rounded up."""

DIRECT_UP_TO: dict[Arch, dict[int, int]] = {
    "sm80": {1: 5, 2: 3, 3: 3, 4: 3},
    "sm90": {},
    "sm100": {1: 3, 2: 3, 3: 3, 4: 3},
    "gfx942": {1: 3, 2: 3, 3: 3, 4: 3},
}
"""Channels → the largest window (default 1) at which the direct form issues fewer instructions."""

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
"""(largest inner size, tile), in increasing order."""

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
        # Few matmuls per step: triton 3.6 drops eight of the wide ones.
        8: (
            (96, Config(64, 128, 32, 4, 1)),
            (128, Config(64, 128, 64, 4, 1)),
            (_ANY, Config(64, 64, 64, 4, 1)),
        ),
    },
    "gfx942": {2: _PAIRS_942, 8: _PAIRS_942},
}
"""Channels of a pair of rows: 2 for gray images, 8 for colour and all others."""

DIAGONAL_FLOATS: dict[Arch, dict[int, Steps]] = {
    **DIAGONAL,
    "sm80": {
        2: ((32, Config(64, 64, 32, 4, 2)), (_ANY, Config(64, 64, 16, 4, 2))),
        8: (
            (64, Config(64, 64, 32, 4, 2)),
            # Two stages of the largest would exceed the 99 KiB of 8.6 and 8.9.
            (168, Config(64, 64, 16, 4, 2)),
            (_ANY, Config(64, 64, 16, 4, 1)),
        ),
    },
    "sm100": {
        2: DIAGONAL["sm100"][2],
        8: ((96, Config(64, 128, 32, 4, 1)), (_ANY, Config(64, 128, 64, 4, 1))),
    },
}
"""The same for banks in two terms, whose keys take twice the registers and copies."""

_HOPPER = Config(64, 128, 32, 4, 2)
NORM_COLUMNS = 8
"""Columns of a product that are norms of keys, for Hopper: see ``hopper_launch``."""
HOPPER_UP_TO = 160
"""Columns of the largest product for Hopper; wider ones take the tiles above, as more spills."""
HOPPER_CHANNELS, HOPPER_VALUES = 4, 16
"""Channels of an image and values of a key, at most, in a tile for Hopper: more channels spill."""
SHARED_BY = 4
"""Images of a batch that share a tile for Hopper, at most."""

SAME_PLACE: dict[Arch, Config] = {
    "sm80": Config(32, 32, 32, 8, 1),
    "sm90": Config(32, 32, 32, 8, 1),
    "sm100": Config(32, 32, 32, 8, 1),
    "gfx942": Config(32, 32, 32, 4, 1),
}

MERGE = Config(64, 0, 0, 4, 1)
"""Tile of the merge, of places alone."""
MERGE_SLOTS = 32
"""Minimum slots that a program merges, one after the other."""

PROGRAMS = 1024
"""Programs that one image should launch: several for each of a chip's 108 to 304 processors."""
MIN_KEYS = 1024
"""Minimum keys (of one row) of a program."""


def form(channels: int, window: int, arch: Arch) -> Literal["direct", "diagonal"]:
    """Return the form for the geometries in which every place is a source."""
    fits = window * window * channels <= DIRECT_DEPTHS[-1]
    return "direct" if fits and window <= DIRECT_UP_TO[arch].get(channels, 1) else "diagonal"


def diagonal_depth(depth: int, pair: int, arch: Arch, key_terms: int = 1) -> tuple[int, Config]:
    """Return the padded inner size and the tile of the diagonal form."""
    table = DIAGONAL if key_terms == 1 else DIAGONAL_FLOATS
    for largest, config in table[arch][2 if pair == 2 else 8]:
        if depth <= largest:
            return -(-depth // config.block_k) * config.block_k, config
    raise AssertionError("the last step serves any depth")


def hopper_tile(
    channels: int, window: int, terms: int, bank_terms: int
) -> tuple[int, Config] | None:
    """Return the columns of a product for Hopper and its tile; None if there is none.

    Args:
        channels: of an image.
        window: k.
        terms: of the query.
        bank_terms: of the bank.
    """
    depth = window * layout.pair_width(channels) + NORM_COLUMNS
    block = 16 if depth <= 48 else 32
    columns = -(-depth // block) * block
    if columns > HOPPER_UP_TO or channels > HOPPER_CHANNELS:
        return None
    # Two buffers, if two programs of a processor can have them: less what the chip keeps of each.
    rows = _HOPPER.block_m * terms + _HOPPER.block_n * min(bank_terms, terms)
    two = 2 * 2 * (columns * rows + HOPPER_VALUES * _HOPPER.block_n)
    stages = 2 if two <= SHARED_BYTES["sm90"] // 2 - 1024 else 1
    return columns, replace(_HOPPER, block_k=block, num_stages=stages)


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
    """Return the number of bank images of one program, independent of the batch.

    Args:
        images: bank images within the range.
        cols: keys of one image per pass of a program.
        tiles: programs that share a chunk of the bank.
        elements: largest number per image in any tensor; a chunk has fewer than 2^31.
    """
    chunks = max(1, -(-PROGRAMS // tiles))
    wanted = max(-(-images // chunks), -(-MIN_KEYS // cols))
    return max(1, min(images, wanted, (1 << 30) // elements))
