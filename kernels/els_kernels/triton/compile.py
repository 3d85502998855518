"""Compiles every kernel with every tuned tile for every chip, without a GPU; analyses the binaries.

    python -m els_kernels.triton.compile [--chip sm90] [--only diagonal]

prints registers, spills, shared memory, matrix instructions and, for the inner loop, instructions
per pair by class, with the bound they imply on an H200: the static roofline. Faults (a spill, too
much shared memory, no matrix instruction) are printed last and make the exit code 1.

The binaries are those that a launch takes, and go to Triton's cache: a server whose
``TRITON_CACHE_DIR`` was filled by this command on the same machine, or in the image that it runs
from, compiles nothing.
"""

from __future__ import annotations

import argparse
import re
import sys
from typing import NamedTuple, get_args

from els_kernels.triton import sass, tuning
from els_kernels.triton.binaries import Binary, binaries, compiled
from els_kernels.triton.hopper import hopper_kernel
from els_kernels.triton.plane_binaries import plane_flops
from els_kernels.triton.targets import CHIPS
from els_kernels.triton.tuning import Arch

_UNITS: dict[Arch, str] = {"sm80": "HMMA", "sm90": "HGMMA", "sm100": "UTCHMMA", "gfx942": "v_mfma"}
"""The matrix instruction native to each architecture."""
_RELOADS = 8
"""Spill instructions of a binary for Hopper: numbers that no step changes, read once in each."""


class Report(NamedTuple):
    """Properties of a compiled binary."""

    registers: int
    spills: int
    """Spill instructions (NVIDIA) or spilled vector registers (AMD)."""
    stores: int
    """Spill instructions of the inner loop that store (NVIDIA)."""
    shared: int
    """Bytes."""
    matrix: str
    """Kinds of matrix instruction, or ``-``."""
    loop: dict[str, float] | None
    """Inner loop: lane instructions per pair, by class; None where it cannot be analysed."""


def build(binary: Binary, chip: str | None = None) -> Report:
    """Compile a binary and return its properties."""
    result = compiled(binary, chip)
    shared = int(result.metadata.shared)
    if "amdgcn" in result.asm:
        return _read_amd(result.asm["amdgcn"], shared)
    return _read_nvidia(result.asm["cubin"], shared, binary)


def faults(binary: Binary, report: Report, chip: str | None = None) -> list[str]:
    """Return the faults: spills, more shared memory than the chip has, the wrong matrix unit."""
    limit = tuning.SHARED_BYTES[binary.arch]
    # 32 × 32 tiles are too small for the wide instructions of Hopper and Blackwell.
    small = binary.config.block_m < 64 and binary.arch != "gfx942"
    unit = "HMMA" if small else _UNITS[binary.arch]
    found = []
    allowed = _RELOADS if binary.kernel is hopper_kernel else 0
    if report.spills > allowed or report.stores:
        got = f"{report.spills}, {report.stores} of them stores of the inner loop"
        found.append(f"expected {f'at most {allowed}' if allowed else 'no'} spills, got {got}")
    if report.shared > limit:
        found.append(f"expected at most {limit} bytes of shared memory, got {report.shared}")
    kinds = report.matrix.split(", ")
    if binary.matrix and not any(kind.startswith(unit) for kind in kinds):
        found.append(f"expected {unit}, got {report.matrix}")
    return [f"{chip or binary.arch} {binary.name}: {fault}" for fault in found]


