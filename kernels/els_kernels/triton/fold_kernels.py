"""Kernels of the fold: normalisers of patches, then their weights filtered along displacements."""

from __future__ import annotations

import triton
import triton.language as tl

from els_kernels.triton.online import kernel
from els_kernels.triton.planes import (
    between,
    block_offsets,
    col_band,
    halves,
    is_source,
    row_band,
    window_sums,
)


@kernel
def normaliser_kernel(
    p_query,
    p_keys,
    p_level,
    p_peak,
    p_total,
    # Columns of the padded images, and their sizes.
    COLS,
    QUERY_PLANE,
    KEY_PLANE,
    # Patches of the query, patches that are sources, and the ring of displacements.
    PLACE_ROWS,
    PLACE_COLS,
    SOURCE_ROWS,
    SOURCE_COLS,
    RING_ROWS,
    RING_COLS,
    WINDOW,
    # Work: images × displacements; patches of a tile.
    IMAGES,
    CHUNK_IMAGES,
    SHIFTS,
    CHUNK_SHIFTS,
    SHIFT_COLS,
    STEP,
    TILE_COLS,
    BLOCKS,
    ZERO,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    SINGLE: tl.constexpr,
):
    """Write ``max ℓ`` and ``Σ 2^(ℓ - max)`` of every patch over a chunk of its sources.

    Programs: (tile of patches, chunk of displacements, chunk of images).

    Tensors:
        p_query: [CHANNELS, rows, COLS] float32: the crop, and zeros.
        p_keys: [IMAGES, CHANNELS, rows, COLS] float32: the ring and its continuation.
        p_level: [5] float32, see ``PlaneLevel``.
        p_peak: [chunks, PLACE_ROWS, PLACE_COLS] float32, written: -3e38 without sources.
        p_total: the same, written: 0 without sources.
    """
    row0 = tl.program_id(0) // TILE_COLS * STEP
    col0 = tl.program_id(0) % TILE_COLS * STEP
    first_shift = tl.program_id(1) * CHUNK_SHIFTS
    last_shift = tl.minimum(first_shift + CHUNK_SHIFTS, SHIFTS)
    first_image = tl.program_id(2) * CHUNK_IMAGES
    last_image = tl.minimum(first_image + CHUNK_IMAGES, IMAGES)
    rows_band, cols_band = row_band(0, WINDOW, BLOCK), col_band(0, WINDOW, BLOCK)
    grow = tl.load(p_level + 4)

    # [BLOCK, BLOCK]. The reference is finite and below any logit: no difference is NaN.
    peak = tl.full((BLOCK, BLOCK), -3e38, tl.float32)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for i_image in range(first_image, last_image):
        p_image = p_keys + tl.cast(i_image, tl.int64) * (CHANNELS * KEY_PLANE)
        for i_shift in range(first_shift, last_shift):
            # 0, which the compiler cannot know: what is loaded again needs no registers meanwhile.
            again = i_shift * ZERO
            key_row, key_col = row0 + i_shift // SHIFT_COLS, col0 + i_shift % SHIFT_COLS
            sums = window_sums(
                p_query + row0 * COLS + col0 + again, p_image + key_row * COLS + key_col, p_level,
                rows_band, cols_band, COLS, QUERY_PLANE, KEY_PLANE, WINDOW, BLOCKS,
                CHANNELS, BLOCK, SINGLE,
            )  # fmt: skip
            here = is_source(
                key_row, key_col, SOURCE_ROWS, SOURCE_COLS, RING_ROWS, RING_COLS, BLOCK
            )
            logits = tl.where(here, sums * grow, float("-inf"))
            # One exponential: the smaller of both relative to the larger, whose own is 1.
            above = logits - peak
            smaller = tl.exp2(-tl.abs(above))
            total = tl.where(above > 0, total * smaller + 1.0, total + smaller)
            peak = tl.maximum(peak, logits)

    o_block = tl.arange(0, BLOCK)
    o_row, o_col = row0 + o_block, col0 + o_block
    m_row, m_col = (o_block < STEP) & (o_row < PLACE_ROWS), (o_block < STEP) & (o_col < PLACE_COLS)
    m_place = m_row[:, None] & m_col[None, :]
    i_chunk = tl.cast(tl.program_id(2), tl.int64) * tl.num_programs(1) + tl.program_id(1)
    o_place = o_row[:, None] * PLACE_COLS + o_col[None, :]
    tl.store(p_peak + i_chunk * PLACE_ROWS * PLACE_COLS + o_place, peak, mask=m_place)
    tl.store(p_total + i_chunk * PLACE_ROWS * PLACE_COLS + o_place, total, mask=m_place)


