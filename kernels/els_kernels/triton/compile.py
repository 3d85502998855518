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
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
import triton

from els_kernels.triton import layout, tuning
from els_kernels.triton.diagonal import diagonal_kernel
from els_kernels.triton.direct import direct_kernel
from els_kernels.triton.online import merge_kernel
from els_kernels.triton.plane_binaries import plane_binaries, plane_flops
from els_kernels.triton.same_place import same_place_kernel
from els_kernels.triton.shifts import shift_logits_kernel, shift_responses_kernel
from els_kernels.triton.targets import CHIPS, compiling_for
from els_kernels.triton.tuning import Arch, Config

_HALVES = {"p_query", "p_keys", "p_values", "p_row_band", "p_col_band"}
_MATRIX = re.compile(r"^(HMMA|HGMMA|UTCHMMA|v_mfma)")
_UNITS: dict[Arch, str] = {"sm80": "HMMA", "sm90": "HGMMA", "sm100": "UTCHMMA", "gfx942": "v_mfma"}
"""The matrix instruction native to each architecture."""
_TERMS = {"": (1, 2), " one term": (1, 1), " floats": (2, 2), " floats one term": (2, 1)}
"""Suffix of a name → terms of the bank and of the query."""


@dataclass(frozen=True)
class Binary:
    """A kernel with all its constants, for one chip."""

    name: str
    kernel: Any
    constants: dict[str, int]
    config: Config
    arch: Arch
    pairs: int
    """Pairs of places in one pass of the inner loop; 0 where the loop is not over pairs."""
    matrix: bool = True
    """Whether the kernel should use the matrix units."""


class Report(NamedTuple):
    """Properties of a compiled binary."""

    registers: int
    spills: int
    """Spill instructions (NVIDIA) or spilled vector registers (AMD)."""
    shared: int
    """Bytes."""
    matrix: str
    """Kinds of matrix instruction, or ``-``."""
    loop: dict[str, float] | None
    """Inner loop: lane instructions per pair, by class; None where it cannot be analysed."""


def binaries(arch: Arch, channels: tuple[int, ...] = (1, 3)) -> Iterator[Binary]:
    """Yield every binary that a chip needs for banks of these channels."""
    for c in channels:
        for suffix in _TERMS:
            for window in (1, 3, 5) if c == 1 else (1, 3):
                yield direct(arch, c, window, suffix)
            for window in _largest_windows(arch, c, suffix):
                yield diagonal(arch, window, c, suffix)
        yield from _same_place(arch, c)
        yield from _shifts(arch, c)
    config = tuning.SHIFTS[arch]
    for suffix, key_terms in (("", 1), (" floats", 2)):
        respond = {"KEY_TERMS": key_terms, "BLOCK_M": config.block_m}
        respond |= {"BLOCK_N": config.block_k, "BLOCK_D": config.block_n}
        name = f"shift responses{suffix}"
        yield Binary(name, shift_responses_kernel, respond, config, arch, 0)
    sums = {layout.value_width(c, terms) for c in channels for terms in (1, 2)}
    for values in sorted(sums | {c + 1 for c in channels}):
        yield merge(arch, values)
    for name, kernel, constants, config in plane_binaries(arch, channels):
        yield Binary(name, kernel, constants, config, arch, config.block_m * config.block_n)


def direct(arch: Arch, channels: int, window: int, suffix: str = "") -> Binary:
    """Return the direct form for a window; ``suffix`` is a key of ``_TERMS``."""
    depth = tuning.direct_depth(window * window * channels)
    config = tuning.DIRECT[arch][depth]
    constants = {
        "CHANNELS": channels, "WINDOW_W": window, **_terms(channels, suffix),
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": depth,
    }  # fmt: skip
    name = f"direct C={channels} k={window}{suffix}"
    return Binary(name, direct_kernel, constants, config, arch, config.block_m * config.block_n)


def diagonal(arch: Arch, window: int, channels: int, suffix: str = "") -> Binary:
    """Return the diagonal form for a window; ``suffix`` is a key of ``_TERMS``."""
    pair, terms = layout.pair_width(channels), _terms(channels, suffix)
    depth, config = tuning.diagonal_depth(window * pair, pair, arch, terms["KEY_TERMS"])
    constants = {
        **terms, "PAIR": pair, "DEPTH": depth,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
    }  # fmt: skip
    name = f"diagonal C={channels} k≤{window}{suffix}"
    return Binary(name, diagonal_kernel, constants, config, arch, config.block_m * config.block_n)


def _largest_windows(arch: Arch, channels: int, suffix: str) -> list[int]:
    """Return the largest window up to 25 of each binary of the diagonal form."""
    windows = {}
    for k in range(3, 26, 2):
        constants = diagonal(arch, k, channels, suffix).constants
        windows[tuple(constants.values())] = k
    return sorted(windows.values())


def merge(arch: Arch, values: int) -> Binary:
    """Return the merge of states with so many sums."""
    constants = {"VALUES": values, "BLOCK_V": 1 << (values - 1).bit_length()}
    constants["BLOCK_M"] = tuning.MERGE.block_m
    return Binary(f"merge V={values}", merge_kernel, constants, tuning.MERGE, arch, 0, matrix=False)


