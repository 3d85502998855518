"""Analytic machines: a bank of images, patch attention, and a noise-dependent window."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from els_kernels import GEOMETRIES, PatchAttention, PatchMoments, count_pairs, max_window
from els_kernels.native import instruction_sets
from els_service.denoisers.banks import Bank
from els_service.denoisers.base import (
    BankInfo,
    Denoised,
    DenoiserInfo,
    Integers,
    Query,
    SizeRange,
)
from els_service.denoisers.explanations import Explanation, explanation
from els_service.denoisers.gradients import Direction, Product
from els_service.denoisers.mapped_banks import MappedBank
from els_service.denoisers.query_checks import check_query
from els_service.denoisers.source_banks import SourceBank
from els_service.denoisers.windows import WindowTable, default_windows

_PER_THREAD = {"reference": 2e6, "torch": 1e8}
"""Pairs per second of one thread (measured); determines inline execution, batch sizes, and the
admission limit of a server without measured costs."""
_NATIVE_PER_THREAD = {"avx512": 3.5e9, "avx2": 1.2e9, "baseline": 5e8}
"""Pairs per second of one thread of the native kernel, by instruction set."""
_TRITON = 1e11
"""Pairs per second of a GPU, approximately."""

_MOMENT_PAIRS = 2.4e7
"""Pairs per second of one thread for a Jacobian product or an explanation: two passes in float64
(measured)."""
_MOST_SHARING, _SHARED_BYTES, _SUM_BYTES = 4, 4 << 20, 64
"""Images that share transforms in the native kernel, bytes of their sums, and of one of these."""
_MOMENT_STEP_S = 3e-4
"""Seconds of one step of both passes beside its pairs (measured)."""
_NATIVE_PRODUCT, _NATIVE_EXPLANATION = 2.8, 2.4
"""Time of the native form, in multiples of a denoise (measured, at the noisiest level)."""
_TRITON_PRODUCT, _TRITON_EXPLANATION = 40.0, 30.0
"""The same of the form in Triton, from instruction counts, not measured: a plain denoise there is a
matmul, and its moments are several passes."""
_NATIVE_IMAGE_S = 1e-3
"""Seconds of these forms for each image beside its pairs."""

_FIXED_PADDING = {"ideal": "zeros", "equivariant": "circular"}


class AnalyticDenoiser:
    """A machine of Kamb & Ganguli (ICML 2025, section 3): one row of ``GEOMETRIES``.

    Args:
        attention: patch attention of the bank; shared by all models with that bank.
        bank: the images.
        machine: ``ideal``, ``local``, ``equivariant`` or ``els``.
        padding: ``zeros``, ``circular`` or (els alone) ``valid``; ideal and equivariant ignore it.
        window: table by noise level; None for the default.
        clip: whether windows above the maximum are clipped to it, or rejected.
        moments: of ``attention``; None to compute them from the bank.
        call_s: seconds that a call takes beside its pairs.

    Raises:
        ValueError: Unknown machine and padding, or a window above the maximum.
    """

    def __init__(
        self,
        attention: PatchAttention,
        bank: Bank | MappedBank,
        *,
        machine: str,
        padding: str = "zeros",
        window: WindowTable | None = None,
        clip: bool = False,
        moments: PatchMoments | None = None,
        call_s: float = 0.0,
    ) -> None:
        padding = _FIXED_PADDING.get(machine, padding)
        if (machine, padding) not in GEOMETRIES:
            known = ", ".join(f"{m} with {p}" for m, p in GEOMETRIES)
            raise ValueError(f"machine and padding: expected {known}, got {machine} with {padding}")
        self._attention, self._bank = attention, bank
        # Decoded tile by tile: no second copy of the bank.
        self._moments = moments or PatchMoments(attention, bank.stored().to(attention.device))
        self._call_s = call_s
        self._geometry = GEOMETRIES[machine, padding]
        largest = 0 if self._geometry.whole else max_window(self._geometry, *bank.shape[1:])
        table = (window or default_windows()) if largest else None
        if table is not None and (clip or window is None):
            table = table.clipped(largest)
        if table is not None and max(table.k) > largest:
            raise ValueError(f"window: expected at most {largest} here, got {max(table.k)}")
        self._window = table
        self._pairs_per_second = _speed(attention.implementation)
        self._info = DenoiserInfo(
            kind="analytic",
            shape=bank.shape,
            machine=machine,
            padding=padding,
            window=table,
            max_window=largest,
            label_count=bank.label_count,
            label_names=bank.label_names,
            bank=bank_info(bank),
            has_log_evidence=True,
            has_gradients=True,
            reuses_evidence=True,
            has_sources=True,
            has_originality=True,
            implementation=attention.implementation,
            memory_bytes=bank_bytes(bank),
        )

    @property
    def info(self) -> DenoiserInfo:
        """Description of the machine."""
        return self._info

    @property
    def bank(self) -> Bank | MappedBank:
        """Images of the machine."""
        return self._bank

    @property
    def attention(self) -> PatchAttention:
        """Patch attention of its bank."""
        return self._attention

    def check(self, query: Query) -> None:
        """Raise InvalidArgumentError if the shape, a label or a window is not supported."""
        check_query(self._info, query)
        for label in np.unique(query.labels):
            self._bank.label_range(int(label))

    def warm_up(self) -> None:
        """Compile what queries with the windows of the table need; see ``base.Compiling``."""
        table = (1,) if self._window is None else self._window.k
        # The table is interpolated.
        windows = range(min(table), max(table) + 1, 2)
        self._attention.warm_up(windows, self._geometry)
        self._moments.warm_up(windows, self._geometry)

    def predict_seconds(self, query: Query) -> float:
        """Return a rough estimate from the number of pairs and the number of torch's threads."""
        work = sum(
            self._work(int(k), len(query)) * (hi - lo)
            for k, (lo, hi) in zip(self._windows(query), self._ranges(query), strict=True)
        )
        return self._call_s + work / self._pairs_per_second

    def _work(self, k: int, batch: int) -> float:
        """Return the cost of an image in a batch by bank image, in pairs of the smallest window."""
        channels, height, width = self._info.shape
        pairs = count_pairs(self._geometry, height, width, k)
        if self._translates:
            # Of a pixel in a transform (measured): its logarithm, in pairs.
            if self._info.implementation == "torch":
                return 0.1 * self._transformed(1)
            return 0.4 * self._transformed(min(batch, self._sharing))
        if self._info.implementation not in ("native", "torch"):
            return pairs
        # Measured weights, too: products only, and sweeps with a single source for each place.
        if self._geometry.whole:
            return channels * pairs / 2
        if self._geometry.sources == "same":
            return 3 * pairs
        if self._info.implementation == "torch":
            return pairs
        # The cost is per displacement, whose number falls as the root of the pairs (measured).
        return math.sqrt(pairs * count_pairs(self._geometry, height, width, 1))

    @property
    def _translates(self) -> bool:
        """Whether every translation of whole images is a source: transforms instead of pairs."""
        return self._geometry.whole and self._geometry.sources == "every"

    def _transformed(self, sharing: int) -> float:
        """Return the pixels of one bank image in all its transforms, times their logarithm.

        Args:
            sharing: images that share those of the bank image alone.
        """
        channels, height, width = self._info.shape
        pixels = height * width
        return (channels / sharing + 2) * pixels * math.log2(max(2, pixels))

    @property
    def _sharing(self) -> int:
        """Most images that share a transform in the native kernel: see ``translations.hpp``."""
        return min(
            _MOST_SHARING, max(1, _SHARED_BYTES // (_SUM_BYTES * math.prod(self._info.shape)))
        )

    def denoise(self, query: Query) -> Denoised:
        """Return posterior means and log evidences."""
        posterior = self._attention(query.x.to(self._attention.device), **self._arguments(query))
        return Denoised(posterior.mean.cpu().numpy(), posterior.log_evidence.cpu().numpy())

    def vjp(self, query: Query, cotangent: npt.NDArray[np.float32]) -> Product:
        """Return D(x) and Jᵀg, exactly."""
        return self._product(self._moments.vjp, query, cotangent)

    def jvp(self, query: Query, tangent: npt.NDArray[np.float32]) -> Product:
        """Return D(x) and J u, exactly."""
        return self._product(self._moments.jvp, query, tangent)

    def evidence(self, query: Query) -> npt.NDArray[np.float64]:
        """Return mean and log evidence in float64, [B, K, H, W]."""
        x = query.x.to(self._attention.device)
        found: npt.NDArray[np.float64] = (
            self._moments.evidence(x, **self._arguments(query)).cpu().numpy()
        )
        return found

    def product_from(
        self,
        query: Query,
        along: npt.NDArray[np.float32],
        evidence: npt.NDArray[np.float64],
        direction: Direction,
    ) -> Product:
        """Return D(x) and Jᵀg or J u, exactly, without the first pass over the bank."""
        multiply = self._moments.vjp if direction == "vjp" else self._moments.jvp
        known = torch.tensor(evidence).to(self._attention.device)
        return self._product(multiply, query, along, evidence=known)

    def predict_evidence_seconds(self, query: Query) -> float:
        """Return a rough estimate from the number of pairs: half of that of both passes."""
        return self._moment_seconds(query, _NATIVE_PRODUCT, _TRITON_PRODUCT) / 2

    def predict_product_seconds(self, query: Query, direction: Direction) -> float:
        """Return a rough estimate from the number of pairs."""
        return self._moment_seconds(query, _NATIVE_PRODUCT, _TRITON_PRODUCT)

    def explain(self, query: Query, top: int) -> Explanation:
        """Return the statistics with the ``top`` sources of every pixel, without evidence."""
        found = self._moments.statistics(
            query.x.to(self._attention.device), **self._arguments(query), top=top
        )
        return explanation(found, self._bank)

    def variance(self, query: Query) -> npt.NDArray[np.float32]:
        """Return the posterior variance of each pixel, [B, C, H, W]."""
        found = self._moments.statistics(
            query.x.to(self._attention.device), **self._arguments(query), top=1, shares=False
        )
        variance: npt.NDArray[np.float32] = found.variance.cpu().numpy()
        return variance

    def predict_explain_seconds(self, query: Query) -> float:
        """Return a rough estimate from the number of pairs."""
        return self._moment_seconds(query, _NATIVE_EXPLANATION, _TRITON_EXPLANATION)

    def _product(
        self, multiply: Any, query: Query, direction: npt.NDArray[np.float32], **known: Tensor
    ) -> Product:
        device = self._attention.device
        along = torch.tensor(direction).to(device)
        mean, product = multiply(query.x.to(device), along, **self._arguments(query), **known)
        return Product(mean.cpu().numpy(), product.cpu().numpy())

    def _moment_seconds(self, query: Query, native: float, triton: float) -> float:
        implementation = self._moments.implementation(self._geometry)
        if implementation in ("native", "triton"):
            factor = native if implementation == "native" else triton
            return factor * self.predict_seconds(query) + _NATIVE_IMAGE_S * len(query)
        channels, height, width = self._info.shape
        rate = _MOMENT_PAIRS * torch.get_num_threads()
        seconds = 0.0
        for k, (lo, hi) in zip(self._windows(query), self._ranges(query), strict=True):
            # Measured weights: transforms, or elementwise work for each channel.
            if self._translates:
                pairs = self._transformed(1) / 14
            else:
                pairs = (channels + 2) / 3 * count_pairs(self._geometry, height, width, int(k))
            steps = self._moments.steps(hi - lo, int(k), self._geometry)
            seconds += _MOMENT_STEP_S * steps + pairs * (hi - lo) / rate
        return seconds

    def _arguments(self, query: Query) -> dict[str, Any]:
        """Return the arguments of patch attention other than x."""
        return {
            "a": [a for a, _ in query.level.pairs],
            "s": [s for _, s in query.level.pairs],
            "window": None if self._window is None else self._windows(query).tolist(),
            "ranges": self._ranges(query),
            "geometry": self._geometry,
        }

    def _windows(self, query: Query) -> Integers:
        if self._window is None:
            return np.ones(len(query), np.int64)
        return np.where(query.windows > 0, query.windows, self._window.at(query.level.sigma))

    def _ranges(self, query: Query) -> list[tuple[int, int]]:
        return [self._bank.label_range(int(label)) for label in query.labels]


def _speed(implementation: str) -> float:
    """Return the approximate pairs per second of an implementation on this machine."""
    if implementation == "triton":
        return _TRITON
    if implementation == "native":
        return _NATIVE_PER_THREAD[instruction_sets()[0]] * torch.get_num_threads()
    return _PER_THREAD[implementation] * torch.get_num_threads()


def bank_info(bank: SourceBank) -> BankInfo:
    """Return the public description of a bank."""
    longest = None if bank.file_names is None else bank.file_names.longest
    common = bank.fingerprint, len(bank), bank.source, bank.licence, longest
    (low, wide_low), (high, wide_high) = bank.extents.min(0).tolist(), bank.extents.max(0).tolist()
    if (low, wide_low) == (high, wide_high):
        return BankInfo(*common)
    sizes = SizeRange((low, high), (wide_low, wide_high))
    return BankInfo(*common, sizes, int(bank.extents.prod(1).max()))


def bank_bytes(bank: SourceBank, *, copies: int = 1) -> int:
    """Return the memory of a bank: images, their float32 copies for computation, file names."""
    names = 0 if bank.file_names is None else bank.file_names.nbytes
    return bank.nbytes + 4 * copies * bank.size + names
