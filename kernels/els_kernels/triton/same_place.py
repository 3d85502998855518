"""The same-place form: box sums as two matmuls with banded 0/1 matrices.

Used for the local machine, the corners of the boundary-broken one, and the ideal machine (bands of
ones).
"""

from __future__ import annotations

import triton
import triton.language as tl

from els_kernels.triton.online import kernel


@triton.jit
def split_dot(left, right, SPLIT_LEFT: tl.constexpr):
    """Return left·right at float32 precision: one side is split into terms, the other is 0/1.

    Three terms of 11 bits represent a float32; the scale keeps them in range.
    """
    whole = left if SPLIT_LEFT else right
    # A power of two that scales the largest element to about 1: the product is exact.
    largest = tl.maximum(tl.max(tl.max(tl.abs(whole), axis=1), axis=0), 1e-30)
    power = tl.floor(tl.log2(largest))
    up, down = tl.exp2(-power), tl.exp2(power)
    rest = whole * up
    high = rest.to(tl.float16)
    rest = (rest - high.to(tl.float32)) * 2048.0
    middle = rest.to(tl.float16)
    low = ((rest - middle.to(tl.float32)) * 2048.0).to(tl.float16)
    if SPLIT_LEFT:
        out = tl.dot(low, right) * (1.0 / 2048)
        out = (out + tl.dot(middle, right)) * (1.0 / 2048)
        out = out + tl.dot(high, right)
    else:
        out = tl.dot(left, low) * (1.0 / 2048)
        out = (out + tl.dot(left, middle)) * (1.0 / 2048)
        out = out + tl.dot(left, high)
    return out * down


@kernel
def same_place_kernel(
    p_query,
    p_keys,
    p_bias,
    p_row_band,
    p_col_band,
    p_peak,
    p_sums,
    HEIGHT,
    WIDTH,
    IMAGES,
    CHUNKS,
    CHUNK_IMAGES,
    CHANNELS: tl.constexpr,
    KEY_TERMS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Absorb a chunk of the bank into the states of one tile of places, each its own source.

    With ``g[v] = Σ_c q_c[v]·p_c[v] + BIAS·‖p[v]‖²/2`` the logits of an image are
    ``row_band · g · col_bandᵀ``: O(H + W) work per place, for any window.

    Tensors:
        p_query: [B, CHANNELS, HEIGHT, WIDTH] float32, scaled.
        p_keys: [KEY_TERMS, IMAGES, CHANNELS, HEIGHT, WIDTH] float16.
        p_bias: [B] float32, < 0.
        p_row_band: [HEIGHT, HEIGHT] float16, 0 or 1. p_col_band: [WIDTH, WIDTH] float16.
        p_peak: [B, CHUNKS, HEIGHT·WIDTH] float32, written.
        p_sums: [B, CHUNKS, HEIGHT·WIDTH, CHANNELS + 1] float32, written.
    """
    tiles = tl.cdiv(WIDTH, BLOCK)
    i_row, i_col = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    i_batch, i_chunk = tl.cast(tl.program_id(1), tl.int64), tl.program_id(2)
    plane = HEIGHT * WIDTH
    term_stride = tl.cast(IMAGES, tl.int64) * CHANNELS * plane
    bias = tl.load(p_bias + i_batch)

    o_block = tl.arange(0, BLOCK)
    o_row, o_col = i_row * BLOCK + o_block, i_col * BLOCK + o_block
    m_row, m_col = o_row < HEIGHT, o_col < WIDTH
    o_channel = tl.arange(0, BLOCK_C)
    m_channel = o_channel < CHANNELS
    # [BLOCK_C, BLOCK, BLOCK]
    o_here = o_channel[:, None, None] * plane + (o_row[:, None] * WIDTH + o_col[None, :])[None]
    m_here = m_channel[:, None, None] & (m_row[:, None] & m_col[None, :])[None]

    # The state: [BLOCK, BLOCK], [BLOCK_C, BLOCK, BLOCK], [BLOCK, BLOCK].
    peak = tl.full((BLOCK, BLOCK), float("-inf"), tl.float32)
    mean = tl.zeros((BLOCK_C, BLOCK, BLOCK), tl.float32)
    weight = tl.zeros((BLOCK, BLOCK), tl.float32)
    last = tl.minimum((i_chunk + 1) * CHUNK_IMAGES, IMAGES)
    for i_image in range(i_chunk * CHUNK_IMAGES, last):
        p_image = p_keys + tl.cast(i_image, tl.int64) * CHANNELS * plane
        logits = tl.zeros((BLOCK, BLOCK), tl.float32)
        for row0 in range(0, HEIGHT, BLOCK):
            o_y = row0 + o_block
            m_y = o_y < HEIGHT
            part = tl.zeros((BLOCK, BLOCK), tl.float32)
            for col0 in range(0, WIDTH, BLOCK):
                o_x = col0 + o_block
                m_x = o_x < WIDTH
                # [BLOCK_C, BLOCK (y), BLOCK (x)]
                o_v = o_channel[:, None, None] * plane + (o_y[:, None] * WIDTH + o_x[None, :])[None]
                m_v = m_channel[:, None, None] & (m_y[:, None] & m_x[None, :])[None]
                keys = tl.load(p_image + o_v, mask=m_v, other=0.0).to(tl.float32)
                if KEY_TERMS == 2:
                    keys += tl.load(p_image + term_stride + o_v, mask=m_v, other=0.0)
                query = tl.load(p_query + i_batch * CHANNELS * plane + o_v, mask=m_v, other=0.0)
                products = tl.sum(keys * query + keys * keys * (0.5 * bias), axis=0)
                # [BLOCK (x), BLOCK (place)]
                cols = tl.load(
                    p_col_band + o_col[None, :] * WIDTH + o_x[:, None],
                    mask=m_col[None, :] & m_x[:, None],
                    other=0.0,
                )
                part += split_dot(products, cols, SPLIT_LEFT=True)
            # [BLOCK (place), BLOCK (y)]
            rows = tl.load(
                p_row_band + o_row[:, None] * HEIGHT + o_y[None, :],
                mask=m_row[:, None] & m_y[None, :],
                other=0.0,
            )
            logits += split_dot(rows, part, SPLIT_LEFT=False)

        values = tl.load(p_image + o_here, mask=m_here, other=0.0).to(tl.float32)
        if KEY_TERMS == 2:
            values += tl.load(p_image + term_stride + o_here, mask=m_here, other=0.0)
        # The maximum is assigned, not accumulated: from -inf, old sums are scaled by exactly 0.
        top = tl.maximum(peak, logits)
        old, new = tl.exp2(peak - top), tl.exp2(logits - top)
        mean = mean * old[None] + values * new[None]
        weight = weight * old + new
        peak = top

    o_state = (i_batch * CHUNKS + i_chunk) * plane + o_row[:, None] * WIDTH + o_col[None, :]
    m_state = m_row[:, None] & m_col[None, :]
    tl.store(p_peak + o_state, peak, mask=m_state)
    p_state = p_sums + o_state * (CHANNELS + 1)
    tl.store(p_state[None] + o_channel[:, None, None], mean, mask=m_here)
    tl.store(p_state + CHANNELS, weight, mask=m_state)
