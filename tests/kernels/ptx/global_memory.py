"""Global memory of a launch: tensors with gaps between them, and a shadow that finds races."""

from __future__ import annotations

import numpy as np
from tests.kernels.ptx.faults import Faults
from tests.kernels.ptx.threads import Array

BASE = 0x7F0000000000
"""Address of the first byte: 64 bits are needed, as they are on a GPU."""
_GAP = 4096
"""Bytes between two tensors, in which no access is allowed."""
_ALIGNMENT = 512
_WORD = 4
"""Bytes that the shadow describes together."""


class GlobalMemory:
    """Memory that holds copies of tensors' storages.

    Threads of different programs must not touch the same word unless both read it, and threads of
    one program only with a barrier between.

    Args:
        storages: bytes of each tensor's storage.
        programs: program of each thread, [T].
        epoch: number of barriers of each program so far, shared with the shared memory.
        faults: account of faults.
    """

    def __init__(
        self, storages: list[Array], programs: Array, epoch: Array, faults: Faults
    ) -> None:
        sizes = [-(-len(data) // _ALIGNMENT) * _ALIGNMENT + _GAP for data in storages]
        self._starts = (np.cumsum([_GAP, *sizes]) // _ALIGNMENT * _ALIGNMENT)[:-1]
        self._bytes = np.zeros(_GAP + sum(sizes) + _ALIGNMENT, np.uint8)
        self._valid = np.zeros(len(self._bytes), bool)
        for start, data in zip(self._starts, storages, strict=True):
            self._bytes[start : start + len(data)] = data
            self._valid[start : start + len(data)] = True
        self._programs, self._epoch, self._faults = programs, epoch, faults
        words = len(self._bytes) // _WORD
        self._writer, self._written_in = np.full(words, -1, np.int32), np.zeros(words, np.int32)
        self._reader, self._read_in = np.full(words, -1, np.int32), np.zeros(words, np.int32)

    def address(self, storage: int) -> int:
        """Return the address of a storage's first byte."""
        return BASE + int(self._starts[storage])

    def content(self, storage: int, size: int) -> Array:
        """Return the bytes of a storage."""
        start = self._starts[storage]
        return self._bytes[start : start + size]

    def read(self, threads: Array, addresses: Array, size: int, where: str) -> Array:
        """Return bytes [n, size] at ``addresses`` [n], read by ``threads`` [n]."""
        start, _ = self._inside(addresses, size, "read", where)
        for word in self._words(start, size):
            race = self._others(self._writer, self._written_in, word, threads)
            self._faults.add("global race: read of another thread's write", race, where)
            self._reader[word], self._read_in[word] = threads, self._epoch[self._programs[threads]]
        return self._bytes[start[:, None] + np.arange(size)]

    def write(self, threads: Array, addresses: Array, data: Array, where: str) -> None:
        """Write bytes [n, size] at ``addresses`` [n]; those out of bounds are dropped."""
        size = data.shape[1]
        start, outside = self._inside(addresses, size, "write", where)
        for word in self._words(start, size):
            for kind, by, epoch in (
                ("write", self._writer, self._written_in),
                ("read", self._reader, self._read_in),
            ):
                race = self._others(by, epoch, word, threads)
                self._faults.add(f"global race: write over another thread's {kind}", race, where)
            self._writer[word] = threads
            self._written_in[word] = self._epoch[self._programs[threads]]
        kept = start[~outside]
        places = kept[:, None] + np.arange(size)
        self._bytes[places] = data[~outside]
        lost = self._bytes[places] != data[~outside]
        self._faults.add("global race: two threads write at once", lost, where)

    def _inside(self, addresses: Array, size: int, kind: str, where: str) -> tuple[Array, Array]:
        """Return offsets, 0 where they are out of bounds, and which are."""
        start = addresses - BASE
        outside = (start < 0) | (start + size > len(self._bytes))
        start = np.where(outside, 0, start)
        outside |= ~(self._valid[start] & self._valid[start + size - 1])
        self._faults.add(f"global {kind} out of bounds", outside, where)
        self._faults.add(f"global {kind} misaligned", start % size != 0, where)
        return start, outside

    def _words(self, start: Array, size: int) -> list[Array]:
        return [start // _WORD + i for i in range(max(1, size // _WORD))]

    def _others(self, by: Array, epoch: Array, word: Array, threads: Array) -> Array:
        """Return whether another thread has touched a word, without a barrier since."""
        other, program = by[word], self._programs[threads]
        foreign = self._programs[np.maximum(other, 0)] != program
        unordered = foreign | (epoch[word] == self._epoch[program])
        result: Array = (other >= 0) & (other != threads) & unordered
        return result
