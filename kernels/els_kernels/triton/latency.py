"""Model of the time of a step of the diagonal form on an H200, from counts of its machine code.

A program issues one instruction of each of its warps in a clock, as a processor has four
schedulers and a program four warps, and nothing while it waits. Programs on one processor hide each
other's waits, up to the issue bound of all. So in a clock a processor completes

    pairs of a step · min(programs / (issue + waits), 1 / issue)

It says what a change of the counts would mean; it has not been compared with a GPU. Constants are
rounded from published microbenchmarks of Hopper (Luo et al. 2024, arXiv:2402.13499) where these
have them, assumed otherwise, and stay as they are when kernels change.
"""

from __future__ import annotations

from typing import NamedTuple

L1, L2 = 41, 263
"""Clocks of a load from the cache of a processor and of the chip."""
MATRIX = 128
"""Clocks from an asynchronous product to the end of its wait: one of 64 × 256 × 16; assumed for
all, as smaller ones have the same pipeline."""
BARRIER, FENCE = 30, 20
"""Clocks of a barrier of four warps, and of a fence to the asynchronous proxy (assumed)."""
FAR = 3
"""Waits for loads of a step that the cache of the processor does not serve (assumed): keys, queries
and, in steps with a softmax, states. All others meet lines that these have fetched."""
REGISTERS, WARPS, SHARED = 65536, 64, 233472
"""Of a processor; shared memory in bytes, of which it keeps 1024 for each program."""
SCHEDULERS = 4


class Waits(NamedTuple):
    """Waits of a thread in one full step."""

    matrix: int
    barriers: int
    fences: int
    loads: int

    @property
    def clocks(self) -> int:
        """Clocks of all, one after the other."""
        far = min(FAR, self.loads)
        memory = far * L2 + (self.loads - far) * L1
        return self.matrix * MATRIX + self.barriers * BARRIER + self.fences * FENCE + memory


def programs_of(registers: int, warps: int, shared: int) -> int:
    """Return the programs that a processor holds at once.

    Args:
        registers: of a thread; allotted by 8.
        warps: of a program.
        shared: bytes of a program.
    """
    each = -(-registers // 8) * 8 * 32 * warps
    return min(REGISTERS // each, WARPS // warps, SHARED // (shared + 1024))


def pairs_a_clock(
    pairs: float, instructions: float, waits: float, programs: int, warps: int
) -> float:
    """Return the pairs that a processor completes in a clock.

    Args:
        pairs: useful ones of a step.
        instructions: of a thread, of that step.
        waits: clocks, of that step.
        programs: on one processor.
        warps: of a program.
    """
    issue = instructions * warps / SCHEDULERS
    return pairs * min(programs / (issue + waits), 1 / issue)
