"""Patch attention with a fold by its definition, in float64: the specification.

Every other implementation is tested against this one and shares no code with it: patches by
explicit places and offsets, sources by comparing border signatures, one softmax over all of them,
and the fold by adding each mean patch, offset by offset.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from els_kernels.control import checkpoint
from els_kernels.fold_plan import FoldQuery
from els_kernels.geometry import Geometry

_CENTRE_ALONE = 1e-9
"""A ρ at which e^(-1/ρ²) is 0 in float64, so that each pixel's nearest patch alone counts."""


class FoldReference:
    """Brute force: O(places of the query · places of the bank · k²C) work."""

    def __init__(self, groups: Sequence[Tensor]) -> None:
        self._images = [image for group in groups for image in _pixels(group)]

    def __call__(self, query: FoldQuery) -> tuple[Tensor, Tensor]:
        """Return mean [C, H, W] and log evidence [H, W]."""
        centres, logits, keys, _ = self._patches(query)
        mean = _folded(query, centres, torch.einsum("qj,jco->qco", logits.softmax(1), keys))
        evidence, (height, width) = logits.logsumexp(1), query.size
        # Border pixels without a patch of their own have the evidence of the nearest patch.
        rows, cols = (sorted(set(places.tolist())) for places in centres.unbind(1))
        grid = evidence.view(len(rows), len(cols))
        row = torch.arange(height).clamp(rows[0], rows[-1]) - rows[0]
        col = torch.arange(width).clamp(cols[0], cols[-1]) - cols[0]
        return mean.float(), grid[row][:, col].float()

    def without(self, query: FoldQuery, image: int) -> tuple[Tensor, Tensor]:
        """Return the mean [C, H, W] without a bank image, and its weight [H, W]."""
        centres, logits, keys, images = self._patches(query)
        own = images == image
        weights = logits[:, ~own].softmax(1)
        mean = _folded(query, centres, torch.einsum("qj,jco->qco", weights, keys[~own]))
        share = logits.softmax(1)[:, own].sum(1)
        each = share[:, None, None].expand(-1, 1, query.window**2)
        return mean.float(), _folded(query, centres, each)[0].float()

    def _patches(self, query: FoldQuery) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return centres [Q, 2], logits [Q, J], keys [J, C, k²] and the image of each key [J]."""
        x, geometry, window = query.x.double(), query.geometry, query.window
        centres = _query_centres(*query.size, window, geometry)
        queries = _patches(x, centres, window, geometry.padding != "zeros")
        bank, level = self._images[slice(*query.limits)], (query.a, query.s, window)
        logits, keys = _logits(queries, centres, x, bank, level, geometry)
        sizes = ((image.shape[1], image.shape[2]) for image in bank)
        places = [len(_sources(*size, window, geometry)) for size in sizes]
        images = torch.arange(*query.limits).repeat_interleave(torch.tensor(places))
        return centres, logits, keys, images


def _folded(query: FoldQuery, centres: Tensor, means: Tensor) -> Tensor:
    return _fold(means, centres, query.size, query.window, query.fold, query.geometry)


def _pixels(group: Tensor) -> Tensor:
    """Return images in float64; uint8 v means v/127.5 - 1, rounded to float32 as banks are."""
    return (group.float() / 127.5 - 1 if group.dtype == torch.uint8 else group).double()


def _query_centres(height: int, width: int, window: int, geometry: Geometry) -> Tensor:
    """Return the centres of the query's patches, [Q, 2] rows and columns."""
    r = window // 2 if geometry.padding == "inside" else 0
    return torch.cartesian_prod(torch.arange(r, height - r), torch.arange(r, width - r))


def _offsets(window: int) -> Tensor:
    side = torch.arange(window) - window // 2
    return torch.cartesian_prod(side, side)


def _patches(image: Tensor, centres: Tensor, window: int, wraps: bool) -> Tensor:
    """Return the patch at every centre, [Q, C, k²]; outside an image it is zero or wraps."""
    height, width = image.shape[1:]
    places = centres[:, None] + _offsets(window)
    row, col = places[..., 0], places[..., 1]
    patches = image[:, row % height, col % width]
    if not wraps:
        patches = patches * ((row >= 0) & (row < height) & (col >= 0) & (col < width))
    return patches.transpose(0, 1)


