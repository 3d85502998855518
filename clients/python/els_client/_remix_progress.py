"""Progress of ``els remix``: by the cost of steps, as those of the finest scale take longest."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from els_client._remix_inputs import Size


def progress_of_steps(
    scales: Sequence[Size], steps: int, total: int, sources: int | None = None
) -> list[float]:
    """Return the progress after each step, rising from 0, before the first, to 1.

    A step compares each pixel with every pixel of the picture at its scale; the uniform posterior,
    at the first step from noise of a scale, compares none.

    Args:
        scales: Height and width of the model at each scale, coarsest first.
        steps: Of a scale.
        total: Steps in all: a start leaves out some of the coarsest scale.
        sources: Most pixels of a scale that are compared with; None for all.
    """
    costs: list[float] = []
    for scale, (height, width) in enumerate(scales):
        pixels = height * width
        skipped = steps * len(scales) - total if scale == 0 else 0
        each = float(pixels * min(pixels, sources or pixels))
        first = [] if skipped else [0.0]
        costs += first + [each] * (steps - max(skipped, 1))
    done = [0.0, *itertools.accumulate(costs)]
    return [each / done[-1] for each in done]
