"""ctypes call of a pass of moments of a fold over the bank."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from els_kernels.control import Control, current
from els_kernels.native.binding import _library, run_apart
from els_kernels.native.fold_bank import FoldUnits, NativeFoldBank
from els_kernels.native.fold_lines import Line

NORMALISE, STATISTICS, TOTALS, PRODUCT = range(4)
"""Passes, as ``FoldPass`` of fold_problem.hpp."""
_TASKS = 4
"""Least number of tasks of a pass that have sums of their own: ``kLeastFoldTasks``."""
_PRECISION = 26
"""Weights that do not count are together 2^-26 of a patch's normaliser at most."""


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


class _Call(ctypes.Structure):
    """``ElsFoldMomentsCall`` of fold_moments_library.hpp."""

    _fields_ = (
        ("kernel", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("kind", ctypes.c_int32),
        ("channels", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("cols", ctypes.c_int32),
        ("window", ctypes.c_int32),
        ("ring", ctypes.c_int32),
        ("first_row", ctypes.c_int32),
        ("last_row", ctypes.c_int32),
        ("first_col", ctypes.c_int32),
        ("last_col", ctypes.c_int32),
        ("table_taps", ctypes.c_int32),
        ("inner_table", ctypes.c_int32),
        ("inner_uniform", ctypes.c_int32),
        ("outer_table", ctypes.c_int32),
        ("outer_uniform", ctypes.c_int32),
        ("top", ctypes.c_int32),
        ("sources", ctypes.c_void_p),
        ("sources_count", ctypes.c_int64),
        ("row_classes", ctypes.c_void_p),
        ("col_classes", ctypes.c_void_p),
        ("query", ctypes.c_void_p),
        ("centre", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("bias", ctypes.c_double),
        ("scale", ctypes.c_double),
        ("lowest", ctypes.c_double),
        ("dead", ctypes.c_double),
        ("row_taps", ctypes.c_void_p),
        ("col_taps", ctypes.c_void_p),
        ("inner_rows", ctypes.c_void_p),
        ("inner_cols", ctypes.c_void_p),
        ("outer_rows", ctypes.c_void_p),
        ("outer_cols", ctypes.c_void_p),
        ("whole", ctypes.c_void_p),
        ("rest", ctypes.c_void_p),
        ("reference", ctypes.c_void_p),
        ("reach", ctypes.c_void_p),
        ("direction", ctypes.c_void_p),
        ("offset", ctypes.c_void_p),
        ("mean", ctypes.c_void_p),
        ("mean_rest", ctypes.c_void_p),
        ("planes", ctypes.c_void_p),
        ("scalars", ctypes.c_void_p),
        ("shares", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("origins", ctypes.c_void_p),
        ("control", ctypes.c_void_p),
    )


def row_bytes(ring: int, channels: int, top: int) -> int:
    """Return the bytes that a pass holds for a row of pixels: sums of tasks, lists of sources."""
    planes = 2 + 2 * channels
    return ring * (8 * _TASKS * planes + 12 * top + 4)


class FoldPasses:
    """Passes over a range of the bank for one query crop.

    Args:
        bank: the images.
        rows: axis of the query.
        cols: axis of the query.
        crop: [C, X, Y] float64, centred.
        units: of its logits.
        limits: range of bank images.
    """

    def __init__(
        self,
        bank: NativeFoldBank,
        rows: Line,
        cols: Line,
        crop: Tensor,
        units: FoldUnits,
        limits: tuple[int, int],
    ) -> None:
        self._kernel, self._rows, self._cols, self._units = bank.kernel, rows, cols, units
        self._ring = cols.ring([group.shape[3] for group in bank.groups], bank.lanes)
        self._sources, self._lines = _sources(bank.groups, limits, rows, cols, self._ring)
        keys = sum((s.hi - s.lo) * s.crop_rows * s.crop_cols for s in self._sources)
        self._dead = _PRECISION + math.log2(keys)
        self._inputs = {
            "query": (crop * units.product).float(),
            "row_classes": rows.classes(),
            "col_classes": self._padded(cols.classes()),
        }
        self._inputs["centre"] = bank.pixels.centre
        if bank.pixels.values is not None:
            self._inputs["values"] = bank.pixels.values

    @property
    def images(self) -> int:
        """Number of images that are attended to."""
        return int(sum(source.hi - source.lo for source in self._sources))

    def normalisers(self) -> dict[str, Tensor]:
        """Return results of the first pass, for the others: ``whole`` int32, ``rest``, [Q, P]."""
        patches = self._rows.axis.places, self._cols.axis.places
        whole = torch.empty(patches, dtype=torch.int32)
        rest = torch.empty(patches)
        owners = self._rows.own(), self._cols.own()
        # Patches that repeat others attend to none.
        classes = [
            torch.where(own == torch.arange(len(own)), line.classes(), -1).int()
            for own, line in zip(owners, (self._rows, self._cols), strict=True)
        ]
        given = {"row_classes": classes[0], "col_classes": self._padded(classes[1])}
        self.run(NORMALISE, given | {"whole": whole, "rest": rest}, {})
        rows, cols = owners
        return {name: found[rows][:, cols] for name, found in (("whole", whole), ("rest", rest))}

    def run(
        self,
        kind: int,
        tensors: dict[str, Tensor],
        numbers: dict[str, int],
        *,
        answered: bool = True,
    ) -> None:
        """Run a pass; results are written into the tensors, which are contiguous.

        Args:
            kind: of pass.
            tensors: fields of ``ElsFoldMomentsCall`` that point to inputs and results.
            numbers: other fields.
            answered: whether sums of pixels are wanted, and not those of patches alone.

        Raises:
            ComputationStoppedError: The current ``Control`` was stopped.
            MemoryError: The partial results do not fit in memory.
        """
        control = current() or Control()
        tensors = self._inputs | tensors
        channels, rows, cols = self._inputs["query"].shape
        table = (_Source * len(self._sources))(*self._sources)
        call = _Call(
            kernel=self._kernel,
            threads=torch.get_num_threads(),
            kind=kind,
            channels=channels,
            rows=rows,
            cols=cols,
            window=self._rows.axis.window,
            ring=self._ring,
            first_row=self._rows.image.start,
            last_row=self._rows.image.stop if answered else self._rows.image.start,
            first_col=self._cols.image.start,
            last_col=self._cols.image.stop,
            sources=ctypes.addressof(table),
            sources_count=len(table),
            bias=self._units.bias,
            scale=math.exp2(-self._units.bits),
            lowest=self._units.lowest,
            dead=self._dead,
            control=control.address,
            **numbers,
            **{name: tensor.data_ptr() for name, tensor in tensors.items()},
        )
        alive = (self, table, tensors)
        run_apart(_library().els_fold_moments, call, control, alive, "moments of a fold")

    def _padded(self, classes: Tensor) -> Tensor:
        padding = torch.full((self._ring - len(classes),), -1, dtype=torch.int32)
        return torch.cat([classes, padding])


def _sources(
    groups: Sequence[Tensor], limits: tuple[int, int], rows: Line, cols: Line, ring: int
) -> tuple[list[_Source], list[Tensor]]:
    """Return the parts of groups that are attended to, and the tensors that they point to."""
    sources: list[_Source] = []
    alive: list[Tensor] = []
    first = 0
    for group in groups:
        lo, hi = max(0, limits[0] - first), min(len(group), limits[1] - first)
        if lo < hi:
            down = rows.key_line(group.shape[2])
            along = cols.key_ring(group.shape[3], ring)
            source = _Source(
                images=group.data_ptr(),
                lo=lo,
                hi=hi,
                first=first,
                height=group.shape[2],
                width=group.shape[3],
                crop_rows=len(down.places),
                crop_cols=len(along.places),
                rows=down.places.data_ptr(),
                cols=along.places.data_ptr(),
                row_classes=down.classes.data_ptr(),
                col_classes=along.classes.data_ptr(),
                first_row=down.displacements[0],
                last_row=down.displacements[1],
                shifts=along.displacements[1],
            )
            sources.append(source)
            alive += [group, down.places, down.classes, along.places, along.classes]
        first += len(group)
    return sources, alive
