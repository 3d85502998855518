"""Patch attention with a fold: whole mean patches overlap, and queries may have any size.

attention = FoldedAttention(bank)         # [N, C, H, W], or images of different sizes
posterior = attention(x, a=a, s=s, window=k, fold=rho, geometry=FOLD_GEOMETRIES["els", "inside"])

With the posterior weights w of each query patch q over patches y of the bank::

    mean patch   ŷ_q  = Σ_y w_q(y)·y
    mean[p]           = Σ_q g(p-q)·ŷ_q(p-q) / Σ_q g(p-q)          q: all patches that reach p
    g(u, v)           = e^(-(u² + v²) / 2ρ²)                      u, v from -1 to 1 over the patch

ρ → 0 is the centre of each mean patch (ELS, local), ρ = ∞ the plain mean of all overlapping patches
(patch posterior composites: Niedoba et al. 2025, eq. 9-11).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Protocol, Unpack

import torch
from torch import Tensor

from els_kernels.arguments import Integers, Numbers, Ranges
from els_kernels.attention import Compiling, PatchAttention
from els_kernels.fold_arguments import BankLimits, FoldArguments, bank_groups, bank_limits, folds
from els_kernels.fold_plan import FoldQuery
from els_kernels.geometry import GEOMETRIES, Geometry, Posterior
from els_kernels.moments import gathered
from els_kernels.native import NativeFold, PartedFoldImages, instruction_sets
from els_kernels.posterior_statistics import Removal
from els_kernels.reference_fold import FoldReference
from els_kernels.torch_fold import TiledFold, decoded
from els_kernels.triton import create_fold as create_triton_fold
from els_kernels.triton import unavailable as triton_unavailable

_log = logging.getLogger(__name__)

FOLD_GEOMETRIES: dict[tuple[str, str], Geometry] = {
    **{name: geometry for name, geometry in GEOMETRIES.items() if not geometry.whole},
    ("local", "inside"): Geometry("same", "inside"),
    ("els", "inside"): Geometry("every", "inside"),
}
"""(machine, padding) → geometry of the machines that have a fold."""


class FoldImplementation(Protocol):
    """A bank prepared for queries."""

    def __call__(self, query: FoldQuery) -> tuple[Tensor, Tensor]:
        """Return mean [C, H, W] and log evidence [H, W], float32."""
        ...

    def without(self, query: FoldQuery, image: int) -> tuple[Tensor, Tensor]:
        """Return the mean [C, H, W] without a bank image, and its weight [H, W], float32.

        Args:
            query: whose range has the image and others.
            image: index in the bank.
        """
        ...


FOLD_IMPLEMENTATIONS: dict[str, Callable[[Sequence[Tensor]], FoldImplementation]] = {
    "reference": FoldReference,
    "torch": TiledFold,
    "native": NativeFold,
    "triton": create_triton_fold,
}


class FoldedAttention:
    """Patch attention whose answer is the overlap of whole mean patches.

    An image with ρ = 0 whose size and padding ``PatchAttention`` answers has the bits that it has
    there. Results are batch invariant, as images are computed one by one. They carry no gradient,
    and do not depend on autocast or the default device.
    """

    @torch.no_grad()
    def __init__(self, bank: Tensor | Sequence[Tensor], *, implementation: str = "auto") -> None:
        """Prepare a bank.

        Args:
            bank: [N, C, H, W], N ≥ 1; or, for several sizes, a sequence of images [C, H, W] or
                groups [N, C, H, W] of equal C, so that none needs padding. Finite float32, or uint8
                v for v/127.5 − 1. It is kept as it is: a tensor and groups are not copied, and must
                not be changed.
            implementation: a key of ``FOLD_IMPLEMENTATIONS``, or ``auto``, which logs its choice.

        Raises:
            ValueError: the bank or the implementation is invalid; names expected and got.
            RuntimeError: ``native`` or ``triton`` is requested but not available; gives the reason.
        """
        self._groups = bank_groups(bank)
        self._limits = bank_limits(self._groups)
        self.device = self._limits.device
        if implementation == "auto":
            implementation = fastest_fold(self.device)
            _log.info("fold: auto chose %s for device %s", implementation, self.device)
        if implementation not in FOLD_IMPLEMENTATIONS:
            known = ", ".join(FOLD_IMPLEMENTATIONS)
            raise ValueError(f"implementation: expected one of {known}, got {implementation!r}")
        self.implementation = implementation
        with torch.autocast(self.device.type, enabled=False):
            self._attend = FOLD_IMPLEMENTATIONS[implementation](self._groups)

    @classmethod
    def of_parts(cls, images: PartedFoldImages, largest: float) -> FoldedAttention:
        """Return the operator of a bank whose blocks are in other processes.

        Queries of the bank's size with ρ = 0 are computed as others are.

        Args:
            images: in the processes.
            largest: a bound of |pixel| of the bank.
        """
        fold = cls.__new__(cls)
        channels, height, width = images.shape
        sizes = frozenset([(height, width)])
        fold.device = torch.device("cpu")
        fold._limits = BankLimits(images.count, channels, sizes, largest, fold.device)
        fold._groups, fold.implementation = [], "native"
        fold._attend = NativeFold(images)
        return fold

    @property
    def prepared(self) -> FoldImplementation:
        """The bank, prepared by the implementation."""
        return self._attend

    @property
    def groups(self) -> list[Tensor]:
        """Images of the bank in order, those of one size in a row together: [[N, C, H, W], …].

        None for a bank in other processes.
        """
        return self._groups

    @torch.no_grad()
    def warm_up(self, windows: Iterable[int], geometry: Geometry) -> None:
        """Compile what folds with these windows take, if the implementation compiles at all."""
        if isinstance(self._attend, Compiling):
            with torch.autocast(self.device.type, enabled=False):
                self._attend.warm_up(windows, geometry)

    @cached_property
    def _centre_alone(self) -> PatchAttention:
        """The operator for ρ = 0; prepared when first needed, as it keeps a copy of the bank."""
        (bank,) = self._groups
        return PatchAttention(decoded(bank), implementation=self.implementation)

    @torch.no_grad()
    def __call__(self, x: Tensor, **arguments: Unpack[FoldArguments]) -> Posterior:
        """Return posterior mean and log evidence of every pixel.

        Args:
            x: noisy images [B, C, H, W] float32, finite, on the bank's device, ``x = a·x0 + s·ε``.
                H and W are those of the bank's images where sources are the *same* place, else any.
            **arguments: of each image.

        Returns:
            The log evidence of a pixel is that of the patch centred at it; with padding ``inside``
            border pixels have that of the nearest patch.

        Raises:
            ValueError: an argument is invalid; names it, expected and got.
            ComputationStoppedError: the current ``Control`` was stopped (CPU only).
        """
        queries = self.validate(x, **arguments)
        x, geometry = x.resolve_neg(), arguments["geometry"]
        answer = Posterior(torch.empty_like(x), x.new_empty(len(x), *x.shape[2:]))
        same_size = self._limits.sizes == {(x.shape[2], x.shape[3])}
        plain = same_size and geometry.padding != "inside" and len(self._groups) == 1
        alone = [b for b, query in enumerate(queries) if plain and query.fold == 0]
        if alone:
            answer.mean[alone], answer.log_evidence[alone] = self._centre_alone(
                x[alone],
                a=[queries[b].a for b in alone],
                s=[queries[b].s for b in alone],
                window=[queries[b].window for b in alone],
                ranges=[queries[b].limits for b in alone],
                geometry=geometry,
            )
        with torch.autocast(self.device.type, enabled=False):
            for b in sorted(set(range(len(x))) - set(alone)):
                answer.mean[b], answer.log_evidence[b] = self._attend(queries[b])
        return answer

    @torch.no_grad()
    def without(self, x: Tensor, image: int, **arguments: Unpack[FoldArguments]) -> Removal:
        """Return D(x) of the bank without one image, exactly.

        The image is removed from the posterior of each patch, before the fold::

            w'_q(y) = w_q(y) / (1 − W_q)     W_q = Σ_{y of the image} w_q(y)

        with 1 − W_q computed from the others themselves, so that nothing cancels where W_q is
        nearly 1. The weight of a pixel is the fold of W_q.

        Args:
            x: noisy images [B, C, H, W] float32, as of a call.
            image: index in the bank; outside a query's range it changes nothing.
            **arguments: of each image.

        Raises:
            ValueError: As a call, or the image is the only one of a range.
            ComputationStoppedError: As a call.
        """
        if not 0 <= image < self._limits.images:
            raise ValueError(f"image: expected 0 to {self._limits.images - 1}, got {image}")
        queries = self.validate(x, **arguments)
        for lo, hi in {query.limits for query in queries}:
            if (lo, hi) == (image, image + 1):
                raise ValueError("ranges: expected two images or more, one of which stays, got 1")
        with torch.autocast(self.device.type, enabled=False):
            parts = (self._without(query, image) for query in queries)
            return Removal(*gathered(parts, len(queries)))

    def _without(self, query: FoldQuery, image: int) -> tuple[Tensor, Tensor]:
        lo, hi = query.limits
        if lo <= image < hi:
            return self._attend.without(query, image)
        mean, _ = self._attend(query)
        return mean, torch.zeros_like(mean[0])

    @torch.no_grad()
    def validate(
        self,
        x: Tensor,
        *,
        a: Numbers,
        s: Numbers,
        window: Integers,
        fold: Numbers,
        ranges: Ranges | None = None,
        geometry: Geometry,
    ) -> list[FoldQuery]:
        """Return the validated arguments of each image; see ``FoldArguments``.

        Raises:
            ValueError: An argument is invalid; names it, expected and got.
        """
        if geometry not in FOLD_GEOMETRIES.values():
            raise ValueError(f"geometry: expected one of FOLD_GEOMETRIES, got {geometry!r}")
        self._limits.check_query(x, geometry)
        x = x.resolve_neg()
        levels = self._limits.levels(x, a, s)
        windows = self._limits.windows(window, x, geometry)
        limits = self._limits.ranges(ranges, len(x))
        rho = folds(fold, len(x))
        return [
            FoldQuery(x[b], *levels[b], windows[b], limits[b], rho[b], geometry)
            for b in range(len(x))
        ]


def fastest_fold(device: torch.device) -> str:
    """Return the implementation that ``auto`` selects, and log why a faster one is unavailable."""
    if device.type != "cpu":
        reason = triton_unavailable(torch.empty(0, device=device))
        if reason is None:
            return "triton"
        _log.warning("fold: no triton: %s", reason)
        return "torch"
    try:
        instruction_sets()
    except RuntimeError as error:
        _log.warning("fold: %s; torch is several times slower", error)
        return "torch"
    return "native"
