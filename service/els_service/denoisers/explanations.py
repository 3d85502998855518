"""Where each pixel of a denoised image came from: protocol and result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from els_service.denoisers.banks import Bank
from els_service.denoisers.base import Denoised, DenoiserInfo, Query
from els_service.denoisers.file_names import FileNames


class SourceBank(Protocol):
    """Images that sources are pixels of."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the images."""
        ...

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """Label of each image, [N]; −1 for none."""
        ...

    @property
    def label_count(self) -> int:
        """The largest label plus one; 0 without labels."""
        ...

    @property
    def file_names(self) -> FileNames | None:
        """Name of each image's file; None if they are not known."""
        ...

    @property
    def numbers(self) -> int:
        """Numbers of all images together."""
        ...

    def pixels_of(self, images: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Return some images, [n, C, h, w], smaller ones padded by −1 below and on the right."""
        ...

    def of_shape(self, shape: tuple[int, ...]) -> tuple[Bank, npt.NDArray[np.int64]] | None:
        """Return the images of a shape [C, H, W] as a bank, and their numbers; None for none."""
        ...


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
