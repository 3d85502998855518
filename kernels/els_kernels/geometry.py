"""Windows Ω and sources S(u): the pixels of a query patch and the bank places it attends to.

Axes are handled separately. With zero padding the places of an axis form spans that share a border
signature ``sig(i) = (min(i, r), min(H-1-i, r))``: the interior, where every place is a source of
every other, and one span for each edge place. A span has a *crop* of the axis in which its window
always fits, so that neither masks nor padding are needed::

    H = 9, k = 5          0 1 2 3 4 5 6 7 8
    interior  places 2…6  [x x x x x x x x x]   window 5
    edge 0    place  0    [x x x]               window 3 (clipped)
    edge 1    place  1    [x x x x]             window 4
    edge 7, edge 8        the mirror images
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Padding = Literal["zeros", "circular", "valid", "inside"]
Sources = Literal["same", "every"]


class Posterior(NamedTuple):
    """Result of patch attention: float32, on the query's device."""

    mean: Tensor
    """[B, C, H, W]: the posterior mean E[x0 | x] of each pixel under its own window."""
    log_evidence: Tensor
    """[B, H, W]: log Σ exp(logit) over the pixel's sources, unnormalised."""


@dataclass(frozen=True)
class Geometry:
    """Window Ω and sources S(u) of a machine.

    ``sources``: the *same* place of every image, or *every* place that the padding allows.
    ``padding``: ``zeros`` clips windows at the border and matches border signatures; ``circular``
    wraps around the torus; ``valid`` uses interior places only and pads the query circularly;
    ``inside`` uses patches wholly inside both images, and exists with a fold only (see ``fold``).
    ``whole``: the window is the whole image, and the window argument is None.
    """

    sources: Sources
    padding: Padding
    whole: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError for whole windows of every place under zero padding: undefined."""
        if self.whole and self.sources == "every" and self.padding == "zeros":
            raise ValueError(
                "geometry: expected a whole window of every place on the torus, got padding zeros"
            )


GEOMETRIES: dict[tuple[str, str], Geometry] = {
    ("ideal", "zeros"): Geometry("same", "zeros", whole=True),
    ("local", "zeros"): Geometry("same", "zeros"),
    ("local", "circular"): Geometry("same", "circular"),
    ("equivariant", "circular"): Geometry("every", "circular", whole=True),
    ("els", "zeros"): Geometry("every", "zeros"),
    ("els", "circular"): Geometry("every", "circular"),
    ("els", "valid"): Geometry("every", "valid"),
}
"""(machine, padding) → geometry: Kamb & Ganguli (ICML 2025), section 3."""


def max_window(geometry: Geometry, height: int, width: int) -> int:
    """Return the largest odd window allowed for images of this size.

    On the torus a window larger than the image would count wrapped pixels twice; with zero padding
    ``2·max(H, W) - 1`` covers the whole image from every place.
    """
    if geometry.padding == "zeros":
        return 2 * max(height, width) - 1
    side = min(height, width)
    return side - (side + 1) % 2


def count_pairs(geometry: Geometry, height: int, width: int, window: int) -> int:
    """Return the number of logits of one query image and one bank image: the unit of cost.

    It is Σ_u |S(u)|, except for a whole window, where pixels share the logits of the image's
    shifts.
    """
    pixels = height * width
    if geometry.whole or geometry.sources == "same":
        return pixels
    if geometry.padding == "circular":
        return pixels * pixels
    rows, cols = height - window + 1, width - window + 1
    if geometry.padding == "valid":
        return pixels * rows * cols
    return _axis_pairs(height, rows) * _axis_pairs(width, cols)


def _axis_pairs(length: int, interior: int) -> int:
    return length if interior < 1 else interior * interior + length - interior


@dataclass(frozen=True)
class Span:
    """Places of one axis that share a signature; ``crop`` is the range that their windows cover."""

    crop: slice
    places: slice
    window: int

    @property
    def single(self) -> bool:
        """Whether the span is a single place, whose only source is itself."""
        return bool(self.places.stop - self.places.start == 1)


def group_by(*keys: Iterable[Hashable]) -> dict[tuple[Any, ...], list[int]]:
    """Return the images of a batch grouped by their keys: (one entry of each list) → indices."""
    groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for b, key in enumerate(zip(*keys, strict=True)):
        groups[key].append(b)
    return groups


def zero_padded_spans(length: int, window: int) -> list[Span]:
    """Return the spans of an axis under zero padding; together they cover it once."""
    r = window // 2
    edges = [
        Span(slice(lo, hi), slice(i, i + 1), hi - lo)
        for i in range(length)
        if i < r or i >= length - r
        for lo, hi in [(max(0, i - r), min(length, i + r + 1))]
    ]
    if length < window:
        return edges
    return [Span(slice(0, length), slice(r, length - r), window), *edges]


def band(length: int, window: int, padding: Padding) -> Tensor:
    """Return the 0/1 matrix [length, length] whose product sums each place's window (float64).

    ``zeros`` clips the window at the ends, the others wrap it. The matrix is on the CPU.
    """
    place = torch.arange(length, device="cpu")
    distance = place[:, None] - place[None, :]
    r = window // 2
    inside = distance.abs() <= r if padding == "zeros" else (distance + r) % length < window
    return inside.double()
