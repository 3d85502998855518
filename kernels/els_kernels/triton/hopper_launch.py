"""Launcher of the diagonal form for Hopper: the inputs and states of ``launch.diagonal``.

Keys' norms are columns of the product. A logit is a box sum and f·n(t), with n the half norm of
its window and f a factor of the query. Sums run along a diagonal: a row adds f·n(t) - f·n(t - 1),
and the row with which the first window of a query is whole adds f·n(t) alone. Before it all columns
are zero, so that a box sum does not depend on where its tile begins.

    column      0 to 2             3 to 5              6             7
    of a key    n(t), 3 terms      n(t - 1), 3 terms   n(t), first   n(t - 1), first
    of a query  f, first           -f, first           f, third      -f, third
    its 2nd     f, second          -f, second          0             0

Three terms of half precision hold a float32 norm, and a product with f in three terms (the third
only times the first of the norm) is exact to 2^-32. What a matrix unit cuts off f·n(t) leaves with
the next row, as it cuts the same bits off both.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad
from triton import knobs
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from els_kernels.geometry import Padding
from els_kernels.triton import launch, layout, precision, tuning
from els_kernels.triton.hopper import hopper_kernel
from els_kernels.triton.launch import DiagonalTraversal, Queries, State
from els_kernels.triton.tuning import NORM_COLUMNS

_OFFSETS = 1 << 31
"""Elements that an offset of 32 bits reaches."""


def serves(arch: tuning.Arch, batch: Queries, window: int, bank_terms: int) -> bool:
    """Return whether there is a tile for a window, and a compiler for the kernel.

    Triton does not interpret Gluon, and before 3.9 names its copies otherwise.
    """
    terms, _, channels, height, width = batch.terms.shape
    known = hasattr(async_copy, "async_load") and not knobs.runtime.interpret
    if arch != "sm90" or not known:
        return False
    states = max(height, width) * height * width * layout.value_width(channels, bank_terms)
    tile = tuning.hopper_tile(channels, window, terms, bank_terms)
    return tile is not None and states < _OFFSETS


def diagonal(
    batch: Queries,
    keys: Tensor,
    half: Tensor,
    values: Tensor,
    traversal: DiagonalTraversal,
    window: int,
    padding: Padding,
) -> State:
    """Return the state of every query row and tile column: see ``launch.diagonal``.

    Raises:
        ValueError: the tuning table has no tile for the window.
    """
    terms, size, channels = batch.terms.shape[:3]
    pair = layout.pair_width(channels)
    key_terms = min(len(keys), terms)
    tile = tuning.hopper_tile(channels, window, terms, len(keys))
    if tile is None:
        raise ValueError(f"window: expected one with a tile for Hopper, got {window}")
    depth, config = tile
    exponent = _exponent(window * window * channels, len(keys))
    scale, smaller, factors = _factors(batch, exponent)
    query = layout.unfold_rows(
        layout.pair_rows(batch.terms.transpose(0, 1), window, padding, query=True), window, depth
    )
    rows, cols = query.shape[2:4]
    query *= smaller[:, None, None, None, None]
    _write_factors(query[..., depth - NORM_COLUMNS :], factors, window)
    # Places beside a query are zero, so that a tile may overhang it.
    query = pad(query.flatten(2, 3), (0, 0, config.block_m, config.block_m))

    flat0, end = (edge * cols for edge in traversal.diagonals)
    images, width = keys.shape[1], pair * len(keys) + NORM_COLUMNS
    slab = launch.slab_images(images, keys.shape[-2:], window, width)
    # Chunks, and so results, do not depend on how many images share a tile.
    chunk = tuning.chunk_images(
        min(slab, images), traversal.columns, -(-(end - flat0) // config.block_m),
        launch.paired_elements(keys.shape[-2:], window, width),
    )  # fmt: skip
    chunks = -(-min(slab, images) // chunk)
    places = (rows - window + 1) * cols
    peak, sums = launch.empty_states(size, chunks * traversal.slots, places, values)
    # A slot without pairs is empty: peak -inf, sums 0.
    peak.fill_(-math.inf)
    sums.zero_()
    share = _share(size, max(query[0].numel(), sums[0].numel()))
    spans = layout.row_spans(
        flat0, end - flat0, config.block_m // share, (rows, cols), traversal.rows, traversal.margin
    )
    table = torch.tensor(spans, dtype=torch.int32, device=keys.device)
    for first in range(0, images, slab):
        # Each slab continues the states of the one before it.
        block = slice(first, min(first + slab, images))
        paired = layout.pair_rows(keys[:, block], window, padding, query=False, slack=depth)
        columns = _norm_columns(half[block], traversal, window, padding, exponent, paired.shape[2])
        hopper_kernel[(len(spans), -(-size // share), -(-(block.stop - first) // chunk))](
            query, paired, columns, layout.aligned(values[block]), scale, table, peak, sums,
            rows, cols, query.shape[2], size, share, config.block_m // share,
            paired.shape[2], traversal.columns, paired.shape[3], paired.shape[1],
            traversal.lag, *half.shape[1:], *traversal.origin,
            window, traversal.emit_from, *traversal.inner,
            chunks, chunk, traversal.slots, end - flat0, flat0, config.block_m,
            TERMS=terms, KEY_TERMS=key_terms, PAIR=pair, DEPTH=depth,
            VALUES=values.shape[-1], BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            BLOCK_K=config.block_k, BLOCK_V=max(8, values.shape[-1]), BUFFERS=config.num_stages,
            **config.options(),
        )  # fmt: skip
    return launch.merged(peak, sums, (rows - window + 1, cols))


def _share(size: int, elements: int) -> int:
    """Return how many images of a batch share a tile: short diagonals fill its lanes better."""
    share = min(tuning.SHARED_BY, 1 << (size - 1).bit_length())
    while share > 1 and share * elements >= _OFFSETS:
        share //= 2
    return share


def _exponent(depth: int, key_terms: int) -> int:
    """Return e for which half norms of windows of ``depth`` pixels are at most 2^(15 + e)."""
    largest = precision.LARGEST[key_terms]
    return max(0, math.ceil(math.log2(depth * largest * largest / 2)) - 15)


def _factors(batch: Queries, exponent: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return scale [B], the power of two that keeps factors in range [B], and factors [3, B].

    The power makes queries smaller that are small beside their bank, whose logits are its norms.
    """
    factor = batch.bias.double() / batch.scale.double() * 2.0**exponent
    above = (torch.frexp(factor).exponent - 15).clamp(min=0)
    smaller = torch.ldexp(torch.ones_like(factor), -above)
    terms = precision.split(factor * smaller, 3)
    return (batch.scale.double() / smaller).float(), smaller.half(), terms


