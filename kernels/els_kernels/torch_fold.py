"""Patch attention with a fold in torch: planes of displacements, filtered by banded matrices.

For a displacement δ between query patch and key patch the logits of all places are box sums of one
plane of products, and the fold of all weights is one separable filter (a box has P taps of 1)::

    logit_δ = rows·G_δ·colsᵀ + bias        G_δ(v) = Σ_c x_c(v)·φ_c(v + δ)
    D(p)    = Σ_δ A_δ(p)·φ(p + δ)          A_δ = tapsᵀ·weights_δ·taps

so that no mean patch is formed and the cost does not depend on the window. Two passes: the
normaliser of each patch first, then the weights. Columns are on a ring, as wide as the wider of
both crops, whose rotations are the horizontal displacements; keys that are no patch have bias -∞.

Float64, as a logit may be 1e11 at s = 1e-4. Planes are computed in tiles of a bounded size that
depends on the shapes only, one image of the batch at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad

from els_kernels.control import checkpoint
from els_kernels.default_device import made_on
from els_kernels.fold_plan import Cell, FoldQuery, extend, own_patch

_LOG2E = math.log2(math.e)
_TILE = 1 << 20
"""Doubles of one tile of planes: 8 MiB."""


class TiledFold:
    """A bank as it is stored, as groups of images of one size; centred tile by tile."""

    def __init__(self, groups: Sequence[Tensor]) -> None:
        self._centre = bank_centre(groups)
        self._groups = list(groups)

    def __call__(self, query: FoldQuery) -> tuple[Tensor, Tensor]:
        """Return mean [C, H, W] and log evidence [H, W]."""
        with made_on(query.x.device):
            image = query.x.double() - query.a * self._centre
            mean, evidence = torch.zeros_like(image), torch.zeros_like(image[0])
            groups = within(self._groups, query.limits)
            for cell in query.cells():
                planes = _Planes(cell, image, query, groups, self._centre)
                log_z = planes.normaliser()
                cell.scatter(planes.fold(log_z, *query.taps(cell)), mean)
                own_patch(log_z / _LOG2E - planes.energy, cell, evidence)
            evidence = extend(evidence, query.window, query.geometry)
            return (mean + self._centre).float(), evidence.float()

    def without(self, query: FoldQuery, image: int) -> tuple[Tensor, Tensor]:
        """Return the mean [C, H, W] without a bank image, and its weight [H, W]."""
        with made_on(query.x.device):
            x = query.x.double() - query.a * self._centre
            mean, weight = torch.zeros_like(x), torch.zeros_like(x[:1])
            own, others = (
                [part for limits in ranges for part in within(self._groups, limits)]
                for ranges in removed(query.limits, image)
            )
            for cell in query.cells():
                log_own = _Planes(cell, x, query, own, self._centre).normaliser()
                rest = _Planes(cell, x, query, others, self._centre)
                log_rest, taps = rest.normaliser(), query.taps(cell)
                cell.scatter(rest.fold(log_rest, *taps), mean)
                cell.scatter(folded_weight(log_own, log_rest, *taps), weight)
            return (mean + self._centre).float(), weight[0].float()


def decoded(images: Tensor) -> Tensor:
    """Return stored images as float32; uint8 v means v/127.5 − 1."""
    return images.float().div_(127.5).sub_(1) if images.dtype == torch.uint8 else images


def centred(images: Tensor, centre: Tensor) -> Tensor:
    """Return stored images [N, C, H, W] less the centre [C, 1, 1], as float32."""
    return decoded(images) - centre.float()


def bank_centre(groups: Sequence[Tensor]) -> Tensor:
    """Return the mean of each channel over all images, [C, 1, 1] float64."""
    total = torch.stack([channel_sums(group) for group in groups]).sum(0)
    pixels = sum(g.shape[0] * g.shape[2] * g.shape[3] for g in groups)
    return (total / pixels)[:, None, None]


def channel_sums(group: Tensor) -> Tensor:
    """Return the sums over images [N, C, H, W], [C] float64; needs no decoded copy of them."""
    if group.dtype != torch.uint8:
        return group.sum((0, 2, 3), dtype=torch.float64)
    values = decoded(torch.arange(256, dtype=torch.uint8, device=group.device)).double()
    channels = group.unbind(1)
    counts = [torch.bincount(channel.flatten(), minlength=256) for channel in channels]
    return torch.stack([(count * values).sum() for count in counts])


def removed(
    limits: tuple[int, int], image: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Return the range of one image of a range, and the ranges of the others."""
    (lo, hi), after = limits, image + 1
    others = [(first, last) for first, last in ((lo, image), (after, hi)) if first < last]
    return [(image, after)], others


