"""The public operator: validates every argument once, then calls an implementation."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from els_kernels.arguments import (
    Integers,
    Numbers,
    Ranges,
    check_logits,
    describe,
    image_ranges,
    is_images,
    join,
    magnitudes,
    odd_windows,
    positive,
)
from els_kernels.geometry import Geometry, Posterior, max_window
from els_kernels.native import BankParts, Native, PartedNative, instruction_sets
from els_kernels.reference import Reference
from els_kernels.torch_tiled import Tiled
from els_kernels.triton import create as create_triton
from els_kernels.triton import unavailable as triton_unavailable

_log = logging.getLogger(__name__)


class Implementation(Protocol):
    """A bank prepared for queries. Takes validated arguments; ``window`` is 1 for ``whole``."""

    def __call__(
        self,
        x: Tensor,
        a: list[float],
        s: list[float],
        window: list[int],
        ranges: list[tuple[int, int]],
        geometry: Geometry,
    ) -> Posterior:
        """Return the posterior of every pixel."""
        ...


@runtime_checkable
class Compiling(Protocol):
    """An implementation that compiles kernels when they are first launched."""

    def warm_up(self, windows: Iterable[int], geometry: Geometry) -> None:
        """Launch every kernel that queries with these windows take."""
        ...


IMPLEMENTATIONS: dict[str, Callable[[Tensor], Implementation]] = {
    "reference": Reference,
    "torch": Tiled,
    "native": Native,
    "triton": create_triton,
}
_READS_BYTES = {"triton"}
"""Implementations that take banks of uint8; the others get a float32 copy."""


class PatchAttention:
    """Softmax attention from every patch of a query to the patches of a bank of images.

    For output pixel u with window Ω and sources S(u) (Kamb & Ganguli, ICML 2025, eq. 8-10)::

        ℓ(u; n, y) = -‖x[u+Ω] - a·φ_n[y+Ω]‖² / (2 s²)
        mean[u]    = Σ softmax(ℓ) φ_n[y]        log_evidence[u] = logsumexp(ℓ)

    Results are batch invariant: an image has the same bits alone and in any batch, in any order.
    They carry no gradient, and do not depend on autocast or the default device.
    """

    @torch.no_grad()
    def __init__(self, bank: Tensor, *, implementation: str = "auto") -> None:
        """Prepare a bank.

        Args:
            bank: [N, C, H, W], N ≥ 1; finite float32, or uint8 v for v/127.5 - 1, which a GPU
                converts block by block.
            implementation: a key of ``IMPLEMENTATIONS``, or ``auto``, which logs its choice.

        Raises:
            ValueError: the bank or the implementation is invalid; names expected and got.
            RuntimeError: ``native`` or ``triton`` is requested but not available; gives the reason.
        """
        if not (is_images(bank) or is_images(bank, torch.uint8)) or 0 in bank.shape:
            raise ValueError(
                "bank: expected float32 [N, C, H, W] or uint8, none of them 0, "
                f"got {describe(bank)}"
            )
        # Native code reads the memory, which lacks the sign of a lazily negated view.
        bank = bank.resolve_neg()
        self._largest = 1.0 if bank.dtype == torch.uint8 else magnitudes("bank", bank[None])[0]
        if implementation == "auto":
            implementation = fastest(bank)
            _log.info("patch attention: auto chose %s for device %s", implementation, bank.device)
        if implementation not in IMPLEMENTATIONS:
            known = ", ".join(IMPLEMENTATIONS)
            raise ValueError(f"implementation: expected one of {known}, got {implementation!r}")
        if bank.dtype == torch.uint8 and implementation not in _READS_BYTES:
            bank = bank.float().div_(127.5).sub_(1)
        self.implementation = implementation
        self.images = len(bank)
        self.shape = (bank.shape[1], bank.shape[2], bank.shape[3])
        self.device = bank.device
        with torch.autocast(bank.device.type, enabled=False):
            self.prepared = IMPLEMENTATIONS[implementation](bank)
            """The bank, prepared by the implementation."""

    @classmethod
    def of_parts(cls, parts: BankParts, largest: float) -> PatchAttention:
        """Return the operator of a bank whose blocks are in other processes.

        Args:
            parts: the processes.
            largest: a bound of |pixel| of the bank.

        Raises:
            RuntimeError: The native library was not built, or cannot be loaded.
        """
        attention = cls.__new__(cls)
        prepared = PartedNative(parts)
        attention._largest = largest
        attention.implementation = "native"
        attention.images, *shape = prepared.shape
        attention.shape = (shape[0], shape[1], shape[2])
        attention.device = torch.device("cpu")
        attention.prepared = prepared
        return attention

    @torch.no_grad()
    def __call__(
        self,
        x: Tensor,
        *,
        a: Numbers,
        s: Numbers,
        window: Integers | None = None,
        ranges: Ranges | None = None,
        geometry: Geometry,
    ) -> Posterior:
        """Return posterior mean and log evidence of every pixel.

        Args:
            x: noisy images [B, C, H, W] float32, finite, on the bank's device, ``x = a·x0 + s·ε``.
            a: signal scale of each image [B], > 0; a tensor, or a list, which costs less: so are
                ``s``, ``window`` and ``ranges``.
            s: noise scale of each image [B], > 0, and large enough that logits fit a float32:
                ``(|x| + a·|φ|)·√(C·H·W)/s`` and ``a/s`` up to 1e18.
            window: odd side of each image's patch [B] integers; None where ``geometry.whole``.
            ranges: half-open ranges of bank images to attend to, [B, 2] integers ``lo, hi``;
                None for all.
            geometry: window shape, sources and padding.

        Raises:
            ValueError: an argument is invalid; names it, expected and got.
            ComputationStoppedError: the current ``Control`` was stopped (CPU only).
        """
        arguments = self.validate(x, a=a, s=s, window=window, ranges=ranges, geometry=geometry)
        with torch.autocast(self.device.type, enabled=False):
            return self.prepared(*arguments)

    @torch.no_grad()
    def warm_up(self, windows: Iterable[int], geometry: Geometry) -> None:
        """Compile what queries with these windows take, if the implementation compiles at all.

        Otherwise the first query of each kind takes seconds longer. ``windows`` is ignored where
        ``geometry.whole``.
        """
        if isinstance(self.prepared, Compiling):
            with torch.autocast(self.device.type, enabled=False):
                self.prepared.warm_up([1] if geometry.whole else windows, geometry)

    def validate(
        self,
        x: Tensor,
        *,
        a: Numbers,
        s: Numbers,
        window: Integers | None = None,
        ranges: Ranges | None = None,
        geometry: Geometry,
    ) -> tuple[Tensor, list[float], list[float], list[int], list[tuple[int, int]], Geometry]:
        """Return the arguments of an ``Implementation``.

        Raises:
            ValueError: an argument is invalid; names it, expected and got.
        """
        self._check_query(x)
        x = x.resolve_neg()
        batch = len(x)
        if not isinstance(geometry, Geometry):
            raise ValueError(f"geometry: expected a Geometry, got {geometry!r}")
        if geometry.padding == "inside":
            raise ValueError("geometry: padding inside is answered by FoldedAttention only")
        scales = positive("a", a, batch), positive("s", s, batch)
        check_logits(magnitudes("x", x), self._largest, math.prod(self.shape), *scales)
        windows = self._windows(window, batch, geometry)
        return x, *scales, windows, image_ranges(ranges, batch, self.images), geometry

    def _check_query(self, x: Tensor) -> None:
        if not isinstance(x, Tensor) or tuple(x.shape[1:]) != self.shape or len(x) == 0:
            raise ValueError(f"x: expected shape [B, {join(self.shape)}], got {describe(x)}")
        if not is_images(x) or x.device != self.device:
            raise ValueError(
                f"x: expected torch.float32 on {self.device}, got {describe(x)} on {x.device}"
            )

    def _windows(self, window: Integers | None, batch: int, geometry: Geometry) -> list[int]:
        if geometry.whole:
            if window is not None:
                raise ValueError(
                    f"window: expected None for a whole-image window, got {describe(window)}"
                )
            return [1] * batch
        return odd_windows(window, batch, max_window(geometry, *self.shape[1:]))


def fastest(bank: Tensor) -> str:
    """Return the implementation that ``auto`` selects, and log why a faster one is unavailable."""
    if bank.device.type != "cpu":
        reason = triton_unavailable(bank)
        if reason is None:
            return "triton"
        _log.warning("patch attention: no triton: %s", reason)
        return "torch"
    try:
        instruction_sets()
    except RuntimeError as error:
        _log.warning("patch attention: %s; torch is several times slower", error)
        return "torch"
    return "native"
