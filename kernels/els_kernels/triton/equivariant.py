"""The equivariant machine on a GPU: one matmul for the logits of all shifts, one for responses."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from els_kernels.triton import layout, tuning
from els_kernels.triton.launch import Queries
from els_kernels.triton.shifts import shift_logits_kernel, shift_responses_kernel

_LOGITS = 1 << 27
"""Maximum logits in memory: 512 MiB."""


def equivariant(batch: Queries, keys: Tensor, arch: tuning.Arch) -> tuple[Tensor, Tensor]:
    """Return mean [B, C, H, W] in units of the keys and base-2 log sum [B, H, W].

    Images are processed one by one: each has H·W shifts, enough to occupy the GPU.

    Args:
        batch: queries.
        keys: [KT, N, C, H, W] float16.
        arch: architecture whose tuned tiles are used.
    """
    answers = [_attend(batch, b, keys, arch) for b in range(len(batch.plain))]
    means, logs = zip(*answers, strict=True)
    return torch.stack(means), torch.stack(logs)


def _attend(batch: Queries, b: int, keys: Tensor, arch: tuning.Arch) -> tuple[Tensor, Tensor]:
    images = keys.shape[1]
    channels, height, width = keys.shape[2:]
    shifts = height * width
    query = torch.cat([batch.terms[:, b]] * 2, -1)
    query = torch.cat([query] * 2, -2).contiguous()
    indices = _unshift_indices(height, width, keys.device).expand(-1, channels, -1)
    peak, total, weight = _empty_state(keys)
    step = max(1, _LOGITS // shifts)
    for first in range(0, images, step):
        slab = layout.aligned(keys[:, first : first + step].contiguous())
        logits = _logits(query, slab, batch, b, arch)
        top = torch.maximum(peak, _reference(logits.amax()))
        # [shifts, C, H·W]; the response of the shift by p is moved back by p.
        answers = _responses(logits, slab, top, arch).view(shifts, channels, shifts)
        moved = answers.gather(2, indices).sum(0, dtype=torch.float64)
        scale = torch.exp2((peak - top).double())
        total = total * scale + moved.view_as(total)
        weight = weight * scale + torch.exp2(logits - top).sum(dtype=torch.float64)
        peak = top
    log2_z = peak.double() + weight.log2()
    return (total / weight).float(), log2_z.float().expand(height, width)


def _reference(largest: Tensor) -> Tensor:
    """Return the reference of ``online``: the largest logit minus 15 unless rounding loses it."""
    below = largest - 15
    return torch.where(largest - below > 15, largest, below)


def _empty_state(keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    peak = torch.full((), -math.inf, device=keys.device)
    zeros = torch.zeros(keys.shape[2:], dtype=torch.float64, device=keys.device)
    return peak, zeros, torch.zeros_like(peak, dtype=torch.float64)


def _unshift_indices(height: int, width: int, device: torch.device) -> Tensor:
    """Return, for every shift p and place u, the place in the shifted response: [p, 1, u]."""
    y, x = torch.arange(height, device=device), torch.arange(width, device=device)
    rows = (y[None, :] - y[:, None]) % height
    cols = (x[None, :] - x[:, None]) % width
    places = rows[:, None, :, None] * width + cols[None, :, None, :]
    return places.reshape(height * width, 1, height * width)


def _logits(query: Tensor, slab: Tensor, batch: Queries, b: int, arch: tuning.Arch) -> Tensor:
    key_terms, images, channels, height, width = slab.shape
    config = tuning.SHIFTS[arch]
    half = layout.squared_norms(slab) / 2
    logits = half.new_empty(height * width, images)
    grid = (-(-height * width // config.block_m), -(-images // config.block_n))
    shift_logits_kernel[grid](
        query, slab, half, *(layout.aligned(t[b : b + 1]) for t in (batch.scale, batch.bias)),
        logits, height, width, images,
        CHANNELS=channels, TERMS=len(query), KEY_TERMS=min(key_terms, len(query)),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        **config.options(),
    )  # fmt: skip
    return logits


def _responses(logits: Tensor, slab: Tensor, peak: Tensor, arch: tuning.Arch) -> Tensor:
    shifts, images = logits.shape
    config = tuning.SHIFTS[arch]
    depth = slab[0, 0].numel()
    responses = logits.new_empty(shifts, depth)
    grid = (-(-shifts // config.block_m), -(-depth // config.block_n))
    shift_responses_kernel[grid](
        logits, slab, peak.view(1), responses, shifts, images, depth,
        KEY_TERMS=len(slab),
        BLOCK_M=config.block_m, BLOCK_N=config.block_k, BLOCK_D=config.block_n,
        **config.options(),
    )  # fmt: skip
    return responses
