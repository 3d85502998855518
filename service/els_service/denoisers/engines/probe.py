"""Known inputs and answers of a network: what a conversion has to reproduce."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Runner = Callable[..., npt.NDArray[np.float32]]
"""Inputs [B, …] → F, float32 [B, …]; the arrays are not changed, and the answer is the caller's."""

ERRORS = {"float32": 1e-4, "tf32": 1e-2, "bfloat16": 5e-2, "float16": 1e-2}
"""Precision → largest relative error of the answer to an image."""
_TIMED_S = 0.05
"""Seconds of repeated calls, at least two."""


class Probe:
    """Images with the answers of a network's own engine in float32.

    Images, levels and labels differ, so that exchanged rows are found.

    Args:
        inputs: of the network, [K, …] each, or with one value for all images.
        expected: its answers, [K, …].
    """

    def __init__(self, inputs: Sequence[Array], expected: npt.NDArray[np.float32]) -> None:
        self._inputs, self._expected = list(inputs), expected

    def __len__(self) -> int:
        return len(self._expected)

    def inputs(self, batch: int) -> list[Array]:
        """Return inputs of a batch, in which the images repeat."""
        rows = np.arange(batch) % len(self)
        return [one[rows] if one.ndim and len(one) == len(self) else one for one in self._inputs]

    def error(self, run: Runner, batch: int) -> float:
        """Return ‖difference‖/‖answer‖ of the worst image of a batch; infinite for NaN.

        Raises:
            ValueError: The answer has another shape.
        """
        # Twice: a graph that keeps an input or writes into one answers alike only at first.
        first = run(*self.inputs(batch))
        again = run(*self.inputs(batch))
        expected = self._expected[np.arange(batch) % len(self)]
        if first.shape != expected.shape:
            raise ValueError(f"expected answers {list(expected.shape)}, got {list(first.shape)}")
        return max(_worst(first, expected), _worst(again, expected))

    def seconds(self, run: Runner, batch: int) -> float:
        """Return the seconds of a call, the fastest of some."""
        inputs = self.inputs(batch)
        began = now = time.perf_counter()
        fastest, calls = np.inf, 0
        while calls < 2 or now - began < _TIMED_S:
            run(*inputs)
            before, now, calls = now, time.perf_counter(), calls + 1
            fastest = min(fastest, now - before)
        return float(fastest)


def _worst(got: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> float:
    flat, wanted = (one.reshape(len(one), -1).astype(np.float64) for one in (got, expected))
    if not np.isfinite(flat).all():
        return float(np.inf)
    size = np.linalg.norm(wanted, axis=1)
    difference = np.linalg.norm(flat - wanted, axis=1)
    # A network may answer zero, as one with zeros for weights does.
    relative = np.divide(difference, size, out=np.array(difference), where=size > 0)
    return float(relative.max())
