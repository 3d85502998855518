"""The denoiser protocol, and its queries and results."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from els_service.denoisers.folder_scheduler import FolderScheduler
from els_service.denoisers.levels import SCHEDULES, NoiseLevel, Schedule
from els_service.denoisers.windows import WindowTable
from els_service.errors import InvalidArgumentError

Integers = npt.NDArray[np.int64]


@dataclass(eq=False, slots=True)  # immutable by convention; frozen: 5 times slower to construct
class Condition:
    """Conditioning of one image: the embedding that a conditional network attends to."""

    given: npt.NDArray[np.float32]
    """[T, W]: T rows, such as the tokens of a text."""
    unconditional: npt.NDArray[np.float32] | None = None
    """[T, W], such as that of an empty text; required for guidance."""
    guidance: float = 1.0
    """Classifier-free: D = D(unconditional) + guidance·(D(given) - D(unconditional))."""

    @property
    def nbytes(self) -> int:
        """Size of both arrays in bytes."""
        return self.given.nbytes * (1 if self.unconditional is None else 2)


@dataclass(eq=False, slots=True)  # immutable by convention; see Condition
class Query:
    """Noisy images, each with its own level, label, window and condition."""

    pixels: npt.NDArray[np.float32]
    """[B, C, H, W], C order; may be read-only."""
    level: NoiseLevel
    labels: Integers
    """[B]; -1 means none."""
    windows: Integers
    """[B]; 0 means the model's own window."""
    conditions: tuple[Condition, ...] = ()
    """One for each image, or empty."""
    unclipped: npt.NDArray[np.bool_] | None = None
    """[B]: for which images a model that clips D to a range returns it unclipped; None for none."""
    guidance: npt.NDArray[np.float64] | None = None
    """[B]: g of D(no label) + g·(D(label) - D(no label)); None for 1, which is none."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def x(self) -> Tensor:
        """Pixels as a CPU tensor that shares their memory; read-only pixels are copied first."""
        if not self.pixels.flags.writeable:
            # A view of a message's bytes: torch takes no read-only memory.
            self.pixels = self.pixels.copy()
        return torch.from_numpy(self.pixels)

    @property
    def nbytes(self) -> int:
        """Size of pixels and conditions in bytes."""
        return self.pixels.nbytes + sum(condition.nbytes for condition in self.conditions)

    def __getitem__(self, images: slice) -> Query:
        return Query(
            self.pixels[images],
            self.level[images],
            self.labels[images],
            self.windows[images],
            self.conditions[images],
            None if self.unclipped is None else self.unclipped[images],
            None if self.guidance is None else self.guidance[images],
        )


def make_query(
    x: Tensor | npt.NDArray[np.float32],
    level: NoiseLevel,
    labels: int | Sequence[int] = (),
    windows: int | Sequence[int] = (),
    conditions: Sequence[Condition] = (),
) -> Query:
    """Return a query; arguments other than x have one value for all images or one each.

    Labels, windows and conditions may also be empty.

    Raises:
        InvalidArgumentError: The number of levels, labels, windows or conditions is neither.
    """
    batch, levels = len(x), len(level)
    if levels != batch:
        if levels != 1:
            raise InvalidArgumentError("level", f"1 value or {batch}", f"{levels} values")
        level = level.repeat(batch)
    if conditions:
        if len(conditions) not in (1, batch):
            expected = f"none, 1 or {batch} conditions"
            raise InvalidArgumentError("conditioning", expected, len(conditions))
        conditions = tuple(conditions) * (batch // len(conditions))
    return Query(
        x.numpy() if isinstance(x, Tensor) else x,
        level,
        one_each("labels", labels, batch, none=-1),
        one_each("windows", windows, batch, none=0),
        tuple(conditions),
    )


def one_each(
    field: str, values: int | np.integer[Any] | Sequence[int], batch: int, none: int
) -> Integers:
    """Return one value for each image from no value, one value, or one each: [batch].

    Raises:
        InvalidArgumentError: The number of values is not 0, 1 or ``batch``.
    """
    # Not an abstract base class, whose isinstance is slow: every call runs this twice.
    given = [values] if isinstance(values, (int, np.integer)) else values
    count = len(given)
    if not count:
        return _filled(none, batch)
    if count not in (1, batch):
        raise InvalidArgumentError(field, f"none, 1 or {batch} values", f"{count} values")
    return np.array(given if count == batch else list(given) * batch, np.int64)


@functools.lru_cache(1024)
def _filled(value: int, batch: int) -> Integers:
    """Return a cached read-only array: most queries have no labels or no windows."""
    filled = np.full(batch, value, np.int64)
    filled.flags.writeable = False
    return filled


def concatenate(queries: Sequence[Query]) -> Query:
    """Return one query with the images of all queries, in order."""
    if len(queries) == 1:
        return queries[0]
    return Query(
        np.concatenate([query.pixels for query in queries]),
        NoiseLevel.of([pair for query in queries for pair in query.level.pairs]),
        np.concatenate([query.labels for query in queries]),
        np.concatenate([query.windows for query in queries]),
        tuple(condition for query in queries for condition in query.conditions),
        _concatenate_given([query.unclipped for query in queries], queries, False),
        _concatenate_given([query.guidance for query in queries], queries, 1.0),
    )


def _concatenate_given(
    arrays: Sequence[npt.NDArray[Any] | None], queries: Sequence[Query], absent: float
) -> npt.NDArray[Any] | None:
    """Return one array of arrays that are None or [B] each; None if all are."""
    if all(array is None for array in arrays):
        return None
    filled = (
        np.full(len(query), absent) if array is None else array
        for array, query in zip(arrays, queries, strict=True)
    )
    return np.concatenate(list(filled))


@dataclass(eq=False, slots=True)  # immutable by convention; see Condition
class Denoised:
    """Result of a query."""

    pixels: npt.NDArray[np.float32]
    """[B, C, H, W], C order: D(x) = E[x0 | x]."""
    log_evidence: npt.NDArray[np.float32] | None
    """[B, H, W]; None if the denoiser does not compute it."""

    def __getitem__(self, images: slice) -> Denoised:
        evidence = self.log_evidence
        return Denoised(self.pixels[images], None if evidence is None else evidence[images])

    @property
    def mean(self) -> Tensor:
        """Pixels as a CPU tensor that shares their memory, for callers that compute in torch."""
        return torch.from_numpy(self.pixels)


@dataclass(frozen=True)
class BankInfo:
    """Provenance of a denoiser's training images."""

    fingerprint: str
    images: int
    source: str
    licence: str
    longest_name: int | None = None
    """Bytes of the longest name of an image's file; None if the names are not known."""
    sizes: SizeRange | None = None
    """Heights and widths of the images, if they have several sizes."""
    most_pixels: int = 0
    """H·W of the largest image, if they have several sizes."""


