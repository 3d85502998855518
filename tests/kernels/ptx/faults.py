"""Account of what a GPU would do wrong, or might."""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray


class Faults:
    """Number of threads, bytes or registers with each kind of fault, and its first instruction."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}
        """Kind → instruction."""

    def add(self, kind: str, occurred: NDArray[np.bool_] | bool, where: str) -> None:
        """Count a kind of fault as often as ``occurred`` is true."""
        number = int(np.count_nonzero(occurred))
        if number:
            self.counts[kind] += number
            self.first.setdefault(kind, where)

    def __str__(self) -> str:
        """Return one line for each kind, empty if there are no faults."""
        lines = (f"{kind}: {n} times, first {self.first[kind]}" for kind, n in self.counts.items())
        return "\n".join(lines)
