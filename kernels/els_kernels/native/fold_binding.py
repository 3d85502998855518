"""ctypes binding of the fold: levels, taps and units here, sweeps in C++.

Logits are integers in units of 2^-bits, modulo 2^32: as fine as keeps the difference of any two
logits of a patch below 2^31. Box sums of integers are exact, whatever the size of a logit.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from els_kernels.control import Control, checkpoint, current
from els_kernels.fold_plan import Axis, Cell, cells, extend, own_patch
from els_kernels.geometry import Geometry
from els_kernels.native.binding import _library, instruction_sets, run_apart
from els_kernels.native.far_queries import MOST_ERROR, is_far
from els_kernels.torch_fold import TiledFold, bank_centre, box_sums, centred

_LOG2E = math.log2(math.e)
_MOST_BITS = 20.0
_SPARE = 100.0
"""Bits of a logit for the headroom of running maxima, and for rounding."""
_PRECISION = 20
"""Weights that do not count are together 2^-20 of a patch's normaliser at most."""
_LEAST_PLAIN = 0.15
"""ρ from which the taps of a whole axis fit a float32 without scaling: e^(-1/2ρ²) = 2e-10."""
_TILE = 1 << 20
"""Pixels whose norms are computed together."""


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


class FoldPixels(NamedTuple):
    """How stored pixels are read: less the centre of the bank."""

    centre: Tensor
    """[C] float32."""
    values: Tensor | None
    """[C, 256] float32: pixel of each byte, less the centre; None for a bank in float32."""

    @classmethod
    def of(cls, centre: Tensor, dtype: torch.dtype) -> FoldPixels:
        """Return those of a bank with a centre [C, 1, 1] float64."""
        values = None
        if dtype == torch.uint8:
            every = torch.arange(256, dtype=torch.uint8).expand(1, len(centre), 1, 256)
            values = centred(every, centre)[0, :, 0].contiguous()
        return cls(centre.flatten().float().contiguous(), values)


class _Images(NamedTuple):
    """Images of one size that are attended to, and their crops."""

    group: Tensor
    """[N, C, H, W]."""
    begin: int
    end: int
    rows: Tensor
    """int32: row of the image in each row of a crop; -1 outside it."""
    cols: Tensor


class FoldUnits(NamedTuple):
    """How logits of a cell are written as integers."""

    bits: float
    """log₂ of the units of a bit."""
    product: float
    """Units of a product of centred pixels of query and key."""
    bias: float
    """Units of a key's squared norm."""
    lowest: float
    """Units below every logit."""
    error: float
    """Bits that a logit may be wrong by."""


