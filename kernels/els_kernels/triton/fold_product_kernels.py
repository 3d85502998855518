"""Kernels of Jacobian products of a fold.

With final weights w over patches y, a direction u or g, a reference r of every pixel, and the
scalars c of pairs of patches::

    J u    c = ⟨u, y - r⟩                          fold of Σ w (c - mean c)·y
    Jᵀg    c = Σ_p g(p - q)·⟨g(p), y(p - q) - r⟩   Σ w (c - mean c)·y, summed over patches

in units of 1 / aσ². Both are filtered twice: windows and taps change places. r drops out. Programs
are (tile of patches, or block of its pixels; chunk of displacements; chunk of images).
"""

from __future__ import annotations

import triton
import triton.language as tl

from els_kernels.triton.online import kernel
from els_kernels.triton.planes import (
    between,
    block_offsets,
    col_band,
    is_source,
    load_halves,
    row_band,
    window_adjoint,
    window_sums,
)
from els_kernels.triton.product_kernels import product_sums, products


@triton.jit
def tap_sums(
    p_left, p_keys, p_pixels, p_level, p_row_halves, p_col_halves,
    COLS, QUERY_PLANE, KEY_PLANE, BLOCKS, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return ``Σ_p g(p - q)·⟨left(p), (φ - r)(p)⟩`` of the patches of a tile, scaled."""
    factor = tl.load(p_level + 5)
    sums = tl.zeros((BLOCK, BLOCK), tl.float32)
    for i_block in range(BLOCKS * BLOCKS):
        i_down, i_right = i_block // BLOCKS, i_block % BLOCKS
        first = i_down * BLOCK * COLS + i_right * BLOCK
        plane = products(
            p_left + first, p_keys + first, p_pixels + first, factor,
            COLS, QUERY_PLANE, KEY_PLANE, CHANNELS, BLOCK,
        )  # fmt: skip
        row_high, row_low = load_halves(p_row_halves + i_down * (2 * BLOCK * BLOCK), BLOCK)
        col_high, col_low = load_halves(p_col_halves + i_right * (2 * BLOCK * BLOCK), BLOCK)
        sums += between(row_high, row_low, plane, col_high, col_low)
    return sums


@triton.jit
def scalars(
    p_left, p_keys, p_pixels, p_level, p_row_halves, p_col_halves, rows_band, cols_band,
    COLS, QUERY_PLANE, KEY_PLANE, WINDOW, BLOCKS,
    CHANNELS: tl.constexpr, VJP: tl.constexpr, BLOCK: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """Return c of the patches of a tile, [BLOCK, BLOCK], scaled."""
    if VJP:
        return tap_sums(
            p_left, p_keys, p_pixels, p_level, p_row_halves, p_col_halves,
            COLS, QUERY_PLANE, KEY_PLANE, BLOCKS, CHANNELS, BLOCK,
        )  # fmt: skip
    else:
        return product_sums(
            p_left, p_keys, p_pixels, p_level, rows_band, cols_band,
            COLS, QUERY_PLANE, KEY_PLANE, WINDOW, BLOCKS, CHANNELS, BLOCK, SINGLE,
        )  # fmt: skip


@kernel
def fold_scalar_kernel(
    p_query,
    p_keys,
    p_level,
    p_reference,
    p_row_halves,
    p_col_halves,
    p_centre,
    p_direction,
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
    CHANNELS: tl.constexpr,
    VJP: tl.constexpr,
    BLOCK: tl.constexpr,
    SINGLE: tl.constexpr,
):
    """Write ``Σ w`` and ``Σ w (c - centre)`` of the patches of a tile; c is scaled.

    Tensors:
        p_query, p_keys: as of ``normaliser_kernel``.
        p_row_halves: [rows of tiles, BLOCKS, 2, BLOCK, BLOCK] float16: taps, pixels of a block by
            patches, in two terms; patches by pixels if VJP. p_col_halves: the transpose of the
            same, of columns.
        p_level: [7] float32: ``PlaneLevel``, a factor of the direction, and one of c.
        p_reference: [tiles, 2, BLOCK, BLOCK] float32: peak and 1 / Σ 2^(ℓ - peak) of each patch.
        p_centre: [tiles, 2, BLOCK, BLOCK] float32: the centre of each patch, in two terms.
        p_direction: u or g, p_pixels: r, as p_query.
        p_out: [chunks, tiles, 2, BLOCK, BLOCK] float32, written.
    """
    i_tile = tl.program_id(0)
    i_row, i_col = i_tile // TILE_COLS, i_tile % TILE_COLS
    row0, col0 = i_row * STEP, i_col * STEP
    p_row_halves += i_row * BLOCKS * (2 * BLOCK * BLOCK)
    p_col_halves += i_col * BLOCKS * (2 * BLOCK * BLOCK)
    first_shift = tl.program_id(1) * CHUNK_SHIFTS
    last_shift = tl.minimum(first_shift + CHUNK_SHIFTS, SHIFTS)
    first_image = tl.program_id(2) * CHUNK_IMAGES
    last_image = tl.minimum(first_image + CHUNK_IMAGES, IMAGES)
    i_chunk = tl.cast(tl.program_id(2), tl.int64) * tl.num_programs(1) + tl.program_id(1)
    rows_band, cols_band = row_band(0, WINDOW, BLOCK), col_band(0, WINDOW, BLOCK)
    grow = tl.load(p_level + 4)
    p_reference += i_tile * (2 * BLOCK * BLOCK)
    p_centre += i_tile * (2 * BLOCK * BLOCK)
    o_tile, first = block_offsets(BLOCK, BLOCK), row0 * COLS + col0

    mass = tl.zeros((BLOCK, BLOCK), tl.float32)
    total = mass
    for i_image in range(first_image, last_image):
        p_image = p_keys + tl.cast(i_image, tl.int64) * (CHANNELS * KEY_PLANE)
        for i_shift in range(first_shift, last_shift):
            # 0, which the compiler cannot know: what is loaded again needs no registers meanwhile.
            again = i_shift * ZERO
            key_row, key_col = row0 + i_shift // SHIFT_COLS, col0 + i_shift % SHIFT_COLS
            p_key = p_image + key_row * COLS + key_col
            sums = window_sums(
                p_query + first + again, p_key, p_level,
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
                along = scalars(
                    p_direction + first + again, p_key + again, p_pixels + first + again, p_level,
                    p_row_halves + again, p_col_halves + again, rows_band, cols_band,
                    COLS, QUERY_PLANE, KEY_PLANE, WINDOW, BLOCKS, CHANNELS, VJP, BLOCK, SINGLE,
                )  # fmt: skip
                p_mean = p_centre + again + o_tile
                along = (along - tl.load(p_mean)) - tl.load(p_mean + BLOCK * BLOCK)
                mass += weights
                total += weights * along

    p_sum = p_out + (i_chunk * tl.num_programs(0) + i_tile) * (2 * BLOCK * BLOCK) + o_tile
    tl.store(p_sum, mass)
    tl.store(p_sum + BLOCK * BLOCK, total)


@kernel
def fold_product_kernel(
    p_query,
    p_keys,
    p_level,
    p_reference,
    p_row_halves,
    p_col_halves,
    p_centre,
    p_direction,
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
    # Channel of the product.
    CHANNEL,
    CHANNELS: tl.constexpr,
    VJP: tl.constexpr,
    BLOCK: tl.constexpr,
    SINGLE: tl.constexpr,
):
    """Write one channel of the product of a block of pixels, scaled.

    Programs: (block of pixels of a tile of patches, chunk of displacements, chunk of images).

    Tensors:
        p_query … p_pixels: as of ``fold_scalar_kernel``; p_centre: the mean of c.
        p_out: [chunks, tiles·BLOCKS², BLOCK, BLOCK] float32, written.
    """
    i_block = tl.program_id(0) % (BLOCKS * BLOCKS)
    i_tile = tl.program_id(0) // (BLOCKS * BLOCKS)
    pixel_row, pixel_col = i_block // BLOCKS * BLOCK, i_block % BLOCKS * BLOCK
    i_row, i_col = i_tile // TILE_COLS, i_tile % TILE_COLS
    row0, col0 = i_row * STEP, i_col * STEP
    p_row_halves += i_row * BLOCKS * (2 * BLOCK * BLOCK)
    p_col_halves += i_col * BLOCKS * (2 * BLOCK * BLOCK)
    first_shift = tl.program_id(1) * CHUNK_SHIFTS
    last_shift = tl.minimum(first_shift + CHUNK_SHIFTS, SHIFTS)
    first_image = tl.program_id(2) * CHUNK_IMAGES
    last_image = tl.minimum(first_image + CHUNK_IMAGES, IMAGES)
    i_chunk = tl.cast(tl.program_id(2), tl.int64) * tl.num_programs(1) + tl.program_id(1)
    rows_band, cols_band = row_band(0, WINDOW, BLOCK), col_band(0, WINDOW, BLOCK)
    grow = tl.load(p_level + 4)
    shrink, squeeze = tl.load(p_level + 3), tl.load(p_level + 6)
    p_reference += i_tile * (2 * BLOCK * BLOCK)
    p_centre += i_tile * (2 * BLOCK * BLOCK)
    o_tile, first = block_offsets(BLOCK, BLOCK), row0 * COLS + col0
    o_block, block = block_offsets(COLS, BLOCK), pixel_row * COLS + pixel_col
    p_value = p_pixels + CHANNEL * QUERY_PLANE + first + block
    p_row_block = p_row_halves + pixel_row * (2 * BLOCK)
    p_col_block = p_col_halves + pixel_col * (2 * BLOCK)

    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for i_image in range(first_image, last_image):
        p_image = p_keys + tl.cast(i_image, tl.int64) * (CHANNELS * KEY_PLANE)
        for i_shift in range(first_shift, last_shift):
            # 0, which the compiler cannot know: what is loaded again needs no registers meanwhile.
            again = i_shift * ZERO
            key_row, key_col = row0 + i_shift // SHIFT_COLS, col0 + i_shift % SHIFT_COLS
            p_key = p_image + key_row * COLS + key_col
            sums = window_sums(
                p_query + first + again, p_key, p_level,
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
                along = scalars(
                    p_direction + first + again, p_key + again, p_pixels + first + again, p_level,
                    p_row_halves + again, p_col_halves + again, rows_band, cols_band,
                    COLS, QUERY_PLANE, KEY_PLANE, WINDOW, BLOCKS, CHANNELS, VJP, BLOCK, SINGLE,
                )  # fmt: skip
                p_mean = p_centre + again + o_tile
                along = (along - tl.load(p_mean)) - tl.load(p_mean + BLOCK * BLOCK)
                weights *= along * squeeze
                if VJP:
                    reach = window_adjoint(
                        weights, rows_band, cols_band, pixel_row, pixel_col, shrink,
                        WINDOW, BLOCK, SINGLE,
                    )  # fmt: skip
                else:
                    row_high, row_low = load_halves(p_row_block + again, BLOCK)
                    col_high, col_low = load_halves(p_col_block + again, BLOCK)
                    reach = between(row_high, row_low, weights, col_high, col_low)
                p_pixel = p_key + CHANNEL * KEY_PLANE + block + again
                gap = tl.load(p_pixel + o_block) - tl.load(p_value + again + o_block)
                total += reach * gap

    i_program = i_chunk * tl.num_programs(0) + tl.program_id(0)
    tl.store(p_out + i_program * (BLOCK * BLOCK) + o_tile, total)
