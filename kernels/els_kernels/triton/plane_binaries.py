"""Binaries of the plane kernels: what ``compile`` makes of them beside the other forms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from els_kernels.triton.fold_kernels import fold_kernel, normaliser_kernel
from els_kernels.triton.plane_plan import BLOCK, PLANES, values_of
from els_kernels.triton.tuning import Arch, Config


def plane_binaries(
    arch: Arch, channels: tuple[int, ...]
) -> Iterator[tuple[str, Any, dict[str, int], Config]]:
    """Yield name, kernel, constants and tile of every binary for images of these channels.

    Windows of up to half a block and one more pixel need a single block of pixels.
    """
    for c in channels:
        for single, config in zip((1, 0), PLANES[arch], strict=True):
            shape = {"CHANNELS": c, "BLOCK": BLOCK, "SINGLE": single}
            name = f"C={c} " + (f"k≤{BLOCK // 2 + 1}" if single else f"k>{BLOCK // 2 + 1}")
            yield f"normaliser {name}", normaliser_kernel, shape, config
            yield f"fold {name}", fold_kernel, {**shape, "VALUES": values_of(c)}, config


def plane_flops(constants: dict[str, int]) -> int:
    """Return half-precision operations of one pixel of a block: sums over windows, and the fold.

    Two products with two terms each, and two with three terms for the fold.
    """
    return 2 * constants["BLOCK"] * (4 + (6 if "VALUES" in constants else 0))
