"""Kernel of the sources of largest weight of every patch.

Each program keeps a list for each of its patches. A source enters a list only if its logit reaches
``p_least``, the logit that as many chunks as there are sources to list have exceeded: few do.
Programs are (tile of patches, chunk of displacements, chunk of images).
"""

from __future__ import annotations

import triton
import triton.language as tl

from els_kernels.triton.online import kernel
from els_kernels.triton.planes import block_offsets, col_band, is_source, row_band, window_sums


@triton.jit
def insert(p_logits, p_ids, logits, i_source, TOP, BLOCK: tl.constexpr):
    """Insert a source into the lists of some places: TOP logits that fall, [TOP, BLOCK, BLOCK].

    Of equal logits the earlier stays first. Places whose logit is -inf keep their list.
    """
    o_tile = block_offsets(BLOCK, BLOCK)
    carried, carried_id = logits, tl.full((BLOCK, BLOCK), 0, tl.int32) + i_source
    inserted = tl.full((BLOCK, BLOCK), 0, tl.int32) > 0
    for i_top in range(TOP):
        p_held = p_logits + i_top * BLOCK * BLOCK + o_tile
        p_held_id = p_ids + i_top * BLOCK * BLOCK + o_tile
        held, held_id = tl.load(p_held), tl.load(p_held_id)
        # Once inserted, all that follow move down by one.
        inserted = inserted | (carried > held)
        tl.store(p_held, tl.where(inserted, carried, held))
        tl.store(p_held_id, tl.where(inserted, carried_id, held_id))
        carried = tl.where(inserted, held, carried)
        carried_id = tl.where(inserted, held_id, carried_id)
    # The next insertion may read by other threads what these wrote.
    tl.debug_barrier()


@kernel
def ranking_kernel(
    p_query,
    p_keys,
    p_level,
    p_least,
    p_logits,
    p_ids,
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
    # Sources that are listed.
    TOP,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    SINGLE: tl.constexpr,
):
    """Write the TOP largest logits of each patch over a chunk of its sources, and which these are.

    Tensors:
        p_query, p_keys, p_level: as of ``normaliser_kernel``.
        p_least: [tiles, BLOCK, BLOCK] float32: logit from which a source may be listed.
        p_logits: [chunks, tiles, TOP, BLOCK, BLOCK] float32, -inf at first.
        p_ids: the same, int32: image·SHIFTS + displacement.
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
    i_program = i_chunk * tl.num_programs(0) + i_tile
    p_logits += i_program * TOP * (BLOCK * BLOCK)
    p_ids += i_program * TOP * (BLOCK * BLOCK)
    p_least += i_tile * (BLOCK * BLOCK) + block_offsets(BLOCK, BLOCK)

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
            near = tl.where(logits >= tl.load(p_least + again), logits, float("-inf"))
            if tl.max(tl.max(near, axis=1), axis=0) > -3e38:
                insert(p_logits, p_ids, near, i_image * SHIFTS + i_shift, TOP, BLOCK)
