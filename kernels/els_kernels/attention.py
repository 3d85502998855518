"""The public operator: checks every argument once, then hands over to an implementation."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from els_kernels.geometry import Geometry, Posterior, max_window
from els_kernels.native import Native, instruction_sets
from els_kernels.reference import Reference
from els_kernels.tiled import Tiled
from els_kernels.triton import create as create_triton
from els_kernels.triton import unavailable as triton_unavailable

_log = logging.getLogger(__name__)


class Implementation(Protocol):
    """A bank prepared for queries. Arguments come checked; ``window`` 1 where ``whole``."""

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


IMPLEMENTATIONS: dict[str, Callable[[Tensor], Implementation]] = {
    "reference": Reference,
    "torch": Tiled,
    "native": Native,
    "triton": create_triton,
}


class PatchAttention:
    """Softmax attention from every patch of a query to the patches of a bank of images.

    For output pixel u with window Ω and sources S(u) (Kamb & Ganguli, ICML 2025, eq. 8-10)::

        ℓ(u; n, y) = -‖x[u+Ω] - a·φ_n[y+Ω]‖² / (2 s²)
        mean[u]    = Σ softmax(ℓ) φ_n[y]        log_evidence[u] = logsumexp(ℓ)

    Results are bitwise the same for an image alone and in any batch, in any order.
    """

    def __init__(self, bank: Tensor, *, implementation: str = "auto") -> None:
        """Prepare a bank.

        Args:
            bank: [N, C, H, W] float32, finite, N ≥ 1.
            implementation: a key of ``IMPLEMENTATIONS``, or ``auto``, which logs its choice.

        Raises:
            ValueError: bank or implementation is not as above; says expected and got.
            RuntimeError: ``native`` or ``triton`` was asked for and cannot be had; says why.
        """
        if bank.ndim != 4 or bank.dtype != torch.float32 or 0 in bank.shape:
            raise ValueError(
                "bank: expected float32 [N, C, H, W], none of them 0, "
                f"got {bank.dtype} {list(bank.shape)}"
            )
        _check_finite("bank", bank)
        if implementation == "auto":
            implementation = fastest(bank)
            _log.info("patch attention: auto chose %s for device %s", implementation, bank.device)
        if implementation not in IMPLEMENTATIONS:
            known = ", ".join(IMPLEMENTATIONS)
            raise ValueError(f"implementation: expected one of {known}, got {implementation!r}")
        self.implementation = implementation
        self.images = len(bank)
        self.shape = (bank.shape[1], bank.shape[2], bank.shape[3])
        self.device = bank.device
        self._attend = IMPLEMENTATIONS[implementation](bank)

    def __call__(
        self,
        x: Tensor,
        *,
        a: Tensor,
        s: Tensor,
        window: Tensor | None = None,
        ranges: Tensor | None = None,
        geometry: Geometry,
    ) -> Posterior:
        """Return posterior mean and log evidence of every pixel.

        Args:
            x: noisy images [B, C, H, W] float32, finite, on the bank's device, ``x = a·x0 + s·ε``.
            a: signal scale of each image [B], > 0.
            s: noise scale of each image [B], > 0.
            window: odd side of each image's patch [B] integers; None where ``geometry.whole``.
            ranges: images of the bank that may answer, [B, 2] integers ``lo, hi`` (half-open);
                None for all.
            geometry: window shape, sources and padding.

        Raises:
            ValueError: an argument is not as above; says which, expected and got.
        """
        self._check_query(x)
        batch = len(x)
        return self._attend(
            x,
            _positive("a", a, batch),
            _positive("s", s, batch),
            self._windows(window, batch, geometry),
            self._ranges(ranges, batch),
            geometry,
        )

    def _check_query(self, x: Tensor) -> None:
        if x.ndim != 4 or tuple(x.shape[1:]) != self.shape or len(x) == 0:
            raise ValueError(f"x: expected shape [B, {_join(self.shape)}], got {list(x.shape)}")
        if x.dtype != torch.float32 or x.device != self.device:
            raise ValueError(
                f"x: expected torch.float32 on {self.device}, got {x.dtype} on {x.device}"
            )
        _check_finite("x", x)

    def _windows(self, window: Tensor | None, batch: int, geometry: Geometry) -> list[int]:
        if geometry.whole:
            if window is not None:
                raise ValueError("window: expected None for a whole-image window, got a tensor")
            return [1] * batch
        if window is None or window.shape != (batch,) or window.is_floating_point():
            raise ValueError(f"window: expected integers [{batch}], got {_describe(window)}")
        largest = max_window(geometry, *self.shape[1:])
        for k in window.tolist():
            if k % 2 == 0 or not 1 <= k <= largest:
                raise ValueError(f"window: expected odd from 1 to {largest}, got {k}")
        return [int(k) for k in window.tolist()]

    def _ranges(self, ranges: Tensor | None, batch: int) -> list[tuple[int, int]]:
        if ranges is None:
            return [(0, self.images)] * batch
        if ranges.shape != (batch, 2) or ranges.is_floating_point():
            raise ValueError(f"ranges: expected integers [{batch}, 2], got {_describe(ranges)}")
        for lo, hi in ranges.tolist():
            if not 0 <= lo < hi <= self.images:
                raise ValueError(
                    f"ranges: expected 0 <= lo < hi <= {self.images}, got lo {lo}, hi {hi}"
                )
        return [(int(lo), int(hi)) for lo, hi in ranges.tolist()]


def fastest(bank: Tensor) -> str:
    """Return what ``auto`` takes for a bank, and log why it is not the fastest there could be."""
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


def _check_finite(name: str, images: Tensor) -> None:
    # NaN passes through both ends, and no mask as large as the images is made.
    for end in torch.stack(images.aminmax()).tolist():
        if not math.isfinite(end):
            raise ValueError(f"{name}: expected finite pixels, got {end}")


def _positive(name: str, scale: Tensor, batch: int) -> list[float]:
    if scale.shape != (batch,):
        raise ValueError(f"{name}: expected shape [{batch}], got {list(scale.shape)}")
    values = [float(value) for value in scale.tolist()]
    for value in values:
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: expected finite and > 0, got {value}")
    return values


def _describe(tensor: Tensor | None) -> str:
    return "None" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"


def _join(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))
