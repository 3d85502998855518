"""Patch attention on a GPU: selects the form for each geometry and combines the partial results."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor

from els_kernels.geometry import Geometry, Padding, Posterior, group_by, zero_padded_spans
from els_kernels.moment_queries import exact_posterior
from els_kernels.triton import hopper_launch, launch, layout, precision, queries, tuning
from els_kernels.triton.chips import architecture
from els_kernels.triton.launch import Cell, DiagonalTraversal, Queries, State

_log = logging.getLogger(__name__)

_TOGETHER = 16
"""Maximum images in a launch: bounds the memory of their states; results do not depend on it."""

Form = Literal["direct", "diagonal"]
"""Form for the geometries in which every place is a source; ``diagonal`` is the kernel that every
chip has. Without a form Hopper takes its own where that has a tile."""


class TritonAttention:
    """A bank in half-precision terms on a GPU, ready for queries."""

    def __init__(self, bank: Tensor, *, form: Form | None = None) -> None:
        """Prepare a bank; ``form`` overrides the tuning table, for tests and benchmarks."""
        self._keys = precision.prepare_keys(bank)
        self._values = layout.responses(self._keys.terms)
        self._arch = architecture(bank.device)
        self._form = form
        _log.info(
            "triton: %d images in %d half-precision term(s), tiles of %s",
            len(bank), len(self._keys.terms), self._arch,
        )  # fmt: skip

    def __call__(
        self,
        x: Tensor,
        a: list[float],
        s: list[float],
        window: list[int],
        ranges: list[tuple[int, int]],
        geometry: Geometry,
    ) -> Posterior:
        """Return the posteriors; images that share window, range and precision share launches."""
        answer = Posterior(torch.empty_like(x), x.new_empty(len(x), *x.shape[2:]))
        if geometry.whole and geometry.sources == "every":
            for b, limits in enumerate(ranges):
                answer.mean[b], answer.log_evidence[b] = self._translated(
                    x[b], a[b], s[b], limits, geometry
                )
            return answer
        channels, *size = x.shape[1:]
        sides = (size if geometry.whole else [min(k, n) for n in size] for k in window)
        terms_of = map(precision.query_terms, a, s, (channels * math.prod(side) for side in sides))
        parts = (
            (key, members[first : first + _TOGETHER])
            for key, members in group_by(window, ranges, terms_of).items()
            for first in range(0, len(members), _TOGETHER)
        )
        for (k, (lo, hi), terms), members in parts:
            chosen = torch.tensor(members, device=x.device)
            levels = [(a[b], s[b]) for b in members]
            batch = queries.prepare(x[chosen], levels, self._keys, terms)
            # Triton launches kernels on the current device.
            with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
                mean, log2_z = self._range(lo, hi).attend(batch.queries, k, geometry)
            pixels = mean.double() * self._keys.unit + self._keys.centre
            answer.mean[chosen] = pixels.float()
            energy = batch.energy(k, geometry)
            answer.log_evidence[chosen] = (log2_z.double() / queries.LOG2E - energy).float()
        return answer

    def warm_up(self, windows: Iterable[int], geometry: Geometry) -> None:
        """Launch every kernel that queries with these windows take; logs the seconds.

        Triton compiles a binary at its first launch, or takes it from the cache on disk.
        """
        began = time.perf_counter()
        channels, *size = self._keys.terms.shape[2:]
        x = torch.zeros(1, channels, *size, device=self._keys.terms.device)
        # All ranges take the same binaries.
        few = [(0, min(2, self._keys.terms.shape[1]))]
        windows = sorted(set(windows))
        for k in windows:
            side = size if geometry.whole else [min(k, n) for n in size]
            high = 2 * precision.one_term_noise(channels * math.prod(side))
            for s in (1.0, high):
                self(x, [1.0], [s], [k], few, geometry)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        seconds = time.perf_counter() - began
        _log.info("triton: kernels of windows %s ready after %.1f s", windows, seconds)

    def _translated(
        self, x: Tensor, a: float, s: float, limits: tuple[int, int], geometry: Geometry
    ) -> tuple[Tensor, Tensor]:
        """Return mean and log evidence over all translations, by Fourier transforms in float64."""
        centre, unit = self._keys.centre, self._keys.unit
        mean, log_sum = exact_posterior(
            lambda lo, hi: self._keys.terms[:, lo:hi].double().sum(0),
            (x / a - centre) / unit, 1.0, s / a / unit, 1, limits, geometry,
        )  # fmt: skip
        return mean * unit + centre, log_sum

    def _range(self, lo: int, hi: int) -> _Part:
        keys, values = self._keys.terms[:, lo:hi].contiguous(), self._values[lo:hi]
        return _Part(keys, values, self._arch, self._form)


Answer = tuple[Tensor, Tensor]
"""Mean [B, C, H, W] in units of the keys and base-2 log of the summed weights [B, H, W]."""


class _Part:
    """The images of a bank within one range."""

    def __init__(self, keys: Tensor, values: Tensor, arch: tuning.Arch, form: Form | None) -> None:
        self._keys, self._values, self._arch, self._form = keys, values, arch, form

    def attend(self, batch: Queries, window: int, geometry: Geometry) -> Answer:
        """Return mean and base-2 log sum of a batch."""
        if geometry.whole:
            return self._same_place(batch, None, geometry)
        if geometry.sources == "same":
            return self._same_place(batch, window, geometry)
        return self._every_place(batch, window, geometry)

    def _same_place(self, batch: Queries, window: int | None, geometry: Geometry) -> Answer:
        height, width = self._keys.shape[-2:]
        bands = launch.bands(height, width, window, geometry.padding, self._keys.device)
        state = launch.same_place(batch, self._keys, bands, self._arch)
        return _finish(state, self._keys.shape[2], 1)

    def _every_place(self, batch: Queries, window: int, geometry: Geometry) -> Answer:
        channels, height, width = self._keys.shape[2:]
        if geometry.padding == "zeros":
            # The only source of a corner is itself; all other places are overwritten.
            mean, log2_z = self._same_place(batch, window, geometry)
        else:
            mean = batch.plain.new_empty(batch.plain.shape)
            log2_z = mean.new_empty(len(mean), height, width)
        form = self._form or tuning.form(channels, window, self._arch)
        if form == "direct":
            pieces = self._direct(batch, window, geometry)
        else:
            pieces = self._diagonal(batch, window, geometry)
        for rows, cols, (piece_mean, piece_log) in pieces:
            mean[:, :, rows, cols] = piece_mean
            log2_z[:, rows, cols] = piece_log
        return mean, log2_z

    def _direct(
        self, batch: Queries, window: int, geometry: Geometry
    ) -> list[tuple[slice, slice, Answer]]:
        height, width = self._keys.shape[-2:]
        keys, queries, r = self._keys, batch.terms, window // 2
        if geometry.padding != "zeros":
            queries = layout.wrap(queries, r, r)
        if geometry.padding == "circular":
            keys = layout.wrap(keys, r, r)
        half = layout.half_norms(self._keys, window, geometry.padding)
        # Channels last: a row of a patch is contiguous.
        queries = queries.permute(1, 0, 3, 4, 2).contiguous()
        keys = keys.permute(0, 1, 3, 4, 2)
        # A padded patch may extend past the last image by as many rows as its elements fill.
        slack = (tuning.DIRECT_DEPTHS[-1] + 1) * keys[0, 0, 0].numel()
        keys = layout.zeros_with_slack(keys, tuple(keys.shape), slack).copy_(keys)
        pieces = []
        for rows, cols, cell in _cells(height, width, window, geometry):
            state = launch.direct(queries, keys, batch, half, self._values, cell, self._arch)
            pieces.append((rows, cols, self._finish(state)))
        return pieces

    def _launch(
        self,
        batch: Queries,
        keys: Tensor,
        half: Tensor,
        values: Tensor,
        traversal: DiagonalTraversal,
        window: int,
        padding: Padding,
    ) -> State:
        """Return the states of a traversal, by Hopper's kernel where it has a tile."""
        if self._form is None and hopper_launch.serves(self._arch, batch, window, len(keys)):
            return hopper_launch.diagonal(batch, keys, half, values, traversal, window, padding)
        return launch.diagonal(batch, keys, half, values, traversal, window, padding, self._arch)

    def _diagonal(
        self, batch: Queries, window: int, geometry: Geometry
    ) -> list[tuple[slice, slice, Answer]]:
        height, width = self._keys.shape[-2:]
        padding, r = geometry.padding, window // 2
        half = layout.half_norms(self._keys, window, padding)
        everywhere = slice(0, height), slice(0, width)
        if padding != "zeros":
            traversal = launch.traversal_of(padding, height, width, window)
            state = self._launch(batch, self._keys, half, self._values, traversal, window, padding)
            return [(*everywhere, self._finish(state))]
        pieces: list[tuple[slice, slice, Answer]] = []
        if width >= window:
            traversal = launch.traversal_of(padding, height, width, window)
            state = self._launch(batch, self._keys, half, self._values, traversal, window, padding)
            pieces.append((everywhere[0], slice(r, width - r), self._finish(state)))
        if height >= window and r > 0:
            pieces += self._side_edges(batch, half, window)
        return pieces

    def _side_edges(
        self, batch: Queries, half: Tensor, window: int
    ) -> list[tuple[slice, slice, Answer]]:
        """Return the columns near the border, which attend to themselves: rows of the transpose."""
        height, width = self._keys.shape[-2:]
        r = window // 2
        turned = Queries(batch.terms.mT, batch.scale, batch.bias, batch.plain)
        state = self._launch(
            turned, self._keys.mT, half.mT.contiguous(), self._values.transpose(1, 2).contiguous(),
            launch.edge_traversal(width, height, window), window, "zeros",
        )  # fmt: skip
        mean, log2_z = self._finish(State(state.peak.mT, state.sums.transpose(1, 2)))
        edges = [slice(0, width)] if width < window else [slice(0, r), slice(width - r, width)]
        rows = slice(r, height - r)
        return [(rows, cols, (mean[..., cols], log2_z[..., cols])) for cols in edges]

    def _finish(self, state: State) -> Answer:
        return _finish(state, self._keys.shape[2], len(self._keys))