@dataclass(frozen=True)
class SizeRange:
    """Sizes of images: smallest and largest side of each axis."""

    height: tuple[int, int]
    width: tuple[int, int]

    @property
    def least(self) -> int:
        """Smallest side of any image."""
        return min(self.height[0], self.width[0])

    def __contains__(self, size: tuple[int, int]) -> bool:
        return all(
            low <= side <= high
            for side, (low, high) in zip(size, (self.height, self.width), strict=True)
        )

    def __str__(self) -> str:
        """Return the sides of images, as they are written in the shape of an array."""
        return ", ".join(f"{low} to {high}" for low, high in (self.height, self.width))


@dataclass(frozen=True)
class DenoiserInfo:
    """Public description of a denoiser."""

    kind: str
    shape: tuple[int, int, int]
    machine: str = ""
    padding: str = ""
    window: WindowTable | None = None
    max_window: int = 0
    """0 if the window cannot be chosen."""
    fold: float = 0.0
    """ρ of overlapping mean patches, see ``els_kernels.FoldedAttention``; 0: the centres alone."""
    sizes: SizeRange | None = None
    """Heights and widths of queries; None for those of ``shape`` alone."""
    scales: tuple[tuple[int, int], ...] = ()
    """Height and width of each scale of a picture, coarsest first: its labels; else empty."""
    scale_steps: int = 0
    """Default steps of each scale for the sampler ``pyramid``; 0 for models without scales."""
    patch: int = 0
    """Side of the patches of a model with scales; 0 for others, whose windows are in ``window``."""
    schedule: str = "cosine"
    """A key of ``SCHEDULES``, or ``timesteps`` with ``own_schedule``."""
    own_schedule: Schedule | None = None
    """Levels that a network was trained at, unless they are those of a named schedule."""
    trained_sigma: tuple[float, float] | None = None
    """Lowest and highest trained σ = s/a; None for a model that knows every level."""
    scheduler: FolderScheduler | None = None
    """Scheduler of a diffusers folder, whose steps requests may ask for."""
    label_count: int = 0
    label_names: tuple[str, ...] = ()
    label_guidance: bool = False
    """Whether queries may have guidance: the model also answers without a label."""
    bank: BankInfo | None = None
    batch_invariant: bool = True
    """Whether an image has the same bits alone and in any batch, not only up to rounding."""
    has_log_evidence: bool = False
    has_gradients: bool = False
    """Whether it is ``gradients.Differentiable``."""
    reuses_evidence: bool = False
    """Whether it is ``gradients.ReusesEvidence``."""
    has_sources: bool = False
    """Whether it is ``explanations.Explainable``."""
    has_originality: bool = False
    """Whether it is ``originality.HasBank``: a network describes its bank, but does not have it."""
    implementation: str = ""
    engine: str = ""
    """Execution engine of a trained network; empty for other models."""
    engine_reason: str = ""
    """Why it was chosen; empty if it is what was asked for."""
    precision: str = ""
    """Precision of a trained network's arithmetic; empty for other models."""
    precision_error: float = 0.0
    """Relative error of a trained network's output, measured at load: ‖difference‖/‖output‖ of the
    worst image of a probe, against its own engine in float32; 0 for that engine in float32."""
    memory_bytes: int = 0
    """Approximate resident size of weights or bank; models of one bank share it."""
    condition_width: int = 0
    """W of the condition that every image requires; 0 for a model without conditioning."""
    condition_rows: int = 0
    """Maximum rows of a condition."""
    decoded_shape: tuple[int, int, int] | None = None
    """(C, H, W) of the decoded images of a latent model; otherwise None."""

    @property
    def levels(self) -> Schedule:
        """Schedule of the model: time → level."""
        return self.own_schedule or SCHEDULES[self.schedule]