def _write_factors(columns: Tensor, factors: Tensor, window: int) -> None:
    """Write the factors of norms to the columns [B, T, R, W', 8] of queries."""
    first, second, third = factors[:, :, None, None]
    terms = columns.shape[1]
    # The window of a row is whole from row k - 1 on, that of the row before from row k on.
    for at, rows, sign in ((0, slice(window - 1, None), 1), (1, slice(window, None), -1)):
        part = columns[:, :, rows]
        part[:, 0, ..., 3 * at : 3 * at + 3] = sign * first[..., None]
        # One term of a query leaves the second of its factor to the first of the norm.
        part[:, 0, ..., 6 + at] = sign * (third if terms > 1 else second)
        if terms > 1:
            part[:, 1, ..., 3 * at : 3 * at + 3] = sign * second[..., None]


def _norm_columns(
    half: Tensor,
    traversal: DiagonalTraversal,
    window: int,
    padding: Padding,
    exponent: int,
    rows: int,
) -> Tensor:
    """Return the columns of norms [N, key rows, key columns, 8] float16, times 2^-exponent.

    Args:
        half: ‖p‖²/2 of the window at each place, [N, H, W] float32.
        traversal: where key rows lie in the image.
        window: k.
        padding: how rows continue; other than on the torus, rows that end no window have none.
        exponent: see ``_exponent``.
        rows: key rows.
    """
    if padding == "circular":
        new = half.roll(window // 2, 1)
        old = new.roll(1, 1)
    else:
        row0, col0 = traversal.origin
        whole = slice(row0, row0 + rows - window + 1)
        new = pad(half[:, whole, col0 : col0 + traversal.columns], (0, 0, window - 1, 0))
        old = pad(new[:, :-1], (0, 0, 1, 0))
    columns = half.new_empty(*new.shape, NORM_COLUMNS, dtype=torch.float16)
    for at, norms in enumerate((new, old)):
        terms = precision.split(norms.double() * 2.0**-exponent, 3)
        columns[..., 3 * at : 3 * at + 3] = terms.movedim(0, -1)
        columns[..., 6 + at] = terms[0]
    return columns
