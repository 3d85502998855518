"""A pass of a fold over blocks of the bank: its arguments, its results, and the ctypes call.

Arguments are those of the whole bank, so that several processes with blocks of it compute one pass.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from els_kernels.control import Control, current
from els_kernels.fold_plan import Cell, cells
from els_kernels.geometry import Geometry
from els_kernels.native.binding import _library, run_apart
from els_kernels.native.fold_lines import Line, cell_line, line

NORMALISE, STATISTICS, TOTALS, PRODUCT, MEAN = range(5)
"""Passes, as ``FoldPass`` of fold_problem.hpp."""


class FoldFrame(NamedTuple):
    """Patches of a query image: those of one cell, or all of them on one plane."""

    size: tuple[int, int]
    """Height and width of the image."""
    window: int
    geometry: Geometry
    cell: int = -1
    """Index of the cell, see ``fold_plan.cells``; −1 for the plane of ``fold_lines``."""
    answered: tuple[int, int] | None = None
    """Rows of pixels that are answered on a plane, if not all."""

    @property
    def keys_name(self) -> tuple[object, ...]:
        """Key of its patches of bank images, which no other property of the query changes."""
        return self.window, self.geometry, self.cell

    @property
    def shape(self) -> Cell:
        """Its patches, as a cell."""
        rows, cols = self.lines()
        return Cell(rows.axis, cols.axis)

    def lines(self) -> tuple[Line, Line]:
        """Return the lines of its rows and columns."""
        height, width = self.size
        if self.cell >= 0:
            cell = list(cells(height, width, self.window, self.geometry))[self.cell]
            return cell_line(cell.rows, self.geometry), cell_line(cell.cols, self.geometry)
        rows = line(height, self.window, self.geometry)
        if self.answered is not None:
            rows = rows.part(slice(*self.answered))
        return rows, line(width, self.window, self.geometry)


@dataclass(frozen=True, eq=False)
class FoldPass:
    """A pass over ranges of a bank."""

    kind: int
    frame: FoldFrame
    ranges: list[tuple[int, int]]
    """Half-open ranges of images of the whole bank, rising."""
    parts: int
    """Most tasks of a block."""
    logits: tuple[float, float, float, float]
    """Bias, scale, lowest and dead of ``ElsFoldCall``."""
    tensors: dict[str, Tensor]
    """Inputs: fields of ``ElsFoldCall``."""
    numbers: dict[str, int] = field(default_factory=dict)
    """The other fields."""
    answered: bool = True
    """Whether sums of pixels are wanted, and not those of patches alone."""


class FoldRows(NamedTuple):
    """Results of a pass: a row for each block of the ranges, in order; empty where there are none.

    Normalisers of patches have peaks [R, Q, P] int32 in units and totals [R, Q, P] float64; the
    other passes planes [R, n, h, w] float64. Totals have scalars [R, 2, Q, P] float64, statistics
    shares [images] float64 and lists of sources: weights [h, w, top] float32, codes [h, w, top] and
    origins [h, w, top, 3] int64, see ``FoldRanking``.
    """

    peaks: Tensor
    totals: Tensor
    planes: Tensor
    scalars: Tensor
    shares: Tensor
    weights: Tensor
    codes: Tensor
    origins: Tensor


class FoldSource(NamedTuple):
    """Images of one size within one block."""

    images: Tensor
    """[N, C, H, W], stored."""
    first: int
    """Number of its image 0 in the whole bank."""
    lo: int
    hi: int
    """Those that are attended to, in the whole bank."""

    @property
    def stored(self) -> Tensor:
        """The images that are attended to."""
        return self.images[self.lo - self.first : self.hi - self.first]


class _Source(ctypes.Structure):
    """``FoldSource`` of fold_problem.hpp."""

    _fields_ = (
        ("images", ctypes.c_void_p),
        ("lo", ctypes.c_int64),
        ("hi", ctypes.c_int64),
        ("first", ctypes.c_int64),
        ("height", ctypes.c_int32),
        ("width", ctypes.c_int32),
        ("crop_rows", ctypes.c_int32),
        ("crop_cols", ctypes.c_int32),
        ("rows", ctypes.c_void_p),
        ("cols", ctypes.c_void_p),
        ("row_classes", ctypes.c_void_p),
        ("col_classes", ctypes.c_void_p),
        ("first_row", ctypes.c_int32),
        ("last_row", ctypes.c_int32),
        ("shifts", ctypes.c_int32),
    )


_NUMBERS = (
    *("kernel", "threads", "kind", "channels", "rows", "cols", "window", "ring"),
    *("first_row", "last_row", "first_col", "last_col"),
    *("table_taps", "uniform_taps", "inner_table", "inner_uniform", "outer_table", "outer_uniform"),
    *("top", "parts"),
)
_POINTERS = (
    *("row_taps", "col_taps", "inner_rows", "inner_cols", "outer_rows", "outer_cols"),
    *("row_scale", "col_scale", "whole", "rest", "reference", "reach", "direction", "offset"),
    *("mean", "mean_rest", "peaks", "totals", "planes", "scalars", "shares"),
    *("weights", "codes", "origins", "control"),
)


class _Call(ctypes.Structure):
    """``ElsFoldCall`` of fold_library.hpp."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in _NUMBERS),
        ("sources", ctypes.c_void_p),
        ("sources_count", ctypes.c_int64),
        ("block_sources", ctypes.c_void_p),
        ("blocks", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("row_classes", "col_classes", "query")),
        *((name, ctypes.c_void_p) for name in ("centre", "values")),
        *((name, ctypes.c_double) for name in ("bias", "scale", "lowest", "dead")),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    )


