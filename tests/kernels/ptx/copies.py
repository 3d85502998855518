"""Asynchronous copies from global to shared memory, which arrive when a thread waits for them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tests.kernels.ptx.faults import Faults
from tests.kernels.ptx.global_memory import GlobalMemory
from tests.kernels.ptx.program import Immediate, Instruction
from tests.kernels.ptx.shared_memory import SharedMemory
from tests.kernels.ptx.threads import SHARED_BASE, Array, Mask, Threads


@dataclass
class _Copy:
    """Bytes [n, size] on their way for n threads."""

    threads: Array
    start: Array
    data: Array
    group: Array
    """Number of the group of each, among those of its program."""
    where: str


class Copies:
    """Copies of a launch: ``cp.async`` with its groups.

    The threads of a program commit and wait together, as Triton's do.
    """

    def __init__(
        self, threads: Threads, shared: SharedMemory, memory: GlobalMemory, faults: Faults
    ) -> None:
        self._threads, self._shared, self._memory = threads, shared, memory
        self._faults = faults
        self._committed = np.zeros(threads.programs, np.int64)
        self._flying: list[_Copy] = []

    def execute(self, one: Instruction, mask: Mask) -> None:
        """Begin, commit or wait for copies."""
        action = one.parts[2]
        if action == "commit_group":
            self._committed += self._threads.active_programs(mask, one.text, whole=True)
        elif action == "wait_group":
            (left,) = one.operands
            assert isinstance(left, Immediate)
            programs = self._threads.active_programs(mask, one.text, whole=True)
            self._arrive(np.where(programs, self._committed - left.bits, 0))
        else:
            self._begin(one, mask)

    def check_end(self) -> None:
        """Count the bytes that nothing has waited for."""
        for copy in self._flying:
            lost = np.ones(copy.data.shape, bool)
            self._faults.add("asynchronous copy that nothing waits for", lost, copy.where)

    def _begin(self, one: Instruction, mask: Mask) -> None:
        """Read the source; a size of 0 instead of the full one writes zeros."""
        target, source, width, *given = one.operands
        assert isinstance(width, Immediate)
        threads, size = self._threads.indices(mask), width.bits
        if not len(threads):
            return
        data = np.zeros((len(threads), size), np.uint8)
        full = np.ones(len(threads), bool)
        if given:
            taken = self._threads.every(given[0], np.uint32)[threads]
            full = taken == size
            if not (full | (taken == 0)).all():
                raise NotImplementedError(f"{one.text}: a copy of a part")
        if full.any():
            addresses = self._threads.address(source, np.uint64)[threads[full]]
            data[full] = self._memory.read(threads[full], addresses, size, one.text)
        program, warp = self._threads.program[threads], self._threads.warp[threads]
        start = self._threads.address(target, np.uint32)[threads] - SHARED_BASE
        start = self._shared.check_write(program, warp, start, size, one.text)
        self._shared.begin_copy(program, start, size)
        group = self._committed[program]
        self._flying.append(_Copy(threads, start, data, group, one.text))

    def _arrive(self, before: Array) -> None:
        """Write the copies of groups below ``before`` [programs]."""
        left = []
        for copy in self._flying:
            program = self._threads.program[copy.threads]
            done = copy.group < before[program]
            if done.any():
                warp = self._threads.warp[copy.threads[done]]
                self._shared.end_copy(program[done], warp, copy.start[done], copy.data[done])
            if not done.all():
                rest = ~done
                left.append(
                    _Copy(
                        copy.threads[rest],
                        copy.start[rest],
                        copy.data[rest],
                        copy.group[rest],
                        copy.where,
                    )
                )
        self._flying = left
