"""The diagonal form for Hopper: the products of a row run under the softmax of the row before it.

The sums are those of ``diagonal.py`` (see ``README.md``), with asynchronous copies and products
ordered by hand, which takes Gluon. Norms of keys are columns of the product, and images of a batch
share a tile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from els_kernels.triton.online import sizes_of


def kernel(function: Callable[..., None]) -> Any:
    """Return a kernel without specialisation on sizes, like ``online.kernel``."""
    return gluon.jit(function, do_not_specialize=sizes_of(function))


@gluon.jit
def copy_row(
    keys,
    queries,
    buffer,
    p_keys,
    p_norms,
    p_query,
    key_stride,
    query_stride,
    KEY_TERMS: gl.constexpr,
    TERMS: gl.constexpr,
    PAIR: gl.constexpr,
    BLOCKS: gl.constexpr,
    BLOCK_K: gl.constexpr,
    COPY: gl.constexpr,
):
    """Start the copies of a row to shared memory.

    ``keys`` are [buffers·KEY_TERMS·BLOCKS, BLOCK_N, BLOCK_K], ``queries`` the same of TERMS and
    BLOCK_M. ``p_keys`` and ``p_norms`` are [BLOCK_N], pointers to the first pixel and to the norms
    of each key, ``p_query`` [BLOCK_M, BLOCK_K] to the first columns of each query; strides are
    between terms, in elements. COPY is the layout of a block of keys.
    """
    for term in gl.static_range(KEY_TERMS):
        for i in gl.static_range(BLOCKS):
            o_k = i * BLOCK_K + gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, COPY))[None, :]
            target = keys.index((buffer * KEY_TERMS + term) * BLOCKS + i)
            p_pixels = (p_keys + term * key_stride)[:, None] + o_k
            # Norms are the last columns, in the first term alone; before them zeros of the query
            # may meet pixels past the window.
            m_pixel = o_k < BLOCKS * BLOCK_K - 8
            if i < BLOCKS - 1:
                async_copy.async_load(target, p_pixels)
            elif term == 0:
                pointers = gl.where(
                    m_pixel, p_pixels, p_norms[:, None] + (o_k - (BLOCKS * BLOCK_K - 8))
                )
                if PAIR >= 8:
                    # Both are in units of 16 bytes, which is lost in the choice between them.
                    pointers = gl.max_contiguous(gl.multiple_of(pointers, [1, 16]), [1, 8])
                async_copy.async_load(target, pointers)
            else:
                async_copy.async_load(target, p_pixels, mask=m_pixel)
    for term in gl.static_range(TERMS):
        for i in gl.static_range(BLOCKS):
            target = queries.index((buffer * TERMS + term) * BLOCKS + i)
            async_copy.async_load(target, p_query + term * query_stride + i * BLOCK_K)


@gluon.jit
def products(
    keys, queries, buffer, zeros, KEY_TERMS: gl.constexpr, TERMS: gl.constexpr, BLOCKS: gl.constexpr
):
    """Start the products of a row of ``keys`` and ``queries``, the shared memory of ``copy_row``.

    They are [BLOCK_M, BLOCK_N] like ``zeros``.
    """
    step = warpgroup_mma_init(zeros)
    for key_term in gl.static_range(KEY_TERMS):
        for term in gl.static_range(TERMS - key_term):
            for i in gl.static_range(BLOCKS):
                left = queries.index((buffer * TERMS + term) * BLOCKS + i)
                right = keys.index((buffer * KEY_TERMS + key_term) * BLOCKS + i).permute((1, 0))
                first = key_term + term + i == 0
                step = warpgroup_mma(left, right, step, use_acc=not first, is_async=True)
    return step


@gluon.jit
def absorb_row(box, scale, values, peak, sums, LEFT: gl.constexpr):
    """Return the state (peak [M], sums [M, V]) after one row, as ``online.absorb`` does.

    ``box`` are [M, N] logits over ``scale`` [M], powers of two; ``values`` [N, V] in shared memory.
    LEFT is the layout of weights as the left operand of a product.
    """
    ROW: gl.constexpr = scale.type.layout
    BOX_ROW: gl.constexpr = gl.SliceLayout(1, box.type.layout)
    largest = gl.convert_layout(gl.max(box, axis=1), ROW) * scale
    below = largest - 15.0
    below = gl.where(largest - below > 15.0, largest, below)
    top = gl.maximum(peak, below)
    factor = gl.convert_layout(scale, BOX_ROW)[:, None]
    weights = gl.exp2(box * factor - gl.convert_layout(top, BOX_ROW)[:, None])
    # The upper 11 bits, by a mask in the place of two conversions.
    high = (weights.to(gl.uint32, bitcast=True) & 0xFFFFE000).to(gl.float32, bitcast=True)
    low = (weights - high).to(gl.float16)
    total = sums * gl.exp2(peak - top)[:, None]
    total = warpgroup_mma(gl.convert_layout(low, LEFT), values, total, is_async=True)
    high = gl.convert_layout(high.to(gl.float16), LEFT)
    total = warpgroup_mma(high, values, total, is_async=True)
    return top, warpgroup_mma_wait(0, deps=[total])


@kernel
def hopper_kernel(
    p_query,
    p_keys,
    p_norms,
    p_values,
    p_scale,
    p_row_spans,
    p_peak,
    p_sums,
    # Sizes that ``diagonal_kernel`` has too mean the same.
    QUERY_ROWS,
    QUERY_COLS,
    # Places of a query in memory, with those before and after.
    QUERY_PLACES,
    BATCH,
    # Images of a tile, and diagonals of each.
    SHARE,
    DIAGONALS,
    KEY_ROWS,
    KEY_COLS,
    PAIR_COLS,
    IMAGES,
    LAG,
    IMAGE_ROWS,
    IMAGE_COLS,
    ROW0,
    COL0,
    WINDOW,
    EMIT_FROM,
    INNER_LO,
    INNER_HI,
    CHUNKS,
    CHUNK_IMAGES,
    SLOTS,
    FLATS,
    FLAT0,
    TERMS: gl.constexpr,
    KEY_TERMS: gl.constexpr,
    PAIR: gl.constexpr,
    DEPTH: gl.constexpr,
    VALUES: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    BLOCK_V: gl.constexpr,
    BUFFERS: gl.constexpr,
):
    """Absorb a chunk of the bank into the states of every query place, along diagonals.

    A tile has SHARE·DIAGONALS = BLOCK_M rows: neighbouring flat diagonals of several images of the
    batch, whose arithmetic does not depend on which rows share a tile. Iterations are rows of key
    tiles, one tile after another. Iteration i multiplies row i, copies the operands of row i + 1,
    and absorbs row i - 1, whose box sums are complete; the last has only a row to absorb.

    The last eight columns of a product are norms of keys times factors of the query (see
    ``hopper_launch``), so that a box sum times ``scale`` is a logit.

    Tensors:
        p_query: [B, TERMS, QUERY_PLACES, DEPTH] float16, with BLOCK_M zero places before the first
            and after the last.
        p_keys: as for ``diagonal_kernel``.
        p_norms: [IMAGES, KEY_ROWS, KEY_COLS, 8] float16.
        p_values: [IMAGES, IMAGE_ROWS, IMAGE_COLS, VALUES] float16.
        p_scale: [B] float32.
        p_row_spans: [tiles, 2] int32: first and last+1 key row of each tile of diagonals.
        p_peak: [B, CHUNKS, SLOTS, PLACES] float32: states so far, -inf at first; slot = key row,
            or one for all.
        p_sums: [B, CHUNKS, SLOTS, PLACES, VALUES] float32, 0 at first.
    """
    BLOCKS: gl.constexpr = DEPTH // BLOCK_K
    BOX: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_V, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, SUM)
    # A thread copies all of a key, or eight columns of a query.
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [32, 1], [4, 1], [1, 0])
    COPY_QUERY: gl.constexpr = gl.BlockedLayout(
        [1, 8], [256 // BLOCK_K, BLOCK_K // 8], [4, 1], [1, 0]
    )
    KEY: gl.constexpr = gl.SliceLayout(1, COPY)
    OPERAND: gl.constexpr = gl.NVMMASharedLayout(2 * BLOCK_K, 16, 2)
    RESPONSE: gl.constexpr = gl.NVMMASharedLayout(32, 16, 2)

    i_tile, i_group, i_chunk = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    places = (QUERY_ROWS - WINDOW + 1) * QUERY_COLS
    first, last = gl.load(p_row_spans + 2 * i_tile), gl.load(p_row_spans + 2 * i_tile + 1)

    # Rows of the tile, [BLOCK_M]: image of the batch and flat diagonal. Offsets within the states
    # and queries of a tile are of 32 bits: see ``hopper_launch``.
    flat_first = FLAT0 + i_tile * DIAGONALS
    i_b = i_group * SHARE
    i_row = gl.arange(0, BLOCK_M, layout=ROW)
    i_share, o_flat = i_row // DIAGONALS, flat_first + i_row % DIAGONALS
    m_row = (i_b + i_share < BATCH) & (o_flat < FLAT0 + FLATS)
    i_share = gl.where(m_row, i_share, 0)
    scale = gl.load(p_scale + i_b + i_share)
    o_state = i_share * (CHUNKS * SLOTS * places) + o_flat
    # Rows without pairs are far from all.
    o_flat = gl.where(m_row, o_flat, -(1 << 30))
    i_state = (i_b.to(gl.int64) * CHUNKS + i_chunk) * SLOTS * places
    p_peak += i_state
    p_sums += i_state * VALUES
    o_value = gl.arange(0, BLOCK_V, layout=gl.SliceLayout(0, SUM))[None, :]

    query_stride = QUERY_PLACES * DEPTH
    i_copy = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, COPY_QUERY))
    o_image = gl.minimum(i_copy // DIAGONALS, BATCH - 1 - i_b) * TERMS * query_stride
    o_query = o_image + (BLOCK_M + flat_first + i_copy % DIAGONALS) * DEPTH
    o_query = o_query[:, None] + gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, COPY_QUERY))[None]
    p_query += i_b.to(gl.int64) * TERMS * query_stride

    i_first = i_chunk.to(gl.int64) * CHUNK_IMAGES
    row_stride, norm_stride = PAIR_COLS * PAIR, KEY_COLS * 8
    image_stride = KEY_ROWS * row_stride
    key_stride = image_stride.to(gl.int64) * IMAGES
    p_keys += i_first * image_stride
    p_norms += i_first * KEY_ROWS * norm_stride
    p_values += i_first * IMAGE_ROWS * IMAGE_COLS * VALUES
    o_response = gl.arange(0, BLOCK_V, layout=gl.SliceLayout(0, COPY))[None, :]

    keys = gl.allocate_shared_memory(
        gl.float16, [BUFFERS * KEY_TERMS * BLOCKS, BLOCK_N, BLOCK_K], OPERAND
    )
    queries = gl.allocate_shared_memory(
        gl.float16, [BUFFERS * TERMS * BLOCKS, BLOCK_M, BLOCK_K], OPERAND
    )
    values = gl.allocate_shared_memory(gl.float16, [2, BLOCK_N, 16], RESPONSE)

    # Flat keys of the chunk: (image, column). Those beyond the end are the first, without values.
    flat_keys = (
        gl.minimum((i_chunk + 1) * CHUNK_IMAGES, IMAGES) - i_chunk * CHUNK_IMAGES
    ) * KEY_COLS
    o_key = gl.arange(0, BLOCK_N, layout=KEY)
    m_key = o_key < flat_keys
    i_key = gl.where(m_key, o_key, 0)
    i_image, i_col = i_key // KEY_COLS, i_key % KEY_COLS
    o_place = gl.where(m_key, i_image * (IMAGE_ROWS * IMAGE_COLS) + COL0 + i_col, -1)

    zeros = gl.zeros((BLOCK_M, BLOCK_N), gl.float32, BOX)
    box = zeros
    # Row of the traversal, and the key row in memory.
    j_first = (first + KEY_ROWS) % KEY_ROWS
    t, j = first, j_first
    # Row of the image that the row before ends.
    i_before = 0
    copy_row(
        keys, queries, 0,
        p_keys + (i_image * image_stride + i_col * PAIR) + j * row_stride,
        p_norms + (i_image * KEY_ROWS * KEY_COLS + i_col) * 8 + j * norm_stride,
        p_query + (o_query + t * QUERY_COLS * DEPTH), key_stride, query_stride,
        KEY_TERMS, TERMS, PAIR, BLOCKS, BLOCK_K, COPY,
    )  # fmt: skip
    async_copy.commit_group()
    for i in range(gl.cdiv(flat_keys, BLOCK_N) * (last - first) + 1):
        stage = i & 1
        # A single buffer has number 0, as there are fewer than 2^30 rows, which the compiler does
        # not know: it would keep all descriptors of the products in registers.
        buffer = stage if BUFFERS > 1 else i >> 30

        # The state that the row before is absorbed into, on its way while copies end.
        # Triton drops a loop variable that begins as the value it is first assigned: not ``= t``
        # below. See ``findings/triton-loop-variable-that-starts-alike-is-dropped.sh``.
        t_before = gl.where(t == first, last, t) - 1
        inner = (i_before >= INNER_LO) & (i_before < INNER_HI)
        lo = gl.where(inner, INNER_LO, i_before) * QUERY_COLS
        hi = gl.where(inner, INNER_HI, i_before + 1) * QUERY_COLS
        o_u = (t_before - WINDOW + 1) * QUERY_COLS
        emits = (i > 0) & (t_before >= EMIT_FROM)
        emits = emits & (flat_first + o_u + DIAGONALS > lo) & (flat_first + o_u < hi)
        m_u = emits & (o_flat >= lo - o_u) & (o_flat < hi - o_u)
        m_sum = m_u[:, None] & (o_value < VALUES)
        o_row = o_state + (o_u + gl.where(SLOTS > 1, i_before, 0) * places)
        p_sum = p_sums + ((o_row * VALUES)[:, None] + o_value)
        peak = gl.load(p_peak + o_row, mask=m_u, other=float("-inf"))
        sums = gl.load(p_sum, mask=m_sum, other=0.0)

        async_copy.wait_group(0)
        gl.barrier()
        fence_async_shared()
        step = products(keys, queries, buffer, zeros, KEY_TERMS, TERMS, BLOCKS)

        # The row after this one.
        new = t + 1 == last
        t_next = gl.where(new, first, t + 1)
        j_next = gl.where(new, j_first, gl.where(j + 1 == KEY_ROWS, 0, j + 1))
        if new:
            o_key += BLOCK_N
            m_key = o_key < flat_keys
            i_key = gl.where(m_key, o_key, 0)
            i_image, i_col = i_key // KEY_COLS, i_key % KEY_COLS
        if BUFFERS > 1:
            copy_row(
                keys, queries, 1 - stage,
                p_keys + (i_image * image_stride + i_col * PAIR) + j_next * row_stride,
                p_norms + (i_image * KEY_ROWS * KEY_COLS + i_col) * 8 + j_next * norm_stride,
                p_query + (o_query + t_next * QUERY_COLS * DEPTH), key_stride, query_stride,
                KEY_TERMS, TERMS, PAIR, BLOCKS, BLOCK_K, COPY,
            )  # fmt: skip
        # Values of this row, for the next iteration. Rows before the first whole window have none.
        i_now = gl.where(j + LAG >= KEY_ROWS, j + LAG - KEY_ROWS, j + LAG)
        i_source = ROW0 + gl.minimum(i_now, IMAGE_ROWS - 2 * ROW0 - 1)
        p_value = p_values + (o_place + i_source * IMAGE_COLS) * VALUES
        m_value = (o_response < VALUES) & (o_place >= 0)[:, None]
        target = values.index(stage).slice(0, BLOCK_V, 1)
        async_copy.async_load(target, p_value[:, None] + o_response, mask=m_value)
        async_copy.commit_group()

        if emits:
            right = values.index(1 - stage).slice(0, BLOCK_V, 1)
            top, total = absorb_row(box, scale, right, peak, sums, gl.DotOperandLayout(0, SUM, 2))
            gl.store(p_peak + o_row, top, mask=m_u)
            gl.store(p_sum, total, mask=m_sum)

        step = warpgroup_mma_wait(0, deps=[step])
        box = box * gl.where(t == first, 0.0, 1.0) + step
        if BUFFERS == 1:
            copy_row(
                keys, queries, buffer,
                p_keys + (i_image * image_stride + i_col * PAIR) + j_next * row_stride,
                p_norms + (i_image * KEY_ROWS * KEY_COLS + i_col) * 8 + j_next * norm_stride,
                p_query + (o_query + t_next * QUERY_COLS * DEPTH), key_stride, query_stride,
                KEY_TERMS, TERMS, PAIR, BLOCKS, BLOCK_K, COPY,
            )  # fmt: skip
            async_copy.commit_group()
        t, j, i_before = t_next, j_next, i_now
        o_place = gl.where(m_key, i_image * (IMAGE_ROWS * IMAGE_COLS) + COL0 + i_col, -1)
    async_copy.wait_group(0)
