"""Analytic machines whose answer is the overlap of mean patches, or that answer any size."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from els_kernels import FOLD_GEOMETRIES, FoldedAttention, FoldedMoments, count_fold_work, max_window
from els_service.denoisers.analytic import AnalyticDenoiser, bank_bytes, bank_info
from els_service.denoisers.banks import Bank
from els_service.denoisers.base import (
    Denoised,
    DenoiserInfo,
    Integers,
    Query,
    SizeRange,
)
from els_service.denoisers.explanations import Explanation, explanation
from els_service.denoisers.gradients import Direction, Product
from els_service.denoisers.mapped_banks import MappedBank
from els_service.denoisers.mixed_banks import one_size
from els_service.denoisers.query_checks import check_query, largest_window, odd
from els_service.denoisers.source_banks import SourceBank
from els_service.denoisers.windows import WindowTable, default_windows
from els_service.errors import InvalidArgumentError

LEAST_FOLD = 0.05
"""Smallest ρ but 0."""
MAX_SIDE = 4096
"""Largest height and width of a range of sizes."""

_LOGIT_S = {"native": (4e-9, 2e-10, 7e-11), "torch": (2.5e-8, 4e-9, 2e-10)}
"""Seconds of one thread for a logit: fixed, for each channel, and for each pixel of the window's
side (measured). The cost model corrects them."""
_TRITON_LOGIT_S = (2e-11, 1e-11)
"""Seconds of a GPU for a logit: fixed, and for each channel; three times the static bound of
``benchmarks/results/static.md``, as it was not measured."""
_SLOWEST = "torch"
_EXPLAIN = {"native": 1.5, "torch": 1.8, "triton": 6.0}
_PRODUCT = {"native": 2.4, "torch": 1.3, "triton": 6.0}
"""Time of an explanation and of a Jacobian product, in multiples of a fold (measured, at the
noisiest level; of a GPU counted in passes and instructions of three channels)."""
LogitSeconds = Callable[[str, int, int], float]
"""Implementation, channels and side of the window → seconds of one thread for a logit."""
_IMAGE_S = 1e-3
"""Seconds of a query image beside its logits (measured)."""
_PIXEL_S = 3e-8
"""Seconds of one thread for each pixel of a bank image, beside its logits (measured)."""


def check_fold(machine: str, padding: str, fold: float, *, sized: bool) -> None:
    """Check that a machine has a fold ρ, and answers other sizes than its bank's if ``sized``.

    Raises:
        ValueError: It has not; names field, expected and got.
    """
    if not (fold == 0 or fold >= LEAST_FOLD):
        raise ValueError(f"fold: expected 0, at least {LEAST_FOLD}, inf or uniform, got {fold}")
    if (machine, padding) not in FOLD_GEOMETRIES:
        known = ", ".join(f"{m} with {p}" for m, p in FOLD_GEOMETRIES)
        expected = f"expected {known} for fold, sizes and padding inside"
        raise ValueError(f"machine and padding: {expected}, got {machine} with {padding}")
    if sized and machine != "els":
        expected = "expected none but for els, as other sources are the same place"
        raise ValueError(f"sizes: {expected}, got some for {machine}")


def check_images(bank: SourceBank, machine: str, *, sized: bool) -> None:
    """Check that a machine takes the images of a bank.

    Raises:
        ValueError: They have several sizes, and the machine needs one, or has no ``sizes``.
    """
    if isinstance(bank, MappedBank):
        return
    if machine != "els":
        why = "sources are at the same place" if machine == "local" else "window is the whole image"
        one_size(bank, f"machine {machine}, as its {why}")
    if not (isinstance(bank, Bank) or sized):
        expected = "expected any, or ranges, as the bank has images of several sizes"
        raise ValueError(f"sizes: {expected}, got none")


def fold_of(bank: SourceBank, device: str, implementation: str = "auto") -> FoldedAttention:
    """Return the fold of a bank; on the CPU it holds the memory of the bank, and no copy."""
    groups = (group if group.flags.writeable else group.copy() for group in bank.groups)
    images = [torch.from_numpy(group).to(device) for group in groups]
    return FoldedAttention(images, implementation=implementation)


def logit_seconds(implementation: str, channels: int, taps: int) -> float:
    """Return the predicted seconds of one thread for a logit and its part of the fold.

    A GPU's are those of all threads of torch, whose number does not matter to it.
    """
    if implementation == "triton":
        fixed, channel = _TRITON_LOGIT_S
        return (fixed + channel * channels) * torch.get_num_threads()
    fixed, channel, tap = _LOGIT_S.get(implementation, _LOGIT_S[_SLOWEST])
    return fixed + channel * channels + tap * taps


def explain_seconds(implementation: str, channels: int, taps: int) -> float:
    """Return the predicted seconds of one thread for a logit of an explanation."""
    factor = _EXPLAIN.get(implementation, _EXPLAIN[_SLOWEST])
    return factor * logit_seconds(implementation, channels, taps)


def product_seconds(implementation: str, channels: int, taps: int) -> float:
    """Return the predicted seconds of one thread for a logit of a Jacobian product."""
    factor = _PRODUCT.get(implementation, _PRODUCT[_SLOWEST])
    return factor * logit_seconds(implementation, channels, taps)


def fold_product(
    moments: FoldedMoments,
    kind: Direction,
    query: Query,
    along: npt.NDArray[np.float32],
    arguments: dict[str, Any],
) -> Product:
    """Return D(x) and a Jacobian product of a fold.

    Args:
        moments: of the fold.
        kind: which product.
        query: noisy images.
        along: cotangent or tangent, [B, C, H, W].
        arguments: of the fold other than x.
    """
    multiply = moments.vjp if kind == "vjp" else moments.jvp
    device = moments.attention.device
    mean, product = multiply(query.x.to(device), torch.tensor(along).to(device), **arguments)
    return Product(mean.cpu().numpy(), product.cpu().numpy())


class FoldedDenoiser:
    """The machine ``els`` or ``local`` with a fold ρ, padding ``inside``, or queries of any size.

    Its sources are pixels of the bank: each is weighed by all patches that join it to a pixel.

    Args:
        moments: moments of the fold of the bank; shared by all models with that bank.
        bank: the images; of several sizes for ``els`` with ``sizes`` alone.
        machine: ``els`` or ``local``.
        padding: of a key of ``FOLD_GEOMETRIES``.
        fold: ρ: 0, or from 0.05 to infinity.
        window: table by noise level; None for the default.
        clip: whether windows larger than the images are reduced, or rejected.
        sizes: of queries; None for the size of the bank's images.
        plain: with ρ = 0, the same machine for queries of the bank's size.
        call_s: seconds that a call takes beside its logits.

    Raises:
        ValueError: Unknown machine and padding, ρ or a window out of range, or images of several
            sizes where one is needed.
    """

    def __init__(
        self,
        moments: FoldedMoments,
        bank: SourceBank,
        *,
        machine: str,
        padding: str,
        fold: float = 0.0,
        window: WindowTable | None = None,
        clip: bool = False,
        sizes: SizeRange | None = None,
        plain: AnalyticDenoiser | None = None,
        call_s: float = 0.0,
    ) -> None:
        check_fold(machine, padding, fold, sized=sizes is not None)
        check_images(bank, machine, sized=sizes is not None)
        self._attention, self._moments = moments.attention, moments
        self._bank, self._fold, self._plain, self._call_s = bank, fold, plain, call_s
        self._geometry = FOLD_GEOMETRIES[machine, padding]
        self._size = bank.shape[1], bank.shape[2]
        self._typical: dict[tuple[int, int], tuple[int, int]] = {}
        """Range of bank images → mean height and largest width, which determine their cost."""
        self._clip = clip or window is None
        info = bank_info(bank)
        if info.sizes is None:
            largest = max_window(self._geometry, *self._size)
        else:
            largest = odd(info.sizes.least)
        table = window or default_windows()
        if self._clip:
            table = table.clipped(largest)
        if max(table.k) > largest:
            raise ValueError(f"window: expected at most {largest} here, got {max(table.k)}")
        self._window = table
        self._info = DenoiserInfo(
            kind="analytic",
            shape=bank.shape,
            machine=machine,
            padding=padding,
            window=table,
            max_window=largest,
            fold=fold,
            sizes=sizes,
            label_count=bank.label_count,
            label_names=bank.label_names,
            bank=info,
            has_originality=True,
            has_log_evidence=True,
            has_gradients=True,
            has_sources=True,
            implementation=self._attention.implementation,
            # The fold and its moments need no copy of the bank, the plain machine one in float32.
            memory_bytes=bank_bytes(bank, copies=0 if plain is None else 1),
        )

    @property
    def info(self) -> DenoiserInfo:
        """Description of the machine."""
        return self._info

    @property
    def bank(self) -> SourceBank:
        """Images of the machine."""
        return self._bank

    def check(self, query: Query) -> None:
        """Raise InvalidArgumentError if the shape, a label or a window is not supported."""
        check_query(self._info, query)
        needed = 1 if self._clip else max(self._window.k)
        if needed > self._largest(query) and not query.windows.all():
            expected = f"sides of at least {needed}, the model's largest window, or windows"
            raise InvalidArgumentError("x", expected, f"shape {list(query.pixels.shape)}")
        for label in np.unique(query.labels):
            self._bank.label_range(int(label))

    def warm_up(self) -> None:
        """Compile what queries of the bank's size need; see ``base.Compiling``."""
        if self._plain is not None:
            self._plain.warm_up()
        self._attention.warm_up(self._window.k, self._geometry)
        self._moments.warm_up(self._window.k, self._geometry)

    def predict_seconds(self, query: Query) -> float:
        """Return a rough estimate from the number of logits and the number of torch's threads."""
        if self._plain is not None and self._is_plain(query):
            return self._plain.predict_seconds(query)
        return self._seconds(query, logit_seconds, self._info.implementation)

    def predict_explain_seconds(self, query: Query) -> float:
        """Return a rough estimate from the number of logits."""
        if self._plain is not None and self._is_plain(query):
            return self._plain.predict_explain_seconds(query)
        return self._seconds(query, explain_seconds, self._moments.implementation)

    def predict_product_seconds(self, query: Query, direction: Direction) -> float:
        """Return a rough estimate from the number of logits."""
        if self._plain is not None and self._is_plain(query):
            return self._plain.predict_product_seconds(query, direction)
        return self._seconds(query, product_seconds, self._moments.implementation)

    def _seconds(self, query: Query, each: LogitSeconds, implementation: str) -> float:
        size = query.pixels.shape[2], query.pixels.shape[3]
        channels = self._info.shape[0]
        seconds = 0.0
        for k, (lo, hi) in zip(self._windows(query).tolist(), self._ranges(query), strict=True):
            image = self._typical_size(lo, hi)
            work = count_fold_work(self._geometry, size, image, k)
            taps = 1 if math.isinf(self._fold) else k
            logit = each(implementation, channels, taps)
            seconds += (hi - lo) * (logit * work + _PIXEL_S * channels * math.prod(image))
        return self._call_s + len(query) * _IMAGE_S + seconds / torch.get_num_threads()

    def denoise(self, query: Query) -> Denoised:
        """Return posterior means and log evidences."""
        if self._plain is not None and self._is_plain(query):
            return self._plain.denoise(query)
        posterior = self._attention(query.x.to(self._attention.device), **self._arguments(query))
        return Denoised(posterior.mean.cpu().numpy(), posterior.log_evidence.cpu().numpy())

    def explain(self, query: Query, top: int) -> Explanation:
        """Return the statistics with the ``top`` sources of every pixel, without evidence."""
        if self._plain is not None and self._is_plain(query):
            return self._plain.explain(query, top)
        x = query.x.to(self._attention.device)
        found = self._moments.statistics(x, **self._arguments(query), top=top)
        return explanation(found, self._bank)

    def variance(self, query: Query) -> npt.NDArray[np.float32]:
        """Return the posterior variance of each pixel, [B, C, H, W]."""
        if self._plain is not None and self._is_plain(query):
            return self._plain.variance(query)
        x = query.x.to(self._attention.device)
        found = self._moments.statistics(x, **self._arguments(query), top=1, shares=False)
        variance: npt.NDArray[np.float32] = found.variance.cpu().numpy()
        return variance

    def vjp(self, query: Query, cotangent: npt.NDArray[np.float32]) -> Product:
        """Return D(x) and Jᵀg, exactly."""
        if self._plain is not None and self._is_plain(query):
            return self._plain.vjp(query, cotangent)
        return fold_product(self._moments, "vjp", query, cotangent, self._arguments(query))

    def jvp(self, query: Query, tangent: npt.NDArray[np.float32]) -> Product:
        """Return D(x) and J u, exactly."""
        if self._plain is not None and self._is_plain(query):
            return self._plain.jvp(query, tangent)
        return fold_product(self._moments, "jvp", query, tangent, self._arguments(query))

    def _arguments(self, query: Query) -> dict[str, Any]:
        """Return the arguments of the fold other than x."""
        return {
            "a": torch.tensor(query.level.a),
            "s": torch.tensor(query.level.s),
            "window": torch.from_numpy(self._windows(query)),
            "fold": torch.full((len(query),), self._fold, dtype=torch.float64),
            "ranges": torch.tensor(self._ranges(query)),
            "geometry": self._geometry,
        }

    def _typical_size(self, lo: int, hi: int) -> tuple[int, int]:
        """Return the size of an image that costs as much as those of a range do in the mean.

        Rows of all images are on a ring as long as the widest.
        """
        if (lo, hi) not in self._typical:
            extents = self._bank.extents[lo:hi]
            self._typical[lo, hi] = round(float(extents[:, 0].mean())), int(extents[:, 1].max())
        return self._typical[lo, hi]

    def _is_plain(self, query: Query) -> bool:
        return query.pixels.shape[2:] == self._size

    def _largest(self, query: Query) -> int:
        return largest_window(self._info, query.pixels.shape[2], query.pixels.shape[3])

    def _windows(self, query: Query) -> Integers:
        own = np.minimum(self._window.at(query.level.sigma), self._largest(query))
        return np.where(query.windows > 0, query.windows, own)

    def _ranges(self, query: Query) -> list[tuple[int, int]]:
        return [self._bank.label_range(int(label)) for label in query.labels]
