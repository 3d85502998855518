"""ctypes binding of moments of a fold: lines, taps and scalars here, sweeps in C++.

Passes over the bank, see fold_problem.hpp: the first finds the normaliser of each patch; statistics
need one more, a Jacobian product two: means of the scalars of patches, then the product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from els_kernels.fold_plan import Cell, FoldQuery
from els_kernels.image_statistics import ImageStatistics
from els_kernels.native.fold_bank import NativeFoldBank
from els_kernels.native.fold_binding import line_taps
from els_kernels.native.fold_lines import plane
from els_kernels.native.fold_moments_call import PRODUCT, STATISTICS, TOTALS, FoldPasses, row_bytes
from els_kernels.torch_fold_moments import TiledFoldMoments

_SCALE = 500.0
"""a/s² from which the mean of a patch's scalars, wrong by 6e-8 of them in float32, is refined."""


class NativeFoldMoments(NativeFoldBank):
    """A bank prepared for moments of a fold; far queries are computed in float64: ``far_queries``.

    Results have the same bits for any number of threads.
    """

    @cached_property
    def _exact(self) -> TiledFoldMoments:
        return TiledFoldMoments(self.groups)

    def statistics(self, query: FoldQuery, top: int, shares: bool) -> tuple[Tensor, ...]:
        """Return the fields of ``PosteriorStatistics`` for one image.

        Raises:
            ComputationStoppedError: The current ``Control`` was stopped.
            MemoryError: The partial results do not fit in memory.
        """
        with torch.device("cpu"):
            whole = NativeFoldQuery(self, query)
            if not whole.crop.resolved:
                return self._exact.statistics(query, top, shares)
            images = sum(map(len, self.groups))
            answer = ImageStatistics.empty(query.x, images, top, shares=shares)
            for part in whole.parts(top):
                part.statistics(answer.rows(part.rows))
            # What weights lack for being rounded, and not counted where they are small.
            answer.shares.div_(answer.shares.sum())
            return answer

    def vjp(self, query: FoldQuery, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        """Return D(x) and Jᵀg, [C, H, W] float32.

        Raises:
            ComputationStoppedError, MemoryError: As ``statistics``.
        """
        with torch.device("cpu"):
            whole = NativeFoldQuery(self, query)
            if not whole.crop.resolved:
                return self._exact.vjp(query, cotangent)
            return _joined([part.vjp(cotangent) for part in whole.parts()])

    def jvp(self, query: FoldQuery, tangent: Tensor) -> tuple[Tensor, Tensor]:
        """Return D(x) and J u, [C, H, W] float32.

        Raises:
            ComputationStoppedError, MemoryError: As ``statistics``.
        """
        with torch.device("cpu"):
            whole = NativeFoldQuery(self, query)
            if not whole.crop.resolved:
                return self._exact.jvp(query, tangent)
            return _joined([part.jvp(tangent) for part in whole.parts()])

    @cached_property
    def spread(self) -> tuple[float, float]:
        """Mean square and largest norm of a centred pixel of the bank."""
        total, largest, count = 0.0, 0.0, 0
        for tile in self.tiles():
            squares = tile.double().square()
            total += float(squares.sum())
            largest = max(largest, float(squares.sum(1).max()))
            count += tile.numel()
        return total / count, math.sqrt(largest)


class NativeFoldQuery:
    """One query image, which is answered some rows at a time."""

    def __init__(self, bank: NativeFoldMoments, query: FoldQuery) -> None:
        self.bank, self.query = bank, query
        self.rows, self.cols, cell = plane(*query.size, query.window, query.geometry)
        self.crop = bank.crop_of(query, cell, (query.window, query.geometry))

    def parts(self, top: int = 0) -> Iterator[NativeFoldPart]:
        """Yield the rows, for so many sources of a pixel."""
        bank, channels = self.bank, len(self.query.x)
        ring = self.cols.ring([group.shape[3] for group in bank.groups], bank.lanes)
        for rows in self.query.blocks(row_bytes(ring, channels, top)):
            yield NativeFoldPart(self, rows)


class NativeFoldPart:
    """Some rows of pixels of a query: their taps, and the passes over the bank that they need."""

    def __init__(self, whole: NativeFoldQuery, rows: slice) -> None:
        query, bank = whole.query, whole.bank
        a, s = query.a, query.s
        self.rows, self._bank, self._query = rows, bank, query
        self._rows, self._cols = whole.rows.part(rows), whole.cols
        self._cell = Cell(self._rows.axis, self._cols.axis)
        first = self._rows.axis.offset
        crop = whole.crop.pixels[:, first : first + self._rows.size]
        self._passes = FoldPasses(
            bank, self._rows, self._cols, crop, whole.crop.units, query.limits
        )
        self._row_taps, self._col_table = query.taps(self._cell)
        self._col_taps, self._col_scale = line_taps(
            self._cols.axis, query.size[1], query.fold, query.geometry
        )
        self._size = rows.stop - rows.start, query.size[1]
        self._jacobian_scale = a / (s * s)
        # The mean of a posterior whose prior is Gaussian: near enough to centre sums. About a place
        # far beyond the pixels of the bank they would cancel.
        square, farthest = bank.spread
        signal = a * a * square
        reference = crop * (signal / (signal + s * s) / a)
        self._reference = reference.clamp_(-farthest, farthest).float().contiguous()

    def statistics(self, out: ImageStatistics) -> None:
        """Write the statistics, and add what these rows count in the shares."""
        found = torch.empty(self._passes.images, dtype=torch.float64)
        rows, cols = self._counts()
        sums = self._planes(
            STATISTICS,
            2 + 2 * len(self._reference),
            self._passes.normalisers(),
            reach=torch.outer(rows, cols).float(),
            shares=found,
            weights=out.weights,
            origins=out.sources,
            numbers={"top": out.weights.shape[2]},
        )
        total = sums[0]
        mean = sums[2::2] / total
        out.mean.copy_(self._pixels(mean))
        out.variance.copy_((sums[3::2] / total - mean.square()).clamp_(min=0))
        out.entropy.copy_((total.log2() - sums[1] / total).mul_(math.log(2)).clamp_(min=0))
        out.weights.div_(total[..., None]).clamp_(max=1)
        if len(out.shares):
            out.shares[slice(*self._query.limits)] += found

    def vjp(self, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        """Return D(x) and Jᵀg: scalars are folded, their products summed over patches."""
        direction = self._cell.query(cotangent.double()) * self._col_scale
        return self._product(direction, self._folded(), self._summed())

    def jvp(self, tangent: Tensor) -> tuple[Tensor, Tensor]:
        """Return D(x) and J u: scalars are summed over patches, their products folded."""
        direction = self._cell.query(tangent.double())
        taps = self._row_taps.float(), self._col_taps
        mean, product = self._product(direction, self._summed(), taps)
        return mean, product * self._col_scale[self._cols.image]

    def _product(
        self, direction: Tensor, inner: tuple[Tensor, Tensor], outer: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return D(x) and the product of the direction, with taps of rows and columns."""
        channels = len(direction)
        direction = direction.float().contiguous()
        patches = self._rows.axis.places, self._cols.axis.places
        scalars = torch.empty(2, *patches, dtype=torch.float64)
        inputs = self._passes.normalisers() | {
            "direction": direction,
            "offset": (direction.double() * self._reference).sum(0).float(),
            "inner_rows": inner[0].contiguous(),
            "inner_cols": inner[1].contiguous(),
            "mean": torch.zeros(patches),
            "mean_rest": torch.zeros(patches),
            "scalars": scalars,
        }
        flags = _flags("inner", inner[1])
        sums = self._planes(TOTALS, 1 + channels, inputs, numbers=flags)
        inputs["mean"] = (scalars[1] / scalars[0]).float()
        if self._jacobian_scale > _SCALE:
            self._passes.run(TOTALS, self._taps() | inputs, flags, answered=False)
            inputs["mean_rest"] = (scalars[1] / scalars[0]).float()
        product = self._planes(
            PRODUCT,
            channels,
            inputs,
            outer_rows=outer[0].contiguous(),
            outer_cols=outer[1].contiguous(),
            numbers=flags | _flags("outer", outer[1]),
        )
        product *= self._jacobian_scale
        return self._pixels(sums[1:] / sums[0]), product.float()

    def _planes(
        self,
        kind: int,
        count: int,
        inputs: dict[str, Tensor],
        numbers: dict[str, int],
        **tensors: Tensor,
    ) -> Tensor:
        """Return the sums of a pass, [count, H, W] float64: see ``FoldMomentSums``."""
        sums = torch.empty(count, *self._size, dtype=torch.float64)
        given = self._taps() | inputs | tensors | {"planes": sums}
        self._passes.run(kind, given, numbers | {"table_taps": int(self._col_taps.ndim == 2)})
        return sums

    def _taps(self) -> dict[str, Tensor]:
        """Return the common inputs of all passes but the first."""
        return {
            "row_taps": self._row_taps.float(),
            "col_taps": self._col_taps,
            "reference": self._reference,
        }

    def _counts(self) -> tuple[Tensor, Tensor]:
        """Return the weights of patches in a mean over the pixels: [Q] and [P] float64."""
        counts = []
        for line, taps in ((self._rows, self._row_taps), (self._cols, self._col_table)):
            here = torch.zeros(line.size, 1).double()
            here[line.image] = 1 / line.length
            counts.append(_of_patches(taps * here).sum(1))
        return counts[0], counts[1]

    def _folded(self) -> tuple[Tensor, Tensor]:
        """Return the taps of the fold for filters of patches."""
        table = self._col_taps.ndim == 2
        cols = _of_patches(self._col_taps) if table else self._col_taps
        padding = torch.zeros(self._cols.size - len(cols), self._query.window)
        return self._row_taps.float(), torch.cat([cols, padding]) if table else cols

    def _summed(self) -> tuple[Tensor, Tensor]:
        """Return the taps of sums over patches."""
        return torch.ones(self._rows.size, self._query.window), torch.ones(self._query.window)

    def _pixels(self, mean: Tensor) -> Tensor:
        """Return pixels of an image whose mean is measured from the reference."""
        reference = self._reference[:, self._rows.image, self._cols.image]
        return (mean + reference + self._bank.centre.float()).float()


def _joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the means and products of an image from those of its rows."""
    mean, product = (torch.cat(each, 1) for each in zip(*parts, strict=True))
    return mean, product


def _flags(name: str, cols: Tensor) -> dict[str, int]:
    """Return the fields that describe the taps of columns of a filter."""
    uniform = cols.ndim == 1 and bool((cols == 1).all())
    return {f"{name}_table": int(cols.ndim == 2), f"{name}_uniform": int(uniform)}


def _of_patches(taps: Tensor) -> Tensor:
    """Return taps [Y, k] of pixels as those of patches, [P, k]: of the o-th pixel of each."""
    size, window = taps.shape
    patch, offset = torch.arange(size - window + 1)[:, None], torch.arange(window)
    return taps[patch + offset, offset]
