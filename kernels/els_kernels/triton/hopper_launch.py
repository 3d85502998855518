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
only times the first of the norm) is exact to 2^-32. A query of one term has the second of f in
the place of the third. What a matrix unit cuts off f·n(t) nearly leaves with the next row, which
cuts it at about the same bit.
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
    # Half norms times this power of two are at most 2^15.
    unit = torch.ldexp(torch.ones_like(half[0, 0, 0]), 15 - torch.frexp(half.amax()).exponent)
    scale, smaller, factors = _factors(batch, unit)
    # Not in half precision, which does not have all these powers.
    images = (batch.terms.transpose(0, 1) * smaller[:, None, None, None, None]).half()
    query = layout.unfold_rows(layout.pair_rows(images, window, padding, query=True), window, depth)
    rows, cols = query.shape[2:4]
    _write_factors(query[..., depth - NORM_COLUMNS :], factors, window)
    # Places beside a query are zero, so that a tile may overhang it.
    query = pad(query.flatten(2, 3), (0, 0, config.block_m, config.block_m))

    flat0, end = (edge * cols for edge in traversal.diagonals)
    count, width = keys.shape[1], pair * len(keys) + NORM_COLUMNS
    slab = launch.slab_images(count, keys.shape[-2:], window, width)
    # Chunks, and so results, do not depend on how many images share a tile.
    chunk = tuning.chunk_images(
        min(slab, count), traversal.columns, -(-(end - flat0) // config.block_m),
        launch.paired_elements(keys.shape[-2:], window, width),
    )  # fmt: skip
    chunks = -(-min(slab, count) // chunk)
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
    for first in range(0, count, slab):
        # Each slab continues the states of the one before it.
        block = slice(first, min(first + slab, count))
        paired = layout.pair_rows(keys[:, block], window, padding, query=False, slack=depth)
        columns = _norm_columns(half[block], traversal, window, padding, unit, paired.shape[2])
        hopper_kernel[(len(spans), -(-size // share), -(-(block.stop - first) // chunk))](
            query, paired, columns, layout.aligned(values[block]), scale, table, peak, sums,
            rows, cols, query.shape[2], size, share, config.block_m // share,
            paired.shape[2], traversal.columns, paired.shape[3], paired.shape[1],
            traversal.lag, *half.shape[1:], *traversal.origin,
            window, traversal.emit_from, *traversal.inner,
            chunks, chunk, traversal.slots, end - flat0, flat0,
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


def _factors(batch: Queries, unit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return scale [B], the power of two that keeps factors in range [B], and factors [3, B].

    The power makes queries smaller that are small beside their bank, whose logits are its norms.

    Args:
        batch: queries.
        unit: power of two that norms are multiplied by.
    """
    factor = batch.bias.double() / batch.scale.double() / unit.double()
    above = (torch.frexp(factor).exponent - 15).clamp(min=0)
    smaller = torch.ldexp(torch.ones_like(factor), -above)
    terms = precision.split(factor * smaller, 3)
    return (batch.scale.double() / smaller).float(), smaller.float(), terms


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
    unit: Tensor,
    rows: int,
) -> Tensor:
    """Return the columns of norms [N, key rows, key columns, 8] float16, times ``unit``.

    Args:
        half: ‖p‖²/2 of the window at each place, [N, H, W] float32.
        traversal: where key rows lie in the image.
        window: k.
        padding: how rows continue; other than on the torus, rows that end no window have none.
        unit: power of two.
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
        terms = precision.split(norms.double() * unit, 3)
        columns[..., 3 * at : 3 * at + 3] = terms.movedim(0, -1)
        columns[..., 6 + at] = terms[0]
    return columns
