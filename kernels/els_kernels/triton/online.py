"""Online softmax state of every kernel, and its exact merge.

A state is ``(peak, sums)``: a reference for base-2 logits and ``Σ 2^(logit - peak)·value``; the
last value is 1, so that the last sum is the weight. The reference is the largest logit so far minus
15, which puts the largest weight, 2^15, at the top of the half-precision range. A weight is split
into two half-precision terms for the matrix units; weights below 2^-40 of the largest are lost.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl


def kernel(function: Callable[..., None]) -> Any:
    """Return a kernel without specialisation on sizes: one binary for each set of constants.

    Its parameters are tensors ``p_``, then sizes in capitals, then annotated constants.
    """
    return triton.jit(function, do_not_specialize=sizes_of(function))


def sizes_of(function: Callable[..., None]) -> list[str]:
    """Return the sizes among the parameters of a kernel."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.name.isupper() and p.annotation is p.empty]


@triton.jit
def absorb(logits, values, peak, sums):
    """Return the state (peak [M], sums [M, V]) after one tile of logits [M, N], values [N, V]."""
    largest = tl.max(logits, axis=1)
    below = largest - 15.0
    # A logit so large that rounding loses the 15 is its own reference.
    below = tl.where(largest - below > 15.0, largest, below)
    # The reference is assigned, not accumulated: from -inf, old sums are scaled by exactly 0.
    top = tl.maximum(peak, below)
    weights = tl.exp2(logits - top[:, None])
    high = weights.to(tl.float16)
    low = (weights - high.to(tl.float32)).to(tl.float16)
    sums = sums * tl.exp2(peak - top)[:, None]
    sums = tl.dot(low, values, sums)
    sums = tl.dot(high, values, sums)
    return top, sums


@kernel
def merge_kernel(
    p_peak,
    p_sums,
    p_top,
    p_total,
    SLOTS,
    SPAN,
    PLACES,
    VALUES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Merge every SPAN partial states in a row by log-sum-exp, in the order of their slots.

    ``top = max_i peak_i``, ``total = Σ_i 2^(peak_i - top)·sums_i``. An empty slot has
    peak -inf and sums 0; of empty slots alone top is -3e38.
    Programs: (block of places, batch, run of slots).

    Tensors:
        p_peak: [B, SLOTS, PLACES] float32.
        p_sums: [B, SLOTS, PLACES, VALUES] float32.
        p_top: [B, runs, PLACES] float32, written.
        p_total: [B, runs, PLACES, VALUES] float32, written.
    """
    i_batch = tl.cast(tl.program_id(1), tl.int64)
    i_run = tl.program_id(2)
    o_place = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_value = tl.arange(0, BLOCK_V)
    m_place, m_value = o_place < PLACES, o_value < VALUES

    # [BLOCK_M], [BLOCK_M, BLOCK_V]. Finite and below any logit: no difference is NaN.
    top = tl.full((BLOCK_M,), -3e38, tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    for i_slot in range(i_run * SPAN, tl.minimum(i_run * SPAN + SPAN, SLOTS)):
        o_state = (i_batch * SLOTS + i_slot) * PLACES + o_place
        peak = tl.load(p_peak + o_state, mask=m_place, other=float("-inf"))
        sums = tl.load(
            p_sums + o_state[:, None] * VALUES + o_value[None, :],
            mask=m_place[:, None] & m_value[None, :],
            other=0.0,
        )
        higher = tl.maximum(top, peak)
        total = total * tl.exp2(top - higher)[:, None] + sums * tl.exp2(peak - higher)[:, None]
        top = higher

    o_out = (i_batch * tl.num_programs(2) + i_run) * PLACES + o_place
    tl.store(p_top + o_out, top, mask=m_place)
    tl.store(
        p_total + o_out[:, None] * VALUES + o_value[None, :],
        total,
        mask=m_place[:, None] & m_value[None, :],
    )
