"""Other implementations on the torus, on unfolded patches, as a reference for the kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention


@dataclass(frozen=True)
class Problem:
    """Attention with its scale in the queries and its bias as an additional column."""

    queries: Tensor
    """[B·HW, D] float32."""
    keys: Tensor
    """[N·HW, D] float32."""
    values: Tensor
    """[N·HW, 16] float32: the centre pixel, then zeros."""
    wide_values: Tensor
    """[N·HW, D] float32: the same, padded to the depth of the keys."""


def unfolded(
    x: Tensor, bank: Tensor, a: float, s: float, window: int, align: Callable[[int], int]
) -> Problem:
    """Return the problem of images [B, C, H, W] of one level and a bank [N, C, H, W].

    ``align`` rounds the depth of a patch up to one that a contender supports.
    """
    keys = _unfold(bank, window)
    norm = keys.square().sum(1, keepdim=True)
    queries = _unfold(x, window) * (a / s**2)
    bias = queries.new_full((len(queries), 1), -(a * a) / (2 * s * s))
    values = bank.permute(0, 2, 3, 1).flatten(0, 2)
    depth = max(16, align(keys.shape[1] + 1))
    return Problem(
        _widen(torch.cat([queries, bias], 1), depth),
        _widen(torch.cat([keys, norm], 1), depth),
        _widen(values, 16),
        _widen(values, depth),
    )


def whole_vectors(depth: int) -> int:
    """Return the next multiple of 8."""
    return -(-depth // 8) * 8


def power_of_two(depth: int) -> int:
    """Return the next power of two."""
    return 1 << (depth - 1).bit_length()


def _unfold(images: Tensor, window: int) -> Tensor:
    r = window // 2
    wrapped = pad(images, (r, r, r, r), mode="circular")
    patches = wrapped.unfold(2, window, 1).unfold(3, window, 1)
    return patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2)


def _widen(rows: Tensor, width: int) -> Tensor:
    return pad(rows, (0, width - rows.shape[1])).contiguous()


def by_matmul(problem: Problem, tile: int = 1 << 15) -> Tensor:
    """Return the answer by matmuls over tiles of keys with an online softmax: the unfold form."""
    peak = problem.queries.new_full((len(problem.queries), 1), -torch.inf)
    weight = torch.zeros_like(peak)
    total = problem.queries.new_zeros(len(problem.queries), problem.values.shape[1])
    for keys, values in zip(
        torch.split(problem.keys, tile), torch.split(problem.values, tile), strict=True
    ):
        logits = problem.queries @ keys.T
        top = torch.maximum(peak, logits.amax(1, keepdim=True))
        logits.sub_(top).exp_()
        scale = torch.exp(peak - top)
        weight = weight * scale + logits.sum(1, keepdim=True)
        total = total * scale + logits @ values
        peak = top
    return total / weight


def by_sdpa(problem: Problem) -> Tensor:
    """Return the answer of torch's fused attention in float32, values as deep as the keys."""
    return _sdpa(problem.queries, problem.keys, problem.wide_values)


def by_narrow_sdpa(problem: Problem) -> Tensor:
    """Return the same with values of depth 16, which not every backend supports."""
    return _sdpa(problem.queries, problem.keys, problem.values)


def _sdpa(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    q, k, v = (part[None, None] for part in (queries, keys, values))
    return scaled_dot_product_attention(q, k, v, scale=1.0)[0, 0, :, :16]


def by_flex(problem: Problem) -> Tensor:
    """Return the answer of compiled FlexAttention in float32."""
    q, k, v = (part[None, None] for part in (problem.queries, problem.keys, problem.values))
    answer: Tensor = _flex()(q, k, v, scale=1.0)[0, 0]
    return answer


@functools.cache
def _flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


PEERS: dict[str, tuple[Callable[[int], int], Callable[[Problem], Tensor]]] = {
    "unfold": (whole_vectors, by_matmul),
    "sdpa": (whole_vectors, by_sdpa),
    "sdpa, narrow values": (whole_vectors, by_narrow_sdpa),
    "flex_attention": (power_of_two, by_flex),
}
"""Name → (alignment of the depth, implementation)."""
