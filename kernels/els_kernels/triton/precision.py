"""Number of half-precision terms of each operand; the only module that determines precision.

The matrix units multiply half-precision numbers (11 bits) exactly and add in float32. A float32 is
represented as ``high + low`` of 11 bits each, relative error ≤ 2^-23, and a product as
``high·high + high·low + low·high``: the precision of three-term TF32 at twice its speed. Half
precision is used rather than bfloat16 (8 bits, three terms): every operand is first scaled by a
power of two to the top of its range, where the exponent bits of bfloat16 have no benefit.

Two facts save terms:

- *Images of bytes.* Pixels v/127.5 - 1 centred at a level of the grid are integers up to 255 in
  units of 1/127.5: one term holds them exactly, and a product takes two matmuls instead of three.
- *High noise.* One term of the query (relative error e ≤ 2^-12, rms 2^-12/√3 at most) moves a logit
  by at most 4 standard deviations ``4·rms·a‖q‖‖p‖/(s²·√d)`` with d = k²C. The budget of the log
  evidence is ``8·2^-23·max|logit| ≥ 2^-20·(‖q‖² + a²‖p‖²)/(2s²)``, as some centred keys have a
  negative product with the query. So one term suffices if ``(‖q‖/(a‖p‖) + a‖p‖/‖q‖)·√d ≥
  2^11·4/√3``; with
  ‖q‖ ≥ s·√d/√2 (noise alone, with a margin) and ‖p‖ ≤ 2√d the rule is ``s/a·√d ≥ 13400``.
  No image at t < .99 satisfies that: the evidence, not the mean, requires two terms.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

LEVELS = 127.5
"""A byte v represents v/LEVELS - 1."""
_GRID_ERROR = 2e-5
"""Tolerance of a float32 v/127.5 - 1 in levels: 127.5·2^-23, and a margin."""
_ONE_TERM = 13400.0


@dataclass(frozen=True)
class Keys:
    """A bank as a sum of half-precision terms: ``centre + unit·Σ terms``."""

    terms: Tensor
    """[KT, N, C, H, W] float16."""
    centre: Tensor
    """[C, 1, 1] float64."""
    unit: float


def prepare_keys(bank: Tensor) -> Keys:
    """Return the bank in one term if its pixels are bytes, otherwise in two.

    Beside the terms it needs memory for a block of images only, on the device of the bank.

    Args:
        bank: [N, C, H, W]; float32, or uint8 v for v/127.5 - 1.
    """
    mean = _mean(bank)
    middle = ((mean + 1) * LEVELS).round().clamp(0, 255)
    terms = torch.empty(1, *bank.shape, dtype=torch.float16, device=bank.device)
    for block in blocks(bank):
        levels = _levels(bank[block])
        if levels is None:
            del terms
            return _two_terms(bank, mean)
        terms[0, block] = levels - middle
    return Keys(terms, middle / LEVELS - 1, 1 / LEVELS)


_BLOCK_ELEMENTS = 1 << 22
"""Pixels converted per step: 32 MiB in float64."""


def blocks(images: Tensor) -> Iterator[slice]:
    """Yield slices of [N, ...] that cover N and are small enough to convert at once."""
    step = max(1, _BLOCK_ELEMENTS // images[0].numel())
    for first in range(0, len(images), step):
        yield slice(first, first + step)


def _levels(block: Tensor) -> Tensor | None:
    """Return the levels of images of bytes, integers 0 to 255 in float64; None for others."""
    if block.dtype == torch.uint8:
        return block.double()
    levels = (block.double() + 1) * LEVELS
    whole = levels.round()
    if (levels - whole).abs().max() > _GRID_ERROR or whole.min() < 0 or whole.max() > 255:
        return None
    return whole


def _mean(bank: Tensor) -> Tensor:
    """Return the mean of each channel, float64 [C, 1, 1]."""
    total = torch.zeros(bank.shape[1], dtype=torch.float64, device=bank.device)
    for block in blocks(bank):
        total += bank[block].double().sum((0, 2, 3))
    mean = total / (bank.numel() // bank.shape[1])
    if bank.dtype == torch.uint8:
        mean = mean / LEVELS - 1
    return mean[:, None, None]


def _two_terms(bank: Tensor, centre: Tensor) -> Keys:
    # 2^11: squares and products of two terms are well within float32 and half precision. Below 1e-6
    # a bank is constant at any level, and scales of its queries would leave float32.
    largest = max(float((bank.amax() - centre).max()), float((centre - bank.amin()).max()), 1e-6)
    unit = 2.0 ** math.frexp(largest)[1] / 2**11
    terms = torch.empty(2, *bank.shape, dtype=torch.float16, device=bank.device)
    for block in blocks(bank):
        terms[:, block] = split((bank[block].double() - centre) / unit, 2)
    return Keys(terms, centre, unit)


def split(values: Tensor, terms: int) -> Tensor:
    """Return float16 [terms, ...] whose sum is ``values`` (float64) up to its rounding."""
    parts = []
    for _ in range(terms):
        part = values.to(torch.float16)
        parts.append(part)
        values = values - part.double()
    return torch.stack(parts)


def scale_queries(queries: Tensor) -> tuple[Tensor, Tensor]:
    """Return each query times a power of two, its largest element in [2^13, 2^14); the powers [B].

    Elements of at most 2^-27 of the largest lose bits, which is below the precision of a logit.
    """
    largest = queries.abs().amax((1, 2, 3))
    exponents = torch.frexp(largest).exponent
    # Of a query of zeros the exponent is 0.
    powers = torch.ldexp(torch.ones_like(largest), torch.where(largest > 0, 14 - exponents, 0))
    return queries * powers[:, None, None, None], powers


def one_term_noise(depth: int) -> float:
    """Return the least s/a at which a query with ``depth`` elements per patch needs one term."""
    return _ONE_TERM / math.sqrt(depth)


def query_terms(a: float, s: float, depth: int) -> int:
    """Return the number of terms of a query with ``depth`` elements per patch at this level."""
    return 1 if s / a * math.sqrt(depth) >= _ONE_TERM else 2
