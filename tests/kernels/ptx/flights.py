"""Registers that the asynchronous matrix units use until a thread waits for their group."""

from __future__ import annotations

import numpy as np
from tests.kernels.ptx.faults import Faults
from tests.kernels.ptx.program import Address, Instruction, Operand
from tests.kernels.ptx.threads import Array, Mask, Threads

_STORES = {"st", "stmatrix", "bra", "ret", "bar"}
"""Operations without a target register."""


class Flights:
    """Registers in flight of each program, and the numbers of their groups.

    Args:
        threads: of the launch.
        faults: account of faults.
    """

    def __init__(self, threads: Threads, faults: Faults) -> None:
        self._threads, self._faults = threads, faults
        self.committed = np.zeros(threads.programs, np.int64)
        """Number of groups that each program has committed."""
        self._results: dict[str, Array] = {}
        """Accumulator → latest group that writes it, [programs]; -1 for none."""
        self._operands: dict[str, Array] = {}
        """Register of the left operand → latest group that reads it."""

    def start(self, results: Operand, operands: Operand, programs: Array) -> None:
        """Mark the registers of a product as in flight, in some programs."""
        for registers, group_of in ((results, self._results), (operands, self._operands)):
            for register in registers if isinstance(registers, tuple) else ():
                assert isinstance(register, str)
                old = group_of.get(register, np.full(len(programs), -1))
                group_of[register] = np.where(programs, self.committed, old)

    def end(self, before: Array) -> None:
        """Mark the registers of groups below ``before`` [programs] as free."""
        self._results = _left(self._results, before)
        self._operands = _left(self._operands, before)

    def check(self, one: Instruction, mask: Mask) -> None:
        """Count the registers that an instruction uses although they are in flight.

        A copy of one accumulator renames it: LLVM puts such copies between a product and its wait,
        and ptxas removes them; the machine code has no use of the registers before the wait.
        """
        if not self._results and not self._operands:
            return
        target, *sources = one.operands or ("",)
        if one.operation == "mov" and isinstance(target, str) and sources[0] in self._results:
            assert isinstance(sources[0], str)
            self._results[target] = self._results[sources[0]]
            return
        for i, operand in enumerate(one.operands):
            for part in operand if isinstance(operand, tuple) else (operand,):
                name = part.base if isinstance(part, Address) else part
                if isinstance(name, str):
                    writes = i == 0 and one.operation not in _STORES
                    self._check_register(name, one, mask, writes=writes)

    def _check_register(self, name: str, one: Instruction, mask: Mask, *, writes: bool) -> None:
        kinds = [("accumulator in flight is used", self._results)]
        kinds += [("operand in flight is overwritten", self._operands)] * writes
        for kind, group_of in kinds:
            if name in group_of:
                active = self._threads.active_programs(mask, one.text)
                flying = (group_of[name] >= 0) & active
                self._faults.add(f"matrix units: {kind}", flying, one.text)


def _left(group_of: dict[str, Array], before: Array) -> dict[str, Array]:
    """Return the registers whose group is not below ``before``."""
    left = {name: np.where(group < before, -1, group) for name, group in group_of.items()}
    return {name: group for name, group in left.items() if (group >= 0).any()}
