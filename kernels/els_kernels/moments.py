"""Second moments of the patch posterior: variance, entropy, sources, Jacobian products.

For a place with weights w over sources with patches φ and centres v, D = Σ w v, z = x/a, σ = s/a::

    variance  Σ w (v − D)²              (J u)      = 1/(aσ²) Σ w (v − D) ⟨φ, u⟩
    entropy  −Σ w log w                 (Jᵀ g)[q] += 1/(aσ²) Σ w ⟨g, v − D⟩ φ[q]

Two implementations. ``torch`` is float64 (``moment_queries``): a logit at s = 1e-4 is of size 1e8,
and a Jacobian divides by σ². ``native`` (``native/moments_binding``) has integer logits, and serves
the machines with windows on a CPU, but for queries far from the bank at low noise
(``native/far_queries``); ``triton`` serves them on a GPU, with the same exception. No pair is
stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from els_kernels import whole_moments
from els_kernels.arguments import Integers, Numbers, Ranges
from els_kernels.attention import Compiling, PatchAttention
from els_kernels.blocked_moments import BlockedQuery, Level, MomentPass, block_answers
from els_kernels.blocks import Blocks
from els_kernels.displacements import sweep_steps
from els_kernels.geometry import Geometry
from els_kernels.native import Native, NativeMoments, PartedNative
from els_kernels.native.moments_binding import NativeQuery
from els_kernels.posterior_statistics import MAX_SOURCES, PosteriorStatistics, Removal
from els_kernels.triton import create_moments

if TYPE_CHECKING:
    from els_kernels.triton.moments import TritonMoments, TritonQuery


class PatchMoments:
    """Moments of the posterior of a ``PatchAttention``.

    Results are batch invariant, for one number of torch's threads (torch) or any (native), as
    images are computed one by one. Work for a batch needs less than 64 MiB beside the bank.

    Args:
        attention: operator of the same bank; checks the queries.
        bank: [N, C, H, W] on the operator's device; float32, or uint8 v for v/127.5 − 1, which is
            decoded tile by tile.
        implementation: ``torch``, exact; ``native``, which shares the bank of a native operator, or
            ``triton``, beside an operator in Triton: both leave whole windows and removals to
            torch; ``auto``: that of the operator if it is one of them, or else torch.

    Raises:
        ValueError: The bank has another shape than the operator's, or another dtype; or the
            implementation is unknown, or not that of the operator.
    """

    def __init__(
        self,
        attention: PatchAttention,
        bank: Tensor,
        *,
        implementation: str = "auto",
    ) -> None:
        expected = (attention.images, *attention.shape)
        if tuple(bank.shape) != expected or bank.dtype not in (torch.uint8, torch.float32):
            raise ValueError(
                f"bank: expected uint8 or float32 {list(expected)}, "
                f"got {bank.dtype} {list(bank.shape)}"
            )
        if implementation not in ("auto", "torch", "native", "triton"):
            raise ValueError(
                f"implementation: expected auto, torch, native or triton, got {implementation!r}"
            )
        prepared = attention.prepared
        own = "native" if isinstance(prepared, Native) else attention.implementation
        if implementation in ("native", "triton") and implementation != own:
            raise ValueError(
                f"implementation: {implementation} needs a {implementation} operator, got {own}"
            )
        self._attention, self._bank = attention, bank
        self._blocks = Blocks.whole(attention.images)
        parted = attention.prepared
        self._passes = parted.passes if isinstance(parted, PartedNative) else self._own_passes
        self._fast: NativeMoments | TritonMoments | None = None
        if implementation != "torch" and isinstance(prepared, Native):
            self._fast = NativeMoments(prepared)
        elif implementation != "torch" and own == "triton":
            self._fast = create_moments(bank)

    def implementation(self, geometry: Geometry) -> str:
        """Return the implementation for a geometry, but of ``without``: native, triton or torch."""
        if self._fast is None or geometry.whole:
            return "torch"
        return "native" if isinstance(self._fast, NativeMoments) else "triton"

    def warm_up(self, windows: Iterable[int], geometry: Geometry) -> None:
        """Compile what queries with these windows take, if the implementation compiles at all."""
        if isinstance(self._fast, Compiling) and not geometry.whole:
            with self._exact():
                self._fast.warm_up(windows, geometry)

    def vjp(
        self,
        x: Tensor,
        cotangent: Tensor,
        *,
        a: Numbers,
        s: Numbers,
        window: Integers | None = None,
        ranges: Ranges | None = None,
        geometry: Geometry,
        evidence: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return D(x) and Jᵀg with J = ∂D/∂x, both [B, C, H, W] float32.

        Args:
            x: noisy images [B, C, H, W] float32, as of ``PatchAttention``.
            cotangent: g, [B, C, H, W] float32, finite.
            a: signal scale of each image [B]; a tensor or a list, as of ``PatchAttention``.
            s: noise scale of each image [B].
            window: odd side of each image's patch [B]; None where ``geometry.whole``.
            ranges: half-open ranges of bank images, [B, 2]; None for all.
            geometry: window shape, sources and padding.
            evidence: of the same arguments, from ``evidence``: spares the first of two passes and
                changes no bit. That of others gives finite or infinite numbers without meaning.

        Raises:
            ValueError: An argument is invalid; names it, expected and got.
            ComputationStoppedError: The current ``Control`` was stopped.
        """
        with self._exact():
            queries = self._queries(x, a, s, window, ranges, geometry, evidence)
            directions = self._directions("cotangent", cotangent, x)
            return _stacked([q.vjp(g) for q, g in zip(queries, directions, strict=True)])

    def jvp(
        self,
        x: Tensor,
        tangent: Tensor,
        *,
        a: Numbers,
        s: Numbers,
        window: Integers | None = None,
        ranges: Ranges | None = None,
        geometry: Geometry,
        evidence: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return D(x) and J u with J = ∂D/∂x, both [B, C, H, W] float32.

        Args:
            x: noisy images [B, C, H, W] float32, as of ``PatchAttention``.
            tangent: u, [B, C, H, W] float32, finite.
            a: signal scale of each image [B]; a tensor or a list, as of ``PatchAttention``.
            s: noise scale of each image [B].
            window: odd side of each image's patch [B]; None where ``geometry.whole``.
            ranges: half-open ranges of bank images, [B, 2]; None for all.
            geometry: window shape, sources and padding.
            evidence: as of ``vjp``.

        Raises:
            ValueError, ComputationStoppedError: As ``vjp``.
        """
        with self._exact():
            queries = self._queries(x, a, s, window, ranges, geometry, evidence)
            directions = self._directions("tangent", tangent, x)
            return _stacked([q.jvp(u) for q, u in zip(queries, directions, strict=True)])

    def evidence_channels(self, geometry: Geometry) -> int:
        """Return the number K of float64 numbers that ``evidence`` has for each pixel."""
        is_fast = self._fast is not None and not geometry.whole
        return self._bank.shape[1] + (2 if is_fast else 1)

    def evidence(
        self,
        x: Tensor,
        *,
        a: Numbers,
        s: Numbers,
        window: Integers | None = None,
        ranges: Ranges | None = None,
        geometry: Geometry,
    ) -> Tensor:
        """Return the result of the first pass of ``vjp`` and ``jvp``: [B, K, H, W] float64.

        Args:
            x: noisy images [B, C, H, W] float32, as of ``PatchAttention``.
            a: signal scale of each image [B]; a tensor or a list, as of ``PatchAttention``.
            s: noise scale of each image [B].
            window: odd side of each image's patch [B]; None where ``geometry.whole``.
            ranges: half-open ranges of bank images, [B, 2]; None for all.
            geometry: window shape, sources and padding.

        Raises:
            ValueError, ComputationStoppedError: As ``vjp``.
        """
        with self._exact():
            queries = self._queries(x, a, s, window, ranges, geometry)
            return torch.stack([query.evidence() for query in queries])

    def statistics(
        self,
        x: Tensor,
        *,
        a: Numbers,
        s: Numbers,
        window: Integers | None = None,
        ranges: Ranges | None = None,
        geometry: Geometry,
        top: int = 8,
        shares: bool = True,
    ) -> PosteriorStatistics:
        """Return the statistics of every pixel.

        Args:
            x: noisy images [B, C, H, W] float32, as of ``PatchAttention``.
            a: signal scale of each image [B]; a tensor or a list, as of ``PatchAttention``.
            s: noise scale of each image [B].
            window: odd side of each image's patch [B]; None where ``geometry.whole``.
            ranges: half-open ranges of bank images, [B, 2]; None for all.
            geometry: window shape, sources and padding.
            top: number m of sources of a pixel, 1 to ``MAX_SOURCES``.
            shares: whether to compute the shares of bank images, for which the native form takes
                another pass.

        Raises:
            ValueError, ComputationStoppedError: As ``vjp``.
        """
        if not 1 <= top <= MAX_SOURCES:
            raise ValueError(f"top: expected 1 to {MAX_SOURCES}, got {top}")
        with self._exact():
            queries = self._queries(x, a, s, window, ranges, geometry)
            parts = (query.statistics(top, len(self._bank), shares) for query in queries)
            return PosteriorStatistics(*gathered(parts, len(queries)))

    def without(
        self,
        x: Tensor,
        image: int,
        *,
        a: Numbers,
        s: Numbers,
        window: Integers | None = None,
        ranges: Ranges | None = None,
        geometry: Geometry,
    ) -> Removal:
        """Return D(x) of the bank without one image: ``(D − w_i v_i) / (1 − w_i)``, exactly.

        Where 1 − w_i is small, the mean of the others is computed from themselves.

        Args:
            x: noisy images [B, C, H, W] float32, as of ``PatchAttention``.
            image: index in the bank; outside a query's range it changes nothing.
            a: signal scale of each image [B]; a tensor or a list, as of ``PatchAttention``.
            s: noise scale of each image [B].
            window: odd side of each image's patch [B]; None where ``geometry.whole``.
            ranges: half-open ranges of bank images, [B, 2]; None for all.
            geometry: window shape, sources and padding.

        Raises:
            ValueError: As ``vjp``, or the image is the only one of a range.
            ComputationStoppedError: As ``vjp``.
        """
        if not 0 <= image < len(self._bank):
            raise ValueError(f"image: expected 0 to {len(self._bank) - 1}, got {image}")
        with self._exact():
            queries = self._torch_queries(x, a, s, window, ranges, geometry)
            return Removal(*_stacked([query.without(image) for query in queries]))

    def steps(self, images: int, window: int, geometry: Geometry) -> int:
        """Return the number of steps of one pass over bank images: a fixed cost each.

        Args:
            images: of the bank, in the query's range.
            window: odd side of the patch; 1 where ``geometry.whole``.
            geometry: window shape, sources and padding.
        """
        if geometry.whole:
            return whole_moments.sweep_steps(images, self._attention.shape, self._bank.device)
        return sweep_steps(images, self._attention.shape, window, geometry)

    @contextmanager
    def _exact(self) -> Iterator[None]:
        """Compute in float64 and without gradients, whatever the caller's modes."""
        with torch.no_grad(), torch.autocast(self._bank.device.type, enabled=False):
            yield

    def _queries(
        self,
        x: Tensor,
        a: Numbers,
        s: Numbers,
        window: Integers | None,
        ranges: Ranges | None,
        geometry: Geometry,
        evidence: Tensor | None = None,
    ) -> list[BlockedQuery | NativeQuery | TritonQuery]:
        """Return the queries of a batch, of the implementation of their geometry."""
        queries: list[BlockedQuery | NativeQuery | TritonQuery] = []
        fast = self._fast
        if fast is None or geometry.whole:
            queries += self._torch_queries(x, a, s, window, ranges, geometry)
        else:
            images, scales, noises, windows, limits, geometry = self._attention.validate(
                x, a=a, s=s, window=window, ranges=ranges, geometry=geometry
            )
            for image, scale, noise, side, ends in zip(
                images, scales, noises, windows, limits, strict=True
            ):
                found = fast.query(image, scale, noise, side, ends, geometry)
                if found.is_unresolved:
                    level = Level(image, scale, noise, side, geometry)
                    queries.append(self._blocked(level, ends, padded=True))
                else:
                    queries.append(found)
        if evidence is not None:
            self._check_evidence(evidence, x, geometry)
            for query, known in zip(queries, evidence, strict=True):
                query.known = known
        return queries

    def _torch_queries(
        self,
        x: Tensor,
        a: Numbers,
        s: Numbers,
        window: Integers | None,
        ranges: Ranges | None,
        geometry: Geometry,
    ) -> list[BlockedQuery]:
        images, scales, noises, windows, limits, geometry = self._attention.validate(
            x, a=a, s=s, window=window, ranges=ranges, geometry=geometry
        )
        return [
            self._blocked(Level(image, scale, noise, side, geometry), limits)
            for image, scale, noise, side, limits in zip(
                images, scales, noises, windows, limits, strict=True
            )
        ]

    def _blocked(
        self, level: Level, limits: tuple[int, int], *, padded: bool = False
    ) -> BlockedQuery:
        return BlockedQuery(level, limits, self._passes, self._blocks, padded=padded)

    def _own_passes(self, level: Level, each: MomentPass) -> list[tuple[Tensor, ...]]:
        return block_answers(lambda lo, hi: self._bank[lo:hi], self._blocks, level, each)

    def _check_evidence(self, evidence: Tensor, x: Tensor, geometry: Geometry) -> None:
        expected = [len(x), self.evidence_channels(geometry), *x.shape[2:]]
        if list(evidence.shape) != expected or evidence.dtype != torch.float64:
            got = f"{evidence.dtype} {list(evidence.shape)}"
            raise ValueError(f"evidence: expected torch.float64 {expected}, got {got}")
        if not evidence.isfinite().all():
            raise ValueError("evidence: expected finite numbers, got others")

    def _directions(self, name: str, direction: Tensor, x: Tensor) -> Tensor:
        check_direction(name, direction, x)
        return direction.double()


def check_direction(name: str, direction: Tensor, x: Tensor) -> None:
    """Raise ValueError unless a direction is finite float32 of the shape and device of x."""
    if not isinstance(direction, Tensor) or direction.shape != x.shape:
        got = list(direction.shape) if isinstance(direction, Tensor) else type(direction)
        raise ValueError(f"{name}: expected the shape of x, {list(x.shape)}, got {got}")
    if direction.dtype != torch.float32 or direction.device != x.device:
        raise ValueError(
            f"{name}: expected torch.float32 on {x.device}, "
            f"got {direction.dtype} on {direction.device}"
        )
    if not direction.isfinite().all():
        raise ValueError(f"{name}: expected finite numbers, got others")


def gathered(parts: Iterable[Sequence[Tensor]], count: int) -> list[Tensor]:
    """Return the results of images as batches; beside these the results of one are held at a time.

    Args:
        parts: results of each image, computed as they are taken.
        count: of images, at least 1.
    """
    batches: list[Tensor] = []
    for index, part in enumerate(parts):
        if count == 1:
            return [each[None] for each in part]
        batches = batches or [each.new_empty(count, *each.shape) for each in part]
        for batch, each in zip(batches, part, strict=True):
            batch[index] = each
    return batches


def _stacked(answers: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    means, products = zip(*answers, strict=True)
    return torch.stack(means).float(), torch.stack(products).float()
