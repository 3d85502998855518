"""Binaries of the plane kernels: what ``compile`` makes of them beside the other forms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from els_kernels.triton.fold_kernels import fold_kernel, normaliser_kernel
from els_kernels.triton.plane_plan import BLOCK, FOLD_VALUES, PLANES, PRODUCT_VALUES, values_of
from els_kernels.triton.product_kernels import jvp_kernel, vjp_kernel
from els_kernels.triton.ranking_kernel import ranking_kernel
from els_kernels.triton.statistics_kernel import statistics_kernel
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
            yield f"ranking {name}", ranking_kernel, shape, config
            each = {**shape, "VALUES": values_of(c, FOLD_VALUES)}
            yield f"fold {name}", fold_kernel, each, config
            for moments, kind in enumerate(("entropy", "moments")):
                each = {**shape, "MOMENTS": moments}
                yield f"{kind} {name}", statistics_kernel, each, config
            each = {**shape, "VALUES": values_of(c, PRODUCT_VALUES[1 - single])}
            yield f"vjp {name}", vjp_kernel, each, config
            yield f"jvp {name}", jvp_kernel, each, config


def plane_flops(constants: dict[str, int]) -> int:
    """Return half-precision operations of one pixel of a block: sums over windows, and the fold.

    Two products with two terms each, and two with three terms for the fold.
    """
    return 2 * constants["BLOCK"] * (4 + (6 if "VALUES" in constants else 0))
