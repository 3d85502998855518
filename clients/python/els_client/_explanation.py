"""Where each pixel of denoised images came from: the result of ``explain``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from els_client._types import Images


@dataclass(frozen=True, eq=False)
class Explanation:
    """Where each pixel of denoised images came from.

    Attributes:
        denoised: E[x0 | x], float32 [B, C, H, W].
        variance: Posterior variance of each pixel, float32 [B, C, H, W].
        entropy: Posterior entropy in nats, float32 [B, H, W].
        sources: The m sources of largest weight of each pixel, int64 [B, H, W, m, 3]: bank image,
            row, column; -1 where a pixel has fewer.
        weights: Their weights, float32 [B, H, W, m], falling; 0 where a pixel has fewer.
        shares: Share of each bank image in each result, float64 [B, N]; with ``dropped_share`` they
            sum to 1.
        dropped_share: Share of the images whose shares are not given, float64 [B]; 0 for banks of
            at most 65,536 images.
        labels: Label of each bank image with a share, int64 [N], else -1; all -1 for unlabelled
            banks.
        label_names: Empty, or one name for each label.
        bank_fingerprint: SHA-256 of the bank, hexadecimal, as in ``Model.bank``.
        images: For each of B results the requested bank images of largest share, by falling share:
            number in the bank → float32 [C, H, W], each of its own size if ``Bank.sizes``.
        file_names: Number in the bank → name of the file that the image was read from; empty if the
            bank does not know it. At most the 4,096 images of largest share of each result.
        image_sizes: Height and width of each bank image with a share, int64 [N, 2], else -1; empty
            from servers that do not return them.
    """

    denoised: Images
    variance: Images
    entropy: Images
    sources: npt.NDArray[np.int64]
    weights: Images
    shares: npt.NDArray[np.float64]
    dropped_share: npt.NDArray[np.float64]
    labels: npt.NDArray[np.int64]
    label_names: tuple[str, ...]
    bank_fingerprint: str
    images: tuple[dict[int, Images], ...] = ()
    file_names: dict[int, str] = field(default_factory=dict)
    image_sizes: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 2), np.int64))

    @property
    def effective_sources(self) -> Images:
        """Effective number of sources of each pixel, exp of the entropy, float32 [B, H, W]."""
        return np.exp(self.entropy)
