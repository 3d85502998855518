"""Division of a batch into launches of fixed sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

SIZES = (1, 2, 4, 8, 16, 64)
"""Batch sizes of graphs whose model names none."""
LONGEST_S = 0.2
"""Maximum predicted seconds of a launch of more than one image: a large network is not faster in
batches, and compiling and trying each size takes as long as some launches."""


def launches(count: int, seconds: Mapping[int, float]) -> list[int]:
    """Return the sizes of the launches that compute ``count`` images in the least time.

    The last ones may be padded: their sum is at least ``count``. Largest first.

    Args:
        count: number of images, at least 1.
        seconds: batch size → seconds of a launch.
    """
    best: list[tuple[float, int]] = [(0.0, 0)]
    for images in range(1, count + 1):
        best.append(
            min((cost + best[max(0, images - size)][0], size) for size, cost in seconds.items())
        )
    chosen: list[int] = []
    while count > 0:
        chosen.append(best[count][1])
        count -= chosen[-1]
    return sorted(chosen, reverse=True)


def worth_trying(size: int, measured: Mapping[int, float], given: Sequence[int]) -> bool:
    """Return whether to compile a size beside those that were measured.

    Args:
        size: the batch size.
        measured: smaller sizes → seconds of a launch.
        given: sizes that the model names, all of which are compiled.
    """
    if given or not measured:
        return True
    largest = max(measured)
    return measured[largest] * size / largest <= LONGEST_S