class _Normalisers(ctypes.Structure):
    """``ElsFoldNormalisers`` of fold_library.hpp."""

    _fields_ = (
        ("blocks", ctypes.c_int64),
        ("patches", ctypes.c_int64),
        ("peaks", ctypes.c_void_p),
        ("totals", ctypes.c_void_p),
        ("lowest", ctypes.c_double),
        ("scale", ctypes.c_double),
        ("whole", ctypes.c_void_p),
        ("rest", ctypes.c_void_p),
        ("log_z", ctypes.c_void_p),
    )


def run_pass(
    kernel: int,
    lanes: int,
    blocks: Sequence[Sequence[FoldSource]],
    pixels: dict[str, Tensor],
    each: FoldPass,
) -> FoldRows:
    """Return the results of a pass over blocks.

    Args:
        kernel: index of the instruction set.
        lanes: numbers of its vectors.
        blocks: sources of each block.
        pixels: how they are read: ``centre``, and ``values`` for those of bytes.
        each: the pass.

    Raises:
        ComputationStoppedError: The current ``Control`` was stopped.
        MemoryError: The partial results do not fit in memory.
    """
    rows, cols = each.frame.lines()
    sources = [source for block in blocks for source in block]
    found = _results(each, rows, cols, len(blocks), sum(one.hi - one.lo for one in sources))
    if not blocks:
        return found
    control = current() or Control()
    ring = cols.ring([source.images.shape[3] for source in sources], lanes)
    table, lines = _table(sources, rows, cols, ring)
    firsts = torch.tensor([0, *(len(block) for block in blocks)]).cumsum(0)
    padding = torch.full((ring - len(cols.classes()),), -1, dtype=torch.int32)
    own = {"row_classes": rows.classes(), "col_classes": torch.cat([cols.classes(), padding])}
    if "col_classes" in each.tensors:
        own["col_classes"] = torch.cat([each.tensors["col_classes"], padding])
    tensors = {**pixels, **each.tensors, **found._asdict(), "block_sources": firsts}
    tensors |= {name: own[name] for name in own if name == "col_classes" or name not in tensors}
    channels = each.tensors["query"].shape[0]
    bias, scale, lowest, dead = each.logits
    call = _Call(
        kernel=kernel,
        threads=torch.get_num_threads(),
        kind=each.kind,
        channels=channels,
        rows=rows.size,
        cols=cols.size,
        window=each.frame.window,
        ring=ring,
        first_row=rows.image.start,
        last_row=rows.image.stop if each.answered else rows.image.start,
        first_col=cols.image.start,
        last_col=cols.image.stop,
        parts=each.parts,
        sources=ctypes.addressof(table),
        sources_count=len(table),
        blocks=len(blocks),
        bias=bias,
        scale=scale,
        lowest=lowest,
        dead=dead,
        control=control.address,
        **each.numbers,
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
    )
    alive = (sources, table, lines, tensors)
    run_apart(_library().els_fold, call, control, alive, "a fold")
    return found


