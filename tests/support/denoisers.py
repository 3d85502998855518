"""Denoisers of every kind, random images, and the loop that drives a trajectory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from els_kernels import GEOMETRIES, FoldedMoments, PatchAttention
from els_service.denoisers.analytic import AnalyticDenoiser
from els_service.denoisers.banks import Bank
from els_service.denoisers.base import Denoiser, make_query
from els_service.denoisers.closed_forms import GaussianDenoiser, WienerDenoiser
from els_service.denoisers.folded import FoldedDenoiser, fold_of
from els_service.denoisers.pca import PcaDenoiser
from els_service.denoisers.samplers import DenoiseCall, Step, Trajectory, windows_for
from els_service.denoisers.smoothed import SmoothedDenoiser

Answer = Callable[[DenoiseCall], Tensor]

SHAPE = (2, 5, 6)
CLOSED = ("gaussian", "wiener", "pca", "smoothed")
KINDS = [*("-".join(name) for name in GEOMETRIES), "els-inside", *CLOSED]


def random_images(shape: Sequence[int], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (0.4 * torch.randn(tuple(shape), generator=generator) - 0.3).clamp(-1, 1)


def build(kind: str, bank: Bank, **options: Any) -> Denoiser:
    """A denoiser of a closed form, or ``MACHINE-PADDING``; inside has a fold."""
    if kind == "gaussian":
        mean, variance = random_images(bank.shape, 1), random_images(bank.shape, 2).square() + 0.01
        return GaussianDenoiser(bank.shape, mean, variance)
    if kind == "wiener":
        return WienerDenoiser(bank)
    if kind == "pca":
        return PcaDenoiser(bank)
    if kind == "smoothed":
        ideal = AnalyticDenoiser(PatchAttention(bank.pixels()), bank, machine="ideal")
        return SmoothedDenoiser(ideal, smoothing=0.1, draws=3)
    machine, padding = kind.split("-")
    if padding == "inside":
        moments = FoldedMoments(fold_of(bank, "cpu"))
        return FoldedDenoiser(moments, bank, machine=machine, padding=padding, fold=0.5, **options)
    attention = PatchAttention(bank.pixels())
    return AnalyticDenoiser(attention, bank, machine=machine, padding=padding, **options)


def run(trajectory: Trajectory, answer: Answer) -> tuple[list[DenoiseCall], list[Step]]:
    """What a sampler asks and the steps it takes when its questions are answered so."""
    asks: list[DenoiseCall] = []
    steps: list[Step] = []
    sent: Tensor | None = None
    while True:
        try:
            event = trajectory.send(sent)
        except StopIteration:
            return asks, steps
        if isinstance(event, DenoiseCall):
            asks.append(event)
            sent = answer(event)
        else:
            steps.append(event)
            sent = None


def answers_of(denoiser: Denoiser, labels: int | list[int] = -1) -> Answer:
    def answer(ask: DenoiseCall) -> Tensor:
        query = make_query(ask.x.float(), ask.level, labels, windows_for(denoiser, ask))
        return denoiser.denoise(query).mean.double()

    return answer
