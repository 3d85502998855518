"""Arguments and results of a call of patch attention in C++."""

from __future__ import annotations

import ctypes
import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from els_kernels.control import Control
from els_kernels.geometry import Posterior
from els_kernels.native.binding import BlocksArgument, _library, run_apart


class AttendCall(ctypes.Structure):
    """``ElsCall`` of attend_library.hpp."""

    _fields_ = (
        ("kernel", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("bank", ctypes.c_void_p),
        ("centre", ctypes.c_void_p),
        ("images", ctypes.c_int64),
        ("channels", ctypes.c_int32),
        ("height", ctypes.c_int32),
        ("width", ctypes.c_int32),
        ("sources", ctypes.c_int32),
        ("padding", ctypes.c_int32),
        ("whole", ctypes.c_int32),
        ("blocks", BlocksArgument),
        ("grouped", ctypes.c_int32),
        ("batch", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        ("a", ctypes.c_void_p),
        ("s", ctypes.c_void_p),
        ("window", ctypes.c_void_p),
        ("ranges", ctypes.c_void_p),
        ("row_peaks", ctypes.c_void_p),
        ("row_sums", ctypes.c_void_p),
        ("mean", ctypes.c_void_p),
        ("log_evidence", ctypes.c_void_p),
        ("control", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class PreparedCall:
    """Call of patch attention, with the memory that it reads and writes."""

    call: AttendCall
    control: Control
    alive: object
    """Holds the memory, but that of rows."""

    def run(self, function: str, rows: tuple[Iterable[int], Iterable[int]] | None = None) -> None:
        """Call a function of the library.

        Args:
            function: ``els_attend`` or ``els_merge``.
            rows: addresses of the peaks and the sums of rows, which the caller holds.

        Raises:
            ComputationStoppedError: The ``Control`` was stopped.
            MemoryError: The partial results do not fit in memory.
        """
        peaks, sums = (array("Q", each) for each in rows or ((), ()))
        if rows is not None:
            self.call.row_peaks, self.call.row_sums = peaks.buffer_info()[0], sums.buffer_info()[0]
        alive = self.alive, peaks, sums
        run_apart(getattr(_library(), function), self.call, self.control, alive, "this batch")


@dataclass(frozen=True)
class Merge:
    """Merge of rows, prepared before they are there; runs once."""

    call: PreparedCall
    answer: Posterior

    def run(self, rows: tuple[Iterable[int], Iterable[int]]) -> Posterior:
        """Return the posteriors.

        Args:
            rows: addresses of the peaks and the sums of each image's rows, in order: see
                ``Blocks.owners``; the caller holds their memory.

        Raises:
            ComputationStoppedError: The ``Control`` was stopped.
            MemoryError: The partial results do not fit in memory.
        """
        self.call.run("els_merge", rows)
        return self.answer


class Rows(NamedTuple):
    """Sums of images over the blocks of a process: see ``Blocks.rows``."""

    peaks: Tensor
    """[R, H, W] float32: the largest logit, in bits."""
    sums: Tensor
    """[R, 1 + C, H, W] float64: weights relative to it, and responses from the centre."""

    def addresses(self) -> tuple[range, range]:
        """Return the addresses of each row's peaks and sums."""
        peaks, sums = (
            range(first, first + len(each) * step, step) if len(each) else range(0)
            for each in self
            for first, step in [(each.data_ptr(), each.stride(0) * each.element_size())]
        )
        return peaks, sums


def empty_rows(count: int, shape: Sequence[int], memory: Tensor | None = None) -> Rows:
    """Return the memory of the results for ``count`` rows of images of a shape (C, H, W)."""
    channels, height, width = shape
    shapes = (count, height, width), (count, 1 + channels, height, width)
    sums_bytes, peaks_bytes = 8 * math.prod(shapes[1]), 4 * math.prod(shapes[0])
    if memory is None or len(memory) < sums_bytes + peaks_bytes:
        return Rows(torch.empty(shapes[0]), torch.empty(shapes[1], dtype=torch.float64))
    sums = memory[:sums_bytes].view(torch.float64).view(shapes[1])
    peaks = memory[sums_bytes : sums_bytes + peaks_bytes].view(torch.float32).view(shapes[0])
    return Rows(peaks, sums)
