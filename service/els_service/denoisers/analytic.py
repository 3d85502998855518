"""Analytic machines: a bank of images, patch attention, and a window that grows with the noise."""

from __future__ import annotations

import math

import numpy as np
import torch

from els_kernels import GEOMETRIES, PatchAttention, count_pairs, max_window
from els_kernels.native import instruction_sets
from els_service.denoisers.banks import Bank
from els_service.denoisers.base import (
    BankInfo,
    Denoised,
    DenoiserInfo,
    Integers,
    Query,
    check_query,
)
from els_service.denoisers.windows import WindowTable, default_windows

_PER_THREAD = {"reference": 2e6, "torch": 1e8}
"""Pairs that a thread does in a second (measured); decides what is inline, what makes a batch, and
what a fresh server refuses."""
_NATIVE_PER_THREAD = {"avx512": 3.5e9, "avx2": 1.2e9, "baseline": 5e8}
"""The same of the native kernel, by instruction set."""
_TRITON = 1e11
"""Pairs that a GPU does in a second, about."""

_FIXED_PADDING = {"ideal": "zeros", "equivariant": "circular"}


class AnalyticDenoiser:
    """A machine of Kamb & Ganguli (ICML 2025, section 3): one row of ``GEOMETRIES``.

    Args:
        attention: the bank's patch attention; models of one bank share it.
        bank: where the images come from.
        machine: ``ideal``, ``local``, ``equivariant`` or ``els``.
        padding: ``zeros``, ``circular`` or (els alone) ``valid``; ideal and equivariant ignore it.
        window: by noise level; None for the default.
        clip: whether windows beyond the legal range are clipped to it or refused.

    Raises:
        ValueError: No such machine and padding, or a window larger than is legal.
    """

    def __init__(
        self,
        attention: PatchAttention,
        bank: Bank,
        *,
        machine: str,
        padding: str = "zeros",
        window: WindowTable | None = None,
        clip: bool = False,
    ) -> None:
        padding = _FIXED_PADDING.get(machine, padding)
        if (machine, padding) not in GEOMETRIES:
            known = ", ".join(f"{m} with {p}" for m, p in GEOMETRIES)
            raise ValueError(f"machine and padding: expected {known}, got {machine} with {padding}")
        self._attention, self._bank = attention, bank
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
            implementation=attention.implementation,
            memory_bytes=bank_bytes(bank),
        )

    @property
    def info(self) -> DenoiserInfo:
        """What the machine is."""
        return self._info

    def check(self, query: Query) -> None:
        """Raise InvalidArgumentError if shape, a label or a window does not fit."""
        check_query(self._info, query)
        for label in np.unique(query.labels):
            self._bank.label_range(int(label))

    def predict_seconds(self, query: Query) -> float:
        """Return a rough estimate from the number of pairs, for as many threads as torch has."""
        work = sum(
            self._work(int(k)) * (hi - lo)
            for k, (lo, hi) in zip(self._windows(query), self._ranges(query), strict=True)
        )
        return work / self._pairs_per_second

    def _work(self, k: int) -> float:
        """Return what an image and one of the bank cost, in pairs of the smallest window."""
        channels, height, width = self._info.shape
        pairs = count_pairs(self._geometry, height, width, k)
        if self._info.implementation not in ("native", "torch"):
            return pairs
        # These weights are measured, too: products alone, and sweeps that answer only once.
        if self._geometry.whole:
            every = self._geometry.sources == "every"
            return channels * (pairs * pairs / 8 if every else pairs / 2)
        if self._geometry.sources == "same":
            return 3 * pairs
        if self._info.implementation == "torch":
            return pairs
        # It goes by displacements, which become fewer as the root of the pairs does (measured).
        return math.sqrt(pairs * count_pairs(self._geometry, height, width, 1))

    def denoise(self, query: Query) -> Denoised:
        """Return posterior means and log evidences."""
        posterior = self._attention(
            query.x.to(self._attention.device),
            a=torch.tensor(query.level.a),
            s=torch.tensor(query.level.s),
            window=None if self._window is None else torch.from_numpy(self._windows(query)),
            ranges=torch.tensor(self._ranges(query)),
            geometry=self._geometry,
        )
        return Denoised(posterior.mean.cpu().numpy(), posterior.log_evidence.cpu())

    def _windows(self, query: Query) -> Integers:
        if self._window is None:
            return np.ones(len(query), np.int64)
        return np.where(query.windows > 0, query.windows, self._window.at(query.level.sigma))

    def _ranges(self, query: Query) -> list[tuple[int, int]]:
        return [self._bank.label_range(int(label)) for label in query.labels]


def _speed(implementation: str) -> float:
    """Return about how many pairs an implementation does in a second here."""
    if implementation == "triton":
        return _TRITON
    if implementation == "native":
        return _NATIVE_PER_THREAD[instruction_sets()[0]] * torch.get_num_threads()
    return _PER_THREAD[implementation] * torch.get_num_threads()


def bank_info(bank: Bank) -> BankInfo:
    """Return what callers may know of a bank."""
    return BankInfo(bank.fingerprint, len(bank.images), bank.source, bank.licence)


def bank_bytes(bank: Bank) -> int:
    """Return what a bank takes: its images, and their float32 copy that is computed with."""
    return bank.images.nbytes + 4 * bank.images.size