def _read_amd(assembly: str, shared: int) -> Report:
    def field(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", assembly)[-1])

    kinds = sorted(set(re.findall(r"v_mfma_\w+", assembly)))
    return Report(
        field("vgpr_count"), field("vgpr_spill_count"), 0, shared, ", ".join(kinds) or "-", None
    )


def _read_nvidia(cubin: bytes, shared: int, binary: Binary) -> Report:
    code = sass.instructions(cubin)
    kinds = sorted({op.split(".")[0] for _, op, _ in code if sass.MATRIX.match(op)})
    return Report(
        sass.registers(cubin),
        sum(op.startswith(("STL", "LDL")) for _, op, _ in code),
        sum(op.startswith("STL") for _, op, _ in sass.softmax_loop(code) or []),
        shared,
        ", ".join(kinds) or "-",
        _roofline(code, binary) if binary.pairs else None,
    )


def _roofline(code: list[sass.Instruction], binary: Binary) -> dict[str, float] | None:
    """Return lane instructions per pair by class in the smallest loop with both exp2 and matmul.

    Branches inside count as taken: for the diagonal form this is the body of a full step.
    """
    body = sass.softmax_loop(code)
    if body is None:
        return None
    lanes = binary.config.num_warps * 32 / binary.pairs
    counts = dict.fromkeys(("matrix", "exp2", "float", "memory", "other"), 0.0)
    for _, operation, _ in body:
        counts[_class(operation)] += lanes
    counts["all"] = len(body) * lanes
    return counts


def _class(op: str) -> str:
    if sass.MATRIX.match(op):
        return "matrix"
    if op.startswith("MUFU"):
        return "exp2"
    if op.startswith(("FADD", "FMUL", "FFMA", "FMNMX", "HADD", "HFMA", "F2F", "HMUL")):
        return "float"
    if op.startswith(("LD", "ST", "ATOM", "RED", "UTMA", "UBLKCP")):
        return "memory"
    return "other"


def flops(binary: Binary) -> int:
    """Return half-precision operations per pair on the matrix units: logits and responses."""
    constants = binary.constants
    if "SINGLE" in constants:
        return plane_flops(binary.name, constants["BLOCK"])
    depth = constants.get("DEPTH", constants["BLOCK_K"])
    return 2 * 2 * depth + 2 * 2 * constants["BLOCK_V"]


def bound(loop: dict[str, float], operations: int) -> dict[str, float]:
    """Return the pairs per second that each unit of an H200 allows (132 SMs at 1.755 GHz).

    In one clock an SM issues 4 warp instructions and completes 16 exp2, 32 memory lanes and
    8192 half-precision operations (dense).
    """
    clocks = 132 * 1.755e9
    return {
        "matrix": clocks * 8192 / operations,
        "exp2": clocks * 16 / loop["exp2"],
        "issue": clocks * 128 / loop["all"],
    }


def main() -> int:
    """Compile and print; return 1 if there is a fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--chip",
        choices=list(CHIPS),
        action="append",
        help="by default one for each table of tiles",
    )
    parser.add_argument("--only", default="", help="only kernels whose name contains this")
    options = parser.parse_args()
    print(
        "| chip | kernel | tile | warps | registers | spills | shared KiB | matrix "
        "| exp2 | float | memory | other | matrix bound | exp2 bound | issue bound |"
    )
    print("|---" * 15 + "|")
    wrong = []
    for chip in options.chip or get_args(Arch):
        for binary in binaries(CHIPS[chip].arch):
            if options.only in binary.name:
                report = build(binary, chip)
                wrong += faults(binary, report, chip)
                print(_row(binary, report, chip), flush=True)
    for fault in wrong:
        print(fault, file=sys.stderr)
    return 1 if wrong else 0


def _row(binary: Binary, report: Report, chip: str) -> str:
    c = binary.config
    cells = [
        chip, binary.name, f"{c.block_m}×{c.block_n}×{c.block_k}", str(c.num_warps),
        str(report.registers), str(report.spills), f"{report.shared / 1024:.0f}", report.matrix,
    ]  # fmt: skip
    if report.loop:
        cells += [f"{report.loop[key]:.1f}" for key in ("exp2", "float", "memory", "other")]
        limits = bound(report.loop, flops(binary)) if binary.arch == "sm90" else {}
        cells += [f"{limit:.1e}" for limit in limits.values()] or [""] * 3
    else:
        cells += [""] * 7
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