def merge_normalisers(
    peaks: Tensor, totals: Tensor, logits: tuple[float, float, float, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the normalisers of a whole bank: whole part, rest, and log₂ in bits, [Q, P].

    Args:
        peaks: [R, Q, P] int32 of all blocks in order.
        totals: [R, Q, P] float64.
        logits: of the pass.
    """
    patches = peaks.shape[1:]
    whole, rest = torch.empty(patches, dtype=torch.int32), torch.empty(patches)
    log_z = torch.empty(patches, dtype=torch.float64)
    _, scale, lowest, _ = logits
    call = _Normalisers(
        blocks=len(peaks),
        patches=math.prod(patches),
        peaks=peaks.data_ptr(),
        totals=totals.data_ptr(),
        lowest=lowest,
        scale=scale,
        whole=whole.data_ptr(),
        rest=rest.data_ptr(),
        log_z=log_z.data_ptr(),
    )
    _library().els_fold_normalisers(ctypes.byref(call))
    return whole, rest, log_z


def merge_lists(found: Sequence[FoldRows], top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return weights, codes and origins of the sources of several results: see ``FoldRows``.

    Of falling weight; equal ones in the order of their codes, as one process lists them.
    """
    if len(found) == 1:
        return found[0].weights, found[0].codes, found[0].origins
    weights = torch.cat([one.weights for one in found], -1)
    codes = torch.cat([one.codes for one in found], -1)
    origins = torch.cat([one.origins for one in found], -2)
    # What is no source has a weight of 0, less than any.
    order = codes.argsort(dim=-1)
    order = order.gather(
        -1, weights.gather(-1, order).argsort(dim=-1, descending=True, stable=True)
    )
    order = order[..., :top]
    places = order[..., None].expand(*order.shape, 3)
    return weights.gather(-1, order), codes.gather(-1, order), origins.gather(-2, places)


def _results(each: FoldPass, rows: Line, cols: Line, blocks: int, images: int) -> FoldRows:
    """Return the memory of the results of a pass."""
    channels, kind = each.tensors["query"].shape[0], each.kind
    patches = rows.axis.places, cols.axis.places
    height, width = (one.image.stop - one.image.start for one in (rows, cols))
    planes = {STATISTICS: 2 + 2 * channels, TOTALS: 1 + channels}.get(kind, channels)
    own = {
        "peaks": (kind == NORMALISE, (blocks, *patches), torch.int32),
        "totals": (kind == NORMALISE, (blocks, *patches), torch.float64),
        "planes": (kind != NORMALISE, (blocks, planes, height, width), torch.float64),
        "scalars": (kind == TOTALS, (blocks, 2, *patches), torch.float64),
        "shares": (kind == STATISTICS, (images,), torch.float64),
    }
    top = each.numbers.get("top", 0)
    # Also of a process that has none of the images.
    lists = {
        "weights": torch.zeros(height, width, top),
        "codes": torch.full((height, width, top), -1),
        "origins": torch.full((height, width, top, 3), -1),
    }
    return FoldRows(
        **{
            name: torch.empty(shape if wanted else 0, dtype=dtype)
            for name, (wanted, shape, dtype) in own.items()
        },
        **lists,
    )


def _table(
    sources: Sequence[FoldSource], rows: Line, cols: Line, ring: int
) -> tuple[ctypes.Array[_Source], list[Tensor]]:
    """Return the sources of a call, and the tensors that they point to."""
    # A bank may have thousands of groups, of few heights and widths.
    down = {h: rows.key_line(h) for h in {source.images.shape[2] for source in sources}}
    along = {w: cols.key_ring(w, ring) for w in {source.images.shape[3] for source in sources}}
    table = (_Source * len(sources))()
    for one, source in zip(table, sources, strict=True):
        height, width = source.images.shape[2:]
        vertical, horizontal = down[height], along[width]
        one.images, one.first = source.images.data_ptr(), source.first
        one.lo, one.hi = source.lo - source.first, source.hi - source.first
        one.height, one.width = height, width
        one.crop_rows, one.crop_cols = len(vertical.places), len(horizontal.places)
        one.rows, one.cols = vertical.places.data_ptr(), horizontal.places.data_ptr()
        one.row_classes = vertical.classes.data_ptr()
        one.col_classes = horizontal.classes.data_ptr()
        one.first_row, one.last_row = vertical.displacements
        one.shifts = horizontal.displacements[1]
    found = [*down.values(), *along.values()]
    return table, [tensor for each in found for tensor in (each.places, each.classes)]
