"""Machine code of NVIDIA's chips, as text: instructions, loops, registers."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import triton

Instruction = tuple[int, str, str]
"""Address, operation with its modifiers, operands."""

MATRIX = re.compile(r"^(HMMA|HGMMA|UTCHMMA)")
"""Instructions of the matrix units."""

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);")
_TARGET = re.compile(r"0x([0-9a-f]+)")


def instructions(cubin: bytes) -> list[Instruction]:
    """Return the instructions of the only kernel of a binary."""
    text = _dump(cubin, "-sass")
    return [(int(m[1], 16), m[2], m[3]) for m in _LINE.finditer(text)]


def registers(cubin: bytes) -> int:
    """Return the registers of a thread; 0 if the tool does not say."""
    found = re.search(r"REG:(\d+)", _dump(cubin, "-res-usage"))
    return int(found[1]) if found else 0


def loops(code: list[Instruction]) -> Iterator[list[Instruction]]:
    """Yield the bodies of loops, the smallest first."""
    ends = [(target, address) for address, target in branches(code) if target < address]
    for first, last in sorted(ends, key=lambda loop: loop[1] - loop[0]):
        yield [one for one in code if first <= one[0] <= last]


def softmax_loop(code: list[Instruction]) -> list[Instruction] | None:
    """Return the smallest loop with both exp2 and products; None if there is none."""
    for body in loops(code):
        operations = [operation for _, operation, _ in body]
        exp2 = any(one.startswith("MUFU.EX2") for one in operations)
        if exp2 and any(map(MATRIX.match, operations)):
            return body
    return None


def branches(code: list[Instruction]) -> Iterator[tuple[int, int]]:
    """Yield address and target of every branch."""
    for address, operation, operands in code:
        if operation.startswith("BRA") and (target := _TARGET.search(operands)):
            yield address, int(target[1], 16)


def _dump(cubin: bytes, flag: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), flag, file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout
