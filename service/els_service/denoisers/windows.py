"""The window as a function of the noise level: larger patches at higher noise."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from els_service.denoisers.levels import Floats, cosine

PUBLISHED = "fashion-mnist-resnet"
"""Name of ``default_windows`` in model.yaml and on command lines."""

_FMNIST_RESNET_ZEROS = (3, 3, 5, 5, 7, 7, 9, 9, 9, 11, 11, 11, 13, 13, 13, 15, 15, 15, 17, 17)
"""Published table of the paper; entry i (from 1) is that of t = i/20."""


@dataclass(frozen=True)
class WindowTable:
    """Odd windows ``k`` at increasing noise levels ``sigma`` = s/a.

    Interpolated linearly in log σ and rounded to the nearest odd number (ties up); constant beyond
    the ends.

    Raises:
        ValueError: The table is empty, ragged, not increasing, or a window is not odd.
    """

    sigma: tuple[float, ...]
    k: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.k or len(self.sigma) != len(self.k):
            raise ValueError(
                f"window: expected as many k as sigma, at least one, "
                f"got {len(self.k)} k and {len(self.sigma)} sigma"
            )
        if not all(0 < value < float("inf") for value in self.sigma) or not all(
            low < high for low, high in itertools.pairwise(self.sigma)
        ):
            raise ValueError(f"window.sigma: expected increasing, finite and > 0, got {self.sigma}")
        if not all(k > 0 and k % 2 == 1 for k in self.k):
            raise ValueError(f"window.k: expected odd numbers, got {self.k}")

    @classmethod
    def constant(cls, k: int) -> WindowTable:
        """Return the table with window ``k`` at every level."""
        return cls((1.0,), (k,))

    def clipped(self, largest: int) -> WindowTable:
        """Return the table with no window above ``largest`` (odd)."""
        return WindowTable(self.sigma, tuple(min(k, largest) for k in self.k))

    def at(self, sigma: Floats) -> npt.NDArray[np.int64]:
        """Return the window at each level, [B]."""
        k = np.interp(np.log(sigma), np.log(self.sigma), self.k)
        # A tolerance, so that rounding in log and exp does not change the window at an entry.
        return (np.floor((k + 1e-9) / 2) * 2 + 1).astype(np.int64)


def default_windows() -> WindowTable:
    """Return the paper's windows for a ResNet with zero padding on Fashion-MNIST."""
    steps = len(_FMNIST_RESNET_ZEROS)
    sigma = cosine(np.arange(1, steps + 1) / steps).sigma
    return WindowTable(tuple(sigma.tolist()), _FMNIST_RESNET_ZEROS)