def _sources(height: int, width: int, window: int, geometry: Geometry) -> Tensor:
    """Return the places of an image that any query may attend to, [U, 2]."""
    r = window // 2 if geometry.padding in ("valid", "inside") and window > 1 else 0
    return torch.cartesian_prod(torch.arange(r, height - r), torch.arange(r, width - r))


def _logits(
    queries: Tensor,
    centres: Tensor,
    x: Tensor,
    images: Iterable[Tensor],
    level: tuple[float, float, int],
    geometry: Geometry,
) -> tuple[Tensor, Tensor]:
    """Return logits [Q, J] of all patches of the bank, and these patches [J, C, k²]."""
    a, s, window = level
    keys, logits = [], []
    for image in images:
        checkpoint()
        places = _sources(image.shape[1], image.shape[2], window, geometry)
        patches = _patches(image, places, window, geometry.padding != "zeros")
        distances = torch.stack([(q - a * patches).square().sum((1, 2)) for q in queries])
        allowed = _allowed(centres, x, places, image, window, geometry)
        logits.append((-distances / (2 * s * s)).masked_fill(~allowed, -math.inf))
        keys.append(patches)
    return torch.cat(logits, dim=1), torch.cat(keys)


def _allowed(
    centres: Tensor, x: Tensor, places: Tensor, image: Tensor, window: int, geometry: Geometry
) -> Tensor:
    """Return which places each query patch attends to, bool [Q, U]."""
    if geometry.sources == "same":
        return (centres[:, None] == places).all(-1)
    if geometry.padding != "zeros":
        return torch.ones(len(centres), len(places), dtype=torch.bool)
    query = _signatures(centres, x, window // 2)
    return (query[:, None] == _signatures(places, image, window // 2)).all(-1)


def _signatures(places: Tensor, image: Tensor, r: int) -> Tensor:
    """Return the distances to the four borders, at most r, [U, 4]."""
    ends = torch.tensor(image.shape[1:]) - 1
    return torch.cat([places.clamp(max=r), (ends - places).clamp(max=r)], dim=1)


def _fold(
    means: Tensor,
    centres: Tensor,
    size: tuple[int, int],
    window: int,
    fold: float,
    geometry: Geometry,
) -> Tensor:
    """Return Σ_q g(p-q)·mean_q(p-q) / Σ_q g(p-q), [C, H, W]; g is scaled by its largest value."""
    height, width = size
    reached: list[tuple[Tensor, Tensor, float, Tensor]] = []
    top = torch.full(size, -math.inf, dtype=torch.float64)
    for index, offset in enumerate(_offsets(window)):
        row, col = (centres + offset).unbind(1)
        inside = (row >= 0) & (row < height) & (col >= 0) & (col < width)
        if geometry.padding in ("circular", "valid"):
            row, col, inside = row % height, col % width, torch.ones_like(inside)
        row, col = row[inside], col[inside]
        log_weight = _log_weight(offset, window, fold)
        top[row, col] = top[row, col].clamp(min=log_weight)
        reached.append((row, col, log_weight, means[inside, :, index]))
    total = torch.zeros(means.shape[1], *size, dtype=torch.float64)
    weights = torch.zeros(size, dtype=torch.float64)
    for row, col, log_weight, values in reached:
        g = (log_weight - top[row, col]).exp()
        weights[row, col] += g
        total[:, row, col] += (g[:, None] * values).T
    return total / weights


def _log_weight(offset: Tensor, window: int, fold: float) -> float:
    """Return log g = -(u² + v²) / 2ρ², where u and v run from -1 to 1 over the window."""
    if window == 1:
        return 0.0
    distance = float(offset.double().square().sum()) / (window // 2) ** 2
    return -distance / (2 * max(fold, _CENTRE_ALONE) ** 2)
