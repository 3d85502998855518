"""Sums over the blocks of a bank that its units and centre come from.

They do not depend on the number of threads: torch splits the reductions below between their
results, not within one.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from els_kernels.blocks import Blocks
from els_kernels.geometry import band


def block_sums(bank: Tensor, blocks: Blocks) -> list[Tensor]:
    """Return the number of pixels and the sums of the channels of each block, [1 + C] float64.

    Args:
        bank: the images of the process, [N, C, H, W] float32.
        blocks: of the process.
    """
    found = []
    for images in torch.split(bank, blocks.size):
        sums = images.sum((2, 3), dtype=torch.float64).sum(0)
        count = torch.tensor([images.numel() / images.shape[1]], dtype=torch.float64, device="cpu")
        found.append(torch.cat([count, sums]))
    return found


def centre_of(sums: Iterable[Tensor]) -> Tensor:
    """Return the mean of the channels, [C] float64, of the ``block_sums`` of a bank in order."""
    first, *others = sums
    total = first.clone()
    for each in others:
        total += each
    return total[1:] / total[0]


def squares_of(tiles: Tensor) -> Tensor:
    """Return the squares of packed tiles [T, C, H, W, lanes], summed over channels: [N, H, W]."""
    return tiles.square().sum(1).movedim(3, 1).flatten(0, 1)


def largest_window(squares: Tensor, window: int) -> float:
    """Return the largest sum of [N, H, W] over a window, or a bound of it for clipped windows."""
    height, width = squares.shape[1:]
    if window > min(height, width):
        return float(squares.sum((1, 2)).amax())
    # A clipped window is a part of one that wraps.
    rows, cols = (band(length, window, "circular").to(squares) for length in (height, width))
    return float((rows @ squares @ cols).amax())