class Denoiser(Protocol):
    """Denoises queries. Thread-compatible: one call at a time."""

    @property
    def info(self) -> DenoiserInfo:
        """Description of the denoiser."""
        ...

    def check(self, query: Query) -> None:
        """Raise InvalidArgumentError if ``denoise`` would reject the query; cheap.

        Independent of the level and of the values of the pixels.
        """
        ...

    def predict_seconds(self, query: Query) -> float:
        """Return the predicted duration of ``denoise``."""
        ...

    def denoise(self, query: Query) -> Denoised:
        """Return the expected clean images."""
        ...


@runtime_checkable
class AnswersInPart(Denoiser, Protocol):
    """A denoiser that can answer without some of its bank, where a caller allows that."""

    def denoise_partial(self, query: Query) -> tuple[Denoised, list[float]]:
        """Return the answer, and for each image the share of its bank images that answered."""
        ...


@runtime_checkable
class Compiling(Protocol):
    """A denoiser that compiles code for its device, which takes seconds at the first use."""

    def warm_up(self) -> None:
        """Compile what requests at any level need, unless they choose a window."""
        ...


@runtime_checkable
class LatentDecoder(Protocol):
    """A denoiser of latents that can decode them to images."""

    @property
    def info(self) -> DenoiserInfo:
        """Description of the denoiser, with a ``decoded_shape``."""
        ...

    def decode(self, latents: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return the images in [-1, 1] of latents [B, C, H, W]: [B, *decoded_shape]."""
        ...
