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

from els_kernels.default_device import made_on
from els_kernels.fold_plan import Cell, FoldQuery
from els_kernels.image_statistics import ImageStatistics
from els_kernels.native.fold_bank import FoldPasses, NativeFoldBank
from els_kernels.native.fold_binding import line_taps
from els_kernels.native.fold_lines import plane
from els_kernels.native.fold_pass import PRODUCT, STATISTICS, TOTALS, FoldFrame, FoldRows
from els_kernels.torch_fold_moments import TiledFoldMoments

_TASKS = 4
"""Tasks whose sums of a row of pixels are held, at least."""
_PRECISION = 26
"""Weights that do not count are together 2^-26 of a patch's normaliser at most."""
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
        with made_on(torch.device("cpu")):
            whole = NativeFoldQuery(self, query)
            if not whole.crop.resolved:
                return self._exact.statistics(query, top, shares)
            answer = ImageStatistics.empty(query.x, self.images.count, top, shares=shares)
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
        with made_on(torch.device("cpu")):
            whole = NativeFoldQuery(self, query)
            if not whole.crop.resolved:
                return self._exact.vjp(query, cotangent)
            return _joined([part.vjp(cotangent) for part in whole.parts()])

    def jvp(self, query: FoldQuery, tangent: Tensor) -> tuple[Tensor, Tensor]:
        """Return D(x) and J u, [C, H, W] float32.

        Raises:
            ComputationStoppedError, MemoryError: As ``statistics``.
        """
        with made_on(torch.device("cpu")):
            whole = NativeFoldQuery(self, query)
            if not whole.crop.resolved:
                return self._exact.jvp(query, tangent)
            return _joined([part.jvp(tangent) for part in whole.parts()])


class NativeFoldQuery:
    """One query image, which is answered some rows at a time."""

    def __init__(self, bank: NativeFoldMoments, query: FoldQuery) -> None:
        self.bank, self.query = bank, query
        self.rows, self.cols, cell = plane(*query.size, query.window, query.geometry)
        self.frame = FoldFrame(query.size, query.window, query.geometry)
        self.crop = bank.crop_of(query, cell, self.frame)

    def parts(self, top: int = 0) -> Iterator[NativeFoldPart]:
        """Yield the rows, for so many sources of a pixel."""
        ring = self.bank.images.ring(self.frame)
        for rows in self.query.blocks(row_bytes(ring, len(self.query.x), top)):
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
        frame = whole.frame._replace(answered=(rows.start, rows.stop))
        self._passes = FoldPasses(
            bank.images, frame, crop, whole.crop.units, [query.limits], _PRECISION
        )
        self._row_taps, self._col_table = query.taps(self._cell)
        self._col_taps, self._col_scale = line_taps(
            self._cols.axis, query.size[1], query.fold, query.geometry
        )
        self._jacobian_scale = a / (s * s)
        # The mean of a posterior whose prior is Gaussian: near enough to centre sums. About a place
        # far beyond the pixels of the bank they would cancel.
        square, farthest = bank.images.spread
        signal = a * a * square
        reference = crop * (signal / (signal + s * s) / a)
        self._reference = reference.clamp_(-farthest, farthest).float().contiguous()

    def statistics(self, out: ImageStatistics) -> None:
        """Write the statistics, and add what these rows count in the shares."""
        reach = torch.outer(*self._counts()).float()
        inputs = self._normalisers() | {"reach": reach}
        found = self._run(STATISTICS, inputs, {"top": out.weights.shape[2]})
        sums = found.planes
        total = sums[0]
        mean = sums[2::2] / total
        out.mean.copy_(self._pixels(mean))
        out.variance.copy_((sums[3::2] / total - mean.square()).clamp_(min=0))
        out.entropy.copy_((total.log2() - sums[1] / total).mul_(math.log(2)).clamp_(min=0))
        out.sources.copy_(found.origins)
        out.weights.copy_(found.weights.div_(total[..., None]).clamp_(max=1))
        if len(out.shares):
            out.shares[slice(*self._query.limits)] += found.shares

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
        direction = direction.float().contiguous()
        patches = self._rows.axis.places, self._cols.axis.places
        inputs = self._normalisers() | {
            "direction": direction,
            "offset": (direction.double() * self._reference).sum(0).float(),
            "inner_rows": inner[0].contiguous(),
            "inner_cols": inner[1].contiguous(),
            "mean": torch.zeros(patches),
            "mean_rest": torch.zeros(patches),
        }
        flags = _flags("inner", inner[1])
        found = self._run(TOTALS, inputs, flags)
        sums = found.planes
        inputs["mean"] = (found.scalars[1] / found.scalars[0]).float()
        if self._jacobian_scale > _SCALE:
            refined = self._run(TOTALS, inputs, flags, answered=False).scalars
            inputs["mean_rest"] = (refined[1] / refined[0]).float()
        inputs["outer_rows"], inputs["outer_cols"] = (each.contiguous() for each in outer)
        product = self._run(PRODUCT, inputs, flags | _flags("outer", outer[1])).planes
        product *= self._jacobian_scale
        return self._pixels(sums[1:] / sums[0]), product.float()

    def _run(
        self, kind: int, tensors: dict[str, Tensor], numbers: dict[str, int], **options: bool
    ) -> FoldRows:
        """Return the results of a pass with the taps of the fold."""
        taps = {
            "row_taps": self._row_taps.float(),
            "col_taps": self._col_taps,
            "reference": self._reference,
        }
        numbers = numbers | {"table_taps": int(self._col_taps.ndim == 2)}
        return self._passes.run(kind, tensors | taps, numbers, **options)

    def _normalisers(self) -> dict[str, Tensor]:
        """Return the normalisers of patches, ``whole`` int32 and ``rest``, [Q, P]."""
        owners = self._rows.own(), self._cols.own()
        # Patches that repeat others attend to none.
        rows, cols = (
            torch.where(own == torch.arange(len(own)), line.classes(), -1).int()
            for own, line in zip(owners, (self._rows, self._cols), strict=True)
        )
        whole, rest, _ = self._passes.normalisers({"row_classes": rows, "col_classes": cols})
        at = owners[0][:, None], owners[1]
        return {"whole": whole[at], "rest": rest[at]}

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
        return (mean + reference + self._bank.images.centre.float()).float()


def row_bytes(ring: int, channels: int, top: int) -> int:
    """Return the bytes that a pass holds for a row of pixels: sums of tasks, lists of sources."""
    planes = 2 + 2 * channels
    return ring * (8 * _TASKS * planes + 12 * top + 4)


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
