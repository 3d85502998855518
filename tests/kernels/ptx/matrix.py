"""Matrix units: layouts of their operands in registers and shared memory, and their rounding."""

from __future__ import annotations

from functools import partial
from typing import Literal

import numpy as np
from tests.kernels.ptx.faults import Faults
from tests.kernels.ptx.flights import Flights
from tests.kernels.ptx.program import Immediate, Instruction, Operand
from tests.kernels.ptx.shared_memory import SharedMemory
from tests.kernels.ptx.threads import LANES, SHARED_BASE, Array, Mask, Threads

Rounding = Literal["exact", "ampere", "hopper"]
"""How a sum of products is rounded. ``exact``: once. The others truncate: products and addend are
cut to a few bits below the largest of them, and the sum is rounded to zero; ``ampere`` adds 8
products at a time with 1 extra bit, ``hopper`` 16 with 2. What the chips do is not documented;
these are at least as coarse as what has been measured of them."""
_TRUNCATION = {"ampere": (8, 1), "hopper": (16, 2)}
_INNER = 16
"""Inner size of every instruction on half precision."""
_WARPGROUP = 4
_lane = np.arange(LANES)
_ROW, _COL = _lane // 4, 2 * (_lane % 4)
"""Row and first column of the pair of elements that a lane has of an 8 × 8 matrix."""


