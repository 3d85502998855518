"""Patch attention on CPUs in torch: tiles of keys that fit the cache, online softmax.

Two exact forms cover every geometry but translations of whole images, which are Fourier transforms
(see ``whole_moments``):

- *direct*: a matmul of unfolded query patches with unfolded key patches, one span at a time (see
  ``geometry``). A whole-image window is a single patch.
- *same place*: the box-sum identity ``⟨x[u+Ω], φ[u+Ω]⟩ = (band · (x ⊙ φ) · bandᵀ)[u]``, whose cost
  does not depend on the window.

With centred data q = x - a·μ and p = φ - μ a logit in base 2 is
``log₂e/s² · (a·⟨q, p⟩ - a²·‖p‖²/2)`` plus a term of the query that only the evidence needs.
The norm is an additional column of the matmul.

Tile shapes depend on the sizes of image, window and range, not on the batch, so results are batch
invariant. Images with the same window and range share their key tiles. Each tile starts with a
``checkpoint``, where a stopped computation ends. Matmuls partition their operands by the number of
threads, so results are bitwise reproducible for one number of threads only. torch's thread pool
does not survive a fork: a forked child may compute only if its parent has not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from els_kernels.control import checkpoint
from els_kernels.geometry import Geometry, Padding, Posterior, band, group_by, zero_padded_spans
from els_kernels.moment_queries import exact_posterior

_LOG2E = math.log2(math.e)
_TILE = 1 << 20
"""Floats of unfolded keys and of logits in one tile: 4 MiB, which fits a server CPU's cache."""
_SUMMED = 1 << 12
"""Maximum keys in one tile; weights are summed in float32 within a tile, in float64 across
tiles."""
_BLOCK = 1 << 22
"""Maximum floats of unfolded queries in memory: 16 MiB."""

State = tuple[Tensor, Tensor]
"""Running maximum of the logits (base 2), and sums relative to it; the last is the sum of
weights."""


class Tiled:
    """A centred bank in float32, ready for queries."""

    def __init__(self, bank: Tensor) -> None:
        self._centre = bank.mean((0, 2, 3), dtype=torch.float64)[:, None, None]
        self._bank = bank - self._centre.float()

    def __call__(
        self,
        x: Tensor,
        a: list[float],
        s: list[float],
        window: list[int],
        ranges: list[tuple[int, int]],
        geometry: Geometry,
    ) -> Posterior:
        """Return the posteriors; images that share window and range share their key tiles."""
        answer = Posterior(torch.empty_like(x), x.new_empty(len(x), *x.shape[2:]))
        if geometry.whole and geometry.sources == "every":
            centre = self._centre.float()
            for b, limits in enumerate(ranges):
                mean, answer.log_evidence[b] = exact_posterior(
                    lambda lo, hi: self._bank[lo:hi],
                    x[b] - a[b] * centre.double(), a[b], s[b], 1, limits, geometry,
                )  # fmt: skip
                answer.mean[b] = mean + centre
            return answer
        for (k, (lo, hi)), members in group_by(window, ranges).items():
            queries = [_Query(x[b] - a[b] * self._centre, a[b], s[b]) for b in members]
            states = _attend(queries, self._bank[lo:hi], k, geometry)
            for b, query, (peak, sums) in zip(members, queries, states, strict=True):
                answer.mean[b] = sums[:-1] / sums[-1] + self._centre
                evidence = (peak + sums[-1].log2()) / _LOG2E
                answer.log_evidence[b] = evidence - query.energy(k, geometry)
        return answer


class _Query:
    """One centred image [C, H, W] (float64) scaled by its noise level."""

    def __init__(self, image: Tensor, a: float, s: float) -> None:
        self._image, self._s = image, s
        # Scaled in float64: its product with a key is the first term of a logit in base 2 …
        self.scaled = (image * (a / s / s * _LOG2E)).float()
        # … and the second term is half the key's squared norm times this.
        self.bias = -(a / s) * (a / s) * _LOG2E

    def energy(self, window: int, geometry: Geometry) -> Tensor:
        """Return ‖q[u+Ω]‖² / 2s² of every pixel, [H, W] float64."""
        squares = self._image.square().sum(0)
        rows, cols = _bands(squares, window, geometry)
        return rows @ squares @ cols.T / (2 * self._s * self._s)


