"""Kernels of Jacobian products of the patch posterior.

With final weights w over sources with patches φ and centres v, D the mean of v, and a reference r
of every pixel::

    J u    Σ w (v - D) ⟨φ - r, u⟩          r is constant for a patch, so that it drops out
    Jᵀg    Σ w ⟨g, v - D⟩ (φ - r)          summed over the patches that hold a pixel

in units of 1 / aσ². Programs are (tile of patches, chunk of displacements, chunk of images).
"""

from __future__ import annotations

import triton
import triton.language as tl

from els_kernels.triton.online import kernel
from els_kernels.triton.planes import (
    block_offsets,
    col_band,
    dot_left,
    dot_right,
    is_source,
    row_band,
    window_adjoint,
    window_sums,
)


@triton.jit
def products(
    p_left, p_keys, p_pixels, factor, COLS, QUERY_PLANE, KEY_PLANE,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return ``factor·Σ_c left·(φ - r)`` of a block of pixels, [BLOCK, BLOCK]."""
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    o_block = block_offsets(COLS, BLOCK)
    for i_channel in range(CHANNELS):
        gap = tl.load(p_keys + i_channel * KEY_PLANE + o_block)
        gap -= tl.load(p_pixels + i_channel * QUERY_PLANE + o_block)
        total += gap * (tl.load(p_left + i_channel * QUERY_PLANE + o_block) * factor)
    return total


@triton.jit
def product_sums(
    p_left, p_keys, p_pixels, p_level, rows_band, cols_band,
    COLS, QUERY_PLANE, KEY_PLANE, WINDOW, BLOCKS,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """Return ``⟨φ - r, left⟩`` of the patches of a tile, as ``window_sums``, scaled."""
    shrink, factor = tl.load(p_level + 3), tl.load(p_level + 5)
    sums = tl.zeros((BLOCK, BLOCK), tl.float32)
    if SINGLE:
        plane = products(
            p_left, p_keys, p_pixels, factor, COLS, QUERY_PLANE, KEY_PLANE, CHANNELS, BLOCK
        )
        sums = dot_left(rows_band, dot_right(plane, cols_band, sums) * shrink, sums)
    else:
        for i_row in range(BLOCKS):
            part = tl.zeros((BLOCK, BLOCK), tl.float32)
            for i_col in range(BLOCKS):
                first = i_row * BLOCK * COLS + i_col * BLOCK
                plane = products(
                    p_left + first, p_keys + first, p_pixels + first, factor,
                    COLS, QUERY_PLANE, KEY_PLANE, CHANNELS, BLOCK,
                )  # fmt: skip
                part = dot_right(plane, col_band(i_col * BLOCK, WINDOW, BLOCK), part)
            sums = dot_left(row_band(i_row * BLOCK, WINDOW, BLOCK), part * shrink, sums)
    return sums


@kernel
def jvp_kernel(
    p_query,
    p_keys,
    p_level,
    p_reference,
    p_centre,
    p_tangent,
    p_pixels,
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
    # The row of a patch's centre, and the first channel of the product.
    HALF,
    FIRST,
    CHANNELS: tl.constexpr,
    VALUES: tl.constexpr,
    BLOCK: tl.constexpr,
    SINGLE: tl.constexpr,
):
    """Write ``Σ w (v - D) ⟨φ - r, u⟩`` of the patches of a tile, scaled.

    Tensors:
        p_query, p_keys: as of ``normaliser_kernel``. p_level: [6] float32, with a factor of u.
        p_reference: as of ``statistics_kernel``.
        p_centre: [tiles, CHANNELS, BLOCK, BLOCK] float32: D at the patches' centres.
        p_tangent: u, p_pixels: r, as p_query.
        p_out: [chunks, tiles, VALUES, BLOCK, BLOCK] float32, written.
    """
    i_tile = tl.program_id(0)
    row0, col0 = i_tile // TILE_COLS * STEP, i_tile % TILE_COLS * STEP
    first_shift = tl.program_id(1) * CHUNK_SHIFTS
    last_shift = tl.minimum(first_shift + CHUNK_SHIFTS, SHIFTS)
    first_image = tl.program_id(2) * CHUNK_IMAGES
    last_image = tl.minimum(first_image + CHUNK_IMAGES, IMAGES)
    i_chunk = tl.cast(tl.program_id(2), tl.int64) * tl.num_programs(1) + tl.program_id(1)
    rows_band, cols_band = row_band(0, WINDOW, BLOCK), col_band(0, WINDOW, BLOCK)
    grow = tl.load(p_level + 4)
    p_reference += i_tile * (2 * BLOCK * BLOCK)
    p_centre += (i_tile * CHANNELS + FIRST) * (BLOCK * BLOCK)
    o_tile, first = block_offsets(BLOCK, BLOCK), row0 * COLS + col0

    # One sum for each channel, [BLOCK, BLOCK]; unused ones are removed by the compiler.
    sum0 = tl.zeros((BLOCK, BLOCK), tl.float32)
    sum1 = sum0
    for i_image in range(first_image, last_image):
        p_image = p_keys + tl.cast(i_image, tl.int64) * (CHANNELS * KEY_PLANE)
        for i_shift in range(first_shift, last_shift):
            # 0, which the compiler cannot know: what is loaded again needs no registers meanwhile.
            again = i_shift * ZERO
            key_row, key_col = row0 + i_shift // SHIFT_COLS, col0 + i_shift % SHIFT_COLS
            p_key = p_image + key_row * COLS + key_col
            sums = window_sums(
                p_query + row0 * COLS + col0 + again, p_key, p_level,
                rows_band, cols_band, COLS, QUERY_PLANE, KEY_PLANE, WINDOW, BLOCKS,
                CHANNELS, BLOCK, SINGLE,
            )  # fmt: skip
            here = is_source(
                key_row, key_col, SOURCE_ROWS, SOURCE_COLS, RING_ROWS, RING_COLS, BLOCK
            )
            logits = tl.where(here, sums * grow, float("-inf"))
            p_again = p_reference + again + o_tile
            weights = tl.exp2(logits - tl.load(p_again)) * tl.load(p_again + BLOCK * BLOCK)
            # A plane of weights below 2^-50 is skipped: at low noise nearly all are.
            if tl.max(tl.max(weights, axis=1), axis=0) > 8.9e-16:
                weights *= product_sums(
                    p_tangent + first + again, p_key + again, p_pixels + first + again, p_level,
                    rows_band, cols_band, COLS, QUERY_PLANE, KEY_PLANE, WINDOW, BLOCKS,
                    CHANNELS, BLOCK, SINGLE,
                )  # fmt: skip
                p_value = (
                    p_key + FIRST * KEY_PLANE + HALF * COLS + HALF + block_offsets(COLS, BLOCK)
                )
                p_mean = p_centre + again + o_tile
                sum0 += weights * (tl.load(p_value) - tl.load(p_mean))
                if VALUES > 1:
                    gap = tl.load(p_value + KEY_PLANE) - tl.load(p_mean + BLOCK * BLOCK)
                    sum1 += weights * gap

    p_sum = p_out + (i_chunk * tl.num_programs(0) + i_tile) * (VALUES * BLOCK * BLOCK) + o_tile
    tl.store(p_sum, sum0)
    if VALUES > 1:
        tl.store(p_sum + BLOCK * BLOCK, sum1)


@kernel
def vjp_kernel(
    p_query,
    p_keys,
    p_level,
    p_reference,
    p_centre,
    p_cotangent,
    p_pixels,
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
    # The row of a patch's centre, and the first channel of the product.
    HALF,
    FIRST,
    CHANNELS: tl.constexpr,
    VALUES: tl.constexpr,
    BLOCK: tl.constexpr,
    SINGLE: tl.constexpr,
):
    """Write ``Σ w ⟨g, v - D⟩ (φ - r)`` of a block of pixels, scaled.

    Programs: (block of pixels of a tile of patches, chunk of displacements, chunk of images).

    Tensors:
        p_query, p_keys: as of ``normaliser_kernel``. p_level: [6] float32, with a factor of g.
        p_reference, p_centre, p_pixels: as of ``jvp_kernel``.
        p_cotangent: [tiles, CHANNELS, BLOCK, BLOCK] float32: g at the patches' centres.
        p_out: [chunks, tiles·BLOCKS², VALUES, BLOCK, BLOCK] float32, written.
    """
    i_block = tl.program_id(0) % (BLOCKS * BLOCKS)
    i_tile = tl.program_id(0) // (BLOCKS * BLOCKS)
    pixel_row, pixel_col = i_block // BLOCKS * BLOCK, i_block % BLOCKS * BLOCK
    row0, col0 = i_tile // TILE_COLS * STEP, i_tile % TILE_COLS * STEP
    first_shift = tl.program_id(1) * CHUNK_SHIFTS
    last_shift = tl.minimum(first_shift + CHUNK_SHIFTS, SHIFTS)
    first_image = tl.program_id(2) * CHUNK_IMAGES
    last_image = tl.minimum(first_image + CHUNK_IMAGES, IMAGES)
    i_chunk = tl.cast(tl.program_id(2), tl.int64) * tl.num_programs(1) + tl.program_id(1)
    rows_band, cols_band = row_band(0, WINDOW, BLOCK), col_band(0, WINDOW, BLOCK)
    grow = tl.load(p_level + 4)
    p_reference += i_tile * (2 * BLOCK * BLOCK)
    shrink, factor = tl.load(p_level + 3), tl.load(p_level + 5)
    p_centre += i_tile * (CHANNELS * BLOCK * BLOCK)
    p_cotangent += i_tile * (CHANNELS * BLOCK * BLOCK)
    o_tile = block_offsets(BLOCK, BLOCK)
    p_pixels += FIRST * QUERY_PLANE + (row0 + pixel_row) * COLS + col0 + pixel_col

    # One sum for each channel, [BLOCK, BLOCK]; unused ones are removed by the compiler.
    sum0 = tl.zeros((BLOCK, BLOCK), tl.float32)
    sum1 = sum0
    for i_image in range(first_image, last_image):
        p_image = p_keys + tl.cast(i_image, tl.int64) * (CHANNELS * KEY_PLANE)
        for i_shift in range(first_shift, last_shift):
            # 0, which the compiler cannot know: what is loaded again needs no registers meanwhile.
            again = i_shift * ZERO
            key_row, key_col = row0 + i_shift // SHIFT_COLS, col0 + i_shift % SHIFT_COLS
            p_key = p_image + key_row * COLS + key_col
            sums = window_sums(
                p_query + row0 * COLS + col0 + again, p_key, p_level,
                rows_band, cols_band, COLS, QUERY_PLANE, KEY_PLANE, WINDOW, BLOCKS,
                CHANNELS, BLOCK, SINGLE,
            )  # fmt: skip
            here = is_source(
                key_row, key_col, SOURCE_ROWS, SOURCE_COLS, RING_ROWS, RING_COLS, BLOCK
            )
            logits = tl.where(here, sums * grow, float("-inf"))
            p_again = p_reference + again + o_tile
            weights = tl.exp2(logits - tl.load(p_again)) * tl.load(p_again + BLOCK * BLOCK)
            # A plane of weights below 2^-50 is skipped: at low noise nearly all are.
            if tl.max(tl.max(weights, axis=1), axis=0) > 8.9e-16:
                along = tl.zeros((BLOCK, BLOCK), tl.float32)
                for i_channel in range(CHANNELS):
                    p_value = p_key + i_channel * KEY_PLANE + HALF * COLS + HALF + again
                    o_plane = i_channel * BLOCK * BLOCK + again + o_tile
                    gap = tl.load(p_value + block_offsets(COLS, BLOCK))
                    gap -= tl.load(p_centre + o_plane)
                    along += gap * tl.load(p_cotangent + o_plane)
                weights *= along * factor
                # The adjoint of the sums over windows: bands of pixels by patches.
                reach = window_adjoint(
                    weights, rows_band, cols_band, pixel_row, pixel_col, shrink,
                    WINDOW, BLOCK, SINGLE,
                )  # fmt: skip
                p_value = p_key + FIRST * KEY_PLANE + pixel_row * COLS + pixel_col + again
                o_block = block_offsets(COLS, BLOCK)
                sum0 += reach * (tl.load(p_value + o_block) - tl.load(p_pixels + again + o_block))
                if VALUES > 1:
                    gap = tl.load(p_value + KEY_PLANE + o_block)
                    gap -= tl.load(p_pixels + QUERY_PLANE + again + o_block)
                    sum1 += reach * gap

    p_sum = p_out + (i_chunk * tl.num_programs(0) + tl.program_id(0)) * (VALUES * BLOCK * BLOCK)
    p_sum += o_tile
    tl.store(p_sum, sum0)
    if VALUES > 1:
        tl.store(p_sum + BLOCK * BLOCK, sum1)
