"""The diagonal form: two rows of products per step, for any window.

See ``README.md`` in this folder for the derivation and a figure.
"""

from __future__ import annotations

import triton.language as tl

from els_kernels.triton.online import absorb, kernel


@kernel
def diagonal_kernel(
    p_query,
    p_keys,
    p_half,
    p_values,
    p_scale,
    p_bias,
    p_row_spans,
    p_peak,
    p_sums,
    # Sizes: rows of the traversal, columns of the tiles.
    QUERY_ROWS,
    QUERY_COLS,
    KEY_ROWS,
    KEY_COLS,
    PAIR_COLS,
    IMAGES,
    # Where key rows lie in the image: place row = (traversal row + LAG) mod KEY_ROWS.
    LAG,
    IMAGE_ROWS,
    IMAGE_COLS,
    ROW0,
    COL0,
    # Sources of a row: every inner row for inner rows, otherwise only the row itself.
    WINDOW,
    EMIT_FROM,
    INNER_LO,
    INNER_HI,
    # Layout of the states.
    CHUNKS,
    CHUNK_IMAGES,
    SLOTS,
    FLATS,
    FLAT0,
    TERMS: tl.constexpr,
    KEY_TERMS: tl.constexpr,
    PAIR: tl.constexpr,
    DEPTH: tl.constexpr,
    VALUES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Absorb a chunk of the bank into the states of every query place, along diagonals.

    With ``T(t, t')[j, j'] = Σ_{o,c} x_c[t, j+o]·φ_c[t', j'+o]`` (one row of the window) the box sum
    obeys ``S(t+1, t'+1) = S(t, t') + T(t+1, t'+1) - T(t+1-k, t'+1-k)``. Both products are one
    matmul whose channels are *pairs*: (x[t], -x[t-k]) against (φ[t'], φ[t'-k]), of inner size 2kC.

    A program owns BLOCK_M neighbouring flat diagonals (query place minus key row, in the order of
    places) and iterates over the key rows of BLOCK_N key columns at a time. The logit
    ``SCALE·S + BIAS·‖p‖²/2`` of a pair of places appears when the last row of their windows enters.

    Tensors:
        p_query: [B, TERMS, QUERY_ROWS·QUERY_COLS, DEPTH] float16, unfolded along its rows.
        p_keys: [KEY_TERMS, IMAGES, KEY_ROWS, PAIR_COLS, PAIR] float16, the last two unfolded by
            overlapping loads; followed by at least DEPTH finite elements.
        p_half: [IMAGES, IMAGE_ROWS, IMAGE_COLS] float32: ‖p‖²/2 of the window at each place.
        p_values: [IMAGES, IMAGE_ROWS, IMAGE_COLS, VALUES] float16.
        p_scale: [B] float32. p_bias: [B] float32, < 0.
        p_row_spans: [tiles, 2] int32: first and last+1 key row of each tile of diagonals.
        p_peak: [B, CHUNKS, SLOTS, PLACES] float32: states so far, -inf at first; slot = key row
            modulo SLOTS.
        p_sums: [B, CHUNKS, SLOTS, PLACES, VALUES] float32, 0 at first.
    """
    i_tile, i_chunk = tl.program_id(0), tl.program_id(2)
    i_batch = tl.cast(tl.program_id(1), tl.int64)
    places = (QUERY_ROWS - WINDOW + 1) * QUERY_COLS

    # Flat diagonals, [BLOCK_M]: the flat query place paired with key row 0. Those past the end
    # have no pairs.
    o_flat = FLAT0 + i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    o_flat = tl.where(o_flat < FLAT0 + FLATS, o_flat, -(1 << 30))
    o_depth = tl.arange(0, BLOCK_K)
    o_value = tl.arange(0, BLOCK_V)
    m_value = o_value < VALUES
    o_column = tl.arange(0, BLOCK_N)

    # 64-bit offsets to a chunk and a query, 32-bit offsets within them: see ``chunk_images``.
    i_first = tl.cast(i_chunk, tl.int64) * CHUNK_IMAGES
    row_stride = PAIR_COLS * PAIR
    image_stride = KEY_ROWS * row_stride
    term_stride = tl.cast(image_stride, tl.int64) * IMAGES
    p_keys += i_first * image_stride
    p_half += i_first * IMAGE_ROWS * IMAGE_COLS
    p_values += i_first * IMAGE_ROWS * IMAGE_COLS * VALUES
    query_stride = QUERY_ROWS * QUERY_COLS * DEPTH
    p_query += i_batch * TERMS * query_stride
    i_state = (i_batch * CHUNKS + i_chunk) * SLOTS
    scale, bias = tl.load(p_scale + i_batch), tl.load(p_bias + i_batch)
    first, last = tl.load(p_row_spans + 2 * i_tile), tl.load(p_row_spans + 2 * i_tile + 1)

    # Flat keys of the chunk: (image, column).
    flat_keys = (
        tl.minimum((i_chunk + 1) * CHUNK_IMAGES, IMAGES) - i_chunk * CHUNK_IMAGES
    ) * KEY_COLS
    for start in range(0, flat_keys, BLOCK_N):
        o_key = start + o_column
        m_key = o_key < flat_keys
        o_key = tl.where(m_key, o_key, 0)
        i_image, i_col = o_key // KEY_COLS, o_key % KEY_COLS
        o_pair = i_image * image_stride + i_col * PAIR
        o_place = i_image * IMAGE_ROWS * IMAGE_COLS + COL0 + i_col

        # Box sums, [BLOCK_M, BLOCK_N].
        box = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for t in range(first, last):
            p_row = p_keys + (t + KEY_ROWS) % KEY_ROWS * row_stride
            o_query = o_flat + t * QUERY_COLS
            m_query = (o_query >= 0) & (o_query < QUERY_ROWS * QUERY_COLS)
            step = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for i_depth in tl.static_range(DEPTH // BLOCK_K):
                o_k = i_depth * BLOCK_K + o_depth
                for key_term in tl.static_range(KEY_TERMS):
                    # [BLOCK_K, BLOCK_N]
                    keys = tl.load(
                        p_row + key_term * term_stride + (o_pair[None, :] + o_k[:, None])
                    )
                    for term in tl.static_range(TERMS - key_term):
                        # [BLOCK_M, BLOCK_K]
                        query = tl.load(
                            p_query
                            + term * query_stride
                            + (o_query[:, None] * DEPTH + o_k[None, :]),
                            mask=m_query[:, None],
                            other=0.0,
                        )
                        step = tl.dot(query, keys, step)
            box += step

            # The windows that end in this row: inner key rows are sources of inner places, the
            # others of themselves. Steps without pairs, such as the warm-up, skip the softmax.
            # On the torus t + LAG may be negative, whose remainder is negative on a GPU.
            i_key = (t + LAG + KEY_ROWS) % KEY_ROWS
            inner = (i_key >= INNER_LO) & (i_key < INNER_HI)
            lo = tl.where(inner, INNER_LO, i_key) * QUERY_COLS
            hi = tl.where(inner, INNER_HI, i_key + 1) * QUERY_COLS
            o_first = FLAT0 + i_tile * BLOCK_M + (t - WINDOW + 1) * QUERY_COLS
            if (t >= EMIT_FROM) & (o_first + BLOCK_M > lo) & (o_first < hi):
                o_u = o_query - (WINDOW - 1) * QUERY_COLS
                m_u = (o_u >= lo) & (o_u < hi)

                i_source = (ROW0 + i_key) * IMAGE_COLS
                # A key beyond the end has an infinite norm: its logit is -inf, its weight 0.
                half = tl.load(p_half + i_source + o_place, mask=m_key, other=float("inf"))
                # [BLOCK_N, BLOCK_V]
                values = tl.load(
                    p_values + i_source * VALUES + (o_place[:, None] * VALUES + o_value[None, :]),
                    mask=m_value[None, :],
                    other=0.0,
                )
                i_row = (i_state + i_key % SLOTS) * places
                p_sum = p_sums + i_row * VALUES + (o_u[:, None] * VALUES + o_value[None, :])
                m_sum = m_u[:, None] & m_value[None, :]
                peak = tl.load(p_peak + i_row + o_u, mask=m_u, other=float("-inf"))
                sums = tl.load(p_sum, mask=m_sum, other=0.0)
                peak, sums = absorb(box * scale + (half * bias)[None, :], values, peak, sums)
                tl.store(p_peak + i_row + o_u, peak, mask=m_u)
                tl.store(p_sum, sums, mask=m_sum)
        # The next columns read the states written by these.
        tl.debug_barrier()
