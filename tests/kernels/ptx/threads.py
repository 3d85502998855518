"""Registers of all threads of a launch, which run in lockstep where they do not diverge."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from tests.kernels.ptx.faults import Faults
from tests.kernels.ptx.program import Address, Immediate, Operand, Symbol

Array = NDArray[Any]
Mask = NDArray[np.bool_] | None
"""Active threads; None for all."""

LANES = 32
SHARED_BASE = 1024
"""Address of a program's shared memory: not 0, so that a missing base is found."""
TYPES: dict[str, type[np.generic]] = {
    "b8": np.uint8, "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "b32": np.uint32,
    "u32": np.uint32, "s32": np.int32, "b64": np.uint64, "u64": np.uint64, "s64": np.int64,
    "f16": np.float16, "f32": np.float32, "f64": np.float64,
}  # fmt: skip
BITS: dict[int, type[np.unsignedinteger[Any]]] = {
    1: np.uint8,
    2: np.uint16,
    4: np.uint32,
    8: np.uint64,
}
_UNDEFINED = {2: 0x7E7E, 4: 0x7FC0DEAD, 8: 0x7FF8DEAD}
"""Bits of registers that no instruction has written, by their bytes: NaN as floats."""


def bits_of(values: Array) -> Array:
    """Return the bits of numbers as unsigned integers; predicates are returned as they are."""
    return values if values.dtype == bool else values.view(BITS[values.dtype.itemsize])


class Threads:
    """Threads of a launch, program by program, with their registers.

    Args:
        grid: number of programs along each axis.
        warps: of a program.
        faults: account of faults.
    """

    def __init__(self, grid: tuple[int, int, int], warps: int, faults: Faults) -> None:
        self.programs, self.size = int(np.prod(grid)), warps * LANES
        """Programs; threads of a program."""
        self.count = self.programs * self.size
        self.program: Array = np.repeat(np.arange(self.programs), self.size)
        """Program of each thread, [T]."""
        index = np.tile(np.arange(self.size, dtype=np.uint32), self.programs)
        self.warp: Array = (index // LANES).astype(np.int8)
        """Warp of each thread within its program, [T]."""
        width, height, _ = grid
        places = (
            self.program % width,
            self.program // width % height,
            self.program // width // height,
        )
        self._special = {"%tid.x": index, "%laneid": index % LANES}
        for axis, place, size in zip("xyz", places, grid, strict=True):
            self._special[f"%ctaid.{axis}"] = place.astype(np.uint32)
            self._special[f"%nctaid.{axis}"] = np.full(self.count, size, np.uint32)
        self._registers: dict[str, Array] = {}
        self._faults = faults
        self.since_fence: set[str] = set()
        """Registers written since the last fence of the asynchronous matrix units."""

    def read(self, operand: Operand, dtype: type[np.generic]) -> Array:
        """Return an operand's value in every thread, [T], or of all, [1]."""
        size = np.dtype(dtype).itemsize
        if isinstance(operand, str):
            values = self._special.get(operand)
            values = self._registers[operand] if values is None else values
            return values.view(dtype) if values.dtype.itemsize == size else values.astype(dtype)
        if isinstance(operand, Immediate):
            unsigned = BITS[size](operand.bits & ((1 << 8 * size) - 1))
            return np.array([unsigned]).view(dtype)
        if operand == Symbol("global_smem"):
            return np.array([SHARED_BASE], BITS[size]).view(dtype)
        raise NotImplementedError(f"operand {operand}")

    def every(self, operand: Operand, dtype: type[np.generic]) -> Array:
        """Return an operand's value in every thread, [T]."""
        return np.broadcast_to(self.read(operand, dtype), (self.count,))

    def predicate(self, operand: Operand) -> Array:
        """Return a predicate in every thread, [T]."""
        if isinstance(operand, Immediate):
            return np.full(self.count, operand.bits != 0)
        assert isinstance(operand, str)
        return self._registers[operand]

    def address(self, operand: Operand, dtype: type[np.generic]) -> Array:
        """Return an address in every thread, int64 [T]."""
        assert isinstance(operand, Address)
        base = self.read(operand.base, dtype).astype(np.int64)
        return np.broadcast_to(base + operand.offset, (self.count,))

    def write(self, register: Operand, values: Array, mask: Mask) -> None:
        """Write values [T] or [1] to a register of the active threads."""
        assert isinstance(register, str)
        bits = bits_of(np.ascontiguousarray(values))
        if mask is None:
            whole = bits.shape == (self.count,)
            self._registers[register] = bits if whole else np.broadcast_to(bits, (self.count,))
        else:
            old = self._registers.get(register)
            if old is None:
                undefined = _UNDEFINED.get(bits.dtype.itemsize, 0)
                old = np.full(self.count, undefined, bits.dtype)
            self._registers[register] = np.where(mask, bits, old)
        self.since_fence.add(register)

    def indices(self, mask: Mask) -> Array:
        """Return the active threads."""
        return np.arange(self.count) if mask is None else np.nonzero(mask)[0]

    def active_programs(self, mask: Mask, where: str, *, whole: bool = False) -> Array:
        """Return which programs have an active thread, bool [programs].

        With ``whole`` a program of which only some threads are active is a fault.
        """
        if mask is None:
            return np.ones(self.programs, bool)
        each = mask.reshape(self.programs, self.size)
        some: Array = np.any(each, axis=1)
        if whole:
            self._faults.add("program-wide operation in divergent code", some & ~each.all(1), where)
        return some

    def check_warps(self, mask: Mask, where: str) -> None:
        """Count the warps of which only some threads are active."""
        if mask is not None:
            each = mask.reshape(-1, LANES)
            divergent: Array = np.any(each, axis=1) & ~np.all(each, axis=1)
            self._faults.add("warp-wide operation in divergent code", divergent, where)
