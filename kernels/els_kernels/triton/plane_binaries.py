"""Binaries of the plane kernels: what ``compile`` makes of them beside the other forms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from els_kernels.triton.fold_kernels import fold_kernel, normaliser_kernel
from els_kernels.triton.fold_product_kernels import fold_product_kernel, fold_scalar_kernel
from els_kernels.triton.line_kernels import line_ranking_kernel, line_statistics_kernel
from els_kernels.triton.plane_plan import (
    BLOCK,
    FOLD_VALUES,
    LOOPED,
    PRODUCT_VALUES,
    PlaneKernel,
    config_of,
    values_of,
)
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
        for single in (True, False):
            shape = {"CHANNELS": c, "BLOCK": BLOCK, "SINGLE": int(single)}
            most, line_most = BLOCK // 2 + 1, BLOCK // 4 + 1
            for name, plane, kernel, constants in _kernels(c, single):
                if plane in LOOPED and single:
                    continue
                largest = line_most if kernel in _LINES else most
                windows = "any k" if plane in LOOPED else f"k{'≤' if single else '>'}{largest}"
                config = config_of(plane, arch, single)
                yield f"{name} C={c} {windows}", kernel, {**shape, **constants}, config


_LINES = (line_statistics_kernel, line_ranking_kernel)
"""Kernels whose tiles have every patch of their pixels, so that windows of a quarter of a block are
the largest of a single one."""


def _kernels(channels: int, single: bool) -> Iterator[tuple[str, PlaneKernel, Any, dict[str, int]]]:
    """Yield name, tile, kernel and constants."""
    yield "normaliser", "normaliser", normaliser_kernel, {}
    yield "fold", "fold", fold_kernel, {"VALUES": values_of(channels, FOLD_VALUES)}
    yield "entropy", "entropy", statistics_kernel, {"MOMENTS": 0}
    yield "moments", "moments", statistics_kernel, {"MOMENTS": 1}
    yield "ranking", "ranking", ranking_kernel, {}
    # The last program of an odd number of channels has fewer sums.
    together = values_of(channels, PRODUCT_VALUES[not single])
    for values in sorted({together, channels % together or together}, reverse=True):
        rest = "" if values == together else " rest"
        own = {"VALUES": values}
        yield f"jvp{rest}", "jvp", jvp_kernel, own
        yield f"vjp{rest}", "vjp", vjp_kernel, own
    yield "fold jvp", "fold jvp", fold_product_kernel, {"VJP": 0}
    yield "fold vjp", "fold vjp", fold_product_kernel, {"VJP": 1}
    yield "fold scalars jvp", "fold scalars jvp", fold_scalar_kernel, {"VJP": 0}
    yield "fold scalars vjp", "fold scalars vjp", fold_scalar_kernel, {"VJP": 1}
    yield "fold entropy", "fold entropy", line_statistics_kernel, {"MOMENTS": 0}
    yield "fold moments", "fold moments", line_statistics_kernel, {"MOMENTS": 1}
    yield "fold ranking", "fold ranking", line_ranking_kernel, {}


def plane_flops(name: str, side: int) -> int:
    """Return half-precision operations of one pixel of a block.

    Sums over windows are two products with two terms each. Jacobian products have another of them,
    and the fold has two products with three terms; its own products have both.
    """
    sums, fold = 4, 6
    match name.split():
        case ["fold", "jvp" | "vjp", *_]:
            products = 2 * sums + fold
        case ["fold", "scalars", kind, *_]:
            products = sums + (fold if kind == "vjp" else sums)
        case ["fold", *_]:
            products = sums + fold
        case ["jvp" | "vjp", *_]:
            products = 2 * sums
        case _:
            products = sums
    return 2 * side * products