class NativeFold:
    """A bank as it is stored, as groups of images of one size.

    Pixels are decoded and centred where they are read, once for some displacements of an image: the
    bank needs no second copy.
    """

    def __init__(self, groups: Sequence[Tensor], *, instruction_set: str | None = None) -> None:
        """Prepare a bank.

        Args:
            groups: [N, C, H, W] on the CPU, of one size each, float32, or uint8 v for v/127.5 − 1.
            instruction_set: one of ``instruction_sets()``; None for the best.

        Raises:
            ValueError: The bank is not on the CPU, or the instruction set is unknown.
            RuntimeError: The library was not built, or cannot be loaded.
        """
        device = groups[0].device
        if device.type != "cpu":
            raise ValueError(f"native: expected a bank on the CPU, got one on {device}")
        known = instruction_sets()
        name = known[0] if instruction_set is None else instruction_set
        if name not in known:
            raise ValueError(f"instruction_set: expected one of {', '.join(known)}, got {name!r}")
        self._kernel = known.index(name)
        self._centre = bank_centre(groups)
        self._groups = list(groups)
        self._pixels = FoldPixels.of(self._centre, groups[0].dtype)
        self._norms: dict[tuple[object, ...], float] = {}
        self._largest = max(_largest(group, self._centre) for group in groups)
        self._exact = TiledFold(groups)

    def __call__(
        self,
        x: Tensor,
        a: float,
        s: float,
        window: int,
        limits: tuple[int, int],
        fold: float,
        geometry: Geometry,
    ) -> tuple[Tensor, Tensor]:
        """Return mean [C, H, W] and log evidence [H, W] of one image [C, H, W].

        An image far from the bank is computed in float64 where integers do not resolve its logits:
        see ``far_queries``.

        Raises:
            ComputationStoppedError: The current ``Control`` was stopped.
            MemoryError: The partial results do not fit in memory.
        """
        height, width = x.shape[1:]
        with torch.device("cpu"):
            query = x.double() - a * self._centre
            mean, evidence = torch.zeros_like(query), torch.zeros_like(query[0])
            far = is_far(float(query.abs().amax()), self._largest, a, s)
            for index, cell in enumerate(cells(height, width, window, geometry)):
                crop = cell.query(query)
                squares = box_sums(crop.square().sum(0), window)
                key = self._largest_norm(cell, (index, window, geometry))
                units = fold_units(math.sqrt(float(squares.max())), key, window * window, a, s)
                if far and units.error * math.log(2) > MOST_ERROR:
                    return self._exact(x, a, s, window, limits, fold, geometry)
                sources = self._sources(cell, limits)
                call = _FoldCall(self._kernel, cell, crop, units, sources, self._pixels)
                call.set_taps(cell, (height, width), fold, geometry)
                log_z, folded = call.run()
                cell.scatter(folded, mean)
                own_patch(log_z / _LOG2E - squares / (2 * s * s), cell, evidence)
            return (mean + self._centre).float(), extend(evidence, window, geometry).float()

    def _largest_norm(self, cell: Cell, name: tuple[object, ...]) -> float:
        """Return the largest norm of a patch of the bank, whatever the range; computed once."""
        if name not in self._norms:
            largest = 0.0
            for group in self._groups:
                together = max(1, _TILE // group[0].numel())
                for first in range(0, len(group), together):
                    checkpoint()
                    images = centred(group[first : first + together], self._centre)
                    keys = cell.keys(images).double()
                    sums = box_sums(keys.square().sum(1), cell.rows.window)
                    largest = max(largest, float(sums.max()))
            self._norms[name] = math.sqrt(largest)
        return self._norms[name]

    def _sources(self, cell: Cell, limits: tuple[int, int]) -> list[_Images]:
        """Return the images of each group that are attended to, and where their crops are."""
        lo, hi = limits
        # A bank may have thousands of groups, of few heights and widths.
        rows: dict[int, Tensor] = {}
        cols: dict[int, Tensor] = {}
        sources: list[_Images] = []
        for group in self._groups:
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


def _largest(group: Tensor, centre: Tensor) -> float:
    """Return the largest |pixel| of stored images [N, C, H, W], from the centre of the bank."""
    ends = torch.stack([group.amin((0, 2, 3)), group.amax((0, 2, 3))])
    return float(centred(ends[..., None, None], centre).abs().max())


def fold_units(query: float, key: float, pixels: int, a: float, s: float) -> FoldUnits:
    """Return the units in which logits of patches of these norms fit 31 bits.

    Args:
        query: largest norm of a centred patch of the query.
        key: largest norm of a centred patch of the bank.
        pixels: of a patch.
        a: signal scale.
        s: noise scale.
    """
    per_product = a / s / s * _LOG2E
    per_norm = -(a / s) * (a / s) * _LOG2E / 2
    # A logit is a product of at most 2qk bits minus k², for keys of any norm up to k.
    root = math.sqrt(_LOG2E / 2)
    q, k = query / s * root, a / s * key * root
    highest = q * q if q < k else 2 * q * k - k * k
    spread = highest + 2 * q * k + k * k + _SPARE
    bits = min(_MOST_BITS, 31 - math.log2(spread))
    lowest = per_norm * key * key - per_product * query * key
    unit = math.exp2(bits)
    # Products and norm are rounded to units, products to floats before.
    rounding = pixels / 2 + 1 - 2.0**-24 * lowest * unit
    return FoldUnits(
        bits,
        per_product * unit,
        per_norm * unit,
        math.floor(lowest * unit) - 1.0,
        rounding / unit,
    )


class _FoldCall:
    """Arguments of one call of the library, and the buffers that they point to."""

    def __init__(
        self,
        kernel: int,
        cell: Cell,
        crop: Tensor,
        units: FoldUnits,
        sources: list[_Images],
        pixels: FoldPixels,
    ) -> None:
        channels, rows, cols = crop.shape
        places = cell.rows.places, cell.cols.places
        self._control = current() or Control()
        self._query = (crop * units.product).float().contiguous()
        self._sources, self._pixels = sources, pixels
        self._log_z = crop.new_empty(places)
        self._fold = torch.empty_like(crop)
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
