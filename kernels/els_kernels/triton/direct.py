"""The direct form: unfolded patches as matmul operands, cheapest while k²C is small."""

from __future__ import annotations

import triton.language as tl

from els_kernels.triton.online import absorb, kernel


@kernel
def direct_kernel(
    p_query,
    p_keys,
    p_half,
    p_values,
    p_scale,
    p_bias,
    p_peak,
    p_sums,
    # The crop of the query, and its corner.
    QUERY_H,
    QUERY_W,
    QUERY_ROW0,
    QUERY_COL0,
    QUERY_COLS,
    PLACES,
    # The crop of the keys, and its corner.
    KEY_H,
    KEY_W,
    KEY_ROW0,
    KEY_COL0,
    KEY_ROWS,
    KEY_COLS,
    IMAGES,
    # Where the places of the keys lie in the image.
    IMAGE_ROWS,
    IMAGE_COLS,
    ROW0,
    COL0,
    WINDOW_H,
    # Layout of the states.
    CHUNKS,
    CHUNK_IMAGES,
    CHANNELS: tl.constexpr,
    WINDOW_W: tl.constexpr,
    TERMS: tl.constexpr,
    KEY_TERMS: tl.constexpr,
    VALUES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Absorb a chunk of the bank into the states of one cell of query places.

    The logit ``SCALE·⟨q[u+Ω], p[y+Ω]⟩ + BIAS·‖p[y+Ω]‖²/2`` by one matmul of inner size
    ``WINDOW_H·WINDOW_W·CHANNELS ≤ BLOCK_K``. Patches are never stored: element (o_y, o_x, c) of the
    patch at (i, j) is loaded from pixel (i+o_y, j+o_x), channels last.

    Tensors:
        p_query: [B, TERMS, QUERY_H, QUERY_W, CHANNELS] float16.
        p_keys: [KEY_TERMS, IMAGES, KEY_H, KEY_W, CHANNELS] float16, followed by finite numbers
            for BLOCK_K elements of a patch that extends past the last image; multiplied by 0.
        p_half: [IMAGES, IMAGE_ROWS, IMAGE_COLS] float32: ‖p‖²/2 of the window at each place.
        p_values: [IMAGES, IMAGE_ROWS, IMAGE_COLS, VALUES] float16.
        p_scale: [B] float32. p_bias: [B] float32, < 0.
        p_peak: [B, CHUNKS, PLACES] float32, written.
        p_sums: [B, CHUNKS, PLACES, VALUES] float32, written.
    """
    i_tile, i_chunk = tl.program_id(0), tl.program_id(2)
    i_batch = tl.cast(tl.program_id(1), tl.int64)
    scale, bias = tl.load(p_scale + i_batch), tl.load(p_bias + i_batch)

    # One element of a patch, [BLOCK_K]: a run of WINDOW_W·CHANNELS in each row.
    o_k = tl.arange(0, BLOCK_K)
    run = WINDOW_W * CHANNELS
    m_k = o_k < WINDOW_H * run
    i_oy = o_k // run
    o_query_k = i_oy * QUERY_W * CHANNELS + o_k % run
    o_key_k = i_oy * KEY_W * CHANNELS + o_k % run

    o_u = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    m_u = o_u < PLACES
    i_row, i_col = o_u // QUERY_COLS + QUERY_ROW0, o_u % QUERY_COLS + QUERY_COL0
    o_query = (i_row * QUERY_W + i_col) * CHANNELS
    query_stride = tl.cast(QUERY_H, tl.int64) * QUERY_W * CHANNELS
    # [BLOCK_M, BLOCK_K]
    p_patch = p_query + i_batch * TERMS * query_stride + o_query[:, None] + o_query_k[None, :]
    m_patch = m_u[:, None] & m_k[None, :]
    query = tl.load(p_patch, mask=m_patch, other=0.0)
    query_low = query
    if TERMS == 2:
        query_low = tl.load(p_patch + query_stride, mask=m_patch, other=0.0)

    # 64-bit offset to a chunk, 32-bit offsets within it: see ``chunk_images``.
    i_first = tl.cast(i_chunk, tl.int64) * CHUNK_IMAGES
    image_stride = KEY_H * KEY_W * CHANNELS
    term_stride = tl.cast(image_stride, tl.int64) * IMAGES
    p_keys += i_first * image_stride
    p_half += i_first * IMAGE_ROWS * IMAGE_COLS
    p_values += i_first * IMAGE_ROWS * IMAGE_COLS * VALUES
    o_column = tl.arange(0, BLOCK_N)
    o_value = tl.arange(0, BLOCK_V)
    m_value = o_value < VALUES
    key_places = KEY_ROWS * KEY_COLS

    # The state, [BLOCK_M] and [BLOCK_M, BLOCK_V].
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    images = tl.minimum((i_chunk + 1) * CHUNK_IMAGES, IMAGES) - i_chunk * CHUNK_IMAGES
    for start in range(0, images * key_places, BLOCK_N):
        o_key = start + o_column
        m_key = o_key < images * key_places
        o_key = tl.where(m_key, o_key, 0)
        # Unsigned: half as many instructions as a signed division.
        i_image = (o_key.to(tl.uint32) // tl.cast(key_places, tl.uint32)).to(tl.int32)
        i_place = o_key - i_image * key_places
        i_key_row = (i_place.to(tl.uint32) // tl.cast(KEY_COLS, tl.uint32)).to(tl.int32)
        i_key_col = i_place - i_key_row * KEY_COLS
        o_pixel = ((KEY_ROW0 + i_key_row) * KEY_W + KEY_COL0 + i_key_col) * CHANNELS
        o_pixel += i_image * image_stride

        # [BLOCK_K, BLOCK_N], [BLOCK_M, BLOCK_N]
        keys = tl.load(p_keys + (o_pixel[None, :] + o_key_k[:, None]))
        products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if TERMS == 2:
            products = tl.dot(query_low, keys, products)
            if KEY_TERMS == 2:
                keys_low = tl.load(p_keys + term_stride + (o_pixel[None, :] + o_key_k[:, None]))
                products = tl.dot(query, keys_low, products)
        products = tl.dot(query, keys, products)

        o_source = (i_image * IMAGE_ROWS + ROW0 + i_key_row) * IMAGE_COLS + COL0 + i_key_col
        # A key beyond the end has an infinite norm: its logit is -inf, its weight 0.
        half = tl.load(p_half + o_source, mask=m_key, other=float("inf"))
        # [BLOCK_N, BLOCK_V]
        values = tl.load(
            p_values + (o_source[:, None] * VALUES + o_value[None, :]),
            mask=m_value[None, :],
            other=0.0,
        )
        peak, sums = absorb(products * scale + (half * bias)[None, :], values, peak, sums)

    o_state = (i_batch * CHUNKS + i_chunk) * PLACES + o_u
    tl.store(p_peak + o_state, peak, mask=m_u)
    tl.store(
        p_sums + o_state[:, None] * VALUES + o_value[None, :],
        sums,
        mask=m_u[:, None] & m_value[None, :],
    )
