"""ctypes binding of the fold: cells, taps and units here, sweeps in C++."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from els_kernels.control import Control, current
from els_kernels.fold_plan import Axis, Cell, FoldQuery, extend, own_patch
from els_kernels.geometry import Geometry
from els_kernels.native.binding import _library, run_apart
from els_kernels.native.fold_bank import FoldCrop, FoldPixels, NativeFoldBank
from els_kernels.torch_fold import TiledFold, folded_weight, removed

_LOG2E = math.log2(math.e)
_PRECISION = 20
"""Weights that do not count are together 2^-20 of a patch's normaliser at most."""
_LEAST_PLAIN = 0.15
"""ρ from which the taps of a whole axis fit a float32 without scaling: e^(-1/2ρ²) = 2e-10."""


class _Source(ctypes.Structure):
    """``FoldSource`` of fold_problem.hpp."""

    _fields_ = (
        ("images", ctypes.c_void_p),
        ("lo", ctypes.c_int64),
        ("hi", ctypes.c_int64),
        ("height", ctypes.c_int32),
        ("width", ctypes.c_int32),
        ("crop_rows", ctypes.c_int32),
        ("crop_cols", ctypes.c_int32),
        ("rows", ctypes.c_void_p),
        ("cols", ctypes.c_void_p),
    )


