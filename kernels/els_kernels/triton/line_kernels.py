"""Kernels of the statistics of a fold: moments and largest of the weights of every pixel's sources.

A source of a pixel p is a pixel of the bank, y = p + δ, and its weight joins all patches that reach
p, of whatever border: π_p(y) = Σ_q g(p - q)·w_q(y - p + q). Entropy and ranking are not linear in
it, so a program holds every patch that reaches its pixels; patches of a query and of the bank are
on *lines* (``line_plan``), on which every pair of p and y is met once. Programs are (tile of
pixels, chunk of displacements, chunk of images).
"""

from __future__ import annotations

import triton
import triton.language as tl

from els_kernels.triton.online import kernel
from els_kernels.triton.planes import (
    between,
    block_offsets,
    col_band,
    load_halves,
    row_band,
    window_sums,
)
from els_kernels.triton.ranking_kernel import insert


@triton.jit
def block_weights(
    p_query, p_keys, p_level, p_reference, p_row_halves, p_col_halves,
    p_query_rows, p_query_cols, p_key_rows, p_key_cols, rows_band, cols_band,
    COLS, QUERY_PLANE, KEY_PLANE, WINDOW, BLOCKS,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """Return the share of a block of patches in the weights of a tile's pixels, [BLOCK, BLOCK].

    Pointers are those of its first patch, and of the taps between both.
    """
    o_block = tl.arange(0, BLOCK)
    sums = window_sums(
        p_query, p_keys, p_level, rows_band, cols_band,
        COLS, QUERY_PLANE, KEY_PLANE, WINDOW, BLOCKS, CHANNELS, BLOCK, SINGLE,
    )  # fmt: skip
    # Patches attend to those of their own class.
    rows = tl.load(p_query_rows + o_block) == tl.load(p_key_rows + o_block)
    cols = tl.load(p_query_cols + o_block) == tl.load(p_key_cols + o_block)
    here = rows[:, None] & cols[None, :]
    logits = tl.where(here, sums * tl.load(p_level + 4), float("-inf"))
    p_patch = p_reference + block_offsets(COLS, BLOCK)
    weights = tl.exp2(logits - tl.load(p_patch)) * tl.load(p_patch + QUERY_PLANE)
    reach = tl.zeros((BLOCK, BLOCK), tl.float32)
    # A plane of weights below 2^-50 is skipped: at low noise nearly all are.
    if tl.max(tl.max(weights, axis=1), axis=0) > 1.5e-11:
        row_high, row_low = load_halves(p_row_halves, BLOCK)
        col_high, col_low = load_halves(p_col_halves, BLOCK)
        reach = between(row_high, row_low, weights, col_high, col_low)
    return reach


@triton.jit
def pixel_weights(
    p_query, p_keys, p_level, p_reference, p_row_halves, p_col_halves,
    p_query_rows, p_query_cols, p_key_rows, p_key_cols, rows_band, cols_band,
    COLS, QUERY_PLANE, KEY_PLANE, WINDOW, BLOCKS,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """Return the weights 2^14·π of a tile's pixels at one displacement, [BLOCK, BLOCK]; or 0.

    Pointers are those of the tile's first patch, and of its taps.
    """
    if SINGLE:
        return block_weights(
            p_query, p_keys, p_level, p_reference, p_row_halves, p_col_halves,
            p_query_rows, p_query_cols, p_key_rows, p_key_cols, rows_band, cols_band,
            COLS, QUERY_PLANE, KEY_PLANE, WINDOW, BLOCKS, CHANNELS, BLOCK, SINGLE,
        )  # fmt: skip
    else:
        reach = tl.zeros((BLOCK, BLOCK), tl.float32)
        for i_block in range(BLOCKS * BLOCKS):
            i_down, i_right = i_block // BLOCKS, i_block % BLOCKS
            down, right = i_down * BLOCK, i_right * BLOCK
            first = down * COLS + right
            reach += block_weights(
                p_query + first, p_keys + first, p_level, p_reference + first,
                p_row_halves + i_down * (2 * BLOCK * BLOCK),
                p_col_halves + i_right * (2 * BLOCK * BLOCK), p_query_rows + down,
                p_query_cols + right, p_key_rows + down, p_key_cols + right, rows_band, cols_band,
                COLS, QUERY_PLANE, KEY_PLANE, WINDOW, BLOCKS, CHANNELS, BLOCK, SINGLE,
            )  # fmt: skip
        return reach


@kernel
def line_statistics_kernel(
    p_query,
    p_keys,
    p_level,
    p_reference,
    p_row_halves,
    p_col_halves,
    p_query_rows,
    p_query_cols,
    p_key_rows,
    p_key_cols,
    p_centre,
    p_out,
    p_shares,
    # Columns of the padded images, and their sizes.
    COLS,
    QUERY_PLANE,
    KEY_PLANE,
    WINDOW,
    # Work: images × displacements; pixels of a tile.
    IMAGES,
    CHUNK_IMAGES,
    SHIFTS,
    CHUNK_SHIFTS,
    SHIFT_COLS,
    STEP,
    TILE_COLS,
    BLOCKS,
    ZERO,
    # Channel of e.
    CHANNEL,
    CHANNELS: tl.constexpr,
    MOMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
    SINGLE: tl.constexpr,
):
    """Write Σ π, -Σ π log₂ π and max π of every pixel; or Σ π·e and Σ π·e², e = v - r.

    Tensors:
        p_query: [CHANNELS, rows, COLS] float32: the line of the query, zeros around.
        p_keys: [IMAGES, CHANNELS, rows, COLS] float32: the ring and its continuation.
        p_level: [5] float32, see ``PlaneLevel``.
        p_reference: [2, rows, COLS] float32: the peak of each patch, and 2^14 / Σ 2^(ℓ - peak);
            3e38 and 0 where there is no patch.
        p_row_halves: [rows of tiles, BLOCKS, 2, BLOCK, BLOCK] float16: taps, pixels by patches of a
            block, in two terms; 0 of pixels that are not answered. p_col_halves: patches by pixels.
        p_query_rows, p_query_cols, p_key_rows, p_key_cols: int32, classes of patches.
        p_centre: [tiles, BLOCK, BLOCK] float32: r of the pixels, if MOMENTS.
        p_out: [chunks, tiles, 3, BLOCK, BLOCK] float32, written; two numbers of MOMENTS.
        p_shares: [IMAGES, chunks of displacements, tiles] float32, written unless MOMENTS.
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
    i_program = i_chunk * tl.num_programs(0) + i_tile
    o_tile, first = block_offsets(BLOCK, BLOCK), row0 * COLS + col0
    p_centre += i_tile * (BLOCK * BLOCK)

    # [BLOCK, BLOCK] each.
    own = tl.zeros((BLOCK, BLOCK), tl.float32)
    sum0, sum1, most = own, own, own
    for i_image in range(first_image, last_image):
        p_image = p_keys + tl.cast(i_image, tl.int64) * (CHANNELS * KEY_PLANE)
        for i_shift in range(first_shift, last_shift):
            # 0, which the compiler cannot know: what is loaded again needs no registers meanwhile.
            again = i_shift * ZERO
            key_row, key_col = row0 + i_shift // SHIFT_COLS, col0 + i_shift % SHIFT_COLS
            p_key = p_image + key_row * COLS + key_col
            reach = pixel_weights(
                p_query + first + again, p_key, p_level, p_reference + first + again,
                p_row_halves + again, p_col_halves + again,
                p_query_rows + row0 + again, p_query_cols + col0 + again,
                p_key_rows + key_row, p_key_cols + key_col, rows_band, cols_band,
                COLS, QUERY_PLANE, KEY_PLANE, WINDOW, BLOCKS, CHANNELS, BLOCK, SINGLE,
            )  # fmt: skip
            if MOMENTS:
                p_value = p_key + CHANNEL * KEY_PLANE + (WINDOW - 1) * (COLS + 1)
                gap = tl.load(p_value + block_offsets(COLS, BLOCK))
                gap -= tl.load(p_centre + again + o_tile)
                sum0 += reach * gap
                sum1 += reach * gap * gap
            else:
                own += reach
                # Relative to 2^14; of 0 it is 0.
                sum1 += reach * (14.0 - tl.log2(tl.maximum(reach, 1e-30)))
                most = tl.maximum(most, reach)
        if not MOMENTS:
            sum0 += own
            i_share = i_image * tl.num_programs(1) + tl.program_id(1)
            total = tl.sum(tl.sum(own, axis=1), axis=0)
            tl.store(p_shares + i_share * tl.num_programs(0) + i_tile, total * (1.0 / 16384))
            own = tl.zeros((BLOCK, BLOCK), tl.float32)

    p_sum = p_out + i_program * ((2 if MOMENTS else 3) * BLOCK * BLOCK) + o_tile
    tl.store(p_sum, sum0 * (1.0 / 16384))
    tl.store(p_sum + BLOCK * BLOCK, sum1 * (1.0 / 16384))
    if not MOMENTS:
        tl.store(p_sum + 2 * BLOCK * BLOCK, most)


@kernel
def line_ranking_kernel(
    p_query,
    p_keys,
    p_level,
    p_reference,
    p_row_halves,
    p_col_halves,
    p_query_rows,
    p_query_cols,
    p_key_rows,
    p_key_cols,
    p_least,
    p_weights,
    p_ids,
    # As of ``line_statistics_kernel``.
    COLS,
    QUERY_PLANE,
    KEY_PLANE,
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
    # Sources that are listed.
    TOP,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    SINGLE: tl.constexpr,
):
    """Write the TOP largest 2^14·π of each pixel over a chunk of its sources, and of which.

    Tensors:
        p_query … p_key_cols: as of ``line_statistics_kernel``.
        p_least: [tiles, BLOCK, BLOCK] float32, > 0: weight from which a source may be listed.
        p_weights: [chunks, tiles, TOP, BLOCK, BLOCK] float32, 0 at first.
        p_ids: the same, int32: image·SHIFTS + displacement.
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
    i_program = i_chunk * tl.num_programs(0) + i_tile
    first = row0 * COLS + col0
    p_weights += i_program * TOP * (BLOCK * BLOCK)
    p_ids += i_program * TOP * (BLOCK * BLOCK)
    p_least += i_tile * (BLOCK * BLOCK) + block_offsets(BLOCK, BLOCK)

    for i_image in range(first_image, last_image):
        p_image = p_keys + tl.cast(i_image, tl.int64) * (CHANNELS * KEY_PLANE)
        for i_shift in range(first_shift, last_shift):
            # 0, which the compiler cannot know: what is loaded again needs no registers meanwhile.
            again = i_shift * ZERO
            key_row, key_col = row0 + i_shift // SHIFT_COLS, col0 + i_shift % SHIFT_COLS
            reach = pixel_weights(
                p_query + first + again, p_image + key_row * COLS + key_col, p_level,
                p_reference + first + again, p_row_halves + again, p_col_halves + again,
                p_query_rows + row0 + again, p_query_cols + col0 + again,
                p_key_rows + key_row, p_key_cols + key_col, rows_band, cols_band,
                COLS, QUERY_PLANE, KEY_PLANE, WINDOW, BLOCKS, CHANNELS, BLOCK, SINGLE,
            )  # fmt: skip
            near = tl.where(reach >= tl.load(p_least + again), reach, 0.0)
            if tl.max(tl.max(near, axis=1), axis=0) > 0:
                insert(p_weights, p_ids, near, i_image * SHIFTS + i_shift, TOP, BLOCK)
