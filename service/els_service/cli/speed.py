"""Estimated cost of a model on this machine, printed by ``check`` and ``bank build``."""

from __future__ import annotations

import torch

from els_kernels import FoldedMoments, PatchAttention
from els_service.denoisers.analytic import AnalyticDenoiser
from els_service.denoisers.banks import Bank
from els_service.denoisers.base import Denoiser, DenoiserInfo, SizeRange
from els_service.denoisers.folded import MAX_SIDE, FoldedDenoiser, fold_of
from els_service.denoisers.mixed_banks import AnyBank, MixedBank
from els_service.denoisers.windows import PUBLISHED, default_windows
from els_service.engine.estimates import STEPS, duration, step_estimates, warm
from els_service.errors import LoadError

_TIMED_S = 0.1
"""Estimated seconds of the measured step: only as many images of the bank are used."""
_DEAR_S = 1.0
"""Seconds of a step from which advice on a smaller bank is printed."""


def describe_speed(denoiser: Denoiser) -> str:
    """Return the time of a step of one image on this machine, and of a sample, as text.

    The denoiser's estimate is corrected by a measurement of a tenth of a second.

    Raises:
        LoadError: The model fails at its first run.
    """
    try:
        costs = warm(denoiser)
    except Exception as error:
        raise LoadError("model.yaml", f"the model fails at its first run: {error}") from error
    return _describe(sum(map(costs.seconds, step_estimates(denoiser))) / STEPS)


def describe_windows(info: DenoiserInfo) -> str:
    """Return the name of a machine's windows if they are the published ones, else nothing."""
    if info.window is None or info.window != default_windows().clipped(info.max_window):
        return ""
    return f"; windows {PUBLISHED}, of a network on Fashion-MNIST"


def describe_engine(info: DenoiserInfo) -> str:
    """Return the engine and precision of a network, if there is a reason for them, else nothing."""
    if not info.engine_reason:
        return ""
    return f"; computed by {info.engine} in {info.precision}: {info.engine_reason}"


def describe_sizes(info: DenoiserInfo) -> str:
    """Return the sizes of the images of a bank, if they have several, else nothing."""
    if info.bank is None or info.bank.sizes is None:
        return ""
    (low, high), (wide_low, wide_high) = info.bank.sizes.height, info.bank.sizes.width
    return f"; a bank of heights {low} to {high} and widths {wide_low} to {wide_high}"


def describe_bank_speed(bank: AnyBank) -> str:
    """Return the time of a step of an ELS machine over a bank, with advice on a smaller one.

    A part of the bank is measured for about a tenth of a second; time is proportional to images.
    That of a bank of images of several sizes is an estimate.
    """
    if isinstance(bank, MixedBank):
        return _describe_mixed(bank)
    images = len(bank.images)
    one = _machine(bank, 1)
    count = max(1, min(images, int(_TIMED_S / (sum(step_estimates(one)) / STEPS))))
    machine = _machine(bank, count)
    costs = warm(machine)
    step_s = sum(map(costs.seconds, step_estimates(machine))) / STEPS * images / count
    text = f"an ELS machine over all {images} images: {_describe(step_s)}"
    if step_s < _DEAR_S:
        return text
    return (
        f"{text}. Cheaper: fewer images (--per-label, --limit), as time grows with their number; "
        "smaller ones (--resize), as it grows with the fourth power of their side; or requests "
        "with a label, which use only the images of that label"
    )


def _describe_mixed(bank: MixedBank) -> str:
    sides = (1, MAX_SIDE)
    machine = FoldedDenoiser(
        FoldedMoments(fold_of(bank, "cpu")),
        bank,
        machine="els",
        padding="zeros",
        clip=True,
        sizes=SizeRange(sides, sides),
    )
    step_s = sum(step_estimates(machine)) / STEPS
    _, height, width = bank.shape
    return (
        f"an ELS machine with sizes over all {len(bank)} images, for images of {height}×{width}, "
        f"about: {_describe(step_s)}"
    )


def _machine(bank: Bank, count: int) -> AnalyticDenoiser:
    """Return an ELS machine over the first images of a bank, without labels."""
    part = Bank(bank.images[:count].copy(), torch.full((count,), -1).numpy())
    return AnalyticDenoiser(PatchAttention(part.pixels()), part, machine="els", clip=True)


def _describe(step_s: float) -> str:
    sample = f"{duration(STEPS * step_s)} for a sample of {STEPS} steps"
    return f"one image takes {duration(step_s)} a step here, {sample}"
