"""Kernel of posterior statistics: moments of final weights.

With weights w over sources with centres v, and a reference r near enough to the mean that little
cancels, the sums are Σ w, Σ w·log₂ w, Σ w·e and Σ w·e² with e = v - r. Programs are (tile of
patches, chunk of displacements, chunk of images), as of the normaliser.
"""

from __future__ import annotations

import triton.language as tl

from els_kernels.triton.online import kernel
from els_kernels.triton.planes import (
    block_offsets,
    col_band,
    is_source,
    row_band,
    window_sums,
)


@kernel
def statistics_kernel(
    p_query,
    p_keys,
    p_level,
    p_reference,
    p_centre,
    p_out,
    p_shares,
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
    # The row of a patch's centre, and the channel.
    HALF,
    CHANNEL,
    CHANNELS: tl.constexpr,
    MOMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
    SINGLE: tl.constexpr,
):
    """Write Σ w and -Σ w·(ℓ - peak) of each patch, and Σ w of each image; or Σ w·e and Σ w·e².

    MOMENTS chooses the latter, for one channel: together they need more registers than there are.

    Tensors:
        p_query, p_keys, p_level: as of ``normaliser_kernel``.
        p_reference: [tiles, 2, BLOCK, BLOCK] float32: the peak of each patch of a tile, and
            1 / Σ 2^(ℓ - peak); 3e38 and 0 where the tile has no patch.
        p_centre: [tiles, BLOCK, BLOCK] float32: r of the channel at the patches' centres.
        p_out: [chunks, tiles, 2, BLOCK, BLOCK] float32, written.
        p_shares: [IMAGES, chunks of displacements, tiles] float32, written unless MOMENTS.
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
    i_program = i_chunk * tl.num_programs(0) + i_tile
    p_centre += i_tile * (BLOCK * BLOCK)
    o_tile = block_offsets(BLOCK, BLOCK)

    # [BLOCK, BLOCK] each: Σ w of one image and of all, -Σ w·(ℓ - peak); or Σ w·e, Σ w·e².
    own = tl.zeros((BLOCK, BLOCK), tl.float32)
    first, second = own, own
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
            # Bounded, so that a weight of 0 times its logarithm is 0.
            below = tl.maximum(logits - tl.load(p_again), -10000.0)
            weights = tl.exp2(below) * tl.load(p_again + BLOCK * BLOCK)
            if MOMENTS:
                p_value = p_key + CHANNEL * KEY_PLANE + HALF * COLS + HALF + again
                gap = tl.load(p_value + block_offsets(COLS, BLOCK))
                gap -= tl.load(p_centre + again + o_tile)
                first += weights * gap
                second += weights * gap * gap
            else:
                own += weights
                second -= weights * below
        if not MOMENTS:
            first += own
            i_share = i_image * tl.num_programs(1) + tl.program_id(1)
            total = tl.sum(tl.sum(own, axis=1), axis=0)
            tl.store(p_shares + i_share * tl.num_programs(0) + i_tile, total)
            own = tl.zeros((BLOCK, BLOCK), tl.float32)

    p_sum = p_out + i_program * (2 * BLOCK * BLOCK) + o_tile
    tl.store(p_sum, first)
    tl.store(p_sum + BLOCK * BLOCK, second)
