"""Patch attention with a fold on a GPU: normalisers first, then weights filtered by displacement.

No mean patch is formed and no pair is stored. Programs keep their sums in registers; these are
added in order, in double precision.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from els_kernels.fold_plan import FoldQuery, extend, own_patch
from els_kernels.geometry import Geometry
from els_kernels.torch_fold import TiledFold
from els_kernels.triton.cell_planes import BankLevels, CellPlanes
from els_kernels.triton.chips import architecture
from els_kernels.triton.plane_plan import extremes, on_device


class TritonFold:
    """A bank as it is stored, as groups of images of one size."""

    def __init__(self, groups: Sequence[Tensor]) -> None:
        self._groups = list(groups)
        self._levels = BankLevels(self._groups)
        self._arch = architecture(self._groups[0].device)
        self._exact = TiledFold(self._groups)

    def __call__(self, query: FoldQuery) -> tuple[Tensor, Tensor]:
        """Return mean [C, H, W] and log evidence [H, W], float32.

        A query so far from the bank that logits of float32 do not resolve its sources is computed
        in float64 by ``TiledFold``, as on a CPU: see ``native/far_queries``.
        """
        x, window = query.x, query.window
        if self._levels.is_unresolved(x, query.a, query.s, window):
            return self._exact(query)
        level = self._levels.level(x, query.a, query.s, window)
        with torch.device(x.device), on_device(x):
            mean = torch.zeros_like(x, dtype=torch.float64)
            evidence = torch.zeros_like(mean[0])
            for cell in query.cells():
                planes = CellPlanes(
                    cell, x, level, self._groups, query.limits, query.geometry, self._arch
                )
                cell.scatter(planes.fold(*query.taps(cell)), mean)
                own_patch(planes.log_sum(), cell, evidence)
            return mean.float(), extend(evidence, window, query.geometry).float()

    def warm_up(self, windows: Iterable[int], geometry: Geometry) -> None:
        """Launch every kernel that queries with these windows take, on one image of the bank."""
        x = torch.zeros(self._groups[0].shape[1:], device=self._groups[0].device)
        for k in extremes(windows):
            self(FoldQuery(x, 1.0, 1.0, k, (0, 1), math.inf, geometry))

    def without(self, query: FoldQuery, image: int) -> tuple[Tensor, Tensor]:
        """Return the mean [C, H, W] without a bank image, and its weight [H, W], float32.

        In float64 by ``TiledFold``, as it is rarely asked for.
        """
        return self._exact.without(query, image)
