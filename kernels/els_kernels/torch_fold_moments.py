"""Second moments of the posterior of a fold in torch, float64."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from els_kernels.geometry import Geometry


class TiledFoldMoments:
    """A bank as groups of images of one size."""

    def __init__(self, groups: Sequence[Tensor]) -> None:
        self._groups = groups

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
        """Return the fields of ``PosteriorStatistics`` for one image."""
        raise NotImplementedError

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
        """Return D(x) and Jᵀg, [C, H, W] float32."""
        raise NotImplementedError

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
        """Return D(x) and J u, [C, H, W] float32."""
        raise NotImplementedError
