"""ctypes binding of moments of a fold: lines, taps and scalars here, sweeps in C++.

Passes over the bank, see fold_problem.hpp: the first finds the normaliser of each patch; statistics
need one more, a Jacobian product two: means of the scalars of patches, then the product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from els_kernels.control import checkpoint
from els_kernels.geometry import Geometry
from els_kernels.native.binding import instruction_sets
from els_kernels.native.fold_binding import FoldUnits, fold_units, line_taps
from els_kernels.native.fold_lines import plane
from els_kernels.native.fold_moments_call import PRODUCT, STATISTICS, TOTALS, FoldPasses
from els_kernels.torch_fold import bank_centre, box_sums, decoded

_SCALE = 500.0
"""a/s² from which the mean of a patch's scalars, wrong by 6e-8 of them in float32, is refined."""
_TILE = 1 << 20
"""Numbers of bank images that are centred together."""


class NativeFoldMoments:
    """Moments of the posterior of a fold, of groups of bank images of one size, which it shares.

    Results have the same bits for any number of threads.
    """

    def __init__(self, groups: Sequence[Tensor], *, instruction_set: str | None = None) -> None:
        """Prepare a bank.

        Args:
            groups: [N, C, H, W] on the CPU, of one size each, float32, or uint8 v for v/127.5 − 1.
            instruction_set: one of ``instruction_sets()``; None for the best.

        Raises:
            ValueError: The bank is not on the CPU, or the instruction set is unknown.
            RuntimeError: The library was not built, or cannot be loaded.
        """
        device = groups[0].device
        if device.type != "cpu":
            raise ValueError(f"native: expected a bank on the CPU, got one on {device}")
        known = instruction_sets()
        name = known[0] if instruction_set is None else instruction_set
        if name not in known:
            raise ValueError(f"instruction_set: expected one of {', '.join(known)}, got {name!r}")
        self.kernel = known.index(name)
        self.groups = [group.contiguous() for group in groups]
        self.centre = bank_centre(groups)
        self._norms: dict[tuple[int, Geometry], float] = {}
        self._spread: tuple[float, float] | None = None

    def statistics(
        self,
        x: Tensor,
        a: float,
        s: float,
        window: int,
        limits: tuple[int, int],
        fold: float,
        geometry: Geometry,
        top: int,
        shares: bool,
    ) -> tuple[Tensor, ...]:
        """Return the fields of ``PosteriorStatistics`` for one image.

        Raises:
            ComputationStoppedError: The current ``Control`` was stopped.
            MemoryError: The partial results do not fit in memory.
        """
        with torch.device("cpu"):
            query = NativeFoldQuery(self, x, a, s, window, limits, fold, geometry)
            return query.statistics(top, shares)

    def vjp(
        self,
        x: Tensor,
        cotangent: Tensor,
        a: float,
        s: float,
        window: int,
        limits: tuple[int, int],
        fold: float,
        geometry: Geometry,
    ) -> tuple[Tensor, Tensor]:
        """Return D(x) and Jᵀg, [C, H, W] float32.

        Raises:
            ComputationStoppedError, MemoryError: As ``statistics``.
        """
        with torch.device("cpu"):
            return NativeFoldQuery(self, x, a, s, window, limits, fold, geometry).vjp(cotangent)

    def jvp(
        self,
        x: Tensor,
        tangent: Tensor,
        a: float,
        s: float,
        window: int,
        limits: tuple[int, int],
        fold: float,
        geometry: Geometry,
    ) -> tuple[Tensor, Tensor]:
        """Return D(x) and J u, [C, H, W] float32.

        Raises:
            ComputationStoppedError, MemoryError: As ``statistics``.
        """
        with torch.device("cpu"):
            return NativeFoldQuery(self, x, a, s, window, limits, fold, geometry).jvp(tangent)

    def units(self, x: Tensor, a: float, s: float, window: int, geometry: Geometry) -> FoldUnits:
        """Return the units of the logits of a query [C, H, W]."""
        *_, cell = plane(x.shape[1], x.shape[2], window, geometry)
        crop = cell.query(x.double() - a * self.centre)
        query = math.sqrt(float(box_sums(crop.square().sum(0), window).max()))
        if (window, geometry) not in self._norms:
            largest = 0.0
            for tile in self._tiles():
                squares = cell.keys(tile).square().sum(1)
                largest = max(largest, float(box_sums(squares, window).max()))
            self._norms[window, geometry] = math.sqrt(largest)
        return fold_units(query, self._norms[window, geometry], window * window, a, s)

    def spread(self) -> tuple[float, float]:
        """Return the mean square and the largest norm of a centred pixel of the bank."""
        if self._spread is None:
            total, largest, count = 0.0, 0.0, 0
            for tile in self._tiles():
                squares = tile.square()
                total += float(squares.sum())
                largest = max(largest, float(squares.sum(1).max()))
                count += tile.numel()
            self._spread = total / count, math.sqrt(largest)
        return self._spread

    def _tiles(self) -> Iterator[Tensor]:
        """Yield the centred images of the bank, [n, C, H, W] float64, a few at a time."""
        for group in self.groups:
            together = max(1, _TILE // group[0].numel())
            for first in range(0, len(group), together):
                checkpoint()
                yield decoded(group[first : first + together]).double() - self.centre


class NativeFoldQuery:
    """One query image: its crop, its taps, and the passes over the bank that it needs."""

    def __init__(
        self,
        bank: NativeFoldMoments,
        x: Tensor,
        a: float,
        s: float,
        window: int,
        limits: tuple[int, int],
        fold: float,
        geometry: Geometry,
    ) -> None:
        height, width = x.shape[1:]
        self._rows, self._cols, self._cell = plane(height, width, window, geometry)
        self._bank, self._limits, self._window = bank, limits, window
        self._jacobian_scale = a / (s * s)
        crop = self._cell.query(x.double() - a * bank.centre)
        units = bank.units(x, a, s, window, geometry)
        self._passes = FoldPasses(
            bank.kernel, bank.groups, bank.centre, self._rows, self._cols, crop, units, limits
        )
        self._row_taps = self._rows.axis.taps(height, fold, geometry)
        self._col_table = self._cols.axis.taps(width, fold, geometry)
        self._col_taps, self._col_scale = line_taps(self._cols.axis, width, fold, geometry)
        # The mean of a posterior whose prior is Gaussian: near enough to centre sums. About a place
        # far beyond the pixels of the bank they would cancel.
        square, farthest = bank.spread()
        signal = a * a * square
        reference = crop * (signal / (signal + s * s) / a)
        self._reference = reference.clamp_(-farthest, farthest).float().contiguous()

    def statistics(self, top: int, shares: bool) -> tuple[Tensor, ...]:
        """Return the fields of ``PosteriorStatistics`` for one image."""
        height, width = self._rows.length, self._cols.length
        weights = torch.empty(height, width, top)
        origins = torch.empty(height, width, top, 3, dtype=torch.int64)
        found = torch.empty(self._passes.images, dtype=torch.float64)
        rows, cols = self._counts()
        sums = self._planes(
            STATISTICS,
            2 + 2 * len(self._reference),
            self._passes.normalisers(),
            reach=torch.outer(rows, cols).float(),
            shares=found,
            weights=weights,
            origins=origins,
            numbers={"top": top},
        )
        total = sums[0]
        mean = sums[2::2] / total
        entropy = (total.log2() - sums[1] / total).mul_(math.log(2)).clamp_(min=0)
        images = sum(len(group) for group in self._bank.groups)
        part = torch.zeros(images if shares else 0, dtype=torch.float64)
        if shares:
            # What weights lack for being rounded, and not counted where they are small.
            part[slice(*self._limits)] = found / found.sum()
        return (
            self._pixels(mean),
            (sums[3::2] / total - mean.square()).clamp_(min=0).float(),
            entropy.float(),
            origins,
            (weights / total[..., None]).clamp_(max=1).float(),
            part,
        )

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
        sums = torch.empty(count, self._rows.length, self._cols.length, dtype=torch.float64)
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
        padding = torch.zeros(self._cols.size - len(cols), self._window)
        return self._row_taps.float(), torch.cat([cols, padding]) if table else cols

    def _summed(self) -> tuple[Tensor, Tensor]:
        """Return the taps of sums over patches."""
        return torch.ones(self._rows.size, self._window), torch.ones(self._window)

    def _pixels(self, mean: Tensor) -> Tensor:
        """Return pixels of an image whose mean is measured from the reference."""
        reference = self._reference[:, self._rows.image, self._cols.image]
        return (mean + reference + self._bank.centre.float()).float()


def _flags(name: str, cols: Tensor) -> dict[str, int]:
    """Return the fields that describe the taps of columns of a filter."""
    uniform = cols.ndim == 1 and bool((cols == 1).all())
    return {f"{name}_table": int(cols.ndim == 2), f"{name}_uniform": int(uniform)}


def _of_patches(taps: Tensor) -> Tensor:
    """Return taps [Y, k] of pixels as those of patches, [P, k]: of the o-th pixel of each."""
    size, window = taps.shape
    patch, offset = torch.arange(size - window + 1)[:, None], torch.arange(window)
    return taps[patch + offset, offset]