class _Call(ctypes.Structure):
    """``ElsFoldCall`` of fold_library.hpp."""

    _fields_ = (
        ("kernel", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("channels", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("cols", ctypes.c_int32),
        ("window", ctypes.c_int32),
        ("same_rows", ctypes.c_int32),
        ("same_cols", ctypes.c_int32),
        ("table_taps", ctypes.c_int32),
        ("uniform_taps", ctypes.c_int32),
        ("sources", ctypes.c_void_p),
        ("sources_count", ctypes.c_int64),
        ("query", ctypes.c_void_p),
        ("bias", ctypes.c_double),
        ("scale", ctypes.c_double),
        ("lowest", ctypes.c_double),
        ("dead", ctypes.c_double),
        ("row_taps", ctypes.c_void_p),
        ("col_taps", ctypes.c_void_p),
        ("row_scale", ctypes.c_void_p),
        ("col_scale", ctypes.c_void_p),
        ("centre", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("log_z", ctypes.c_void_p),
        ("fold", ctypes.c_void_p),
        ("control", ctypes.c_void_p),
    )


class _Images(NamedTuple):
    """Images of one size that are attended to, and their crops."""

    group: Tensor
    """[N, C, H, W]."""
    begin: int
    end: int
    rows: Tensor
    """int32: row of the image in each row of a crop; -1 outside it."""
    cols: Tensor


class NativeFold(NativeFoldBank):
    """A bank prepared for folds; queries far from it are computed in float64: ``far_queries``."""

    @cached_property
    def _exact(self) -> TiledFold:
        return TiledFold(self.groups)

    def __call__(self, query: FoldQuery) -> tuple[Tensor, Tensor]:
        """Return mean [C, H, W] and log evidence [H, W].

        Raises:
            ComputationStoppedError: The current ``Control`` was stopped.
            MemoryError: The partial results do not fit in memory.
        """
        with torch.device("cpu"):
            crops = self._crops(query)
            if not all(crop.resolved for crop in crops):
                return self._exact(query)
            mean, evidence = torch.zeros_like(query.x).double(), torch.zeros(query.size).double()
            for crop in crops:
                log_z, folded = self._fold(query, crop, [query.limits])
                crop.cell.scatter(folded, mean)
                energy = crop.squares / (2 * query.s * query.s)
                own_patch(log_z / _LOG2E - energy, crop.cell, evidence)
            evidence = extend(evidence, query.window, query.geometry)
            return (mean + self.centre).float(), evidence.float()

    def without(self, query: FoldQuery, image: int) -> tuple[Tensor, Tensor]:
        """Return the mean [C, H, W] without a bank image, and its weight [H, W].

        Raises:
            ComputationStoppedError, MemoryError: As a call.
        """
        with torch.device("cpu"):
            crops = self._crops(query)
            if not all(crop.resolved for crop in crops):
                return self._exact.without(query, image)
            mean = torch.zeros_like(query.x).double()
            weight = torch.zeros_like(mean[:1])
            own, others = removed(query.limits, image)
            for crop in crops:
                log_own, _ = self._fold(query, crop, own)
                log_rest, folded = self._fold(query, crop, others)
                crop.cell.scatter(folded, mean)
                share = folded_weight(log_own, log_rest, *query.taps(crop.cell))
                crop.cell.scatter(share, weight)
            return (mean + self.centre).float(), weight[0].float()

    def _crops(self, query: FoldQuery) -> list[FoldCrop]:
        named = query.window, query.geometry
        cells = enumerate(query.cells())
        return [self.crop_of(query, cell, (index, *named)) for index, cell in cells]

    def _fold(
        self, query: FoldQuery, crop: FoldCrop, ranges: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """Return log₂ of the normaliser of each patch [Q, P], and the folded mean [C, X, Y].

        Args:
            query: one image.
            crop: of the query.
            ranges: of bank images.
        """
        sources = [source for limits in ranges for source in self._sources(crop.cell, limits)]
        call = _FoldCall(self.kernel, crop, sources, self.pixels)
        call.set_taps(crop.cell, query.size, query.fold, query.geometry)
        return call.run()

    def _sources(self, cell: Cell, limits: tuple[int, int]) -> list[_Images]:
        """Return the images of each group that are attended to, and where their crops are."""
        lo, hi = limits
        # A bank may have thousands of groups, of few heights and widths.
        rows: dict[int, Tensor] = {}
        cols: dict[int, Tensor] = {}
        sources: list[_Images] = []
        for group in self.groups:
            begin, end = max(0, lo), min(len(group), hi)
            if begin < end:
                height, width = group.shape[2:]
                if height not in rows:
                    rows[height] = cell.rows.keys(height).int()
                if width not in cols:
                    cols[width] = cell.cols.keys(width).int()
                sources.append(_Images(group, begin, end, rows[height], cols[width]))
            lo, hi = lo - len(group), hi - len(group)
        return sources


class _FoldCall:
    """Arguments of one call of the library, and the buffers that they point to."""

    def __init__(
        self,
        kernel: int,
        crop: FoldCrop,
        sources: list[_Images],
        pixels: FoldPixels,
    ) -> None:
        cell, units = crop.cell, crop.units
        channels, rows, cols = crop.pixels.shape
        places = cell.rows.places, cell.cols.places
        self._control = current() or Control()
        self._query = (crop.pixels * units.product).float().contiguous()
        self._sources, self._pixels = sources, pixels
        self._log_z = crop.pixels.new_empty(places)
        self._fold = torch.empty_like(crop.pixels)
        table = (_Source * len(sources))()
        for source, part in zip(table, sources, strict=True):
            source.images, source.lo, source.hi = part.group.data_ptr(), part.begin, part.end
            source.height, source.width = part.group.shape[2:]
            source.crop_rows, source.crop_cols = len(part.rows), len(part.cols)
            source.rows, source.cols = part.rows.data_ptr(), part.cols.data_ptr()
        self._table = table
        places_of = ((one.end - one.begin) * len(one.rows) * len(one.cols) for one in sources)
        self._call = _Call(
            kernel=kernel,
            threads=torch.get_num_threads(),
            channels=channels,
            rows=rows,
            cols=cols,
            window=cell.rows.window,
            same_rows=cell.rows.same,
            same_cols=cell.cols.same,
            sources=ctypes.addressof(table),
            sources_count=len(sources),
            query=self._query.data_ptr(),
            bias=units.bias,
            scale=math.exp2(-units.bits),
            lowest=units.lowest,
            dead=_PRECISION + math.log2(sum(places_of)),
            centre=pixels.centre.data_ptr(),
            values=None if pixels.values is None else pixels.values.data_ptr(),
            log_z=self._log_z.data_ptr(),
            fold=self._fold.data_ptr(),
            control=self._control.address,
        )

    def set_taps(self, cell: Cell, size: tuple[int, int], fold: float, geometry: Geometry) -> None:
        """Set the weights of the fold along rows and columns of an image [H, W]."""
        self._row_taps, self._row_scale = line_taps(cell.rows, size[0], fold, geometry)
        self._col_taps, self._col_scale = line_taps(cell.cols, size[1], fold, geometry)
        self._call.table_taps = self._col_taps.ndim == 2
        self._call.uniform_taps = fold == math.inf
        self._call.row_taps = self._row_taps.data_ptr()
        self._call.col_taps = self._col_taps.data_ptr()
        self._call.row_scale = self._row_scale.data_ptr()
        self._call.col_scale = self._col_scale.data_ptr()

    def run(self) -> tuple[Tensor, Tensor]:
        """Return log₂ of the normaliser of each patch [Q, P] and the folded mean [C, X, Y]."""
        run_apart(_library().els_fold, self._call, self._control, self, "a fold")
        return self._log_z, self._fold


def line_taps(axis: Axis, length: int, fold: float, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Return taps [k] of all places and a scale of each [X]; or taps [X, k] and scales of 1."""
    table = axis.taps(length, fold, geometry)
    if fold < _LEAST_PLAIN and axis.window > 1:
        return table.float(), torch.ones(len(table))
    r = axis.window // 2
    distance = (torch.arange(axis.window).double() - r).square() / max(r, 1) ** 2
    taps = torch.exp(-distance / (2 * fold * fold)) if r else torch.ones(1).double()
    return taps.float(), (table.amax(1) / taps[table.argmax(1)]).float()
