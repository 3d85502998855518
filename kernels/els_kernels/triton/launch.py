"""Launchers, one for each form: prepared tensors → states.

Every launcher takes a batch of queries that share window, range and geometry, and returns their
merged states. Grids and chunks depend only on the sizes of image, window and range.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from els_kernels.geometry import Padding, band
from els_kernels.triton import layout, tuning
from els_kernels.triton.diagonal import diagonal_kernel
from els_kernels.triton.direct import direct_kernel
from els_kernels.triton.online import merge_kernel
from els_kernels.triton.same_place import same_place_kernel

_SLAB_BYTES = 1 << 29
"""Maximum paired rows in memory."""
_NEVER = -(1 << 30)


@dataclass(frozen=True)
class Queries:
    """A batch of centred, scaled queries in units of the keys."""

    terms: Tensor
    """[T, B, C, H, W] float16."""
    scale: Tensor
    """[B] float32: the inverse of the power of two by which the queries are scaled."""
    bias: Tensor
    """[B] float32, < 0: the factor of a key's half squared norm."""
    plain: Tensor
    """[B, C, H, W] float32: the queries without their power of two."""


class State(NamedTuple):
    """Merged base-2 states of a grid of places."""

    peak: Tensor
    """[B, rows, cols] float32."""
    sums: Tensor
    """[B, rows, cols, V] float32: Σ 2^(logit - peak)·value; values depend on the kernel."""


@dataclass(frozen=True)
class Cell:
    """Query places and the places of their sources, as (row, column) pairs."""

    query_start: tuple[int, int]
    query_places: tuple[int, int]
    key_start: tuple[int, int]
    key_places: tuple[int, int]
    origin: tuple[int, int]
    """Image coordinates of the first key place."""
    window: tuple[int, int]


@dataclass(frozen=True)
class DiagonalTraversal:
    """Diagonals of a geometry, in rows of the paired layout."""

    columns: int
    """Key places along the tiles' axis."""
    lag: int
    origin: tuple[int, int]
    emit_from: int
    inner: tuple[int, int]
    diagonals: tuple[int, int]
    """First and last+1 difference of query row and key row."""
    rows: tuple[int, int]
    margin: int
    slots: int


