"""Changes of compiled PTX, each of which makes a kernel wrong, and what has to be found then."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tests.kernels.ptx.cases import Shape

WRONG_ANSWER = "budget"
"""Report where only the answer shows the fault."""
_SM90 = Shape("els-circular", (3, 1, 4, 5), (3,))
_TWO_TILES = Shape("els-circular", (2, 1, 9, 9), (3,))
_SM80 = Shape("els-circular", (2, 1, 7, 8), (7,), chip="sm80")


@dataclass(frozen=True)
class Mutation:
    """A change of a kernel's text.

    Attributes:
        name: what it breaks.
        pattern: regular expression.
        replacement: of every match, or of match number ``which``.
        found: part of the fault's kind, or ``WRONG_ANSWER``.
        which: number of the match; None for all.
        shape: the case.
        kernel: the only kernel that is changed.
    """

    name: str
    pattern: str
    replacement: str
    found: str
    which: int | None = None
    shape: Shape = _SM90
    kernel: str = "hopper_kernel"

    def __call__(self, name: str, text: str) -> str:
        """Return the text of a kernel, changed if it is the one.

        Raises:
            ValueError: Nothing matches.
        """
        if name != self.kernel:
            return text
        matches = list(re.finditer(self.pattern, text))
        chosen = matches if self.which is None else matches[self.which : self.which + 1]
        if not chosen:
            raise ValueError(f"{self.name}: expected a match of {self.pattern}, got none")
        for match in reversed(chosen):
            text = text[: match.start()] + match.expand(self.replacement) + text[match.end() :]
        return text


_NOTHING = "bar.warp.sync -1;"
_BARRIER = r"bar\.sync\s+0;"
MUTATIONS = [
    Mutation("a barrier less", _BARRIER, _NOTHING, "shared race", 0),
    Mutation("no proxy fences", r"fence\.proxy\.async\.shared::cta;", _NOTHING, "proxy fence"),
    Mutation("no waits for copies", r"cp\.async\.wait_group\s+\d+;", _NOTHING, "asynchronous copy"),
    Mutation("no waits for products", r"wgmma\.wait_group[\w.]*\s+\d+;", _NOTHING, "in flight"),
    Mutation("no fence of registers", r"wgmma\.fence[\w.]*;", _NOTHING, "after their fence"),
    Mutation("a transposed operand", r", 1, 1, 1;", ", 1, 1, 0;", WRONG_ANSWER),
    Mutation("another lane's maximum", r"(shfl\.sync\.bfly\.b32.*), 2, 31", r"\1, 1, 31",
             WRONG_ANSWER, 0),
    Mutation("a read far away", r"(ld\.global\.b32[^\n]*)\+ 0 \]", r"\1+ 1048576 ]",
             "global read out of bounds", 5),
    Mutation("a write far away", r"(st\.global[^\n]*)\+ 0 \]", r"\1+ -1048576 ]",
             "global write out of bounds", 0),
    Mutation("all programs on one tile", r"(mov\.u32\s+%r\d+), %ctaid\.x;", r"\1, 0;",
             "global race", None, _TWO_TILES),
    Mutation("a barrier less on Ampere", _BARRIER, _NOTHING, "shared race", 3, _SM80,
             "diagonal_kernel"),
    Mutation("a matrix not transposed", r"x4\.trans\.", "x4.", WRONG_ANSWER, 0, _SM80,
             "diagonal_kernel"),
]  # fmt: skip