def _terms(channels: int, suffix: str) -> dict[str, int]:
    key_terms, terms = _TERMS[suffix]
    values = layout.value_width(channels, key_terms)
    return {
        "TERMS": terms, "KEY_TERMS": min(key_terms, terms), "VALUES": values,
        "BLOCK_V": max(16, values),
    }  # fmt: skip


def _same_place(arch: Arch, channels: int) -> Iterator[Binary]:
    config = tuning.SAME_PLACE[arch]
    for suffix, key_terms in (("", 1), (" floats", 2)):
        constants = {"CHANNELS": channels, "KEY_TERMS": key_terms, "BLOCK": config.block_m}
        constants["BLOCK_C"] = 1 << (channels - 1).bit_length()
        name = f"same place C={channels}{suffix}"
        yield Binary(name, same_place_kernel, constants, config, arch, 0)


def _shifts(arch: Arch, channels: int) -> Iterator[Binary]:
    config = tuning.SHIFTS[arch]
    blocks = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
    # A bank of floats and a query of one term take one term of the bank.
    for suffix in (" one term", "", " floats"):
        key_terms, terms = _TERMS[suffix]
        constants = {"CHANNELS": channels, "TERMS": terms, "KEY_TERMS": key_terms, **blocks}
        name = f"shift logits C={channels}{suffix}"
        yield Binary(name, shift_logits_kernel, constants, config, arch, 0)


def compiled(binary: Binary, chip: str | None = None) -> Any:
    """Return Triton's compiled kernel of a chip, by default that of the tiles' own name.

    Specialised as a launch is: tensors aligned to 16 bytes, sizes not specialised.
    """
    arguments = [
        _type(name, binary) if name.startswith("p_") else 1
        for name in binary.kernel.arg_names
        if name not in binary.constants
    ]
    with compiling_for(chip or binary.arch):
        return binary.kernel.warmup(
            *arguments, grid=(1, 1, 1), **binary.constants, **binary.config.options()
        )


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
    if report.spills:
        found.append(f"expected no spills, got {report.spills}")
    if report.shared > limit:
        found.append(f"expected at most {limit} bytes of shared memory, got {report.shared}")
    kinds = report.matrix.split(", ")
    if binary.matrix and not any(kind.startswith(unit) for kind in kinds):
        found.append(f"expected {unit}, got {report.matrix}")
    return [f"{chip or binary.arch} {binary.name}: {fault}" for fault in found]


def _type(name: str, binary: Binary) -> torch.dtype:
    if name in ("p_row_spans", "p_ids"):
        return torch.int32
    floats = "SINGLE" in binary.constants or (
        binary.kernel is same_place_kernel and name == "p_query"
    )
    return torch.float16 if name in _HALVES and not floats else torch.float32


def _read_amd(assembly: str, shared: int) -> Report:
    def field(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", assembly)[-1])

    kinds = sorted(set(re.findall(r"v_mfma_\w+", assembly)))
    return Report(
        field("vgpr_count"), field("vgpr_spill_count"), shared, ", ".join(kinds) or "-", None
    )


def _read_nvidia(cubin: bytes, shared: int, binary: Binary) -> Report:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True)
            for flag in ("-res-usage", "-sass")
        )
    registers = re.search(r"REG:(\d+)", usage.stdout)
    code = _instructions(sass.stdout)
    kinds = sorted({op.split(".")[0] for _, op, _ in code if _MATRIX.match(op)})
    return Report(
        int(registers[1]) if registers else 0,
        sum(op.startswith(("STL", "LDL")) for _, op, _ in code),
        shared,
        ", ".join(kinds) or "-",
        _roofline(code, binary) if binary.pairs else None,
    )


Instruction = tuple[int, str, str]
"""Address, operation, operands."""


def _instructions(sass: str) -> list[Instruction]:
    line = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);")
    return [(int(m[1], 16), m[2], m[3]) for m in line.finditer(sass)]


def _roofline(code: list[Instruction], binary: Binary) -> dict[str, float] | None:
    """Return lane instructions per pair by class in the smallest loop with both exp2 and matmul.

    Branches inside count as taken: for the diagonal form this is the body of a full step.
    """
    loops = [
        (int(target[1], 16), address)
        for address, op, operands in code
        if op.startswith("BRA") and (target := re.search(r"0x([0-9a-f]+)", operands))
        if int(target[1], 16) < address
    ]
    for first, last in sorted(loops, key=lambda loop: loop[1] - loop[0]):
        body = [(op, operands) for address, op, operands in code if first <= address <= last]
        ops = [op for op, _ in body]
        if any(map(_MATRIX.match, ops)) and any(op.startswith("MUFU.EX2") for op in ops):
            lanes = binary.config.num_warps * 32 / binary.pairs
            counts = dict.fromkeys(("matrix", "exp2", "float", "memory", "other"), 0.0)
            for op in ops:
                counts[_class(op)] += lanes
            counts["all"] = len(ops) * lanes
            return counts
    return None


def _class(op: str) -> str:
    if _MATRIX.match(op):
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
