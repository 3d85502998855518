"""Where each pixel of a denoised image came from: protocol and result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from els_kernels import PosteriorStatistics
from els_service.denoisers.base import Denoised, DenoiserInfo, Query
from els_service.denoisers.source_banks import SourceBank


@dataclass(eq=False, slots=True)  # immutable by convention; see base.Condition
class Explanation(Denoised):
    """Statistics of the posterior over the bank, for each pixel, beside D(x)."""

    variance: npt.NDArray[np.float32]
    """[B, C, H, W]."""
    entropy: npt.NDArray[np.float32]
    """[B, H, W], in nats; its exponential is the effective number of sources."""
    sources: npt.NDArray[np.int64]
    """[B, H, W, m, 3]: bank image, row, column, of falling weight; −1 where there are fewer."""
    weights: npt.NDArray[np.float32]
    """[B, H, W, m], falling."""
    shares: npt.NDArray[np.float64]
    """[B, N]: mean over the pixels of each bank image's weight; sums to one."""
    bank: SourceBank
    """Images of the sources, with labels and file names; never copied."""

    def __getitem__(self, images: slice) -> Explanation:
        evidence = self.log_evidence
        return Explanation(
            self.pixels[images],
            None if evidence is None else evidence[images],
            self.variance[images],
            self.entropy[images],
            self.sources[images],
            self.weights[images],
            self.shares[images],
            self.bank,
        )

    def central(self, height: int, width: int) -> Explanation:
        """Return the explanation of the central pixels, without a border around them.

        Shares remain those of all pixels.
        """
        rows, cols = (
            slice((own - asked) // 2, (own - asked) // 2 + asked)
            for own, asked in zip(self.pixels.shape[2:], (height, width), strict=True)
        )
        evidence = self.log_evidence
        return Explanation(
            self.pixels[..., rows, cols],
            None if evidence is None else evidence[..., rows, cols],
            self.variance[..., rows, cols],
            self.entropy[:, rows, cols],
            self.sources[:, rows, cols],
            self.weights[:, rows, cols],
            self.shares,
            self.bank,
        )


def explanation(found: PosteriorStatistics, bank: SourceBank) -> Explanation:
    """Return the explanation, without evidence, of statistics of the posterior over a bank."""
    return Explanation(
        found.mean.cpu().numpy(),
        None,
        found.variance.cpu().numpy(),
        found.entropy.cpu().numpy(),
        found.sources.cpu().numpy(),
        found.weights.cpu().numpy(),
        found.shares.cpu().numpy(),
        bank,
    )


def joined_explanations(parts: Sequence[Explanation]) -> Explanation:
    """Return the explanations of several slices of a batch as one, without evidence."""
    if len(parts) == 1:
        return parts[0]
    return Explanation(
        np.concatenate([part.pixels for part in parts]),
        None,
        np.concatenate([part.variance for part in parts]),
        np.concatenate([part.entropy for part in parts]),
        np.concatenate([part.sources for part in parts]),
        np.concatenate([part.weights for part in parts]),
        np.concatenate([part.shares for part in parts]),
        parts[0].bank,
    )


@runtime_checkable
class Explainable(Protocol):
    """A denoiser of a bank that can name its sources; its info has ``has_sources``."""

    @property
    def info(self) -> DenoiserInfo:
        """Description of the denoiser."""
        ...

    def check(self, query: Query) -> None:
        """Raise InvalidArgumentError if the query is rejected; cheap."""
        ...

    def explain(self, query: Query, top: int) -> Explanation:
        """Return the statistics with the ``top`` sources of every pixel."""
        ...

    def variance(self, query: Query) -> npt.NDArray[np.float32]:
        """Return the posterior variance of each pixel, [B, C, H, W]."""
        ...

    def predict_explain_seconds(self, query: Query) -> float:
        """Return the predicted duration of ``explain``, which is about that of ``variance``."""
        ...
