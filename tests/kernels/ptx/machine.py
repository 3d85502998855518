"""Execution of a launch: flow of control, and the instructions that touch memory or other threads.

All threads of all programs run in lockstep; where they diverge, those in the earliest block run,
so that they meet again as soon as possible.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from tests.kernels.ptx.arithmetic import ARITHMETIC
from tests.kernels.ptx.copies import Copies
from tests.kernels.ptx.faults import Faults
from tests.kernels.ptx.flights import Flights
from tests.kernels.ptx.global_memory import GlobalMemory
from tests.kernels.ptx.matrix import (
    Rounding,
    load_matrices,
    multiply_warp,
    multiply_warpgroup,
    store_matrices,
)
from tests.kernels.ptx.program import Immediate, Instruction, Operand, Program, Symbol
from tests.kernels.ptx.shared_memory import SharedMemory
from tests.kernels.ptx.threads import BITS, LANES, SHARED_BASE, TYPES, Array, Mask, Threads


class Machine:
    """One launch of a kernel.

    Args:
        program: the kernel.
        grid: number of programs along each axis.
        warps: of a program.
        shared_bytes: shared memory of a program.
        storages: bytes of the tensors' storages, copied.
        rounding: of the matrix units.
        faults: account of faults.
    """

    def __init__(
        self,
        program: Program,
        grid: tuple[int, int, int],
        warps: int,
        shared_bytes: int,
        storages: list[Array],
        rounding: Rounding,
        faults: Faults,
    ) -> None:
        self.threads = Threads(grid, warps, faults)
        self._shared = SharedMemory(self.threads.programs, shared_bytes, faults)
        self.memory = GlobalMemory(storages, self.threads.program, self._shared.epoch, faults)
        self._flights = Flights(self.threads, faults)
        self._copies = Copies(self.threads, self._shared, self.memory, faults)
        self._program, self._rounding, self._faults = program, rounding, faults
        self._parameters: list[int] = []
        self.executed: Counter[str] = Counter()
        """Operation → number of times that a warp executed it."""

    def run(self, parameters: list[int]) -> None:
        """Execute the kernel; parameters beyond those given are 0: Triton's own buffers."""
        missing = len(self._program.parameters) - len(parameters)
        self._parameters = [*parameters, *[0] * missing]
        place = np.zeros(self.threads.count, np.int64)
        end = len(self._program.blocks)
        with np.errstate(all="ignore"):
            while (block := int(place.min())) < end:
                here = place == block
                place = self._run_block(block, place, None if here.all() else here, end)
        self._copies.check_end()

    def _run_block(self, block: int, place: Array, here: Mask, end: int) -> Array:
        """Execute a block for the threads in it; return where all threads are then."""
        following = np.full(self.threads.count, block + 1)
        for one in self._program.blocks[block]:
            mask = here
            if one.guard is not None:
                guard = self.threads.predicate(one.guard) ^ one.negated
                mask = guard if here is None else here & guard
            if one.operation == "bra":
                (label,) = one.operands
                assert isinstance(label, Symbol)
                target = self._program.labels[label.name]
                following = np.where(True if mask is None else mask, target, following)
            elif one.operation == "ret":
                following = np.where(True if mask is None else mask, end, following)
            else:
                self._count(one, mask)
                self._execute(one, mask)
        return following if here is None else np.where(here, following, place)

    def _count(self, one: Instruction, mask: Mask) -> None:
        warps = self.threads.count // LANES
        if mask is not None:
            warps = int(mask.reshape(-1, LANES).any(1).sum())
        self.executed[one.operation] += warps

    def _execute(self, one: Instruction, mask: Mask) -> None:
        operation = one.operation
        if operation != "wgmma":
            self._flights.check(one, mask)
        if operation in ARITHMETIC:
            ARITHMETIC[operation](self.threads, one, mask, self._faults)
        elif operation in ("ld", "st"):
            self._move(one, mask)
        elif operation == "cp":
            self._copies.execute(one, mask)
        elif operation == "mma":
            multiply_warp(self.threads, one, mask, self._rounding)
        elif operation == "wgmma":
            self._multiply(one, mask)
        elif operation == "ldmatrix":
            load_matrices(self.threads, self._shared, one, mask)
        elif operation == "stmatrix":
            store_matrices(self.threads, self._shared, one, mask)
        elif operation == "shfl":
            self._shuffle(one, mask)
        else:
            self._synchronise(one, mask)

    def _synchronise(self, one: Instruction, mask: Mask) -> None:
        if one.parts[:2] == ("bar", "sync"):
            self._shared.barrier(self.threads.active_programs(mask, one.text, whole=True))
        elif one.parts[:2] == ("bar", "warp"):
            self.threads.check_warps(mask, one.text)
        elif one.parts[:3] == ("fence", "proxy", "async"):
            active = self.threads.indices(mask)
            self._shared.fence(self.threads.program[active], self.threads.warp[active])
        else:
            raise NotImplementedError(one.text)

    def _move(self, one: Instruction, mask: Mask) -> None:
        """Load or store between registers and memory."""
        space = one.parts[1].split("::")[0]
        size = np.dtype(TYPES[one.kind]).itemsize
        if space == "param":
            self._load_parameter(one, size, mask)
            return
        active = self.threads.indices(mask)
        registers = one.operands[0 if one.operation == "ld" else 1]
        names = registers if isinstance(registers, tuple) else (registers,)
        if one.operation == "ld":
            self._load(one, space, names, size, active, mask)
        elif len(active):
            values = [self.threads.every(name, BITS[size])[active] for name in names]
            data = np.stack(values, 1).view(np.uint8).reshape(len(active), -1)
            self._store(one, space, data, active)

    def _load(
        self,
        one: Instruction,
        space: str,
        names: tuple[Operand, ...],
        size: int,
        active: Array,
        mask: Mask,
    ) -> None:
        source, nbytes = one.operands[1], size * len(names)
        if not len(active):
            values = np.zeros((0, len(names)), BITS[size])
        elif space == "shared":
            start = self.threads.address(source, np.uint32)[active] - SHARED_BASE
            of = self.threads.program[active], self.threads.warp[active]
            data = self._shared.read(*of, start, nbytes, one.text)
            values = np.ascontiguousarray(data).view(BITS[size])
        else:
            addresses = self.threads.address(source, np.uint64)[active]
            data = self.memory.read(active, addresses, nbytes, one.text)
            values = np.ascontiguousarray(data).view(BITS[size])
        for i, name in enumerate(names):
            column = np.zeros(self.threads.count, BITS[size])
            column[active] = values[:, i]
            self.threads.write(name, column, mask)

    def _store(self, one: Instruction, space: str, data: Array, active: Array) -> None:
        target = one.operands[0]
        if space == "shared":
            start = self.threads.address(target, np.uint32)[active] - SHARED_BASE
            of = self.threads.program[active], self.threads.warp[active]
            self._shared.write(*of, start, data, one.text)
        else:
            addresses = self.threads.address(target, np.uint64)[active]
            self.memory.write(active, addresses, data, one.text)

    def _load_parameter(self, one: Instruction, size: int, mask: Mask) -> None:
        target, source = one.operands
        # Its symbol ends in the number of the parameter.
        index = int(one.text.rsplit("_param_", 1)[1].split("]")[0])
        del source
        bits = self._parameters[index] & ((1 << 8 * size) - 1)
        self.threads.write(target, np.array([bits], BITS[size]), mask)

    def _shuffle(self, one: Instruction, mask: Mask) -> None:
        """Exchange registers between the lanes of a warp."""
        target, source, which, *_ = one.operands
        assert isinstance(which, Immediate)
        self.threads.check_warps(mask, one.text)
        lanes = np.arange(LANES)
        chosen = lanes ^ which.bits if "bfly" in one.parts else np.full(LANES, which.bits)
        values = self.threads.every(source, np.uint32).reshape(-1, LANES)
        self.threads.write(target, values[:, chosen].ravel(), mask)

    def _multiply(self, one: Instruction, mask: Mask) -> None:
        """Fence, commit, wait for, or begin products of the asynchronous matrix units."""
        action, flights = one.parts[1], self._flights
        if action == "fence":
            self.threads.since_fence.clear()
        elif action == "mma_async":
            multiply_warpgroup(
                self.threads, self._shared, one, mask, self._rounding, flights, self._faults
            )
        else:
            programs = self.threads.active_programs(mask, one.text, whole=True)
            if action == "commit_group":
                flights.committed += programs
            elif action == "wait_group":
                (left,) = one.operands
                assert isinstance(left, Immediate)
                before = np.where(programs, flights.committed - left.bits, 0)
                flights.end(before)
                self._shared.end_multiplication(before)
            else:
                raise NotImplementedError(one.text)
