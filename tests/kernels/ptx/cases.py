"""Cases of the interpreter: kernels, chips, banks and shapes, and the comparison of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from tests.kernels.cases import NAMES, VARIANTS, Case, assert_within_budget, random_case
from tests.kernels.ptx.driver import InterpretingDriver, Launch, interpreting
from tests.kernels.ptx.matrix import Rounding

from els_kernels.triton import launch
from els_kernels.triton.attention import TritonAttention

_ONE_TERM_NOISE = 2e4
"""s/a at which a query needs one term only, for any window."""


@dataclass(frozen=True)
class Shape:
    """One case.

    Attributes:
        geometry: a key of ``NAMES``.
        size: images, channels, height and width of the bank.
        windows: sides of the windows, two queries each, of which ``queries`` are asked.
        of_bytes: whether the bank needs one term, not two.
        chip: ``sm80`` or ``sm90``.
        rounding: of the matrix units.
        queries: which of the queries are asked; None for all.
        one_term: whether the noise is so high that a query needs one term.
        slabs: whether the bank is cut into several slabs.
    """

    geometry: str
    size: tuple[int, int, int, int]
    windows: tuple[int, ...] = (1,)
    of_bytes: bool = True
    chip: str = "sm90"
    rounding: Rounding = "exact"
    queries: tuple[int, ...] | None = (0,)
    one_term: bool = False
    slabs: bool = False

    def __str__(self) -> str:
        words = [self.chip, self.rounding, self.geometry, "×".join(map(str, self.size))]
        words += [f"k={','.join(map(str, self.windows))}", "bytes" if self.of_bytes else "floats"]
        words += ["one term"] * self.one_term + ["slabs"] * self.slabs
        return " ".join(words)

    def case(self) -> Case:
        """Return bank and queries."""
        case = random_case(NAMES[self.geometry], self.size, self.windows, of_bytes=self.of_bytes)
        case = case if self.queries is None else case[self.queries]
        if self.one_term:
            case.s.copy_(case.a * _ONE_TERM_NOISE)
            case.x.copy_(
                torch.randn(case.x.shape, dtype=torch.float64) * case.s[:, None, None, None]
            )
        return case


FAST = [
    Shape("els-circular", (3, 1, 4, 5), (3,), queries=None),
    Shape("els-circular", (2, 3, 9, 9), (5,)),
    Shape("els-circular", (3, 1, 5, 6), (5,), of_bytes=False, slabs=True),
    Shape("els-circular", (3, 1, 4, 5), (3,), one_term=True),
    Shape("els-circular", (3, 1, 4, 5), (3,), chip="sm80", rounding="ampere"),
    Shape("els-circular", (2, 1, 9, 9), (7,), chip="sm80"),
    Shape("els-zeros", (3, 3, 4, 5), (3,), rounding="hopper"),
    Shape("els-valid", (2, 3, 5, 5), (3,), of_bytes=False),
    # One buffer for a row's operands, not two.
    Shape("els-valid", (2, 3, 9, 9), (9,), of_bytes=False),
    Shape("local-zeros", (2, 1, 4, 5), (3,), of_bytes=False),
    Shape("local-circular", (2, 3, 4, 5), (3,), chip="sm80"),
]
"""Eleven, for every run of the tests: each kernel, chip, number of terms and rounding."""


def everything() -> Iterator[Shape]:
    """Yield the cases of the command: all geometries, banks, windows and chips."""
    yield from FAST
    for chip in ("sm80", "sm90"):
        for of_bytes in (True, False):
            for name in NAMES:
                whole = NAMES[name].whole
                windows = (1, 1) if whole else (3, 5)
                for channels in (1, 3):
                    size = (4, channels, 7, 8)
                    yield Shape(name, size, windows, of_bytes, chip, queries=None)
        exact: Rounding = "hopper" if chip == "sm90" else "ampere"
        for name in ("els-zeros", "els-circular", "els-valid"):
            yield Shape(name, (4, 1, 9, 8), (3, 5), True, chip, exact, None)
            yield Shape(name, (5, 1, 5, 6), (5,), False, chip, slabs=True)
            yield Shape(name, (3, 3, 15, 14), (11, 13), True, chip, queries=None)
        yield Shape("els-zeros", (9, 1, 10, 33), (5,), True, chip)
        yield Shape("els-zeros", (2, 1, 28, 28), (7,), True, chip)
        yield Shape("els-circular", (2, 1, 28, 28), (5,), True, chip)
        yield Shape("els-circular", (3, 1, 26, 25), (25,), True, chip)
        yield Shape("els-circular", (60, 3, 12, 12), (3,), True, chip)
        yield Shape("els-circular", (2, 4, 10, 11), (5,), True, chip)
        yield Shape("els-zeros", (3, 2, 9, 7), (3, 5), False, chip)
        yield Shape("els-valid", (3, 3, 27, 27), (25,), True, chip)
        yield Shape("local-circular", (4, 3, 7, 33), (3, 5), False, chip)


class Outcome(NamedTuple):
    """Result of one case."""

    shape: str
    faults: str
    """Faults that a GPU would make, one line for each kind; empty for none."""
    error: float
    """Largest error of the mean."""
    excess: str
    """Why the answer exceeds its budget; empty if it does not."""
    launches: list[Launch]


def outcome(shape: Shape, mutate: Callable[[str, str], str] | None = None) -> Outcome:
    """Return the result of a case; ``mutate`` changes the PTX of a kernel, given its name."""
    case = shape.case()
    device = InterpretingDriver(shape.chip, shape.rounding, mutate)
    with pytest.MonkeyPatch.context() as patch, interpreting(device, shape.chip):
        if shape.slabs:
            patch.setattr(launch, "_SLAB_BYTES", 2048)
        patch.setitem(VARIANTS, "triton", TritonAttention)
        got = case.attend("triton")
    want = case.attend("reference")
    excess = ""
    try:
        assert_within_budget(case, got, want)
    except AssertionError as error:
        excess = str(error) or "the answer exceeds its budget"
    largest = float((got.mean - want.mean).abs().max())
    return Outcome(str(shape), str(device.faults), largest, excess, device.launches)
