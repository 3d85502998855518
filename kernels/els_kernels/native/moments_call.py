"""One pass of moments over the blocks of a process: its arguments, results and call."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from els_kernels.control import Control, current
from els_kernels.default_device import made_on
from els_kernels.geometry import Geometry
from els_kernels.native.binding import _PADDING, _SOURCES, BlocksArgument, _library, run_apart

if TYPE_CHECKING:
    from els_kernels.native.bank import Native

STATISTICS, SHARES, TANGENT, COTANGENT = range(4)
"""Kinds of passes: ``MomentPass`` of moments_problem.hpp."""


@dataclass(frozen=True, eq=False)
class MomentCall:
    """Arguments of a pass that are the same for every part of the bank."""

    kind: int
    geometry: Geometry
    window: int
    top: int
    """Number of sources."""
    limits: tuple[int, int]
    """Images of the whole bank."""
    numbers: dict[str, float]
    """Fields of ``ElsMomentsCall`` that follow from the units of the query."""
    inputs: dict[str, Tensor]
    """Fields of ``MomentQuery`` by name, float32, and ``peak``, int32; C order."""


class MomentRows(NamedTuple):
    """Results of a pass over the blocks of a process, in order."""

    peaks: Tensor
    """[R, H, W] int32 of statistics; else [0]."""
    sums: Tensor
    """[R, ·, H, W] float64, see ``MomentSums``; of shares [0]."""
    logits: Tensor
    """[H, W, top] int32, falling; −1 where there are fewer sources."""
    origins: Tensor
    """[H, W, top, 2] int64: image of the whole bank and place; −1 likewise."""
    shares: Tensor
    """[n] float64: of the images of this process in the range; else [0]."""


class _Call(ctypes.Structure):
    """``ElsMomentsCall`` of moments_library.hpp."""

    _fields_ = (
        ("kernel", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("bank", ctypes.c_void_p),
        ("images", ctypes.c_int64),
        ("channels", ctypes.c_int32),
        ("height", ctypes.c_int32),
        ("width", ctypes.c_int32),
        ("sources", ctypes.c_int32),
        ("padding", ctypes.c_int32),
        ("kind", ctypes.c_int32),
        ("window", ctypes.c_int32),
        ("top", ctypes.c_int32),
        ("vectors", ctypes.c_int32),
        ("blocks", BlocksArgument),
        ("lo", ctypes.c_int64),
        ("hi", ctypes.c_int64),
        ("norm", ctypes.c_double),
        ("scale", ctypes.c_double),
        ("origin", ctypes.c_int32),
        ("forbidden", ctypes.c_int32),
        ("headroom", ctypes.c_int32),
        ("dead", ctypes.c_int32),
        ("least", ctypes.c_int32),
        ("units", ctypes.c_void_p),
        ("reference", ctypes.c_void_p),
        ("final_peak", ctypes.c_void_p),
        ("rate", ctypes.c_void_p),
        ("mean", ctypes.c_void_p),
        ("direction", ctypes.c_void_p),
        ("offset", ctypes.c_void_p),
        ("cotangent", ctypes.c_void_p),
        ("peak", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("origins", ctypes.c_void_p),
        ("control", ctypes.c_void_p),
    )


def moment_rows(native: Native, call: MomentCall) -> MomentRows:
    """Return the results of a pass over the blocks of a process.

    Raises:
        ComputationStoppedError: The current ``Control`` was stopped.
        MemoryError: The partial results do not fit in memory.
    """
    _, channels, height, width = native.shape
    runs = native.blocks.runs(*call.limits)
    with made_on(torch.device("cpu")):
        vectors = (2 + 2 * channels, 0, channels, 1 + channels)[call.kind]
        shares = call.kind == SHARES
        shape = (native.shape[0],) if shares else (len(runs), vectors, height, width)
        rows = len(runs) if call.kind == STATISTICS else 0
        peaks = torch.empty((rows, height, width), dtype=torch.int32)
        sums = torch.zeros(shape, dtype=torch.float64)
        logits = torch.full((height, width, call.top), -1, dtype=torch.int32)
        origins = torch.full((height, width, call.top, 2), -1)
    if runs:
        _run(native, call, vectors, peaks, sums, logits, origins)
    if not shares:
        return MomentRows(peaks, sums, logits, native.blocks.everywhere(origins), sums.new_zeros(0))
    first = [native.blocks.local(lo) for lo, _ in runs]
    own = [sums[at : at + hi - lo] for at, (lo, hi) in zip(first, runs, strict=True)]
    found = torch.cat(own) if own else sums[:0]
    return MomentRows(peaks, sums.new_zeros(0), logits, origins, found)


def _run(
    native: Native,
    call: MomentCall,
    vectors: int,
    peaks: Tensor,
    sums: Tensor,
    logits: Tensor,
    origins: Tensor,
) -> None:
    control = current() or Control()
    inputs = {name: value.data_ptr() for name, value in call.inputs.items() if name != "peak"}
    given = call.inputs.get("peak")
    arguments = _Call(
        kernel=native.kernel,
        threads=torch.get_num_threads(),
        bank=native.packed.data_ptr(),
        images=native.shape[0],
        channels=native.shape[1],
        height=native.shape[2],
        width=native.shape[3],
        sources=_SOURCES[call.geometry.sources],
        padding=_PADDING[call.geometry.padding],
        kind=call.kind,
        window=call.window,
        top=call.top,
        vectors=vectors,
        blocks=BlocksArgument.of(native.blocks),
        lo=call.limits[0],
        hi=call.limits[1],
        final_peak=None if given is None else given.data_ptr(),
        peak=peaks.data_ptr(),
        sums=sums.data_ptr(),
        logits=logits.data_ptr(),
        origins=origins.data_ptr(),
        control=control.address,
        **inputs,
        **call.numbers,
    )
    alive = (native, call, peaks, sums, logits, origins)
    run_apart(_library().els_moments, arguments, control, alive, "a query")
