"""The denoiser of pictures by matrix products over patches, and trajectories that compare two."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from benchmarks.fold.matmul import Problem, picture
from els_kernels import FoldedAttention
from els_service.denoisers.base import Denoised, Denoiser, DenoiserInfo, Query, make_query
from els_service.denoisers.levels import MAX_SIGMA, NoiseLevel
from els_service.denoisers.noise import seeded_noise
from els_service.denoisers.picture import PictureDenoiser
from els_service.denoisers.picture_banks import PictureBank, picture_bank
from els_service.denoisers.pyramids import (
    COARSEST_PATCHES,
    PyramidPlan,
    Size,
    asked_sizes,
    scale_count,
)
from els_service.denoisers.samplers import Options, Step, options_for
from els_service.denoisers.samplers.pyramid import pyramid

FOLD = 0.2
STEPS = 10
CHUNKS = (64, 128, 256, 512)
_PROBED_ROWS = 8
"""Rows of query patches for which the sizes of chunks are tried."""


@dataclass(frozen=True)
class Case:
    """A model of one picture, and the size that it draws: that of the picture."""

    size: Size
    patch: int
    model: PictureDenoiser
    bank: PictureBank

    def options(self) -> Options:
        """Return the options of the sampler."""
        plan = PyramidPlan(asked_sizes(self.model.info.scales, self.size, self.patch), self.patch)
        return options_for(self.model.info, steps=STEPS, pyramid=plan)

    def answer(self, query: Query) -> Tensor:
        """Return the model's answer."""
        return self.model.denoise(query).mean

    def finest_query(self, level: float) -> Query:
        """Return the mirrored picture with noise, α = σ = ``level``, at the finest scale."""
        image = self.bank.images[-1].flip(2)[None]
        noise = seeded_noise(1, 1, (image.shape[1], *self.size))(0)
        at = np.array([level])
        x = level * (image + noise)
        return make_query(x.float(), NoiseLevel(at, at), len(self.model.info.scales) - 1)

    def problem(self, query: Query) -> Problem:
        """Return the matmul form of a query of one image with a label."""
        first, _ = self.bank.label_range(int(query.labels[0]))
        a, s = float(query.level.a[0]), float(query.level.s[0])
        return Problem(self.bank.images[first][None], query.x, a, s, self.patch, FOLD)


def case(size: Size, patch: int) -> Case:
    """Return the case of a colour picture with the spectrum of photographs."""
    coarsest = round(COARSEST_PATCHES * patch)
    bank = picture_bank([picture(*size)[0]], coarsest=coarsest, scales=scale_count(size, coarsest))
    attention = FoldedAttention(bank.images)
    return Case(
        size, patch, PictureDenoiser(attention, bank, patch=patch, fold=FOLD, steps=STEPS), bank
    )


class MatmulDenoiser:
    """The exact matmul form of the denoiser of a case.

    The uniform posterior, which needs no patches, is that of the case's own model: neither form
    is timed with it.

    Args:
        of: the case.
        rows: query patches of a chunk.
        dtype: in which products are computed.
    """

    def __init__(self, of: Case, rows: int, dtype: torch.dtype = torch.float32) -> None:
        self._case, self._rows, self._dtype = of, rows, dtype

    @property
    def info(self) -> DenoiserInfo:
        """Description of the denoiser."""
        return self._case.model.info

    def check(self, query: Query) -> None:
        """Accept every query."""

    def predict_seconds(self, query: Query) -> float:
        """Return 0: the form is never queued."""
        return 0.0

    def denoise(self, query: Query) -> Denoised:
        """Return the posterior mean of a query of one image."""
        if not is_compared(query):
            return self._case.model.denoise(query)
        mean = self._case.problem(query).matmul(self._rows, self._dtype)
        return Denoised(mean.float().numpy(), None)


def is_compared(query: Query) -> bool:
    """Return whether the posterior of a query is not uniform."""
    return float(query.level.sigma[0]) < MAX_SIGMA * (1 - 1e-9)


def best_chunk(of: Case) -> int:
    """Return the number of query patches of a chunk with which the matmul form is fastest."""
    height = min(of.size[0], of.patch - 1 + _PROBED_ROWS)
    x = of.bank.images[-1][None, :, :height]
    probe = Problem(of.bank.images[-1][None], x, 0.5, 0.5, of.patch, FOLD)
    return min(CHUNKS, key=lambda rows: timed(lambda: probe.matmul(rows))[1])


def trajectory(of: Case, seed: int, answer: Callable[[Query], Tensor]) -> Iterator[Step]:
    """Yield the steps of one picture whose queries ``answer`` answers, [1, C, H, W]."""
    noise = seeded_noise(seed, 1, (of.model.info.shape[0], *of.size))
    sampler = pyramid(noise, of.options())
    sent: Tensor | None = None
    while True:
        try:
            event = sampler.send(sent)
        except StopIteration:
            return
        if isinstance(event, Step):
            sent = None
            yield event
        else:
            sent = answer(make_query(event.x.float(), event.level, event.label or 0)).double()


@dataclass
class Comparison:
    """Answers of a model and of another form of it to the same queries; the model's count.

    Args:
        model: whose answers the trajectory takes.
        other: form that it is compared with.
    """

    model: Denoiser
    other: Denoiser
    model_s: float = 0.0
    """Seconds of the model's calls."""
    other_s: float = 0.0
    """Seconds of the other form's calls."""
    worst: dict[int, float] = field(default_factory=dict)
    """Scale → largest difference of the answers, relative to the norm."""

    def __call__(self, query: Query) -> Tensor:
        """Return the model's answer."""
        got, spent = timed(lambda: self.model.denoise(query).mean)
        want, other_spent = timed(lambda: self.other.denoise(query).mean)
        self.model_s, self.other_s = self.model_s + spent, self.other_s + other_spent
        scale = int(query.labels[0])
        self.worst[scale] = max(self.worst.get(scale, 0.0), difference(got, want))
        return got


def drawn(of: Case, seed: int, model: Denoiser) -> Tensor:
    """Return the picture [1, C, H, W] of a seed."""
    *_, last = trajectory(of, seed, lambda query: model.denoise(query).mean)
    return last.x


def difference(got: Tensor, want: Tensor) -> float:
    """Return the norm of a difference relative to that of ``want``."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def timed(work: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """Return the result of a call and its seconds."""
    begin = time.perf_counter()
    result = work()
    return result, time.perf_counter() - begin