def folded_weight(own: Tensor, rest: Tensor, row_taps: Tensor, col_taps: Tensor) -> Tensor:
    """Return the fold [1, X, Y] of what a bank image weighs in each patch.

    Args:
        own: log₂ of the normaliser of its patches alone, [Q, P].
        rest: of all others.
        row_taps: of the crop, [X, k].
        col_taps: [Y, k].
    """
    share = ((own - rest) / _LOG2E).sigmoid()
    return spread(spread(share, row_taps).T, col_taps).T[None]


def spread(values: Tensor, taps: Tensor) -> Tensor:
    """Return the sums of patches [Q, P] in the rows of a crop, [X, P], with taps [X, k]."""
    out = values.new_zeros(len(taps), values.shape[1])
    for o in range(taps.shape[1]):
        here = slice(o, o + len(values))
        out[here] += taps[here, o, None] * values
    return out


def within(groups: Sequence[Tensor], limits: tuple[int, int]) -> list[Tensor]:
    """Return the parts of groups [N, C, H, W] that images ``lo`` to ``hi`` of the bank are in."""
    lo, hi = limits
    parts = []
    for group in groups:
        part = group[max(0, lo) : max(0, hi)]
        if len(part):
            parts.append(part)
        lo, hi = lo - len(group), hi - len(group)
    return parts


class _Tile(NamedTuple):
    """Logits of some displacements: d of them, of n images at a time."""

    rows: slice
    """Query patches."""
    crop: slice
    """Rows of the query crop that these cover."""
    keys: Tensor
    """[N, C, d, rows of the crop, R]"""
    logits: Tensor
    """[N, d, rows, columns]: base 2, -∞ for keys that are no patch."""


