"""The mean of a fold: cells and taps here, sweeps in C++."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from els_kernels.default_device import made_on
from els_kernels.fold_plan import Axis, FoldQuery, extend, own_patch
from els_kernels.geometry import Geometry
from els_kernels.native.fold_bank import FoldCrop, FoldPasses, NativeFoldBank
from els_kernels.native.fold_pass import MEAN, FoldFrame
from els_kernels.torch_fold import TiledFold, folded_weight, removed

_LOG2E = math.log2(math.e)
_PRECISION = 20
"""Weights that do not count are together 2^-20 of a patch's normaliser at most."""
_LEAST_PLAIN = 0.15
"""ρ from which the taps of a whole axis fit a float32 without scaling: e^(-1/2ρ²) = 2e-10."""


class NativeFold(NativeFoldBank):
    """A bank prepared for folds; queries far from it are computed in float64: ``far_queries``."""

    @cached_property
    def _exact(self) -> TiledFold:
        return TiledFold(self.groups)

    def __call__(self, query: FoldQuery) -> tuple[Tensor, Tensor]:
        """Return mean [C, H, W] and log evidence [H, W].

        Raises:
            ComputationStoppedError: The current ``Control`` was stopped.
            MemoryError: The partial results do not fit in memory.
        """
        with made_on(torch.device("cpu")):
            crops = self._crops(query)
            if not all(crop.resolved for _, crop in crops):
                return self._exact(query)
            mean, evidence = torch.zeros_like(query.x).double(), torch.zeros(query.size).double()
            for frame, crop in crops:
                passes = self._passes(frame, crop, [query.limits])
                log_z, folded = self._fold(query, crop, passes)
                crop.cell.scatter(folded, mean)
                energy = crop.squares / (2 * query.s * query.s)
                own_patch(log_z / _LOG2E - energy, crop.cell, evidence)
            evidence = extend(evidence, query.window, query.geometry)
            return (mean + self.images.centre).float(), evidence.float()

    def without(self, query: FoldQuery, image: int) -> tuple[Tensor, Tensor]:
        """Return the mean [C, H, W] without a bank image, and its weight [H, W].

        Raises:
            ComputationStoppedError, MemoryError: As a call.
        """
        with made_on(torch.device("cpu")):
            crops = self._crops(query)
            if not all(crop.resolved for _, crop in crops):
                return self._exact.without(query, image)
            mean = torch.zeros_like(query.x).double()
            weight = torch.zeros_like(mean[:1])
            own, others = removed(query.limits, image)
            for frame, crop in crops:
                _, _, log_own = self._passes(frame, crop, own).normalisers()
                log_rest, folded = self._fold(query, crop, self._passes(frame, crop, others))
                crop.cell.scatter(folded, mean)
                share = folded_weight(log_own, log_rest, *query.taps(crop.cell))
                crop.cell.scatter(share, weight)
            return (mean + self.images.centre).float(), weight[0].float()

    def _crops(self, query: FoldQuery) -> list[tuple[FoldFrame, FoldCrop]]:
        found = []
        for index, cell in enumerate(query.cells()):
            frame = FoldFrame(query.size, query.window, query.geometry, index)
            found.append((frame, self.crop_of(query, cell, frame)))
        return found

    def _passes(
        self, frame: FoldFrame, crop: FoldCrop, ranges: list[tuple[int, int]]
    ) -> FoldPasses:
        return FoldPasses(self.images, frame, crop.pixels, crop.units, ranges, _PRECISION)

    def _fold(self, query: FoldQuery, crop: FoldCrop, passes: FoldPasses) -> tuple[Tensor, Tensor]:
        """Return log₂ of the normaliser of each patch [Q, P], and the folded mean [C, X, Y]."""
        whole, rest, log_z = passes.normalisers()
        rows, cols, (height, width) = crop.cell.rows, crop.cell.cols, query.size
        row_taps, row_scale = line_taps(rows, height, query.fold, query.geometry)
        col_taps, col_scale = line_taps(cols, width, query.fold, query.geometry)
        if row_taps.ndim == 1:
            row_taps = row_taps.expand(len(rows.query), -1).contiguous()
        tensors = {
            "whole": whole,
            "rest": rest,
            "row_taps": row_taps,
            "col_taps": col_taps,
            "row_scale": row_scale,
            "col_scale": col_scale,
        }
        flags = {"table_taps": int(col_taps.ndim == 2), "uniform_taps": int(query.fold == math.inf)}
        return log_z, passes.run(MEAN, tensors, flags).planes


def line_taps(axis: Axis, length: int, fold: float, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Return taps [k] of all places and a scale of each [X]; or taps [X, k] and scales of 1."""
    table = axis.taps(length, fold, geometry)
    if fold < _LEAST_PLAIN and axis.window > 1:
        return table.float(), torch.ones(len(table))
    r = axis.window // 2
    distance = (torch.arange(axis.window).double() - r).square() / max(r, 1) ** 2
    taps = torch.exp(-distance / (2 * fold * fold)) if r else torch.ones(1).double()
    return taps.float(), (table.amax(1) / taps[table.argmax(1)]).float()
