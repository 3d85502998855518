"""Patch attention with a fold on a GPU: normalisers first, then weights filtered by displacement.

No mean patch is formed and no pair is stored. Programs keep their sums in registers; these are
added in order, in double precision.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from els_kernels.fold_plan import cells, extend, own_patch
from els_kernels.geometry import Geometry
from els_kernels.torch_fold import TiledFold
from els_kernels.triton.attention import architecture
from els_kernels.triton.cell_planes import BankLevels, CellPlanes
from els_kernels.triton.plane_plan import on_device


class TritonFold:
    """A bank as it is stored, as groups of images of one size."""

    def __init__(self, groups: Sequence[Tensor]) -> None:
        self._groups = list(groups)
        self._levels = BankLevels(self._groups)
        self._arch = architecture(self._groups[0].device)
        self._exact = TiledFold(self._groups)

    def __call__(
        self,
        x: Tensor,
        a: float,
        s: float,
        window: int,
        limits: tuple[int, int],
        fold: float,
        geometry: Geometry,
    ) -> tuple[Tensor, Tensor]:
        """Return mean [C, H, W] and log evidence [H, W] of one image [C, H, W].

        A query so far from the bank that logits of float32 do not resolve its sources is computed
        in float64 by ``TiledFold``, as on a CPU: see ``native/far_queries``.
        """
        if self._levels.is_unresolved(x, a, s, window):
            return self._exact(x, a, s, window, limits, fold, geometry)
        height, width = x.shape[1:]
        level = self._levels.level(x, a, s, window)
        with torch.device(x.device), on_device(x):
            mean = torch.zeros_like(x, dtype=torch.float64)
            evidence = torch.zeros_like(mean[0])
            for cell in cells(height, width, window, geometry):
                planes = CellPlanes(cell, x, level, self._groups, limits, geometry, self._arch)
                row_taps = cell.rows.taps(height, fold, geometry)
                col_taps = cell.cols.taps(width, fold, geometry)
                cell.scatter(planes.fold(row_taps, col_taps), mean)
                own_patch(planes.log_sum(), cell, evidence)
            return mean.float(), extend(evidence, window, geometry).float()
