"""Moments of the posterior of a fold on a GPU: statistics and Jacobian products.

The first pass is that of the fold, cell by cell. Statistics need all patches that join a pixel to a
source at once, and have passes of their own on lines; products are linear in the weights, and are
those of the cells: a pass for the mean of what the weights are differentiated along (two at low
noise), and one for the product.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from els_kernels.fold_plan import Cell, FoldQuery, own_patch
from els_kernels.geometry import Geometry
from els_kernels.torch_fold_moments import TiledFoldMoments
from els_kernels.triton.cell_planes import BankLevels
from els_kernels.triton.cell_products import CellProducts, Product
from els_kernels.triton.chips import architecture
from els_kernels.triton.gaussian import GaussianPrior
from els_kernels.triton.line_moments import LineMoments
from els_kernels.triton.plane_plan import extremes, on_device


class TritonFoldMoments:
    """A bank as it is stored, as groups of images of one size."""

    def __init__(self, groups: Sequence[Tensor]) -> None:
        self._groups = list(groups)
        self.levels = BankLevels(self._groups)
        self._prior = GaussianPrior(self._groups, self.levels.largest)
        self._arch = architecture(self._groups[0].device)
        self._exact = TiledFoldMoments(self._groups)

    def statistics(self, query: FoldQuery, top: int, shares: bool) -> tuple[Tensor, ...]:
        """Return the fields of ``PosteriorStatistics`` for one image.

        A query so far from the bank that logits of float32 do not resolve its sources is computed
        in float64 by ``TiledFoldMoments``: see ``native/far_queries``. So are products.
        """
        x = query.x
        if self._is_unresolved(query):
            return self._exact.statistics(query, top, shares)
        images = sum(map(len, self._groups))
        with torch.device(x.device), on_device(x):
            level = self.levels.level(x, query.a, query.s, query.window)
            lines = LineMoments(query, level, self._groups, self._arch, self._normaliser(query))
            weights = lines.weights(images, top)
            reference = self._prior.reference(x, query.a, query.s)
            first, second = (sums / weights.mass for sums in lines.moments(reference))
            found, sources = lines.ranked(weights)
        every = weights.shares / weights.shares.sum()
        return (
            (first + reference).float(), (second - first.square()).clamp(min=0).float(),
            weights.entropy.float(), sources.movedim(0, 2), found.movedim(0, 2).float(),
            every[: images if shares else 0],
        )  # fmt: skip

    def vjp(self, query: FoldQuery, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        """Return D(x) and Jᵀg, [C, H, W] float32."""
        return self._product("vjp", query, cotangent)

    def jvp(self, query: FoldQuery, tangent: Tensor) -> tuple[Tensor, Tensor]:
        """Return D(x) and J u, [C, H, W] float32."""
        return self._product("jvp", query, tangent)

    def warm_up(self, windows: Iterable[int], geometry: Geometry) -> None:
        """Launch every kernel that queries with these windows take, on one image of the bank."""
        x = torch.zeros(self._groups[0].shape[1:], device=self._groups[0].device)
        for k in extremes(windows):
            query = FoldQuery(x, 1.0, 1.0, k, (0, 1), 1.0, geometry)
            self.statistics(query, 1, shares=True)
            self.vjp(query, x)
            self.jvp(query, x)

    def _is_unresolved(self, query: FoldQuery) -> bool:
        return self.levels.is_unresolved(query.x, query.a, query.s, query.window)

    def _normaliser(self, query: FoldQuery) -> Tensor:
        """Return largest logit and Σ of the patch centred at each pixel, [2, H, W] float64."""
        out = torch.ones(2, *query.size, dtype=torch.float64)
        for cell in query.cells():
            planes = self._planes(cell, query)
            own_patch(planes.peak, cell, out[0])
            own_patch(planes.total, cell, out[1])
        return out

    def _product(self, kind: Product, query: FoldQuery, direction: Tensor) -> tuple[Tensor, Tensor]:
        x = query.x
        if self._is_unresolved(query):
            exact = self._exact.vjp if kind == "vjp" else self._exact.jvp
            return exact(query, direction)
        with torch.device(x.device), on_device(x):
            mean, product = torch.zeros(2, *x.shape, dtype=torch.float64)
            reference = self._prior.reference(x, query.a, query.s)
            gain = query.a / query.s / query.s
            for cell in query.cells():
                planes, taps = self._planes(cell, query), query.taps(cell)
                cell.scatter(planes.fold(*taps), mean)
                part = planes.product(
                    kind, cell.query(direction.float()), cell.query(reference),
                    2 * self.levels.largest, gain, taps,
                )  # fmt: skip
                cell.scatter(part, product)
            return mean.float(), (product * gain).float()

    def _planes(self, cell: Cell, query: FoldQuery) -> CellProducts:
        level = self.levels.level(query.x, query.a, query.s, query.window)
        return CellProducts(
            cell, query.x, level, self._groups, query.limits, query.geometry, self._arch
        )
