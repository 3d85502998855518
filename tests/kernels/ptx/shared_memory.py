"""Shared memory of all programs, with a shadow that finds races and reads of what is not there.

Between two barriers of a program its warps run in any order, so two warps must not touch the same
bytes unless both read. Asynchronous copies and the matrix units of Hopper need more than that: a
wait, and a fence between their way to the memory and that of ordinary instructions.
"""

from __future__ import annotations

import numpy as np
from tests.kernels.ptx.faults import Faults
from tests.kernels.ptx.threads import Array

UNIT = 2
"""Bytes that the shadow describes together."""
MATRIX_UNIT = -3
"""Warp that stands for the asynchronous matrix units, which no warp waits for but by a barrier."""
_SEVERAL = -2
"""Reader that stands for several warps."""
_POISON = 0xFF
"""Bytes that were never written: NaN as floats of any size."""


class SharedMemory:
    """Bytes [programs, size] and their shadow, one entry for every two bytes.

    Args:
        programs: number of programs.
        size: bytes of each.
        faults: account of faults.
    """

    def __init__(self, programs: int, size: int, faults: Faults) -> None:
        # A margin, so that what is out of bounds reads something.
        self._bytes = np.full((programs, size + 64), _POISON, np.uint8)
        self._size, self._faults = size, faults
        shadow = (programs, (size + 64) // UNIT)
        self.epoch = np.zeros(programs, np.int32)
        """Number of barriers so far."""
        self._written_in = np.full(shadow, -1, np.int32)
        """Epoch of the last write; -1 for none."""
        self._written_by = np.zeros(shadow, np.int8)
        self._read_in = np.full(shadow, -1, np.int32)
        self._read_by = np.zeros(shadow, np.int8)
        self._unfenced = np.zeros(shadow, bool)
        """Written by ordinary instructions, without a fence since."""
        self._copying = np.zeros(shadow, bool)
        """Destination of an asynchronous copy that nothing has waited for."""
        self._multiplied_in = np.full(shadow, -1, np.int32)
        """Latest group of the asynchronous matrix units that reads it; -1 for none in flight."""

    def read(self, programs: Array, warps: Array, start: Array, size: int, where: str) -> Array:
        """Return bytes [n, size] at ``start`` [n], read by ordinary instructions."""
        start = self._inside(start, size, where)
        row, units = programs[:, None], _units(start, size)
        self._check_read(row, units, warps[:, None], where)
        same = (self._read_in[row, units] == self.epoch[row]) & (
            self._read_by[row, units] != warps[:, None]
        )
        self._read_by[row, units] = np.where(same, _SEVERAL, warps[:, None])
        # Of several warps in this very instruction the last is noted: then none is.
        several = self._read_by[row, units] != warps[:, None]
        self._read_by[row, units] = np.where(several, _SEVERAL, warps[:, None])
        self._read_in[row, units] = self.epoch[row]
        data: Array = self._bytes[row, start[:, None] + np.arange(size)]
        return data

    def read_operand(self, programs: Array, groups: Array, start: Array, where: str) -> Array:
        """Return the two bytes at each of ``start`` [n, ...], read by the matrix units: uint16.

        They are in use until the end of each program's group [n].
        """
        flat = self._inside(start.ravel(), UNIT, where).reshape(start.shape)
        row, group = (one.reshape(-1, *[1] * (start.ndim - 1)) for one in (programs, groups))
        units = flat // UNIT
        self._check_read(row, units, np.int8(MATRIX_UNIT), where)
        self._faults.add(
            "matrix units read ordinary writes without a proxy fence",
            self._unfenced[row, units],
            where,
        )
        self._multiplied_in[row, units] = group
        low, high = (self._bytes[row, flat + i].astype(np.uint16) for i in (0, 1))
        pairs: Array = low | high << np.uint16(8)
        return pairs

    def write(self, programs: Array, warps: Array, start: Array, data: Array, where: str) -> None:
        """Write bytes [n, size] at ``start`` [n]."""
        size = data.shape[1]
        start = self.check_write(programs, warps, start, size, where)
        self._store(programs, warps, start, data)
        # Threads that hold the same element write the same bytes.
        kept = self._bytes[programs[:, None], start[:, None] + np.arange(size)]
        self._faults.add("shared race: two threads write at once", kept != data, where)

    def check_write(
        self, programs: Array, warps: Array, start: Array, size: int, where: str
    ) -> Array:
        """Count the faults of a write; return ``start`` within bounds."""
        start = self._inside(start, size, where)
        row, units, warp = programs[:, None], _units(start, size), warps[:, None]
        now = self.epoch[row]
        races = (
            ("write after read", self._read_in, self._read_by),
            ("write after write", self._written_in, self._written_by),
        )
        for kind, epoch, by in races:
            race = (epoch[row, units] == now) & (by[row, units] != warp)
            self._faults.add(f"shared race: {kind} without a barrier", race, where)
        self._faults.add("shared write over an asynchronous copy", self._copying[row, units], where)
        self._faults.add(
            "shared write over an operand of the matrix units in flight",
            self._multiplied_in[row, units] >= 0,
            where,
        )
        return start

    def begin_copy(self, programs: Array, start: Array, size: int) -> None:
        """Poison the destination of an asynchronous copy until ``end_copy``."""
        row = programs[:, None]
        self._copying[row, _units(start, size)] = True
        self._bytes[row, start[:, None] + np.arange(size)] = _POISON

    def end_copy(self, programs: Array, warps: Array, start: Array, data: Array) -> None:
        """Write what an asynchronous copy, checked before, has brought."""
        self._copying[programs[:, None], _units(start, data.shape[1])] = False
        self._store(programs, warps, start, data)

    def barrier(self, programs: Array) -> None:
        """Let everything before be ordered before everything after, in some programs."""
        self.epoch += programs

    def fence(self, programs: Array, warps: Array) -> None:
        """Make writes of a warp visible to the matrix units: each pair of program and warp [n]."""
        active = np.zeros((len(self.epoch), 128), bool)
        active[programs, warps] = True
        rows = np.nonzero(active.any(1))[0]
        self._unfenced[rows] &= ~active[rows[:, None], self._written_by[rows]]

    def end_multiplication(self, before: Array) -> None:
        """Mark the operands of the matrix units' groups below ``before`` [programs] as read."""
        self._multiplied_in[self._multiplied_in < before[:, None]] = -1

    def _check_read(self, row: Array, units: Array, warps: Array | np.int8, where: str) -> None:
        written = self._written_in[row, units]
        self._faults.add("shared read of bytes that nothing wrote", written < 0, where)
        race = (written == self.epoch[row]) & (self._written_by[row, units] != warps)
        self._faults.add("shared race: read after write without a barrier", race, where)
        self._faults.add("shared read of an asynchronous copy", self._copying[row, units], where)

    def _store(self, programs: Array, warps: Array, start: Array, data: Array) -> None:
        row, units = programs[:, None], _units(start, data.shape[1])
        self._written_in[row, units] = self.epoch[row]
        self._written_by[row, units] = warps[:, None]
        self._unfenced[row, units] = True
        self._bytes[row, start[:, None] + np.arange(data.shape[1])] = data

    def _inside(self, start: Array, size: int, where: str) -> Array:
        """Return addresses within bounds; count those that are not, or not aligned."""
        outside = (start < 0) | (start + size > self._size)
        self._faults.add("shared access out of bounds", outside, where)
        self._faults.add("shared access misaligned", start % min(size, 16) != 0, where)
        clipped: Array = np.clip(start, 0, max(0, self._bytes.shape[1] - size))
        return clipped


def _units(start: Array, size: int) -> Array:
    """Return the entries of the shadow of each access, [n, units]."""
    units: Array = start[:, None] // UNIT + np.arange(max(1, size // UNIT))
    return units
