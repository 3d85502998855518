"""Every binary that a launch may take: a kernel with all its constants, and its compilation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from els_kernels.triton import layout, tuning
from els_kernels.triton.diagonal import diagonal_kernel
from els_kernels.triton.direct import direct_kernel
from els_kernels.triton.hopper import hopper_kernel
from els_kernels.triton.online import merge_kernel
from els_kernels.triton.plane_binaries import plane_binaries
from els_kernels.triton.same_place import same_place_kernel
from els_kernels.triton.targets import compiling_for
from els_kernels.triton.tuning import Arch, Config

_HALVES = {"p_query", "p_keys", "p_norms", "p_values", "p_row_band", "p_col_band"}
_INTEGERS = {
    "p_row_spans", "p_ids", "p_query_rows", "p_query_cols", "p_key_rows", "p_key_cols",
}  # fmt: skip
_TERMS = {"": (1, 2), " one term": (1, 1), " floats": (2, 2), " floats one term": (2, 1)}
"""Suffix of a name → terms of the bank and of the query."""


@dataclass(frozen=True)
class Binary:
    """A kernel with all its constants, for one chip."""

    name: str
    kernel: Any
    constants: dict[str, int]
    config: Config
    arch: Arch
    pairs: int
    """Pairs of places in one pass of the inner loop; 0 where the loop is not over pairs."""
    matrix: bool = True
    """Whether the kernel should use the matrix units."""


def binaries(arch: Arch, channels: tuple[int, ...] = (1, 3)) -> Iterator[Binary]:
    """Yield every binary that a chip needs for banks of these channels."""
    for c in channels:
        for suffix in _TERMS:
            for window in (1, 3, 5) if c == 1 else (1, 3):
                yield direct(arch, c, window, suffix)
            for window in _largest_windows(arch, c, suffix):
                yield diagonal(arch, window, c, suffix)
        yield from _same_place(arch, c)
    sums = {layout.value_width(c, terms) for c in channels for terms in (1, 2)}
    for values in sorted(sums | {c + 1 for c in channels}):
        yield merge(arch, values)
    for name, kernel, constants, config in plane_binaries(arch, channels):
        yield Binary(name, kernel, constants, config, arch, config.block_m * config.block_n)


def direct(arch: Arch, channels: int, window: int, suffix: str = "") -> Binary:
    """Return the direct form for a window; ``suffix`` is a key of ``_TERMS``."""
    depth = tuning.direct_depth(window * window * channels)
    config = tuning.DIRECT[arch][depth]
    constants = {
        "CHANNELS": channels, "WINDOW_W": window, **_terms(channels, suffix),
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": depth,
    }  # fmt: skip
    name = f"direct C={channels} k={window}{suffix}"
    return Binary(name, direct_kernel, constants, config, arch, config.block_m * config.block_n)


def diagonal(arch: Arch, window: int, channels: int, suffix: str = "") -> Binary:
    """Return the diagonal form for a window; ``suffix`` is a key of ``_TERMS``."""
    pair, terms = layout.pair_width(channels), _terms(channels, suffix)
    name = f"diagonal C={channels} k≤{window}{suffix}"
    tile = tuning.hopper_tile(channels, window, terms["TERMS"], _TERMS[suffix][0])
    if arch == "sm90" and tile is not None:
        depth, config = tile
        constants = {
            **terms, "PAIR": pair, "DEPTH": depth,
            "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
            "BLOCK_V": max(8, terms["VALUES"]), "BUFFERS": config.num_stages,
        }  # fmt: skip
        pairs = config.block_m * config.block_n
        return Binary(name, hopper_kernel, constants, config, arch, pairs)
    depth, config = tuning.diagonal_depth(window * pair, pair, arch, terms["KEY_TERMS"])
    constants = {
        **terms, "PAIR": pair, "DEPTH": depth,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
    }  # fmt: skip
    return Binary(name, diagonal_kernel, constants, config, arch, config.block_m * config.block_n)


def _largest_windows(arch: Arch, channels: int, suffix: str) -> list[int]:
    """Return the largest window up to 25 of each binary of the diagonal form."""
    windows = {}
    for k in range(3, 26, 2):
        constants = diagonal(arch, k, channels, suffix).constants
        windows[tuple(constants.values())] = k
    return sorted(windows.values())


def merge(arch: Arch, values: int) -> Binary:
    """Return the merge of states with so many sums."""
    constants = {"VALUES": values, "BLOCK_V": 1 << (values - 1).bit_length()}
    constants["BLOCK_M"] = tuning.MERGE.block_m
    return Binary(f"merge V={values}", merge_kernel, constants, tuning.MERGE, arch, 0, matrix=False)


def _terms(channels: int, suffix: str) -> dict[str, int]:
    key_terms, terms = _TERMS[suffix]
    values = layout.value_width(channels, key_terms)
    return {
        "TERMS": terms, "KEY_TERMS": min(key_terms, terms), "VALUES": values,
        "BLOCK_V": max(16, values),
    }  # fmt: skip


def _same_place(arch: Arch, channels: int) -> Iterator[Binary]:
    config = tuning.SAME_PLACE[arch]
    for suffix, key_terms in (("", 1), (" floats", 2)):
        constants = {"CHANNELS": channels, "KEY_TERMS": key_terms, "BLOCK": config.block_m}
        constants["BLOCK_C"] = 1 << (channels - 1).bit_length()
        name = f"same place C={channels}{suffix}"
        yield Binary(name, same_place_kernel, constants, config, arch, 0)


def compiled(binary: Binary, chip: str | None = None) -> Any:
    """Return Triton's compiled kernel of a chip, by default that of the tiles' own name.

    Specialised as a launch is: tensors aligned to 16 bytes, sizes not specialised.
    """
    arguments = [
        _type(name, binary) if name.startswith("p_") else 1
        for name in binary.kernel.arg_names
        if name not in binary.constants
    ]
    with compiling_for(chip or binary.arch):
        return binary.kernel.warmup(
            *arguments, grid=(1, 1, 1), **binary.constants, **binary.config.options()
        )


def _type(name: str, binary: Binary) -> torch.dtype:
    if name in _INTEGERS:
        return torch.int32
    if name.endswith("_halves"):
        return torch.float16
    floats = "SINGLE" in binary.constants or (
        binary.kernel is same_place_kernel and name == "p_query"
    )
    return torch.float16 if name in _HALVES and not floats else torch.float32
