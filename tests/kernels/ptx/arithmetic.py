"""Arithmetic, logic and conversions of PTX.

Floats round as on a GPU except for ``ex2.approx`` and ``lg2.approx``, which are exact to a float32
here and to 2 units of the last place there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tests.kernels.ptx.faults import Faults
from tests.kernels.ptx.program import Immediate, Instruction, Operand
from tests.kernels.ptx.threads import BITS, TYPES, Array, Mask, Threads

Binary = Callable[[Any, Any], Any]
Execute = Callable[[Threads, Instruction, Mask, Faults], None]

_SMALLEST = np.float32(1.1754944e-38)
_WIDE: dict[str, type[np.generic]] = {
    "s16": np.int32,
    "u16": np.uint32,
    "s32": np.int64,
    "u32": np.uint64,
}
_COMPARE: dict[str, Binary] = {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
}
_BINARY: dict[str, Binary] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    # Of a NaN and a number PTX takes the number.
    "min": np.fmin,
    "max": np.fmax,
}
_UNARY: dict[str, Callable[[Any], Any]] = {"neg": np.negative, "abs": np.abs, "not": np.invert}


def flush(values: Array) -> Array:
    """Return float32 values whose subnormal numbers are 0 of the same sign: ``ftz``."""
    small = np.abs(values) < _SMALLEST
    flushed: Array = np.where(small, np.copysign(np.float32(0), values), values)
    return flushed


def _binary(threads: Threads, one: Instruction, mask: Mask, faults: Faults) -> None:
    target, left, right = one.operands
    if one.kind == "pred":
        result = _BINARY[one.operation](threads.predicate(left), threads.predicate(right))
        threads.write(target, result, mask)
        return
    if "wide" in one.parts:
        wide = _WIDE[one.kind]
        factors = (threads.read(operand, TYPES[one.kind]).astype(wide) for operand in (left, right))
        threads.write(target, np.multiply(*factors), mask)
        return
    dtype = TYPES[one.kind]
    result = _BINARY[one.operation](threads.read(left, dtype), threads.read(right, dtype))
    threads.write(target, flush(result) if "ftz" in one.parts else result, mask)


def _unary(threads: Threads, one: Instruction, mask: Mask, faults: Faults) -> None:
    target, source = one.operands
    if one.kind == "pred":
        threads.write(target, ~threads.predicate(source), mask)
        return
    threads.write(target, _UNARY[one.operation](threads.read(source, TYPES[one.kind])), mask)


def _mad(threads: Threads, one: Instruction, mask: Mask, faults: Faults) -> None:
    target, left, right, addend = one.operands
    dtype = TYPES[one.kind]
    a, b = threads.read(left, dtype), threads.read(right, dtype)
    if "wide" in one.parts:
        dtype = _WIDE[one.kind]
        a, b = a.astype(dtype), b.astype(dtype)
    threads.write(target, a * b + threads.read(addend, dtype), mask)


def _fma(threads: Threads, one: Instruction, mask: Mask, faults: Faults) -> None:
    target, *operands = one.operands
    # The product of two float32 is exact in float64; the sum is rounded twice, at worst.
    a, b, c = (threads.read(operand, np.float32).astype(np.float64) for operand in operands)
    result = (a * b + c).astype(np.float32)
    threads.write(target, flush(result) if "ftz" in one.parts else result, mask)


def _shift(threads: Threads, one: Instruction, mask: Mask, faults: Faults) -> None:
    target, source, amount = one.operands
    dtype = TYPES[one.kind]
    bits = 8 * np.dtype(dtype).itemsize
    values, by = threads.read(source, dtype), threads.read(amount, np.uint32).astype(np.int64)
    inside = np.minimum(by, bits - 1).astype(dtype)
    if one.operation == "shl":
        result = np.where(by < bits, values << inside, dtype(0))
    else:
        # A signed shift by too much leaves the sign.
        rest = values >> dtype(bits - 1) if one.kind.startswith("s") else dtype(0)
        result = np.where(by < bits, values >> inside, rest)
    threads.write(target, result.astype(dtype), mask)


def _divide(threads: Threads, one: Instruction, mask: Mask, faults: Faults) -> None:
    """Divide as C does: rounded to zero, the remainder having the sign of the dividend."""
    target, *operands = one.operands
    dtype = TYPES[one.kind]
    dividend, divisor = (threads.every(operand, dtype) for operand in operands)
    active = np.ones(threads.count, bool) if mask is None else mask
    faults.add("division by zero", active & (divisor == 0), one.text)
    if one.kind.startswith("s"):
        negative = active & ((dividend < 0) | (divisor < 0))
        faults.add("division of a negative number", negative, one.text)
    a, b = dividend.astype(np.int64), np.where(divisor == 0, 1, divisor).astype(np.int64)
    quotient = np.abs(a) // np.abs(b) * np.sign(a) * np.sign(b)
    result = quotient if one.operation == "div" else a - quotient * b
    threads.write(target, result.astype(dtype), mask)


def _compare(threads: Threads, one: Instruction, mask: Mask, faults: Faults) -> None:
    target, left, right = one.operands
    dtype, name = TYPES[one.kind], one.parts[1]
    a, b = threads.every(left, dtype), threads.every(right, dtype)
    if name in _COMPARE:
        threads.write(target, _COMPARE[name](a, b), mask)
        return
    # Unordered: also true of a NaN.
    result = _COMPARE[name.removesuffix("u")](a, b) | np.isnan(a) | np.isnan(b)
    threads.write(target, result, mask)


def _select(threads: Threads, one: Instruction, mask: Mask, faults: Faults) -> None:
    target, first, second, predicate = one.operands
    dtype = TYPES[one.kind]
    chosen = np.where(
        threads.predicate(predicate), threads.read(first, dtype), threads.read(second, dtype)
    )
    threads.write(target, chosen, mask)


def _extract(threads: Threads, one: Instruction, mask: Mask, faults: Faults) -> None:
    target, source, position, length = one.operands
    assert isinstance(position, Immediate)
    assert isinstance(length, Immediate)
    dtype = TYPES[one.kind]
    left = dtype(32 - position.bits - length.bits)
    threads.write(target, (threads.read(source, dtype) << left) >> dtype(32 - length.bits), mask)


def _exp2(threads: Threads, one: Instruction, mask: Mask, faults: Faults) -> None:
    target, source = one.operands
    exponents = flush(threads.read(source, np.float32))
    threads.write(target, flush(np.exp2(exponents)), mask)


def _log2(threads: Threads, one: Instruction, mask: Mask, faults: Faults) -> None:
    target, source = one.operands
    values = flush(threads.read(source, np.float32))
    with np.errstate(divide="ignore", invalid="ignore"):
        threads.write(target, np.log2(values), mask)


def _move(threads: Threads, one: Instruction, mask: Mask, faults: Faults) -> None:
    target, source = one.operands
    if one.kind == "pred":
        threads.write(target, threads.predicate(source), mask)
    elif isinstance(source, tuple):
        threads.write(target, _packed(threads, source, one.kind), mask)
    elif isinstance(target, tuple):
        _unpack(threads, target, source, one.kind, mask)
    else:
        threads.write(target, threads.read(source, TYPES[one.kind]), mask)


def _packed(threads: Threads, parts: tuple[Operand, ...], kind: str) -> Array:
    whole = TYPES[kind]
    size = np.dtype(whole).itemsize // len(parts)
    result = np.zeros(1, whole)
    for i, part in enumerate(parts):
        result = result | threads.read(part, BITS[size]).astype(whole) << whole(8 * size * i)
    return result


def _unpack(
    threads: Threads, parts: tuple[Operand, ...], source: Operand, kind: str, mask: Mask
) -> None:
    whole = TYPES[kind]
    size = np.dtype(whole).itemsize // len(parts)
    values = threads.read(source, whole)
    for i, part in enumerate(parts):
        threads.write(part, (values >> whole(8 * size * i)).astype(BITS[size]), mask)


def _convert(threads: Threads, one: Instruction, mask: Mask, faults: Faults) -> None:
    target, source, *low = one.operands
    to, of = one.parts[-2:]
    if to == "f16x2":
        # The first operand is the upper half.
        halves = (threads.read(operand, np.float32) for operand in (source, *low))
        high, lower = (half.astype(np.float16).view(np.uint16) for half in halves)
        result = high.astype(np.uint32) << np.uint32(16) | lower.astype(np.uint32)
        threads.write(target, result, mask)
        return
    values = threads.read(source, TYPES[of])
    if "rmi" in one.parts:
        values = np.floor(values)
    threads.write(target, values.astype(TYPES[to]), mask)


ARITHMETIC: dict[str, Execute] = {
    **dict.fromkeys(_BINARY, _binary),
    **dict.fromkeys(_UNARY, _unary),
    "mad": _mad,
    "fma": _fma,
    "shl": _shift,
    "shr": _shift,
    "div": _divide,
    "rem": _divide,
    "setp": _compare,
    "selp": _select,
    "bfe": _extract,
    "ex2": _exp2,
    "lg2": _log2,
    "mov": _move,
    "cvt": _convert,
}
"""Operation → what it does; all others touch memory, other threads or the flow of control."""