@triton.jit
def row_taps(p_taps, first, row0, ROWS, STEP, WINDOW, BLOCK: tl.constexpr):
    """Return [pixels, patches] float32: the weight of the pixel ``first + i`` in the patch at j."""
    i_pixel, i_patch = tl.arange(0, BLOCK)[:, None] + first, tl.arange(0, BLOCK)[None, :]
    offset = i_pixel - i_patch
    inside = (offset >= 0) & (offset < WINDOW) & (i_patch < STEP) & (row0 + i_pixel < ROWS)
    return tl.load(p_taps + (row0 + i_pixel) * WINDOW + offset, mask=inside, other=0.0)


@triton.jit
def col_taps(p_taps, first, col0, COLS, STEP, WINDOW, BLOCK: tl.constexpr):
    """Return [patches, pixels] float32: the transpose of ``row_taps``, of columns."""
    i_pixel, i_patch = tl.arange(0, BLOCK)[None, :] + first, tl.arange(0, BLOCK)[:, None]
    offset = i_pixel - i_patch
    inside = (offset >= 0) & (offset < WINDOW) & (i_patch < STEP) & (col0 + i_pixel < COLS)
    return tl.load(p_taps + (col0 + i_pixel) * WINDOW + offset, mask=inside, other=0.0)


@kernel
def fold_kernel(
    p_query,
    p_keys,
    p_level,
    p_reference,
    p_row_taps,
    p_col_taps,
    p_out,
    # As of ``normaliser_kernel``.
    COLS,
    QUERY_PLANE,
    KEY_PLANE,
    PLACE_ROWS,
    PLACE_COLS,
    SOURCE_ROWS,
    SOURCE_COLS,
    RING_ROWS,
    RING_COLS,
    WINDOW,
    IMAGES,
    CHUNK_IMAGES,
    SHIFTS,
    CHUNK_SHIFTS,
    SHIFT_COLS,
    STEP,
    TILE_COLS,
    BLOCKS,
    ZERO,
    # Size of the taps, and the first channel of the mean.
    TAP_ROWS,
    TAP_COLS,
    FIRST,
    CHANNELS: tl.constexpr,
    VALUES: tl.constexpr,
    BLOCK: tl.constexpr,
    SINGLE: tl.constexpr,
):
    """Write ``Σ_δ A_δ(p)·φ(p + δ)`` of a block of pixels, A_δ the filtered weights of a tile.

    Programs: (block of pixels of a tile of patches, chunk of displacements, chunk of images).
    A tile's patches reach BLOCKS² blocks of pixels.

    Tensors:
        p_query, p_keys, p_level: as of ``normaliser_kernel``.
        p_reference: [tiles, 2, BLOCK, BLOCK] float32: the peak of each patch of a tile, and
            2^14 / Σ 2^(ℓ - peak), which makes weights of at most 2^14, near the top of the range of
            half precision; 3e38 and 0 where the tile has no patch.
        p_row_taps: [TAP_ROWS, WINDOW] float32. p_col_taps: [TAP_COLS, WINDOW] float32.
        p_out: [chunks, tiles·BLOCKS², VALUES, BLOCK, BLOCK] float32, written.
    """
    i_block = tl.program_id(0) % (BLOCKS * BLOCKS)
    i_tile = tl.program_id(0) // (BLOCKS * BLOCKS)
    row0, col0 = i_tile // TILE_COLS * STEP, i_tile % TILE_COLS * STEP
    pixel_row, pixel_col = i_block // BLOCKS * BLOCK, i_block % BLOCKS * BLOCK
    first_shift = tl.program_id(1) * CHUNK_SHIFTS
    last_shift = tl.minimum(first_shift + CHUNK_SHIFTS, SHIFTS)
    first_image = tl.program_id(2) * CHUNK_IMAGES
    last_image = tl.minimum(first_image + CHUNK_IMAGES, IMAGES)
    rows_band, cols_band = row_band(0, WINDOW, BLOCK), col_band(0, WINDOW, BLOCK)
    grow = tl.load(p_level + 4)

    p_reference += i_tile * (2 * BLOCK * BLOCK)
    row_high, row_low = halves(row_taps(p_row_taps, pixel_row, row0, TAP_ROWS, STEP, WINDOW, BLOCK))
    col_high, col_low = halves(col_taps(p_col_taps, pixel_col, col0, TAP_COLS, STEP, WINDOW, BLOCK))

    # One sum for each channel, [BLOCK, BLOCK]; unused ones are removed by the compiler.
    sum0 = tl.zeros((BLOCK, BLOCK), tl.float32)
    sum1, sum2, sum3 = sum0, sum0, sum0
    for i_image in range(first_image, last_image):
        p_image = p_keys + tl.cast(i_image, tl.int64) * (CHANNELS * KEY_PLANE)
        for i_shift in range(first_shift, last_shift):
            # 0, which the compiler cannot know: what is loaded again needs no registers meanwhile.
            again = i_shift * ZERO
            key_row, key_col = row0 + i_shift // SHIFT_COLS, col0 + i_shift % SHIFT_COLS
            sums = window_sums(
                p_query + row0 * COLS + col0 + again, p_image + key_row * COLS + key_col, p_level,
                rows_band, cols_band, COLS, QUERY_PLANE, KEY_PLANE, WINDOW, BLOCKS,
                CHANNELS, BLOCK, SINGLE,
            )  # fmt: skip
            here = is_source(
                key_row, key_col, SOURCE_ROWS, SOURCE_COLS, RING_ROWS, RING_COLS, BLOCK
            )
            p_again = p_reference + again + block_offsets(BLOCK, BLOCK)
            logits = tl.where(here, sums * grow, float("-inf"))
            weights = tl.exp2(logits - tl.load(p_again)) * tl.load(p_again + BLOCK * BLOCK)
            # A plane of weights below 2^-50 is skipped: at low noise nearly all are.
            if tl.max(tl.max(weights, axis=1), axis=0) > 1.5e-11:
                reach = between(row_high, row_low, weights, col_high, col_low)
                p_value = p_image + (key_row + pixel_row) * COLS + key_col + pixel_col
                p_value += FIRST * KEY_PLANE + again
                sum0 += reach * tl.load(p_value + block_offsets(COLS, BLOCK))
                if VALUES > 1:
                    p_value += KEY_PLANE
                    sum1 += reach * tl.load(p_value + block_offsets(COLS, BLOCK))
                if VALUES > 2:
                    p_value += KEY_PLANE
                    sum2 += reach * tl.load(p_value + block_offsets(COLS, BLOCK))
                if VALUES > 3:
                    p_value += KEY_PLANE
                    sum3 += reach * tl.load(p_value + block_offsets(COLS, BLOCK))

    i_chunk = tl.cast(tl.program_id(2), tl.int64) * tl.num_programs(1) + tl.program_id(1)
    p_sum = p_out + (i_chunk * tl.num_programs(0) + tl.program_id(0)) * (VALUES * BLOCK * BLOCK)
    p_sum += block_offsets(BLOCK, BLOCK)
    tl.store(p_sum, sum0 * (1.0 / 16384))
    if VALUES > 1:
        tl.store(p_sum + BLOCK * BLOCK, sum1 * (1.0 / 16384))
    if VALUES > 2:
        tl.store(p_sum + 2 * BLOCK * BLOCK, sum2 * (1.0 / 16384))
    if VALUES > 3:
        tl.store(p_sum + 3 * BLOCK * BLOCK, sum3 * (1.0 / 16384))