class _Planes:
    """One cell of one query, [C, H, W] float64 relative to the centre of the bank."""

    def __init__(
        self, cell: Cell, image: Tensor, query: FoldQuery, groups: list[Tensor], centre: Tensor
    ) -> None:
        self._cell, self._groups, self._centre = cell, groups, centre
        self._k, a, s = query.window, query.a, query.s
        crop = cell.query(image)
        self.energy = box_sums(crop.square().sum(0), self._k) / (2 * s * s)
        keys = (len(cell.cols.keys(group.shape[-1])) for group in groups)
        self._ring = max(crop.shape[-1], *keys)
        self._scaled = pad(crop * (a / s / s * _LOG2E), (0, self._ring - crop.shape[-1]))
        self._bias = -(a / s) * (a / s) * _LOG2E / 2
        # Of all rows of a crop; that of fewer is a part of it.
        self._box_rows = box_matrix(crop.shape[1], self._k).to(crop.device)
        self._box_cols = box_matrix(self._ring, self._k)[: cell.cols.places].T.to(crop.device)

    def _tiles(self) -> Iterator[_Tile]:
        """Yield every displacement of every image, in an order that depends on shapes only."""
        rows, cols = self._cell.rows, self._cell.cols
        step = 1 if cols.same else max(1, _TILE // (self._scaled.shape[1] * self._ring))
        shifts = 1 if cols.same else self._ring
        together = max(1, _TILE // (min(step, shifts) * self._scaled.shape[1] * self._ring))
        for group in self._groups:
            for first in range(0, len(group), together):
                images = centred(group[first : first + together], self._centre)
                keys = self._cell.keys(images).double()
                bias = box_sums(keys.square().sum(1), self._k) * self._bias
                places = bias.shape[1]
                low, high = (0, 1) if rows.same else (1 - rows.places, places)
                keys, bias = self._rotations(keys, 0.0), self._rotations(bias, -math.inf)
                for dy in range(low, high):
                    for dx in range(0, shifts, step):
                        moved = slice(dx, min(shifts, dx + step))
                        yield self._tile(keys[..., moved, :], bias[..., moved, :], dy, places)

    def _rotations(self, images: Tensor, fill: float) -> Tensor:
        """Return every rotation [..., X, R, R] of images [..., X, Y] on the ring; a view."""
        ring = pad(images, (0, self._ring - images.shape[-1]), value=fill)
        return torch.cat([ring, ring[..., :-1]], dim=-1).unfold(-1, self._ring, 1)

    def _tile(self, keys: Tensor, bias: Tensor, dy: int, places: int) -> _Tile:
        checkpoint()
        first, last = max(0, -dy), min(self._cell.rows.places, places - dy)
        rows, crop = slice(first, last), slice(first, last + self._k - 1)
        near = keys[:, :, first + dy : last + dy + self._k - 1].transpose(2, 3)
        products = self._scaled[0, crop] * near[:, 0]
        for c in range(1, len(self._scaled)):
            products.addcmul_(self._scaled[c, crop], near[:, c])
        box_rows = self._box_rows[: last - first, : crop.stop - crop.start]
        logits = box_rows @ (products @ self._box_cols)
        logits += bias[:, first + dy : last + dy, :, : self._cell.cols.places].transpose(1, 2)
        return _Tile(rows, crop, near, logits)

    def normaliser(self) -> Tensor:
        """Return log₂ Σ 2^logit of each query patch, [Q, P]."""
        shape = self._cell.rows.places, self._cell.cols.places
        peak = self._scaled.new_full(shape, -math.inf)
        total = self._scaled.new_zeros(shape)
        for tile in self._tiles():
            old = peak[tile.rows]
            top = torch.maximum(old, tile.logits.amax((0, 1)))
            finite = top.masked_fill(top == -math.inf, 0)
            weights = (tile.logits - finite).exp2_().sum((0, 1))
            total[tile.rows] = total[tile.rows] * torch.exp2(old - finite) + weights
            peak[tile.rows] = top
        return peak + total.log2()

    def fold(self, log_z: Tensor, row_taps: Tensor, col_taps: Tensor) -> Tensor:
        """Return the folded mean of the crop [C, X, Y], relative to the centre of the bank."""
        out = torch.zeros_like(self._scaled)
        rows = taps_matrix(row_taps, self._cell.rows.places)
        cols = taps_matrix(col_taps, self._cell.cols.places)
        cols = pad(cols, (0, 0, 0, self._ring - len(cols)))
        for tile in self._tiles():
            weights = (tile.logits - log_z[tile.rows]).exp2_()
            reach = rows[tile.crop, tile.rows] @ (weights @ cols.T)
            for c in range(len(out)):
                out[c, tile.crop] += (reach * tile.keys[:, c]).sum((0, 1))
        return out[..., : len(col_taps)]


def box_sums(images: Tensor, window: int) -> Tensor:
    """Return the sums of [..., X, Y] over every patch, [..., X - k + 1, Y - k + 1]."""
    planes = images.reshape(-1, 1, *images.shape[-2:])
    for side in ((window, 1), (1, window)):
        planes = avg_pool2d(planes, side, stride=1, divisor_override=1)
    return planes.view(*images.shape[:-2], *planes.shape[-2:])


def box_matrix(length: int, window: int) -> Tensor:
    """Return the 0/1 matrix that sums every patch of an axis, [length - k + 1, length] float64."""
    distance = torch.arange(length) - torch.arange(length)[:, None]
    matrix = ((distance >= 0) & (distance < window)).double()
    return matrix[: length - window + 1]


def taps_matrix(taps: Tensor, places: int) -> Tensor:
    """Return [X, places]: the weight of row p in the patch that starts at row i."""
    size, window = taps.shape
    offset = torch.arange(size)[:, None] - torch.arange(places)
    inside = (offset >= 0) & (offset < window)
    return taps.gather(1, offset.clamp(0, window - 1)) * inside
