"""No kernel divides what may be negative: Python and numpy round down, a GPU rounds to zero.

Signs are inferred from the source of every kernel, so that kernels added later are checked too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import els_kernels

FOLDER = Path(els_kernels.__file__).parent
SIGNED = {"FLAT0", "EMIT_FROM", "INNER_LO", "INNER_HI"}
"""Sizes that may be negative, of all kernels."""
DECORATORS = {"kernel", "triton.jit", "gluon.jit", "jit"}
SAME_SIGN = {"cast", "to", "broadcast_to", "expand_dims", "reshape", "view", "max", "min", "sum"}
"""Functions and methods whose result is negative only if their first argument is."""
NEVER_NEGATIVE = {"program_id", "num_programs", "arange", "abs", "zeros"}
LINE = tuple[str, int, str]
"""Kernel, line within it, expression."""


class Signs:
    """Names of a kernel that are never negative.

    At first all are; those with an assignment that may be negative are removed until none is left.
    """

    def __init__(self, function: ast.FunctionDef) -> None:
        parameters = {arg.arg for arg in function.args.args if arg.arg.isupper()}
        assigned = list(_assignments(function))
        names = {name for name, _ in assigned}
        self._positive = names | (parameters - SIGNED)
        before = -1
        while before != len(self._positive):
            before = len(self._positive)
            self._positive -= {name for name, value in assigned if not self.positive(value)}

    def positive(self, value: ast.expr) -> bool:
        """Return whether an expression cannot be negative."""
        match value:
            case ast.Constant(value=int() | float() as number):
                return number >= 0
            case ast.Name(id=name):
                return name in self._positive
            case ast.Compare() | ast.BoolOp():
                return True
            case ast.Subscript(value=inner):
                return self.positive(inner)
            case ast.IfExp(body=one, orelse=other):
                return self.positive(one) and self.positive(other)
            case ast.BinOp(left=left, op=ast.Add() | ast.Mult(), right=right):
                return self.positive(left) and self.positive(right)
            case ast.BinOp(op=ast.Mod() | ast.FloorDiv(), right=right):
                return self.positive(right) and self.divisible(value)
            case ast.Call(func=ast.Attribute(value=called, attr=name), args=args):
                arguments = [called, *args] if not _is_language(called) else args
                return self._call(name, arguments)
        return False

    def divisible(self, value: ast.BinOp) -> bool:
        """Return whether a quotient or a remainder is the same on a GPU as in Python."""
        if self.positive(value.left) or _is_unsigned(value.left):
            return True
        # (x + n) % n: the author has added a period to what is above -n.
        match value:
            case ast.BinOp(left=ast.BinOp(op=ast.Add(), right=period), op=ast.Mod(), right=right):
                return ast.dump(period) == ast.dump(right)
        return False

    def _call(self, name: str, arguments: list[ast.expr]) -> bool:
        if name in NEVER_NEGATIVE:
            return True
        if name == "where":
            return all(map(self.positive, arguments[1:]))
        if name in ("minimum", "cdiv"):
            return all(map(self.positive, arguments))
        if name == "maximum":
            return any(map(self.positive, arguments))
        return name in SAME_SIGN and self.positive(arguments[0])


def _is_language(called: ast.expr) -> bool:
    return isinstance(called, ast.Name) and called.id in ("tl", "gl", "triton")


def _is_unsigned(value: ast.expr) -> bool:
    """Return whether an expression is cast to an unsigned type, which divides alike everywhere."""
    return isinstance(value, ast.Call) and "uint" in ast.unparse(value).rsplit("tl.", 1)[-1]


def _assignments(function: ast.FunctionDef) -> Iterator[tuple[str, ast.expr]]:
    """Yield every name with what it is assigned; a pair of names takes a pair of values."""
    for node in ast.walk(function):
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                yield name, value
            case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Tuple(elts=values)):
                yield from zip(map(ast.unparse, names), values, strict=True)
            case ast.Assign(targets=targets, value=value):
                for target in targets:
                    yield from ((ast.unparse(n), value) for n in getattr(target, "elts", [target]))
            case ast.AugAssign(target=target, op=op, value=value):
                yield ast.unparse(target), ast.BinOp(target, op, value)
            case ast.For(target=target, iter=ast.Call(args=[_])):
                yield ast.unparse(target), ast.Constant(0)
            case ast.For(target=target, iter=ast.Call(args=[first, *_])):
                yield ast.unparse(target), first


def kernels(source: str) -> Iterator[ast.FunctionDef]:
    """Yield the functions of a module that are compiled for a GPU."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            decorators = {ast.unparse(one).split("(")[0] for one in node.decorator_list}
            if decorators & DECORATORS:
                yield node


def faults(source: str) -> list[LINE]:
    """Return the quotients and remainders of what may be negative."""
    found = []
    for function in kernels(source):
        signs = Signs(function)
        for node in ast.walk(function):
            if isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Mod | ast.FloorDiv):
                node = ast.BinOp(node.target, node.op, node.value)
            match node:
                case ast.BinOp(op=ast.Mod() | ast.FloorDiv()) if not signs.divisible(node):
                    line = getattr(node, "lineno", function.lineno) - function.lineno
                    found.append((function.name, line, ast.unparse(node)))
    return found


def sources() -> dict[str, str]:
    texts = {path.name: path.read_text() for path in FOLDER.rglob("*.py")}
    return {name: text for name, text in texts.items() if any(kernels(text))}


def test_no_kernel_divides_what_may_be_negative() -> None:
    found = {name: faults(text) for name, text in sources().items()}
    assert {"diagonal.py", "direct.py", "online.py", "same_place.py"} <= set(found)
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


@pytest.mark.parametrize(
    ("now", "before"),
    [
        # Read rows before the first of two tensors, for windows of 5 or more on the torus.
        ("(t + LAG + KEY_ROWS) % KEY_ROWS", "(t + LAG) % KEY_ROWS"),
        ("(t + KEY_ROWS) % KEY_ROWS", "t % KEY_ROWS"),
        ("o_key = tl.where(m_key, o_key, 0)", "o_key = o_key - 1"),
        ("i_key % SLOTS", "(i_key - LAG) % SLOTS"),
    ],
)
def test_a_remainder_of_what_may_be_negative_is_found(now: str, before: str) -> None:
    source = sources()["diagonal.py"]
    assert now in source
    assert faults(source.replace(now, before, 1))
