"""Counts of the diagonal form per *useful* pair, from its machine code and its traversal.

    python -m els_kernels.triton.counts [--chip sm90]

A step of a program multiplies one tile of query places × keys; its softmax is skipped while windows
are incomplete (warm-up) or where a tile has no pairs. A tile also overhangs the pairs that exist.
So a useful pair costs more than one of a full step: the table has products and softmaxes per useful
pair, counted from the traversals of a launch, for one image and for as many as share a tile, and
instructions per useful pair, which are those of a step's two parts times these. The last column is
the model of ``latency``. Nothing is measured.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from typing import NamedTuple

from els_kernels.geometry import GEOMETRIES, Padding, count_pairs
from els_kernels.triton import latency, launch, layout, sass, tuning
from els_kernels.triton.binaries import Binary, compiled, diagonal
from els_kernels.triton.launch import DiagonalTraversal
from els_kernels.triton.sass import Instruction
from els_kernels.triton.targets import CHIPS

_CASES: list[tuple[Padding, int, int, int]] = [
    ("circular", 1, 28, 5), ("circular", 3, 32, 5), ("circular", 3, 32, 11),
    ("circular", 3, 32, 17), ("zeros", 1, 28, 3), ("zeros", 1, 28, 7), ("zeros", 1, 28, 15),
    ("zeros", 3, 32, 5), ("zeros", 3, 32, 11), ("zeros", 3, 32, 15),
]  # fmt: skip
"""Padding, channels, side of the images, window."""
_CLOCKS = 132 * 1.755e9
"""Clocks of all processors of an H200 in a second; each issues 128 lane instructions."""


class Step(NamedTuple):
    """Instructions of a thread in one full step, read from machine code."""

    product: int
    softmax: int
    waits: int
    """Waits for all products of the matrix units (Hopper) or all copies."""
    barriers: int
    fences: int
    """Fences between ordinary and asynchronous accesses to memory."""
    loads: int
    """Waits for global loads."""


class Cover(NamedTuple):
    """Pairs that the programs compute for one query and bank, per useful pair."""

    products: float
    softmaxes: float


def step_of(code: list[Instruction]) -> Step:
    """Return the counts of a full step.

    Raises:
        ValueError: There is no loop with products and a softmax.
    """
    body = sass.softmax_loop(code)
    if body is None:
        raise ValueError("machine code: expected a loop with products and exp2, found none")
    softmax = _skipped(body)
    operations = [f"{operation} {operands}" for _, operation, operands in body]

    def count(pattern: str) -> int:
        return sum(bool(re.match(pattern, one)) for one in operations)

    return Step(
        len(body) - softmax,
        softmax,
        count(r"(WARPGROUP\.DEPBAR|DEPBAR)\S* \S+, 0x0"),
        count(r"BAR\.SYNC"),
        count(r"(MEMBAR|FENCE)"),
        _load_waits(body),
    )


def _skipped(body: list[Instruction]) -> int:
    """Return the instructions that a step without softmax skips: of the branch with most exp2."""
    inside = {address for address, _, _ in body}
    best = (0, 0)
    for first, last in sass.branches(body):
        part = [one for address, one, _ in body if first < address < last]
        if last in inside and part:
            exp2 = sum(one.startswith("MUFU.EX2") for one in part)
            best = max(best, (exp2, len(part)))
    return best[1] if best[0] else 0


def _load_waits(body: list[Instruction]) -> int:
    """Return how often a step waits for global loads: at the first use of one still on its way.

    Loads arrive in order, so that one wait is also for those issued before it.
    """
    pending: dict[str, int] = {}
    waits = 0
    for i, (_, operation, operands) in enumerate(body):
        names = re.findall(r"\bR\d+", operands)
        loads = operation.startswith("LDG") and "STS" not in operation
        used = [pending[name] for name in (names[1:] if loads else names) if name in pending]
        if used:
            waits += 1
            pending = {name: at for name, at in pending.items() if at > max(used)}
        if loads and names:
            # Wide loads fill several registers in a row.
            first, width = int(names[0][1:]), {"128": 4, "64": 2}.get(operation[-3:].strip("."), 1)
            pending |= {f"R{first + one}": i for one in range(width)}
    return waits


def cover_of(padding: Padding, channels: int, side: int, window: int, block_m: int) -> Cover:
    """Return the counts for square images, per useful pair, without overhanging keys."""
    traversals = [(launch.traversal_of(padding, side, side, window), 1)]
    if padding == "zeros":
        # Rows near the left and right border attend to themselves.
        traversals.append((launch.edge_traversal(side, side, window), 1))
    products = softmaxes = 0
    for traversal, times in traversals:
        for steps, emitted in _tiles(traversal, padding, side, window, block_m):
            products += times * steps * block_m * traversal.columns
            softmaxes += times * emitted * block_m * traversal.columns
    useful = count_pairs(GEOMETRIES["els", padding], side, side, window)
    return Cover(products / useful, softmaxes / useful)


def _tiles(
    traversal: DiagonalTraversal, padding: Padding, side: int, window: int, block_m: int
) -> Iterator[tuple[int, int]]:
    """Yield steps, and steps with a softmax, of each tile of diagonals, as the kernels do."""
    rows, cols = side + window - 1, side if padding != "zeros" else side - window + 1
    key_rows = side + window - 1 if padding == "zeros" else side
    flat0, flats = (edge * cols for edge in traversal.diagonals)
    spans = layout.row_spans(
        flat0, flats - flat0, block_m, (rows, cols), traversal.rows, traversal.margin
    )
    for i, (first, last) in enumerate(spans):
        emitted = 0
        for t in range(first, last):
            key = (t + traversal.lag + key_rows) % key_rows
            low, high = traversal.inner
            inner = low <= key < high
            lo, hi = ((low if inner else key) * cols, (high if inner else key + 1) * cols)
            place = flat0 + i * block_m + (t - window + 1) * cols
            emitted += t >= traversal.emit_from and place + block_m > lo and place < hi
        yield last - first, emitted


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Counts per useful pair of the diagonal form.")
    parser.add_argument("--chip", choices=[c for c in CHIPS if c.startswith("sm")], default="sm90")
    chip = parser.parse_args().chip
    arch = CHIPS[chip].arch
    print(
        "| padding | C | side | k | images a tile | products | softmaxes "
        "| instructions a useful pair | full waits a step | barriers | fences | waits for loads "
        "| programs a processor | issue bound, useful pairs/s | model, useful pairs/s |"
    )
    print("|---" * 15 + "|")
    for padding, channels, side, window in _CASES:
        binary = diagonal(arch, window, channels)
        code = compiled(binary, chip)
        step = step_of(sass.instructions(code.asm["cubin"]))
        programs = latency.programs_of(
            sass.registers(code.asm["cubin"]), binary.config.num_warps, code.metadata.shared
        )
        for share in (1, tuning.SHARED_BY) if "BUFFERS" in binary.constants else (1,):
            cover = cover_of(padding, channels, side, window, binary.config.block_m // share)
            cells = [padding, channels, side, window, share, *_rates(binary, step, cover, programs)]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def _rates(binary: Binary, step: Step, cover: Cover, programs: int) -> list[str | int]:
    """Return the cells of a row of the table, after the case."""
    warps = binary.config.num_warps
    instructions = step.product * cover.products + step.softmax * cover.softmaxes
    each = warps * 32 / binary.pairs * instructions
    # Steps without a softmax are taken to wait as long as those with one.
    waits = latency.Waits(step.waits, step.barriers, step.fences, step.loads)
    rate = latency.pairs_a_clock(
        binary.pairs, instructions, waits.clocks * cover.products, programs, warps
    )
    return [
        f"{cover.products:.2f}", f"{cover.softmaxes:.2f}", f"{each:.1f}", step.waits,
        step.barriers, step.fences, step.loads, programs, f"{_CLOCKS * 128 / each:.1e}",
        f"{_CLOCKS * rate:.1e}",
    ]  # fmt: skip


if __name__ == "__main__":
    main()