def load_matrices(threads: Threads, shared: SharedMemory, one: Instruction, mask: Mask) -> None:
    """Load 8 × 8 matrices of half precision: ``ldmatrix``."""
    registers, source = one.operands
    assert isinstance(registers, tuple)
    threads.check_warps(mask, one.text)
    warps, rows = _rows(threads, source, mask)
    first = warps * LANES
    for i, register in enumerate(registers):
        start = rows[:, 8 * i : 8 * i + 8].ravel()
        program, warp = (np.repeat(of[first], 8) for of in (threads.program, threads.warp))
        data = shared.read(program, warp, start, 16, one.text)
        matrix = np.ascontiguousarray(data).view(np.uint16).reshape(-1, 8, 8)
        if "trans" in one.parts:
            matrix = matrix.transpose(0, 2, 1)
        pair = np.zeros((threads.count // LANES, LANES), np.uint32)
        low, high = (matrix[:, _ROW, _COL + j].astype(np.uint32) for j in (0, 1))
        pair[warps] = low | high << np.uint32(16)
        threads.write(register, pair.ravel(), mask)


def store_matrices(threads: Threads, shared: SharedMemory, one: Instruction, mask: Mask) -> None:
    """Store 8 × 8 matrices of half precision: ``stmatrix``."""
    target, registers = one.operands
    assert isinstance(registers, tuple)
    threads.check_warps(mask, one.text)
    warps, rows = _rows(threads, target, mask)
    first = warps * LANES
    for i, register in enumerate(registers):
        pair = threads.every(register, np.uint32).reshape(-1, LANES)[warps]
        matrix = np.zeros((len(warps), 8, 8), np.uint16)
        matrix[:, _ROW, _COL] = pair & np.uint32(0xFFFF)
        matrix[:, _ROW, _COL + 1] = pair >> np.uint32(16)
        if "trans" in one.parts:
            matrix = matrix.transpose(0, 2, 1)
        data = np.ascontiguousarray(matrix).view(np.uint8).reshape(-1, 16)
        start = rows[:, 8 * i : 8 * i + 8].ravel()
        program, warp = (np.repeat(of[first], 8) for of in (threads.program, threads.warp))
        shared.write(program, warp, start, data, one.text)


def _rows(threads: Threads, operand: Operand, mask: Mask) -> tuple[Array, Array]:
    """Return the active warps and the address in shared memory of each lane, [warps, 32]."""
    rows = (threads.address(operand, np.uint32) - SHARED_BASE).reshape(-1, LANES)
    active = np.ones(len(rows), bool) if mask is None else mask.reshape(-1, LANES).all(1)
    warps = np.nonzero(active)[0]
    return warps, rows[warps]


def multiply_warp(threads: Threads, one: Instruction, mask: Mask, rounding: Rounding) -> None:
    """Multiply 16 × 16 by 16 × 8 and add, warp by warp: ``mma.sync.m16n8k16``."""
    target, left, right, addend = one.operands
    assert isinstance(target, tuple)
    assert isinstance(addend, tuple)
    threads.check_warps(mask, one.text)
    b = np.zeros((threads.count // LANES, _INNER, 8))
    for i, half in enumerate(_halves(threads, right)):
        b[:, _COL + 8 * i, _ROW], b[:, _COL + 8 * i + 1, _ROW] = half[..., 0], half[..., 1]
    places = [(_ROW + 8 * i, _COL + j) for i in (0, 1) for j in (0, 1)]
    c = np.zeros((len(b), 16, 8), np.float32)
    for register, (row, col) in zip(addend, places, strict=True):
        c[:, row, col] = threads.every(register, np.float32).reshape(-1, LANES)
    d = accumulate(_left(threads, left), b, c, rounding)
    for register, (row, col) in zip(target, places, strict=True):
        threads.write(register, d[:, row, col].ravel(), mask)


def multiply_warpgroup(
    threads: Threads,
    shared: SharedMemory,
    one: Instruction,
    mask: Mask,
    rounding: Rounding,
    flights: Flights,
    faults: Faults,
) -> None:
    """Multiply 64 × 16 by 16 × n and add, four warps together: ``wgmma.mma_async``.

    The result is in the registers at once, marked as in flight.
    """
    target, left, right, scale, *immediates = one.operands
    assert isinstance(target, tuple)
    if threads.size != _WARPGROUP * LANES:
        raise NotImplementedError(f"{threads.size} threads: expected one warpgroup")
    programs = threads.active_programs(mask, one.text, whole=True)
    columns = int(one.parts[4].removeprefix("m64n").removesuffix("k16"))
    read = partial(_described, threads, shared, flights.committed, programs, one.text, faults)
    flags = [operand.bits for operand in immediates if isinstance(operand, Immediate)]
    if isinstance(left, tuple):
        unfenced = threads.since_fence.intersection(left)
        a = _left(threads, left).reshape(threads.programs, 64, _INNER)
    else:
        unfenced = set()
        a = read(left, 64, flags[-2])
    b = read(right, columns, flags[-1])
    c = np.zeros((threads.programs, 64, columns), np.float32)
    row = 16 * np.arange(_WARPGROUP)[:, None] + _ROW
    places = [
        (row + 8 * (q // 2 % 2), np.broadcast_to(8 * (q // 4) + q % 2 + _COL, row.shape))
        for q in range(len(target))
    ]
    used = threads.predicate(scale)
    if used.any():
        unfenced |= threads.since_fence.intersection(target)
        for register, (i, j) in zip(target, places, strict=True):
            values = np.where(used, threads.every(register, np.float32), np.float32(0))
            c[:, i, j] = values.reshape(threads.programs, _WARPGROUP, LANES)
    faults.add("matrix units use registers written after their fence", bool(unfenced), one.text)
    d = accumulate(a, b.transpose(0, 2, 1), c, rounding)
    before = set(threads.since_fence)
    for register, (i, j) in zip(target, places, strict=True):
        threads.write(register, d[:, i, j].reshape(threads.count), mask)
    # The units' own writes are in order.
    threads.since_fence = before
    flights.start(target, left, programs)


def accumulate(a: Array, b: Array, c: Array, rounding: Rounding) -> Array:
    """Return ``c + a·b`` in float32, of float64 [..., M, 16] and [..., 16, N], float32 c."""
    exact = np.matmul(a, b) + c.astype(np.float64)
    if rounding == "exact":
        nearest: Array = exact.astype(np.float32)
        return nearest
    step, extra = _TRUNCATION[rounding]
    total = c.astype(np.float64)
    for first in range(0, _INNER, step):
        part = slice(first, first + step)
        products = a[..., :, part, None] * b[..., None, part, :]
        addends = np.concatenate([products, total[..., :, None, :]], -2)
        exponents = np.where(addends == 0, -10_000, np.frexp(addends)[1])
        unit = np.ldexp(1.0, np.maximum(exponents.max(-2, keepdims=True) - 24 - extra, -1000))
        total = _toward_zero((np.trunc(addends / unit) * unit).sum(-2))
        total = np.where(np.isfinite(total), total, exact)
    truncated: Array = total.astype(np.float32)
    return truncated


def _toward_zero(values: Array) -> Array:
    """Return float64 values rounded to zero to the precision of float32."""
    nearest = values.astype(np.float32)
    over = np.abs(nearest.astype(np.float64)) > np.abs(values)
    rounded: Array = np.where(over, np.nextafter(nearest, np.float32(0)), nearest)
    return rounded.astype(np.float64)


def _halves(threads: Threads, registers: Operand) -> list[Array]:
    """Return the two halves in each register, float64 [warps, 32, 2]."""
    assert isinstance(registers, tuple)
    pairs = (np.ascontiguousarray(threads.every(one, np.uint32)) for one in registers)
    return [pair.view(np.float16).reshape(-1, LANES, 2).astype(np.float64) for pair in pairs]


def _left(threads: Threads, registers: Operand) -> Array:
    """Return the left operand in registers, float64 [warps, 16, 16]."""
    a = np.zeros((threads.count // LANES, 16, _INNER))
    for i, half in enumerate(_halves(threads, registers)):
        row, col = _ROW + 8 * (i % 2), _COL + 8 * (i // 2)
        a[:, row, col], a[:, row, col + 1] = half[..., 0], half[..., 1]
    return a


def _described(
    threads: Threads,
    shared: SharedMemory,
    groups: Array,
    programs: Array,
    where: str,
    faults: Faults,
    operand: Operand,
    outer: int,
    transposed: int,
) -> Array:
    """Return an operand in shared memory, float64 [programs, outer, 16]: the canonical layouts.

    A descriptor has, in units of 16 bytes, the first address (bits 0 to 13) and the strides between
    core matrices along both axes (bits 16 to 29 and 32 to 45), and the swizzle (bits 62, 63).
    """
    each = threads.every(operand, np.uint64).reshape(threads.programs, threads.size)
    differ = (each != each[:, :1]).any(1) & programs
    faults.add("descriptors differ within a warpgroup", differ, where)
    word = each[:, 0]
    start, leading, stride = (
        (word >> np.uint64(bit) & np.uint64(0x3FFF)).astype(np.int64) * 16 for bit in (0, 16, 32)
    )
    faults.add("descriptor with a base offset", programs & (word >> np.uint64(49) & 7 != 0), where)
    swizzle = (word >> np.uint64(62)).astype(int)
    matrix = np.zeros((threads.programs, outer, _INNER))
    i, k = np.arange(outer)[:, None], np.arange(_INNER)[None, :]
    for mode in np.unique(swizzle[programs]):
        chosen = np.nonzero(programs & (swizzle == mode))[0]
        along, across = (one[chosen, None, None] for one in (stride, leading))
        width, bits = {0: (16, 0), 1: (128, 7), 2: (64, 3), 3: (32, 1)}[int(mode)]
        if not transposed:
            offset = (
                i % 8 * width + i // 8 * along + (k * 2 if mode else k % 8 * 2 + k // 8 * across)
            )
        elif mode:
            run = width // 2
            offset = i % run * 2 + i // run * across + k % 8 * width + k // 8 * along
        else:
            offset = i % 8 * 2 + i // 8 * along + k % 8 * 16 + k // 8 * across
        address = start[chosen, None, None] + offset
        address = address ^ (address >> 7 & bits) << 4
        found = shared.read_operand(chosen, groups[chosen], address - SHARED_BASE, where)
        matrix[chosen] = found.view(np.float16).astype(np.float64)
    return matrix
