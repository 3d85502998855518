"""Text of PTX → instructions in basic blocks."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

_IGNORED = (".loc", ".reg", ".pragma", ".file")
_LABEL = re.compile(r"(\$?[\w$]+):\s*")
_GUARD = re.compile(r"@(!?)(%p\d+)\s+")
_ADDRESS = re.compile(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+))?\s*\]")
_INTEGER = re.compile(r"-?(0x[0-9a-fA-F]+|\d+)$")


@dataclass(frozen=True)
class Immediate:
    """Constant: the bits of an integer or of a float32."""

    bits: int


@dataclass(frozen=True)
class Symbol:
    """Name of a variable or a label."""

    name: str


@dataclass(frozen=True)
class Address:
    """Register or symbol plus bytes."""

    base: str | Symbol
    offset: int


Scalar = str | Immediate | Symbol | Address
"""A register is its name."""
Operand = Scalar | tuple[Scalar, ...]
"""Braces are a tuple."""


@dataclass(frozen=True, eq=False)
class Instruction:
    """One instruction."""

    text: str
    parts: tuple[str, ...]
    """Operation and its modifiers; the last is often a type."""
    operands: tuple[Operand, ...]
    guard: str | None
    """Predicate register under which it runs."""
    negated: bool

    @property
    def operation(self) -> str:
        """First part of the name."""
        return self.parts[0]

    @property
    def kind(self) -> str:
        """Last part of the name: the type of the result, mostly."""
        return self.parts[-1]


@dataclass(frozen=True)
class Program:
    """Kernel in basic blocks; a block ends at a branch, a return or a label."""

    blocks: list[list[Instruction]]
    labels: dict[str, int]
    """Label → index of its block."""
    parameters: list[str]
    """Type of each parameter, such as ``u64``."""


def parse(ptx: str) -> Program:
    """Return the only kernel of a module.

    Raises:
        ValueError: A statement does not end.
    """
    head, body = ptx[ptx.index(".visible .entry") :].split("\n{", 1)
    body = re.sub(r"//[^\n]*", "", body[: body.index("\n}")])
    blocks: list[list[Instruction]] = [[]]
    labels: dict[str, int] = {}
    for statement in _statements(body):
        text = statement
        while label := _LABEL.match(text):
            if blocks[-1]:
                blocks.append([])
            labels[label[1]] = len(blocks) - 1
            text = text[label.end() :]
        if text:
            blocks[-1].append(_instruction(text))
            if blocks[-1][-1].operation in ("bra", "ret"):
                blocks.append([])
    return Program(blocks, labels, re.findall(r"\.param \.(\w+)", head))


def _statements(body: str) -> Iterator[str]:
    """Yield labels, and instructions without the semicolon that ends them."""
    pending = ""
    for line in map(str.strip, body.splitlines()):
        if not line or (not pending and line.startswith(_IGNORED)):
            continue
        if not pending and _LABEL.fullmatch(line):
            yield line
            continue
        pending = f"{pending} {line}".strip()
        if pending.endswith(";"):
            yield from filter(None, map(str.strip, pending.split(";")))
            pending = ""
    if pending:
        raise ValueError(f"PTX: expected a semicolon after {pending!r}")


def _instruction(text: str) -> Instruction:
    guard = _GUARD.match(text)
    rest = text[guard.end() :] if guard else text
    name, _, operands = rest.replace("\t", " ").partition(" ")
    return Instruction(
        text,
        tuple(name.split(".")),
        tuple(map(_operand, _split(operands))),
        guard[2] if guard else None,
        guard is not None and guard[1] == "!",
    )


def _split(text: str) -> Iterator[str]:
    """Yield the parts between commas outside of braces and brackets."""
    depth, part = 0, ""
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            yield part.strip()
            part = ""
        else:
            part += character
    if part.strip():
        yield part.strip()


def _operand(text: str) -> Operand:
    if text.startswith("{"):
        return tuple(map(_scalar, _split(text[1:-1])))
    return _scalar(text)


def _scalar(text: str) -> Scalar:
    if address := _ADDRESS.match(text):
        base = address[1] if address[1].startswith("%") else Symbol(address[1])
        return Address(base, int(address[2], 0) if address[2] else 0)
    if text.startswith("%"):
        return text
    if text.startswith("0f"):
        return Immediate(struct.unpack(">I", bytes.fromhex(text[2:]))[0])
    if _INTEGER.match(text):
        return Immediate(int(text, 0))
    return Symbol(text)
