"""Validation shared by the operators; errors name the argument, expected and got."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

Numbers = Tensor | list[float] | tuple[float, ...]
"""A number for each image: a tensor [B], or a list or tuple, which costs less."""
Integers = Tensor | list[int] | tuple[int, ...]
"""An integer for each image, likewise."""
Ranges = Tensor | list[tuple[int, int]] | list[list[int]]
"""Ends of a range for each image: a tensor [B, 2], or a list of pairs."""

_REACH = 1e18
"""Largest distance in units of s: logits (1e36) and their intermediate results fit a float32."""
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_logits(
    sizes: list[float], largest: float, numbers: int, a: list[float], s: list[float]
) -> None:
    """Check that the logits of queries fit a float32.

    Args:
        sizes: largest |pixel| of each query.
        largest: largest |pixel| of the bank.
        numbers: C·H·W of a query.
        a: signal scale of each query.
        s: noise scale of each query.

    Raises:
        ValueError: A noise scale is too small.
    """
    root = math.sqrt(numbers)
    for size, a_b, s_b in zip(sizes, a, s, strict=True):
        # This order of operations avoids overflow: s may be 1e-300.
        reach = max((size + a_b * largest) * root, a_b)
        if reach > _REACH * s_b:
            raise ValueError(
                "s: expected noise at which logits fit a float32, "
                f"s >= {reach / _REACH:.1e} here, got {s_b}"
            )


def odd_windows(window: Integers | None, batch: int, largest: int) -> list[int]:
    """Return the window of each query; raise ValueError unless odd from 1 to ``largest``."""
    windows = integers("window", window, (batch,))
    for k in windows:
        if k % 2 == 0 or not 1 <= k <= largest:
            raise ValueError(f"window: expected odd from 1 to {largest}, got {k}")
    return windows


def image_ranges(ranges: Ranges | None, batch: int, images: int) -> list[tuple[int, int]]:
    """Return the range of bank images of each query, by default all; raise ValueError if wrong."""
    if ranges is None:
        return [(0, images)] * batch
    if _is_list(ranges, batch, list | tuple):
        ends = [end for pair in ranges for end in integers("ranges, a pair", pair, (2,))]
    else:
        ends = integers("ranges", ranges, (batch, 2))
    limits = list(zip(ends[::2], ends[1::2], strict=True))
    for lo, hi in limits:
        if not 0 <= lo < hi <= images:
            raise ValueError(f"ranges: expected 0 <= lo < hi <= {images}, got lo {lo}, hi {hi}")
    return limits


def is_images(images: object, dtype: torch.dtype = torch.float32) -> TypeGuard[Tensor]:
    """Return whether an object is a strided tensor [N, C, H, W] of a type."""
    return (
        isinstance(images, Tensor)
        and images.ndim == 4
        and images.dtype == dtype
        and images.layout == torch.strided
    )


def magnitudes(name: str, images: Tensor) -> list[float]:
    """Return the largest |pixel| of each image; raise ValueError if a pixel is not finite."""
    found = ends(images)
    for pair in found:
        for end in pair:
            if not math.isfinite(end):
                raise ValueError(f"{name}: expected finite pixels, got {end}")
    return [max(-low, high) for low, high in found]


def ends(images: Tensor) -> list[tuple[float, float]]:
    """Return the least and the largest pixel of each image [B, ...]; NaN if one is."""
    # aminmax allocates no mask of the size of the images. One image takes a third of the time.
    if len(images) == 1:
        low, high = images.aminmax()
        return [(low.item(), high.item())]
    low, high = images.flatten(1).aminmax(dim=1)
    return list(zip(low.tolist(), high.tolist(), strict=True))


def positive(name: str, scale: Numbers, batch: int) -> list[float]:
    """Return numbers [batch]; raise ValueError unless finite and above 0."""
    values = numbers(name, scale, batch)
    for value in values:
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: expected finite and > 0, got {value}")
    return values


def numbers(name: str, values: object, batch: int) -> list[float]:
    """Return numbers [batch] of a tensor, list or tuple; raise ValueError for anything else."""
    if isinstance(values, Tensor) and values.shape == (batch,) and not values.is_complex():
        return [float(value) for value in values.tolist()]
    if _is_list(values, batch, float | int):
        return [_float(value) for value in values]
    raise ValueError(f"{name}: expected numbers [{batch}], got {describe(values)}")


def _float(value: float) -> float:
    """Return a number as a float; infinity for an integer beyond the largest."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def integers(name: str, values: object, shape: tuple[int, ...]) -> list[int]:
    """Return integers of a shape, flattened; raise ValueError for another type or shape.

    Args:
        name: of the argument.
        values: a tensor, or a list or tuple for a shape of one length.
        shape: to be expected.
    """
    if isinstance(values, Tensor):
        if values.shape == shape and values.dtype in _INTEGERS:
            return [int(value) for value in values.flatten().tolist()]
    elif len(shape) == 1 and _is_list(values, shape[0], int):
        return list(values)
    raise ValueError(f"{name}: expected integers {list(shape)}, got {describe(values)}")


def _is_list(values: object, length: int, kind: Any) -> TypeGuard[Sequence[Any]]:
    """Return whether an object is a list or tuple of a length, its elements of a type, no bool."""
    return (
        isinstance(values, list | tuple)
        and len(values) == length
        and all(isinstance(one, kind) and not isinstance(one, bool) for one in values)
    )


def describe(value: object) -> str:
    """Return dtype and shape of a tensor, or the type of another object, for errors."""
    if isinstance(value, list | tuple):
        kinds = ", ".join(sorted({type(one).__name__ for one in value}))
        return f"{type(value).__name__} of {len(value)} {kinds}".rstrip()
    if not isinstance(value, Tensor):
        return type(value).__name__
    layout = "" if value.layout == torch.strided else f"{value.layout} "
    return f"{layout}{value.dtype} {list(value.shape)}"


def join(shape: tuple[int, ...]) -> str:
    """Return a shape without brackets, for errors."""
    return ", ".join(map(str, shape))
