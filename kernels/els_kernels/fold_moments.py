"""Second moments of the posterior of a fold: variance, entropy, sources, Jacobian products.

The answer of a fold is a mean over pixels of the bank, each of which several patches may contribute
to. With the weights w_q of the patches q that reach a pixel p, g of ``fold``::

    π_p(y) = Σ_q g(p-q)·w_q(y-p+q) / Σ_q g(p-q)        y: pixel of a bank image
    mean     Σ_y π_p(y)·v(y)                           variance, entropy, sources: those of π_p

    J u    = fold of the mean patches under ẇ_q = w_q (t_q - Σ w_q t_q),   t_q(y) = a/s² ⟨u_q, y⟩
    Jᵀg    = a/s² Σ_q Σ_y w_q (c_q - Σ w_q c_q)·y,     c_q(y) = Σ_p g(p-q)/Σg(p-·) ⟨g(p), y(p-q)⟩

A pair of p and y is counted once, however many patches, wrapped or clipped, contribute to it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, Unpack

import torch
from torch import Tensor

from els_kernels.attention import Compiling
from els_kernels.fold import FoldedAttention
from els_kernels.fold_arguments import FoldArguments
from els_kernels.fold_plan import FoldQuery
from els_kernels.geometry import Geometry
from els_kernels.moments import check_direction, gathered
from els_kernels.native import FoldSourceImages, NativeFold, NativeFoldMoments
from els_kernels.posterior_statistics import MAX_SOURCES, PosteriorStatistics, Removal
from els_kernels.torch_fold_moments import TiledFoldMoments
from els_kernels.triton import create_fold_moments

_log = logging.getLogger(__name__)


class FoldMomentImplementation(Protocol):
    """A bank prepared for moments.

    Places of sources are rows and columns of the bank's images as they were given; images are
    numbered through all groups, from 0, whatever the range of a query.
    """

    def statistics(self, query: FoldQuery, top: int, shares: bool) -> tuple[Tensor, ...]:
        """Return the fields of ``PosteriorStatistics`` for one image.

        mean [C, H, W], variance [C, H, W], entropy [H, W] float32, sources [H, W, top, 3] int64,
        weights [H, W, top] float32, shares [N] float64, or [0] unless ``shares``.
        """
        ...

    def vjp(self, query: FoldQuery, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        """Return D(x) and Jᵀg of g [C, H, W], [C, H, W] float32."""
        ...

    def jvp(self, query: FoldQuery, tangent: Tensor) -> tuple[Tensor, Tensor]:
        """Return D(x) and J u of u [C, H, W], [C, H, W] float32."""
        ...


FOLD_MOMENT_IMPLEMENTATIONS: dict[str, Callable[[Any], FoldMomentImplementation]] = {
    "torch": TiledFoldMoments,
    "native": NativeFoldMoments,
    "triton": create_fold_moments,
}


class FoldedMoments:
    """Moments of the posterior of a ``FoldedAttention``.

    Results are batch invariant, as images are computed one by one. They carry no gradient, and do
    not depend on autocast or the default device.

    Args:
        attention: operator of the same bank; checks the queries.
        implementation: a key of ``FOLD_MOMENT_IMPLEMENTATIONS``; ``auto``: that of the operator, if
            it is one of them, or else ``torch``, which is exact.

    Raises:
        ValueError: The implementation is unknown.
        RuntimeError: ``native`` or ``triton`` is requested but not available; gives the reason.
    """

    @torch.no_grad()
    def __init__(self, attention: FoldedAttention, *, implementation: str = "auto") -> None:
        if implementation == "auto":
            own = attention.implementation
            implementation = own if own in FOLD_MOMENT_IMPLEMENTATIONS else "torch"
            _log.info("fold moments: auto chose %s", implementation)
        if implementation not in FOLD_MOMENT_IMPLEMENTATIONS:
            known = ", ".join(FOLD_MOMENT_IMPLEMENTATIONS)
            raise ValueError(
                f"implementation: expected auto or one of {known}, got {implementation!r}"
            )
        self.attention, self.implementation = attention, implementation
        with torch.autocast(attention.device.type, enabled=False):
            bank: Sequence[Tensor] | FoldSourceImages = attention.groups
            if implementation == "native" and isinstance(attention.prepared, NativeFold):
                # Both share what they have found out about a bank.
                bank = attention.prepared.images
            self._moments = FOLD_MOMENT_IMPLEMENTATIONS[implementation](bank)

    @torch.no_grad()
    def warm_up(self, windows: Iterable[int], geometry: Geometry) -> None:
        """Compile what moments with these windows take, if the implementation compiles at all."""
        if isinstance(self._moments, Compiling):
            with torch.autocast(self.attention.device.type, enabled=False):
                self._moments.warm_up(windows, geometry)

    def statistics(
        self, x: Tensor, *, top: int = 8, shares: bool = True, **arguments: Unpack[FoldArguments]
    ) -> PosteriorStatistics:
        """Return the statistics of every pixel; its sources are pixels of the bank.

        Args:
            x: noisy images [B, C, H, W] float32, as of ``FoldedAttention``.
            top: number m of sources of a pixel, 1 to ``MAX_SOURCES``.
            shares: whether to compute the shares of bank images.
            **arguments: of each image.

        Raises:
            ValueError: An argument is invalid; names it, expected and got.
            ComputationStoppedError: The current ``Control`` was stopped.
        """
        if not 1 <= top <= MAX_SOURCES:
            raise ValueError(f"top: expected 1 to {MAX_SOURCES}, got {top}")
        queries = self.attention.validate(x, **arguments)
        with torch.no_grad(), torch.autocast(self.attention.device.type, enabled=False):
            parts = (self._moments.statistics(query, top, shares) for query in queries)
            return PosteriorStatistics(*gathered(parts, len(queries)))

    def vjp(
        self, x: Tensor, cotangent: Tensor, **arguments: Unpack[FoldArguments]
    ) -> tuple[Tensor, Tensor]:
        """Return D(x) and Jᵀg with J = ∂D/∂x, both [B, C, H, W] float32.

        Args:
            x: noisy images [B, C, H, W] float32, as of ``FoldedAttention``.
            cotangent: g, [B, C, H, W] float32, finite.
            **arguments: of each image.

        Raises:
            ValueError, ComputationStoppedError: As ``statistics``.
        """
        queries = self.attention.validate(x, **arguments)
        check_direction("cotangent", cotangent, x)
        return self._products(self._moments.vjp, queries, cotangent)

    def jvp(
        self, x: Tensor, tangent: Tensor, **arguments: Unpack[FoldArguments]
    ) -> tuple[Tensor, Tensor]:
        """Return D(x) and J u with J = ∂D/∂x, both [B, C, H, W] float32.

        Args:
            x: noisy images [B, C, H, W] float32, as of ``FoldedAttention``.
            tangent: u, [B, C, H, W] float32, finite.
            **arguments: of each image.

        Raises:
            ValueError, ComputationStoppedError: As ``statistics``.
        """
        queries = self.attention.validate(x, **arguments)
        check_direction("tangent", tangent, x)
        return self._products(self._moments.jvp, queries, tangent)

    def without(self, x: Tensor, image: int, **arguments: Unpack[FoldArguments]) -> Removal:
        """Return D(x) of the bank without one image: ``FoldedAttention.without``."""
        return self.attention.without(x, image, **arguments)

    def _products(
        self,
        multiply: Callable[[FoldQuery, Tensor], tuple[Tensor, Tensor]],
        queries: Sequence[FoldQuery],
        directions: Tensor,
    ) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), torch.autocast(self.attention.device.type, enabled=False):
            answers = map(multiply, queries, directions.resolve_neg())
            mean, product = gathered(answers, len(queries))
            return mean, product