def _bands(images: Tensor, window: int, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Return the window-summing matrices for rows and columns, of the images' dtype and device."""
    height, width = images.shape[-2:]
    if geometry.whole:
        return images.new_ones(height, height), images.new_ones(width, width)
    rows, cols = (band(length, window, geometry.padding) for length in (height, width))
    return rows.to(images), cols.to(images)


def _attend(queries: list[_Query], bank: Tensor, window: int, geometry: Geometry) -> list[State]:
    """Return for each query maximum [H, W] and sums [C+1, H, W]."""
    if geometry.whole:
        return _whole(queries, bank)
    if geometry.sources == "same":
        return _same_place(queries, bank, window, geometry)
    return _every_place(queries, bank, window, geometry)


# Direct form


@dataclass(frozen=True)
class _Cell:
    """Query places and their source places, as crops in which every window fits."""

    query: Tensor
    """[G, C, h, w], scaled."""
    keys: Callable[[slice], Tensor]
    """Images of the bank → [T, C, h', w'], centred."""
    values: Tensor
    """[N, V, P, Q]: the response of every key place."""
    window: tuple[int, int]

    def attend(self, bias: list[float]) -> Iterator[State]:
        """Yield maximum [M] and sums [V+1, M] over the M places of each image of ``query``."""
        kh, kw = self.window
        images, channels, height, width = self.query.shape
        rows, cols = height - kh + 1, width - kw + 1
        depth = channels * kh * kw + 1
        step = max(1, min(1024, _TILE // depth) // cols)
        together = max(1, _BLOCK // (step * cols * depth))
        for first in range(0, images, together):
            block = slice(first, first + together)
            parts = [
                self._attend_rows(self.query[block, :, top : top + step + kh - 1], bias[block])
                for top in range(0, rows, step)
            ]
            for image in zip(*parts, strict=True):
                yield (
                    torch.cat([peak[:, 0] for peak, _ in image]),
                    torch.cat([sums for _, sums in image]).T,
                )

    def _attend_rows(self, query: Tensor, bias: list[float]) -> list[State]:
        """Return maximum [M, 1] and sums [M, V+1] of each crop, all of them unfolded at once."""
        # Separate tensors, not slices of one: the rounding of a matmul depends on alignment.
        patches = [_unfold(crop[None], self.window).flatten(0, 2) for crop in query]
        for patch, half_norm_scale in zip(patches, bias, strict=True):
            patch[:, -1] = half_norm_scale
        places = len(patches[0])
        states = [
            (
                query.new_full((places, 1), -math.inf),
                query.new_zeros(places, self.values.shape[1] + 1, dtype=torch.float64),
            )
            for _ in patches
        ]
        for keys, values in self._tiles(places):
            logits = query.new_empty(places, len(keys))
            for patch, (peak, sums) in zip(patches, states, strict=True):
                checkpoint()
                torch.mm(patch, keys.T, out=logits)
                _absorb(logits, values, peak, sums)
        return states

    def _tiles(self, places: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield keys [T, D+1] (patch, half its squared norm) and values [T, V+1] (response, 1)."""
        images, responses, rows, cols = self.values.shape
        depth = self.query.shape[1] * self.window[0] * self.window[1] + 1
        size = max(64, min(max(1024, _TILE // places), _TILE // depth, _SUMMED))
        together = max(1, size // (rows * cols))
        step = rows if rows * cols <= size else max(1, size // cols)
        for first in range(0, images, together):
            block = slice(first, first + together)
            crop = self.keys(block)
            for top in range(0, rows, step):
                keys = _unfold(crop[:, :, top : top + step + self.window[0] - 1], self.window)
                keys[..., -1] = keys[..., :-1].square().sum(-1) / 2
                response = self.values[block, :, top : top + step]
                values = response.new_ones(*keys.shape[:3], responses + 1)
                values[..., :-1] = response.permute(0, 2, 3, 1)
                yield keys.flatten(0, 2), values.flatten(0, 2)


def _unfold(images: Tensor, window: tuple[int, int]) -> Tensor:
    """Return every patch, [N, P, Q, D+1]; the last column is uninitialised."""
    kh, kw = window
    patches = images.unfold(2, kh, 1).unfold(3, kw, 1).permute(0, 2, 3, 1, 4, 5)
    out = images.new_empty(*patches.shape[:3], patches[0, 0, 0].numel() + 1)
    out[..., :-1].view(patches.shape).copy_(patches)
    return out


def _absorb(logits: Tensor, values: Tensor, peak: Tensor, sums: Tensor) -> None:
    """Add a tile to the running softmax; overwrites ``logits`` [M, T] with weights."""
    # The maximum is set, never added to: from -inf the old sums are scaled by exactly 0.
    top = torch.maximum(peak, logits.amax(1, keepdim=True))
    logits.sub_(top).exp2_()
    sums.mul_(torch.exp2(peak - top)).add_(logits @ values)
    peak.copy_(top)


def _every_place(
    queries: list[_Query], bank: Tensor, window: int, geometry: Geometry
) -> list[State]:
    if geometry.padding == "zeros":
        # The only source of a corner is itself: box sums compute it, cells overwrite the rest.
        states = _same_place(queries, bank, window, geometry)
    else:
        states = [_empty_state(bank) for _ in queries]
    scaled = torch.stack([query.scaled for query in queries])
    bias = [query.bias for query in queries]
    for rows, cols, cell in _cells(scaled, bank, window, geometry.padding):
        for (peak, sums), (cell_peak, cell_sums) in zip(states, cell.attend(bias), strict=True):
            peak[rows, cols] = cell_peak.view_as(peak[rows, cols])
            sums[:, rows, cols] = cell_sums.view_as(sums[:, rows, cols])
    return states


def _cells(
    scaled: Tensor, bank: Tensor, window: int, padding: Padding
) -> Iterator[tuple[slice, slice, _Cell]]:
    """Yield rows and columns of query places with the cell of their sources."""
    height, width = bank.shape[2:]
    r = window // 2
    if padding == "zeros":
        for row in zero_padded_spans(height, window):
            for col in zero_padded_spans(width, window):
                if not (row.single and col.single):
                    crop = (slice(None), row.crop, col.crop)
                    yield (
                        row.places,
                        col.places,
                        _Cell(
                            scaled[:, *crop],
                            bank[:, *crop].__getitem__,
                            bank[:, :, row.places, col.places],
                            (row.window, col.window),
                        ),
                    )
        return
    ring = _wrap(scaled, r, r, r, r)
    everywhere = (slice(0, height), slice(0, width))
    if padding == "circular":
        wrapped = _Cell(ring, lambda n: _wrap(bank[n], r, r, r, r), bank, (window, window))
        yield *everywhere, wrapped
    else:
        interior = bank[:, :, r : height - r, r : width - r]
        yield *everywhere, _Cell(ring, bank.__getitem__, interior, (window, window))


def _same_place(
    queries: list[_Query], bank: Tensor, window: int, geometry: Geometry
) -> list[State]:
    """Return maximum [H, W] and sums [C+1, H, W]; the only source is the query's own place."""
    images, _, height, width = bank.shape
    rows, cols = _bands(bank, window, geometry)
    states = [_empty_state(bank) for _ in queries]
    together = max(1, _TILE // (4 * height * width))
    for first in range(0, images, together):
        keys = bank[first : first + together]
        half = keys.square().sum(1) / 2
        for query, (peak, sums) in zip(queries, states, strict=True):
            checkpoint()
            products = (keys * query.scaled).sum(1).add_(half, alpha=query.bias)
            logits = rows @ (products @ cols.T)
            top = torch.maximum(peak, logits.amax(0))
            weights = logits.sub_(top).exp2_()
            sums.mul_(torch.exp2(peak - top))
            sums[:-1] += (keys * weights[:, None]).sum(0)
            sums[-1] += weights.sum(0)
            peak.copy_(top)
    return states


def _empty_state(bank: Tensor) -> State:
    channels, height, width = bank.shape[1:]
    sums = bank.new_zeros(channels + 1, height, width, dtype=torch.float64)
    return bank.new_full((height, width), -math.inf), sums


def _whole(queries: list[_Query], bank: Tensor) -> list[State]:
    """Return the states of the ideal machine: one logit for each image, shared by all pixels."""
    cell = _image_cell(torch.stack([query.scaled for query in queries]), bank)
    states = cell.attend([query.bias for query in queries])
    return [_spread(peak[0], sums[:-1, 0].view_as(bank[0]), sums[-1, 0]) for peak, sums in states]


def _image_cell(query: Tensor, bank: Tensor) -> _Cell:
    """Return the cell whose patch is the whole image and whose response is the image itself."""
    return _Cell(
        query, bank.__getitem__, bank.reshape(len(bank), -1, 1, 1), (bank.shape[2], bank.shape[3])
    )


def _spread(peak: Tensor, mean: Tensor, weight: Tensor) -> State:
    """Return the state in which every pixel has the same maximum and weight."""
    return peak.expand_as(mean[0]), torch.cat([mean, weight.expand_as(mean[:1])])


def _wrap(images: Tensor, left: int, right: int, top: int, bottom: int) -> Tensor:
    return pad(images, (left, right, top, bottom), mode="circular")
