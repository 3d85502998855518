"""Posterior moments on a GPU, for the machines with windows: statistics and Jacobian products.

Weights are final before moments are summed, so that the first pass is that of the fold. Further
passes: entropy and shares; means and variances, a channel each; ranked sources; a product.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from els_kernels.fold_plan import Cell, cells, own_patch
from els_kernels.geometry import Geometry
from els_kernels.triton.cell_moments import CellMoments
from els_kernels.triton.cell_planes import BankLevels
from els_kernels.triton.chips import architecture
from els_kernels.triton.gaussian import GaussianPrior
from els_kernels.triton.plane_plan import extremes, on_device


class TritonMoments:
    """A bank [N, C, H, W] as it is stored, float32 or uint8 v for v/127.5 − 1."""

    def __init__(self, bank: Tensor) -> None:
        self.bank = bank
        self.levels = BankLevels([bank])
        self.arch = architecture(bank.device)
        self.prior = GaussianPrior([bank], self.levels.largest)

    def query(
        self,
        x: Tensor,
        a: float,
        s: float,
        window: int,
        limits: tuple[int, int],
        geometry: Geometry,
    ) -> TritonQuery:
        """Return one query [C, H, W]."""
        return TritonQuery(self, x, a, s, window, limits, geometry)

    def warm_up(self, windows: Iterable[int], geometry: Geometry) -> None:
        """Launch every kernel that queries with these windows take, on one image of the bank."""
        x = torch.zeros(self.bank.shape[1:], device=self.bank.device)
        for k in extremes(windows):
            query = self.query(x, 1.0, 1.0, k, (0, 1), geometry)
            query.statistics(1, len(self.bank), with_shares=True)
            query.known = query.evidence()
            query.vjp(x.double())
            query.jvp(x.double())


class TritonQuery:
    """Query image with its level, window, range and geometry."""

    def __init__(
        self,
        moments: TritonMoments,
        x: Tensor,
        a: float,
        s: float,
        window: int,
        limits: tuple[int, int],
        geometry: Geometry,
    ) -> None:
        self._moments, self._x, self._limits, self._geometry = moments, x, limits, geometry
        self._a, self._s, self._window = a, s, window
        self.is_unresolved = moments.levels.is_unresolved(x, a, s, window)
        """Whether the query is far from the bank and needs float64: see ``far_queries``."""
        self._level = moments.levels.level(x, a, s, window)
        self._reference = moments.prior.reference(x, a, s)
        self.known: Tensor | None = None
        """``evidence``, if it was computed before."""

    def evidence(self) -> Tensor:
        """Return the first passes, [C + 2, H, W] float64: D - r, largest logit, and Σ weights."""
        with torch.device(self._x.device), on_device(self._x):
            out = self._x.new_empty(len(self._x) + 2, *self._x.shape[1:], dtype=torch.float64)
            for cell in self._cells():
                planes = self._planes(cell)
                mean, _ = planes.moments(planes.own(self._reference))
                for field, image in zip((*mean, planes.peak, planes.total), out, strict=True):
                    own_patch(field, cell, image)
            return out

    def vjp(self, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        """Return D and Jᵀg, [C, H, W] float64."""
        known = self.evidence() if self.known is None else self.known
        mean = known[:-2] + self._reference
        with torch.device(self._x.device), on_device(self._x):
            out = torch.zeros_like(mean)
            for cell in self._cells():
                planes = self._planes(cell, known)
                crop = planes.vjp(
                    planes.own(cotangent).float(), cell.query(self._reference),
                    planes.own(mean).float(), 2 * self._moments.levels.largest,
                )  # fmt: skip
                cell.scatter(crop, out)
        return mean, out * (self._a / self._s / self._s)

    def jvp(self, tangent: Tensor) -> tuple[Tensor, Tensor]:
        """Return D and J u, [C, H, W] float64."""
        known = self.evidence() if self.known is None else self.known
        mean = known[:-2] + self._reference
        with torch.device(self._x.device), on_device(self._x):
            out = torch.zeros_like(mean)
            for cell in self._cells():
                planes = self._planes(cell, known)
                product = planes.jvp(
                    cell.query(tangent.float()), cell.query(self._reference),
                    planes.own(mean).float(), 2 * self._moments.levels.largest,
                )  # fmt: skip
                for field, image in zip(product, out, strict=True):
                    own_patch(field, cell, image)
        return mean, out * (self._a / self._s / self._s)

    def statistics(self, top: int, images: int, with_shares: bool) -> tuple[Tensor, ...]:
        """Return the fields of ``PosteriorStatistics`` for one image.

        Args:
            top: number of sources.
            images: of the whole bank.
            with_shares: whether shares are returned; [0] otherwise.
        """
        x = self._x
        with torch.device(x.device), on_device(x):
            mean, variance = torch.empty_like(x).double(), torch.empty_like(x).double()
            entropy = torch.empty_like(mean[0])
            weights = mean.new_empty(top, *x.shape[1:])
            sources = torch.empty(top, *x.shape[1:], 3, dtype=torch.int64)
            shares = mean.new_zeros(images)
            for cell in self._cells():
                planes = self._planes(cell, tops=top)
                sums = planes.entropy(images)
                first, second = (m / sums.mass for m in planes.moments(planes.own(self._reference)))
                planes.own(mean).copy_(first + planes.own(self._reference))
                planes.own(variance).copy_((second - first.square()).clamp(min=0))
                planes.own(entropy).copy_(sums.entropy)
                found, which = planes.ranked(top)
                planes.own(weights).copy_(found)
                planes.own(sources.movedim(-1, 0)).copy_(which.movedim(-1, 0))
                shares += sums.shares
        return (
            mean.float(), variance.float(), entropy.float(),
            sources.movedim(0, 2), weights.movedim(0, 2).float(),
            (shares / shares.sum())[: images if with_shares else 0],
        )  # fmt: skip

    def _cells(self) -> list[Cell]:
        height, width = self._x.shape[1:]
        return list(cells(height, width, self._window, self._geometry))

    def _planes(self, cell: Cell, known: Tensor | None = None, tops: int = 0) -> CellMoments:
        first = None
        if known is not None:
            rows, cols = cell.rows, cell.cols
            own = known[
                -2:, rows.first : rows.first + rows.places, cols.first : cols.first + cols.places
            ]
            first = own[0].float(), own[1].contiguous()
        return CellMoments(
            cell, self._x, self._level, [self._moments.bank], self._limits, self._geometry,
            self._moments.arch, known=first, tops=tops,
        )  # fmt: skip