def _finish(state: State, channels: int, terms: int) -> Answer:
    weight = state.sums[..., terms * channels]
    total = state.sums[..., : terms * channels]
    total = total.view(*weight.shape, terms, channels).sum(-2)
    mean = (total / weight[..., None]).movedim(-1, 1)
    return mean, state.peak + weight.log2()


def _cells(
    height: int, width: int, window: int, geometry: Geometry
) -> list[tuple[slice, slice, Cell]]:
    """Return rows and columns of query places with the cell of their sources."""
    r, size, side = window // 2, (height, width), (window, window)
    everywhere = slice(0, height), slice(0, width)
    if geometry.padding == "circular":
        return [(*everywhere, Cell((0, 0), size, (0, 0), size, (0, 0), side))]
    if geometry.padding == "valid":
        inner = (height - 2 * r, width - 2 * r)
        return [(*everywhere, Cell((0, 0), size, (0, 0), inner, (r, r), side))]
    cells = []
    for row in zero_padded_spans(height, window):
        for col in zero_padded_spans(width, window):
            if row.single and col.single:
                continue
            start = (row.crop.start, col.crop.start)
            places = (row.places.stop - row.places.start, col.places.stop - col.places.start)
            origin = (row.places.start, col.places.start)
            cell = Cell(start, places, start, places, origin, (row.window, col.window))
            cells.append((row.places, col.places, cell))
    return cells
