"""The matmul forms of a fold that the kernel is compared with: unfold, q·kᵀ, softmax, p·v, fold."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import fold, scaled_dot_product_attention, unfold


@dataclass(frozen=True)
class Problem:
    """One picture [1, C, H, W] as bank, a query of its size, and a level."""

    bank: Tensor
    x: Tensor
    a: float
    s: float
    window: int
    rho: float

    def taps(self) -> Tensor:
        """Return the weights of the fold, [1, k², 1]."""
        u = torch.linspace(-1, 1, self.window, dtype=torch.float64)
        line = torch.exp(-u.square() / (2 * self.rho * self.rho))
        return torch.outer(line, line).flatten()[None, :, None]

    def overlap(self, means: Tensor) -> Tensor:
        """Return the folded mean [1, C, H, W] of mean patches [Q, C·k²]."""
        size, channels = self.x.shape[2:], self.x.shape[1]
        taps = self.taps().to(means)
        columns = means.T.view(channels, -1, len(means)) * taps
        total = fold(columns.flatten(0, 1)[None], size, self.window)
        weight = fold(taps.expand(1, -1, len(means)), size, self.window)
        return total / weight

    def matmul(self, rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the folded mean, ``rows`` query patches at a time."""
        queries = unfold(self.x.to(dtype), self.window)[0].T.contiguous()
        keys = unfold(self.bank.to(dtype), self.window)[0].T.contiguous()
        scale, a = 1 / (self.s * self.s), self.a
        bias = keys.square().sum(1) * (-a * a * scale / 2)
        means = torch.empty_like(queries)
        for first in range(0, len(queries), rows):
            part = slice(first, first + rows)
            logits = torch.addmm(bias, queries[part], keys.T, alpha=a * scale)
            torch.mm(logits.softmax(1), keys, out=means[part])
        return self.overlap(means)

    def attention(self) -> Tensor:
        """Return the same by ``scaled_dot_product_attention``: the norm is one more coordinate."""
        queries = unfold(self.x, self.window)[0].T
        keys = unfold(self.bank, self.window)[0].T.contiguous()
        queries = torch.cat([queries * self.a, torch.full_like(queries[:, :1], -1.0)], dim=1)
        norms = keys.square().sum(1, keepdim=True) * (self.a * self.a / 2)
        means = scaled_dot_product_attention(
            queries[None, None],
            torch.cat([keys, norms], dim=1)[None, None],
            torch.cat([keys, torch.zeros_like(norms)], dim=1)[None, None],
            scale=1 / (self.s * self.s),
        )
        return self.overlap(means[0, 0, :, :-1])


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    """Return a colour picture [1, 3, H, W] in [-1, 1] with the spectrum of photographs, 1/f."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, 3, height, width, generator=generator)
    row, col = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)
    frequency = (row.square() + col.square()).sqrt().clamp(min=1 / max(height, width))
    # Colours of photographs are correlated.
    noise = 0.8 * noise.mean(1, keepdim=True) * math.sqrt(3) + 0.6 * noise
    smooth = torch.fft.irfft2(torch.fft.rfft2(noise) / frequency, s=(height, width))
    scaled: Tensor = smooth / (2.5 * smooth.std())
    return scaled.clamp(-1, 1)
