"""Planes of one displacement: distances, their sums over windows, and the adjoint of those sums.

For a displacement δ between the pixels of a query and those of a bank image, the logits of all
patches of a tile are sums over windows of one plane, and weighting patches by their taps is the
adjoint with other factors. Both are products with banded matrices, one for each axis::

    logits = -rows · G · cols            G(v) = ‖x(v) - a·φ(v + δ)‖² · log₂e / 2s²
    pixels = row_taps · W · col_taps     W: a number of each patch

so that the work of a pair grows with the side of a tile, not with the window. Distances are formed
from differences and are never negative: a sum of them has the relative precision of its terms, and
nothing cancels. Numbers are split into two terms of half precision, the lower 2^11 times as large.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def halves(values):
    """Return two float16 tensors, ``values ≈ high + low / 2048``; |values| ≤ 65504."""
    high = values.to(tl.float16)
    low = ((values - high.to(tl.float32)) * 2048.0).to(tl.float16)
    return high, low


@triton.jit
def between(left_high, left_low, values, right_high, right_low):
    """Return ``left · values · right`` with factors in two terms, |values| ≤ 2^14."""
    high, low = halves(values)
    lower = tl.dot(low, right_high, tl.dot(high, right_low))
    part = tl.dot(high, right_high, lower * (1.0 / 2048))
    high, low = halves(part)
    lower = tl.dot(left_high, low, tl.dot(left_low, high))
    return tl.dot(left_high, high, lower * (1.0 / 2048))


@triton.jit
def load_halves(p_high, BLOCK: tl.constexpr):
    """Return the two terms of a matrix [2, BLOCK, BLOCK] of float16."""
    o_block = block_offsets(BLOCK, BLOCK)
    return tl.load(p_high + o_block), tl.load(p_high + BLOCK * BLOCK + o_block)


@triton.jit
def dot_right(values, band, sums):
    """Return ``sums + values · band``, with a 0/1 matrix on the right."""
    high, low = halves(values)
    return tl.dot(high, band, sums + tl.dot(low, band) * (1.0 / 2048))


@triton.jit
def dot_left(band, values, sums):
    """Return ``sums + band · values``, with a 0/1 matrix on the left."""
    high, low = halves(values)
    return tl.dot(band, high, sums + tl.dot(band, low) * (1.0 / 2048))


@triton.jit
def row_band(first, WINDOW, BLOCK: tl.constexpr):
    """Return [patches, pixels] float16: 1 where the pixel ``first + j`` is in the patch at i."""
    i_patch, i_pixel = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :] + first
    return ((i_pixel >= i_patch) & (i_pixel < i_patch + WINDOW)).to(tl.float16)


@triton.jit
def col_band(first, WINDOW, BLOCK: tl.constexpr):
    """Return [pixels, patches] float16: 1 where the pixel ``first + i`` is in the patch at j."""
    i_pixel, i_patch = tl.arange(0, BLOCK)[:, None] + first, tl.arange(0, BLOCK)[None, :]
    return ((i_pixel >= i_patch) & (i_pixel < i_patch + WINDOW)).to(tl.float16)


@triton.jit
def block_offsets(COLS, BLOCK: tl.constexpr):
    """Return the offsets [BLOCK, BLOCK] of a block of pixels in an image of COLS columns."""
    return tl.arange(0, BLOCK)[:, None] * COLS + tl.arange(0, BLOCK)[None, :]


@triton.jit
def distances(
    p_query,
    p_keys,
    p_level,
    COLS,
    QUERY_PLANE,
    KEY_PLANE,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return ``Σ_c (root·(x - a·φ))²`` of a block of pixels, [BLOCK, BLOCK].

    a is the sum of two float32, and the first product is fused, so that the difference of near
    pixels is exact up to its own rounding.
    """
    high, low, root = tl.load(p_level), tl.load(p_level + 1), tl.load(p_level + 2)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for i_channel in tl.static_range(CHANNELS):
        query = tl.load(p_query + i_channel * QUERY_PLANE + block_offsets(COLS, BLOCK))
        key = tl.load(p_keys + i_channel * KEY_PLANE + block_offsets(COLS, BLOCK))
        gap = tl.fma(key, -low, tl.fma(key, -high, query)) * root
        total = tl.fma(gap, gap, total)
    return total


@triton.jit
def window_sums(
    p_query,
    p_keys,
    p_level,
    rows_band,
    cols_band,
    COLS,
    QUERY_PLANE,
    KEY_PLANE,
    WINDOW,
    BLOCKS,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    SINGLE: tl.constexpr,
):
    """Return the distances of the patches of a tile to what is displaced, [BLOCK, BLOCK] float32.

    In the unit of ``PlaneLevel``, which ``p_level`` has the factor of.

    Tensors:
        p_query, p_keys: first pixel of the tile, and what it meets.
        p_level: [5] float32, see ``PlaneLevel``.
        rows_band, cols_band: of a SINGLE block; those of BLOCKS² blocks are made here.
    """
    shrink = tl.load(p_level + 3)
    sums = tl.zeros((BLOCK, BLOCK), tl.float32)
    if SINGLE:
        plane = distances(
            p_query, p_keys, p_level, COLS, QUERY_PLANE, KEY_PLANE, CHANNELS, BLOCK
        )  # fmt: skip
        part = dot_right(plane, cols_band, sums)
        sums = dot_left(rows_band, part * shrink, sums)
    else:
        for i_row in range(BLOCKS):
            part = tl.zeros((BLOCK, BLOCK), tl.float32)
            for i_col in range(BLOCKS):
                first = i_row * BLOCK * COLS + i_col * BLOCK
                plane = distances(
                    p_query + first, p_keys + first, p_level,
                    COLS, QUERY_PLANE, KEY_PLANE, CHANNELS, BLOCK,
                )  # fmt: skip
                part = dot_right(plane, col_band(i_col * BLOCK, WINDOW, BLOCK), part)
            sums = dot_left(row_band(i_row * BLOCK, WINDOW, BLOCK), part * shrink, sums)
    return sums


@triton.jit
def window_adjoint(
    weights,
    rows_band,
    cols_band,
    pixel_row,
    pixel_col,
    shrink,
    WINDOW,
    BLOCK: tl.constexpr,
    SINGLE: tl.constexpr,
):
    """Return the sums over the patches of a tile at a block of its pixels: the adjoint of theirs.

    The band of patches by pixels is the same for rows and columns, up to the side that it is on.
    """
    nothing = tl.zeros((BLOCK, BLOCK), tl.float32)
    if SINGLE:
        part = dot_right(weights, rows_band, nothing) * shrink
        return dot_left(cols_band, part, nothing)
    else:
        part = dot_right(weights, row_band(pixel_col, WINDOW, BLOCK), nothing) * shrink
        return dot_left(col_band(pixel_row, WINDOW, BLOCK), part, nothing)


@triton.jit
def is_source(
    first_row, first_col, SOURCE_ROWS, SOURCE_COLS, RING_ROWS, RING_COLS, BLOCK: tl.constexpr
):
    """Return which patches of the keys from a place on are sources, [BLOCK, BLOCK].

    Rows and columns are on a ring, of which the first ones start a patch inside the image.
    """
    # The first place is never negative; a remainder of what is would differ on a GPU.
    row = (tl.maximum(first_row, 0) + tl.arange(0, BLOCK)) % RING_ROWS
    col = (tl.maximum(first_col, 0) + tl.arange(0, BLOCK)) % RING_COLS
    return (row < SOURCE_ROWS)[:, None] & (col < SOURCE_COLS)[None, :]