def direct(
    queries: Tensor,
    keys: Tensor,
    batch: Queries,
    half: Tensor,
    values: Tensor,
    cell: Cell,
    arch: tuning.Arch,
) -> State:
    """Return the state of a cell by the direct form.

    Args:
        queries: [B, T, h, w, C] float16, channels last.
        keys: [KT, N, h', w', C] float16.
        batch: scale and bias.
        half: [N, H, W] float32.
        values: [N, H, W, V] float16.
        cell: query places and key places.
        arch: architecture whose tuned tiles are used.
    """
    key_terms, images, key_h, key_w, channels = keys.shape
    depth = tuning.direct_depth(math.prod(cell.window) * channels)
    config = tuning.DIRECT[arch][depth]
    places, key_places = math.prod(cell.query_places), math.prod(cell.key_places)
    tiles = -(-places // config.block_m)
    elements = key_h * key_w * max(channels, values.shape[-1])
    chunk = tuning.chunk_images(images, key_places, tiles, elements)
    peak, sums = empty_states(len(queries), -(-images // chunk), places, values)
    direct_kernel[(tiles, len(queries), peak.shape[1])](
        queries, keys, half, layout.aligned(values), batch.scale, batch.bias, peak, sums,
        *queries.shape[2:4], *cell.query_start, cell.query_places[1], places,
        key_h, key_w, *cell.key_start, *cell.key_places, images,
        *half.shape[1:], *cell.origin, cell.window[0],
        peak.shape[1], chunk,
        CHANNELS=channels, WINDOW_W=cell.window[1], TERMS=queries.shape[1],
        KEY_TERMS=min(key_terms, queries.shape[1]),
        VALUES=values.shape[-1], BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=depth,
        BLOCK_V=max(16, values.shape[-1]),
        **config.options(),
    )  # fmt: skip
    return merged(peak, sums, cell.query_places)


def diagonal(
    batch: Queries,
    keys: Tensor,
    half: Tensor,
    values: Tensor,
    traversal: DiagonalTraversal,
    window: int,
    padding: Padding,
    arch: tuning.Arch,
) -> State:
    """Return the state of every query row and tile column by the diagonal form.

    Args:
        batch: queries.
        keys: [KT, N, C, H, W] float16.
        half: [N, H, W] float32.
        values: [N, H, W, V] float16.
        traversal: the diagonals.
        window: k.
        padding: how rows and columns continue.
        arch: architecture whose tuned tiles are used.
    """
    terms, size, channels = batch.terms.shape[:3]
    pair = layout.pair_width(channels)
    key_terms = min(len(keys), terms)
    depth, config = tuning.diagonal_depth(window * pair, pair, arch, key_terms)
    query = layout.unfold_rows(
        layout.pair_rows(batch.terms.transpose(0, 1), window, padding, query=True), window, depth
    )
    rows, cols = query.shape[2:4]
    flat0, flats = (edge * cols for edge in traversal.diagonals)
    spans = layout.row_spans(
        flat0, flats - flat0, config.block_m, (rows, cols), traversal.rows, traversal.margin
    )
    table = torch.tensor(spans, dtype=torch.int32, device=keys.device)

    images = keys.shape[1]
    slab = slab_images(images, keys.shape[-2:], window, pair * len(keys))
    elements = paired_elements(keys.shape[-2:], window, pair * len(keys))
    chunk = tuning.chunk_images(min(slab, images), traversal.columns, len(spans), elements)
    chunks = -(-min(slab, images) // chunk)
    places = (rows - window + 1) * cols
    peak, sums = empty_states(size, chunks * traversal.slots, places, values)
    # A slot without pairs is empty: peak -inf, sums 0.
    peak.fill_(-math.inf)
    sums.zero_()
    for first in range(0, images, slab):
        # Each slab continues the states of the one before it.
        block = slice(first, min(first + slab, images))
        paired = layout.pair_rows(keys[:, block], window, padding, query=False, slack=depth)
        diagonal_kernel[(len(spans), size, -(-(block.stop - first) // chunk))](
            query, paired, layout.aligned(half[block]), layout.aligned(values[block]),
            batch.scale, batch.bias, table, peak, sums,
            rows, cols, paired.shape[2], traversal.columns, paired.shape[3], paired.shape[1],
            traversal.lag, *half.shape[1:], *traversal.origin,
            window, traversal.emit_from, *traversal.inner,
            chunks, chunk, traversal.slots, flats - flat0, flat0,
            TERMS=terms, KEY_TERMS=key_terms, PAIR=pair, DEPTH=depth,
            VALUES=values.shape[-1], BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            BLOCK_K=config.block_k, BLOCK_V=max(16, values.shape[-1]),
            **config.options(),
        )  # fmt: skip
    return merged(peak, sums, (rows - window + 1, cols))


def same_place(
    batch: Queries, keys: Tensor, bands: tuple[Tensor, Tensor], arch: tuning.Arch
) -> State:
    """Return the state of every place by the same-place form: its only source is itself.

    The sums are those of the channels and the weight.

    Args:
        batch: queries.
        keys: [KT, N, C, H, W] float16.
        bands: 0/1 matrices [H, H] and [W, W] float16 that sum a window.
        arch: architecture whose tuned tiles are used.
    """
    key_terms, images, channels, height, width = keys.shape
    config = tuning.SAME_PLACE[arch]
    tiles = -(-height // config.block_m) * -(-width // config.block_m)
    chunk = min(images, max(8, -(-images // -(-tuning.PROGRAMS // tiles))))
    size = len(batch.plain)
    peak = keys.new_empty(size, -(-images // chunk), height * width, dtype=torch.float32)
    sums = peak.new_empty(*peak.shape, channels + 1)
    same_place_kernel[(tiles, size, peak.shape[1])](
        batch.plain, layout.aligned(keys), batch.bias, *bands, peak, sums,
        height, width, images, peak.shape[1], chunk,
        CHANNELS=channels, KEY_TERMS=key_terms,
        BLOCK_C=1 << (channels - 1).bit_length(), BLOCK=config.block_m,
        **config.options(),
    )  # fmt: skip
    return merged(peak, sums, (height, width))


def bands(
    height: int, width: int, window: int | None, padding: Padding, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the matrices that sum a window's rows and columns; all ones for None."""
    if window is None:
        sides = (torch.ones(n, n, device=device) for n in (height, width))
    else:
        sides = (band(n, window, padding) for n in (height, width))
    rows, cols = (side.to(device, torch.float16) for side in sides)
    return rows, cols


def traversal_of(padding: Padding, height: int, width: int, window: int) -> DiagonalTraversal:
    """Return the traversal of a geometry whose tiles run along rows of the image."""
    r = window // 2
    if padding == "circular":
        return DiagonalTraversal(
            width, height - r, (0, 0), _NEVER, (0, height), (0, height), (_NEVER, -_NEVER), 0,
            height,
        )  # fmt: skip
    if padding == "valid":
        inner = height - 2 * r
        return DiagonalTraversal(
            width - 2 * r, height - (window - 1), (r, r), window - 1, (0, height),
            (1 - inner, height), (0, height), 0, inner,
        )  # fmt: skip
    inner = max(0, height - 2 * r)
    return DiagonalTraversal(
        width - 2 * r, height, (0, r), window - 1, (r, max(r, height - r)),
        (min(0, 1 - inner), max(1, inner)), (r, height + r), r, height,
    )  # fmt: skip


def edge_traversal(height: int, width: int, window: int) -> DiagonalTraversal:
    """Return the traversal of rows that attend only to the same row of the bank, zero padded."""
    r = window // 2
    return DiagonalTraversal(
        width - 2 * r, height, (0, r), window - 1, (0, 0), (0, 1), (r, height + r), r, 1
    )


def slab_images(images: int, size: tuple[int, ...], window: int, width: int) -> int:
    """Return how many images' paired rows fit the memory limit, at least one."""
    return max(1, min(images, _SLAB_BYTES // (2 * paired_elements(size, window, width))))


def paired_elements(size: tuple[int, ...], window: int, width: int) -> int:
    """Return the elements of an image's paired rows."""
    height, cols = (n + window - 1 for n in size)
    return height * cols * width


def empty_states(size: int, slots: int, places: int, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return memory for the states [size, slots, places] and their sums, without values."""
    shape = (size, slots, places)
    peak = torch.empty(shape, dtype=torch.float32, device=values.device)
    return peak, peak.new_empty(*shape, values.shape[-1])


def merged(peak: Tensor, sums: Tensor, shape: tuple[int, int]) -> State:
    """Return the merged state of all slots: of runs of slots in parallel, then of these."""
    slots = peak.shape[1]
    # Both passes are as long as the other.
    span = max(tuning.MERGE_SLOTS, math.ceil(math.sqrt(slots)))
    top, total = _merged_runs(peak, sums, span)
    if top.shape[1] > 1:
        top, total = _merged_runs(top, total, top.shape[1])
    size = len(top)
    return State(top.view(size, *shape), total.view(size, *shape, -1))


def _merged_runs(peak: Tensor, sums: Tensor, span: int) -> tuple[Tensor, Tensor]:
    """Return the states [B, runs, places] and [B, runs, places, V] of runs of ``span`` slots."""
    size, slots, places = peak.shape
    values, runs = sums.shape[-1], -(-slots // span)
    top, total = peak.new_empty(size, runs, places), peak.new_empty(size, runs, places, values)
    config = tuning.MERGE
    merge_kernel[(-(-places // config.block_m), size, runs)](
        peak, sums, top, total, slots, span, places,
        VALUES=values, BLOCK_V=1 << (values - 1).bit_length(), BLOCK_M=config.block_m,
        **config.options(),
    )  # fmt: skip
    return top, total
