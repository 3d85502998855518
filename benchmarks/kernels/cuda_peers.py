"""Other ways to the same answer on the torus, on unfolded patches: what the kernels are held to."""

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
    """Attention whose scale is folded into the queries and whose bias is one more column."""

    queries: Tensor
    """[HW, D] float32."""
    keys: Tensor
    """[N·HW, D] float32."""
    values: Tensor
    """[N·HW, 16] float32: the centre pixel, then zeros."""


def unfolded(x: Tensor, bank: Tensor, a: float, s: float, window: int) -> Problem:
    """Return the problem of one image [1, C, H, W] and a bank [N, C, H, W]."""
    keys = _unfold(bank, window)
    norm = keys.square().sum(1, keepdim=True)
    queries = _unfold(x, window) * (a / s**2)
    bias = queries.new_full((len(queries), 1), -(a * a) / (2 * s * s))
    values = bank.permute(0, 2, 3, 1).flatten(0, 2)
    depth = 1 << max(4, keys.shape[1].bit_length())
    return Problem(
        _widen(torch.cat([queries, bias], 1), depth),
        _widen(torch.cat([keys, norm], 1), depth),
        _widen(values, 16),
    )


def _unfold(images: Tensor, window: int) -> Tensor:
    r = window // 2
    wrapped = pad(images, (r, r, r, r), mode="circular")
    patches = wrapped.unfold(2, window, 1).unfold(3, window, 1)
    return patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2)


def _widen(rows: Tensor, width: int) -> Tensor:
    return pad(rows, (0, width - rows.shape[1])).contiguous()


def by_matmul(problem: Problem, tile: int = 1 << 17) -> Tensor:
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
    """Return the answer of torch's fused attention in float32."""
    q, k, v = (part[None, None] for part in (problem.queries, problem.keys, problem.values))
    return scaled_dot_product_attention(q, k, pad(v, (0, q.shape[-1] - v.shape[-1])), scale=1.0)[
        0, 0, :, : problem.values.shape[1]
    ]


def by_flex(problem: Problem) -> Tensor:
    """Return the answer of compiled FlexAttention in float32."""
    q, k, v = (part[None, None] for part in (problem.queries, problem.keys, problem.values))
    answer: Tensor = _flex()(q, k, v, scale=1.0)[0, 0]
    return answer


@functools.cache
def _flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


PEERS: dict[str, Callable[[Problem], Tensor]] = {
    "unfold": by_matmul,
    "sdpa": by_sdpa,
    "flex_attention": by_flex,
}
