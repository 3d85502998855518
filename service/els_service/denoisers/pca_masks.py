"""Masks of PCA-locality: which coordinates of an image a coordinate is answered from.

Lukoianov et al., "Locality in image diffusion models emerges from data statistics", 2025: the
coordinates that matter to a coordinate of the Wiener filter of the bank at the same noise level.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from els_service.denoisers.levels import Floats
from els_service.denoisers.spectra import Spectrum

Rule = Literal["correlation", "released"]
RULES: tuple[Rule, ...] = ("correlation", "released")
LEAST_VARIANCE = 1e-4
"""Share of the mean variance below which a coordinate joins no mask."""
DEFAULT_THRESHOLD = 0.1
"""τ of ``correlation``, at every level, unless it is calibrated."""
_BLOCK = 512
"""Rows of W that are multiplied at once; the other half follows by symmetry."""


@dataclass(frozen=True)
class ThresholdTable:
    """Thresholds ``tau`` at increasing noise levels ``sigma`` = s/a.

    Interpolated linearly in log σ and log τ; constant beyond the ends.

    Raises:
        ValueError: The table is empty, ragged or not increasing, or a threshold is not in (0, 1].
    """

    sigma: tuple[float, ...]
    tau: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.tau or len(self.sigma) != len(self.tau):
            raise ValueError(
                f"threshold: expected as many tau as sigma, at least one, "
                f"got {len(self.tau)} tau and {len(self.sigma)} sigma"
            )
        if not all(0 < value < float("inf") for value in self.sigma) or not all(
            low < high for low, high in itertools.pairwise(self.sigma)
        ):
            expected = "expected increasing, finite and > 0"
            raise ValueError(f"threshold.sigma: {expected}, got {self.sigma}")
        for tau in self.tau:
            if not 0 < tau <= 1:
                raise ValueError(f"threshold.tau: expected above 0, at most 1, got {tau}")

    @classmethod
    def constant(cls, tau: float) -> ThresholdTable:
        """Return the table with threshold ``tau`` at every level."""
        return cls((1.0,), (tau,))

    def at(self, sigma: Floats) -> Floats:
        """Return the threshold at each level, [B]."""
        log_tau = np.interp(np.log(sigma), np.log(self.sigma), np.log(self.tau))
        # Rounding of exp and log must not move an entry, nor exceed 1.
        found: Floats = np.minimum(np.round(np.exp(log_tau), 12), 1)
        return found


def wiener_matrix(spectrum: Spectrum, sigma: float) -> Tensor:
    """Return W = U diag(λ / (λ + σ²)) Uᵀ, [D, D] float64, symmetric to the bit."""
    gain = spectrum.values / (spectrum.values + sigma**2)
    rows = spectrum.vectors * gain.sqrt()
    size = len(rows)
    lower = rows.new_zeros(size, size)
    for first in range(0, size, _BLOCK):
        last = min(first + _BLOCK, size)
        lower[first:last, :last] = rows[first:last] @ rows[:last].T
    return lower.tril() + lower.tril(-1).T


def mask_of(spectrum: Spectrum, sigma: float, tau: float, rule: Rule) -> Tensor:
    """Return the mask M, [D, D] bool: column m has the coordinates that m is answered from.

    ``correlation``: |W[n, m]| ≥ τ √(W[n, n] W[m, m]), bounded and symmetric, as W is positive
    semidefinite. ``released``: |R[n, m]| ≥ τ max |R| with R[n, m] = W[n, m] / W[n, n], as in the
    code of the paper. Rows and columns of coordinates with less than ``LEAST_VARIANCE`` of the
    mean variance are False, and do not count in max |R|.

    Args:
        spectrum: of the bank's images.
        sigma: noise level σ = s/a.
        tau: τ in (0, 1].
        rule: one of ``RULES``.
    """
    variance = spectrum.vectors.square() @ spectrum.values
    joins = variance > LEAST_VARIANCE * variance.mean()
    matrix = wiener_matrix(spectrum, sigma).abs_()
    # Divided by what may be 0 only where it joins no mask.
    diagonal = torch.where(joins, matrix.diagonal(), 1.0)
    if rule == "released":
        matrix /= diagonal[:, None]
    else:
        scale = diagonal.rsqrt()
        matrix *= scale[:, None]
        matrix *= scale
    matrix *= joins[:, None]
    matrix *= joins
    if rule == "released":
        tau *= float(matrix.max())
    else:
        matrix.diagonal().copy_(joins)
    return (matrix >= tau) & joins[:, None] & joins
