"""Binaries of the plane kernels: what ``compile`` makes of them beside the other forms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from els_kernels.triton.fold_kernels import fold_kernel, normaliser_kernel
from els_kernels.triton.plane_plan import (
    BLOCK,
    FOLD_VALUES,
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
            products = {"VALUES": values_of(c, PRODUCT_VALUES[not single])}
            kernels: dict[PlaneKernel, tuple[Any, dict[str, int]]] = {
                "normaliser": (normaliser_kernel, {}),
                "fold": (fold_kernel, {"VALUES": values_of(c, FOLD_VALUES)}),
                "entropy": (statistics_kernel, {"MOMENTS": 0}),
                "moments": (statistics_kernel, {"MOMENTS": 1}),
                "ranking": (ranking_kernel, {}),
                "jvp": (jvp_kernel, products),
                "vjp": (vjp_kernel, products),
            }
            windows = f"k{'≤' if single else '>'}{BLOCK // 2 + 1}"
            for name, (kernel, constants) in kernels.items():
                config = config_of(name, arch, single)
                yield f"{name} C={c} {windows}", kernel, {**shape, **constants}, config


def plane_flops(name: str, side: int) -> int:
    """Return half-precision operations of one pixel of a block.

    Sums over windows are two products with two terms each. Jacobian products have another of them,
    and the fold has two products with three terms.
    """
    products = {"fold": 10, "jvp": 8, "vjp": 8}.get(name.split()[0], 4)
    return 2 * side * products
