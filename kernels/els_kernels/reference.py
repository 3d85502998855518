"""Patch attention by its definition, in float64: the specification.

Every other implementation is tested against this one and shares no code with it: patches by
explicit offsets, sources by an explicit mask, one softmax over all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from els_kernels.control import checkpoint
from els_kernels.geometry import Geometry, Posterior


class Reference:
    """Brute force: O(N·(HW)²·k²C) work, O(N·HW·(HW + k²C)) memory for one image."""

    def __init__(self, bank: Tensor) -> None:
        self._bank = bank.double()

    def __call__(
        self,
        x: Tensor,
        a: list[float],
        s: list[float],
        window: list[int],
        ranges: list[tuple[int, int]],
        geometry: Geometry,
    ) -> Posterior:
        """Return the posterior of each image; images are computed separately."""
        answers = [
            _attend(x[b].double(), self._bank[slice(*ranges[b])], a[b], s[b], window[b], geometry)
            for b in range(len(x))
        ]
        return Posterior(
            torch.stack([mean for mean, _ in answers]).float(),
            torch.stack([evidence for _, evidence in answers]).float(),
        )


def _attend(
    x: Tensor, bank: Tensor, a: float, s: float, window: int, geometry: Geometry
) -> tuple[Tensor, Tensor]:
    channels, height, width = x.shape
    wraps = geometry.padding != "zeros"
    offsets = _offsets(height, width, window, geometry)
    queries = _patches(x[None], offsets, wraps)[0]
    keys = _patches(bank, offsets, wraps)
    values = bank.flatten(2).transpose(1, 2)
    allowed = _sources(height, width, window, geometry, x.device)
    mean, evidence = [], []
    for u, query in enumerate(queries):
        checkpoint()
        sources = allowed[u]
        logits = -(query - a * keys[:, sources]).square().sum(-1) / (2 * s * s)
        weights = logits.flatten().softmax(0)
        mean.append(weights @ values[:, sources].flatten(0, 1))
        evidence.append(logits.flatten().logsumexp(0))
    return (
        torch.stack(mean, -1).view(channels, height, width),
        torch.stack(evidence).view(height, width),
    )


def _offsets(height: int, width: int, window: int, geometry: Geometry) -> list[tuple[int, int]]:
    """Return Ω. A whole window has every pixel once: clipped at the border, or on the torus."""
    if not geometry.whole:
        rows = cols = range(-(window // 2), window // 2 + 1)
    elif geometry.padding == "zeros":
        rows, cols = range(1 - height, height), range(1 - width, width)
    else:
        rows, cols = range(height), range(width)
    return [(dy, dx) for dy in rows for dx in cols]


def _patches(images: Tensor, offsets: list[tuple[int, int]], wraps: bool) -> Tensor:
    """Return the patch at every place, [N, HW, |Ω|·C]; outside an image it is zero or wraps."""
    height, width = images.shape[-2:]
    y = torch.arange(height, device=images.device)[:, None]
    x = torch.arange(width, device=images.device)[None, :]
    shifted = []
    for dy, dx in offsets:
        moved = images[:, :, (y + dy) % height, (x + dx) % width]
        if not wraps:
            inside = ((y + dy) % height == y + dy) & ((x + dx) % width == x + dx)
            moved = moved * inside
        shifted.append(moved.flatten(2))
    return torch.cat(shifted, dim=1).transpose(1, 2)


def _sources(
    height: int, width: int, window: int, geometry: Geometry, device: torch.device
) -> Tensor:
    """Return the mask of sources: bool [HW, HW], true where y is in S(u), indexed (u, y)."""
    if geometry.sources == "same":
        return torch.eye(height * width, dtype=torch.bool, device=device)
    if geometry.padding == "circular":
        return torch.ones(height * width, height * width, dtype=torch.bool, device=device)
    r = window // 2
    row, col = _signature(height, r, device), _signature(width, r, device)
    if geometry.padding == "valid":
        interior = (row == r).all(-1)[:, None] & (col == r).all(-1)[None, :]
        return interior.flatten().expand(height * width, -1)
    same_row = (row[:, None] == row[None, :]).all(-1)
    same_col = (col[:, None] == col[None, :]).all(-1)
    allowed = same_row[:, None, :, None] & same_col[None, :, None, :]
    return allowed.reshape(height * width, height * width)


def _signature(length: int, r: int, device: torch.device) -> Tensor:
    """Return (min(i, r), min(length-1-i, r)) for every place i: [length, 2]."""
    place = torch.arange(length, device=device)
    return torch.stack([place.clamp(max=r), (length - 1 - place).clamp(max=r)], dim=-1)
