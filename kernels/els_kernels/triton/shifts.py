"""The equivariant machine: every shift of the query attends to every image in one softmax.

Shift p of the query against the bank equals the query against the bank shifted by -p, so the
response of a shift is moved back by p before the sum.
"""

from __future__ import annotations

import triton.language as tl

from els_kernels.triton.online import kernel


@kernel
def shift_logits_kernel(
    p_query,
    p_keys,
    p_half,
    p_scale,
    p_bias,
    p_logits,
    HEIGHT,
    WIDTH,
    IMAGES,
    CHANNELS: tl.constexpr,
    TERMS: tl.constexpr,
    KEY_TERMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write ``SCALE·⟨x shifted by p, φ_n⟩ + BIAS·‖φ_n‖²/2`` for every shift p and image n.

    Shifts are loads from the query, which is repeated twice along both axes.

    Tensors:
        p_query: [TERMS, CHANNELS, 2·HEIGHT, 2·WIDTH] float16.
        p_keys: [KEY_TERMS, IMAGES, CHANNELS·HEIGHT·WIDTH] float16.
        p_half: [IMAGES] float32.
        p_scale: [1] float32. p_bias: [1] float32.
        p_logits: [HEIGHT·WIDTH, IMAGES] float32, written.
    """
    plane = HEIGHT * WIDTH
    depth = CHANNELS * plane
    o_shift = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_shift = o_shift < plane
    o_origin = o_shift // WIDTH * (2 * WIDTH) + o_shift % WIDTH
    o_image = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_image = o_image < IMAGES
    o_key = o_image.to(tl.int64) * depth

    products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, depth, BLOCK_K):
        o_k = start + tl.arange(0, BLOCK_K)
        m_k = o_k < depth
        o_pixel = o_k % plane
        o_v = (o_k // plane * 2 * HEIGHT + o_pixel // WIDTH) * (2 * WIDTH) + o_pixel % WIDTH
        for key_term in tl.static_range(KEY_TERMS):
            # [BLOCK_K, BLOCK_N]
            keys = tl.load(
                p_keys
                + key_term * tl.cast(IMAGES, tl.int64) * depth
                + o_key[None, :]
                + o_k[:, None],
                mask=m_k[:, None] & m_image[None, :],
                other=0.0,
            )
            for term in tl.static_range(TERMS - key_term):
                # [BLOCK_M, BLOCK_K]
                query = tl.load(
                    p_query + term * 4 * depth + o_origin[:, None] + o_v[None, :],
                    mask=m_shift[:, None] & m_k[None, :],
                    other=0.0,
                )
                products = tl.dot(query, keys, products)

    half = tl.load(p_half + o_image, mask=m_image, other=0.0)
    o_out = o_shift.to(tl.int64)[:, None] * IMAGES + o_image[None, :]
    tl.store(
        p_logits + o_out,
        products * tl.load(p_scale) + (half * tl.load(p_bias))[None, :],
        mask=m_shift[:, None] & m_image[None, :],
    )


@kernel
def shift_responses_kernel(
    p_logits,
    p_keys,
    p_peak,
    p_responses,
    SHIFTS,
    IMAGES,
    DEPTH,
    KEY_TERMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write ``Σ_n 2^(logit - peak)·φ_n`` of every shift, pixel by pixel.

    Tensors:
        p_logits: [SHIFTS, IMAGES] float32.
        p_keys: [KEY_TERMS, IMAGES, DEPTH] float16.
        p_peak: [1] float32: the reference, see ``online``.
        p_responses: [SHIFTS, DEPTH] float32, written.
    """
    o_shift = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_shift = o_shift < SHIFTS
    o_pixel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_pixel = o_pixel < DEPTH
    o_row = o_shift.to(tl.int64) * IMAGES
    peak = tl.load(p_peak)

    responses = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, IMAGES, BLOCK_N):
        o_image = start + tl.arange(0, BLOCK_N)
        m_image = o_image < IMAGES
        # [BLOCK_M, BLOCK_N]
        logits = tl.load(
            p_logits + o_row[:, None] + o_image[None, :],
            mask=m_shift[:, None] & m_image[None, :],
            other=float("-inf"),
        )
        weights = tl.exp2(logits - peak)
        high = weights.to(tl.float16)
        low = (weights - high.to(tl.float32)).to(tl.float16)
        for i_term in tl.static_range(KEY_TERMS):
            # [BLOCK_N, BLOCK_D]
            keys = tl.load(
                p_keys
                + (i_term * IMAGES + o_image).to(tl.int64)[:, None] * DEPTH
                + o_pixel[None, :],
                mask=m_image[:, None] & m_pixel[None, :],
                other=0.0,
            )
            responses = tl.dot(low, keys, responses)
            responses = tl.dot(high, keys, responses)

    o_out = o_shift.to(tl.int64)[:, None] * DEPTH + o_pixel[None, :]
    tl.store(p_responses + o_out, responses, mask=m_shift[:, None] & m_pixel[None, :])
