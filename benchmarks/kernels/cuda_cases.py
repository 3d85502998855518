"""Checks and timings of a run on a GPU: all, or as few as show that everything runs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from els_kernels import GEOMETRIES, Geometry
from els_kernels.attention import Implementation
from els_kernels.triton import precision
from els_kernels.triton.attention import Form
from els_kernels.triton.tuning import Config

TARGET_MS = 20.0
"""Milliseconds an image of a step of CIFAR-10 should take at most, in batches of 16."""
_CIRCULAR, _ZEROS = ("els", "circular"), ("els", "zeros")
_GRAY, _COLOUR = (1, 28, 28), (3, 32, 32)


@dataclass(frozen=True)
class Case:
    """One bank with a batch of queries of one level."""

    name: str
    machine: tuple[str, str]
    shape: tuple[int, int, int]
    images: int
    window: int
    batch: int
    form: Form | None = None
    t: float = 0.3
    of_bytes: bool = True
    one_term: bool = False
    """Whether the noise is so high that a query needs one term."""

    @property
    def geometry(self) -> Geometry:
        """Window and sources."""
        return GEOMETRIES[self.machine]

    @property
    def level(self) -> tuple[float, float]:
        """Signal and noise scale: of the cosine schedule, or of much more noise."""
        if self.one_term:
            side = self.shape[1:] if self.geometry.whole else (self.window, self.window)
            sigma = 2 * precision.one_term_noise(self.shape[0] * math.prod(side))
            return 1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma)
        alpha_bar = math.cos(math.pi * self.t / (2 * 1.008)) ** 2
        return math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)


@dataclass(frozen=True)
class Plan:
    """Plan of a run, in this order; timings are the most informative first."""

    checks: list[tuple[Case, tuple[Form | None, ...]]]
    """Compared with the float64 reference, in each of the forms."""
    timings: list[Case]
    tiles: list[tuple[Case, list[Config]]]
    """Tiles of the diagonal form to try."""


def full() -> Plan:
    """Return the plan for a GPU."""
    configs = [
        Config(block_m, block_n, block_k, warps, stages)
        for block_m, block_n, warps in ((64, 64, 4), (64, 128, 4), (128, 64, 8), (128, 128, 8))
        for block_k in (16, 32, 64)
        for stages in (1, 2, 3)
    ]
    tiles = [
        (Case("tile", _CIRCULAR, shape, images, window, 4, "diagonal"), configs)
        for window in (9, 5, 17)
        for shape, images in ((_COLOUR, 2000), (_GRAY, 4000))
    ]
    return Plan(list(_checks()), list(_timings()), tiles)


def tiny() -> Plan:
    """Return a plan of everything that a full one does, for an interpreter."""
    checks: list[tuple[Case, tuple[Form | None, ...]]] = []
    for machine in GEOMETRIES:
        case = Case("check", machine, (1, 3, 4), 2, 3, 1)
        checks.append((case, _forms(case)))
    checks.append((Case("check", _CIRCULAR, (1, 3, 4), 2, 3, 1, of_bytes=False), (None,)))
    checks.append((Case("check", _CIRCULAR, (1, 3, 4), 2, 3, 1, one_term=True), (None,)))
    timings = [
        Case("cifar-10 step", _ZEROS, (3, 3, 4), 2, 3, 1),
        Case("window", _CIRCULAR, (1, 4, 5), 2, 3, 1),
    ]
    tile = Case("tile", _CIRCULAR, (1, 4, 5), 2, 3, 1, "diagonal")
    return Plan(checks, timings, [(tile, [Config(64, 64, 32, 4, 2), Config(64, 64, 16, 4, 1)])])


def _checks() -> Iterator[tuple[Case, tuple[Form | None, ...]]]:
    """Yield small cases of every geometry, kind of bank and number of terms.

    The float64 reference takes N·(HW)²·k²C multiplications on the processor. Where the window is
    the image that leaves small ones, or the check would outlast the timings.
    """
    for machine, geometry in GEOMETRIES.items():
        shapes = [((1, 20, 17), 40, 5), ((3, 16, 16), 9, 11), ((1, 28, 28), 40, 3)]
        if geometry.whole and geometry.sources == "every":
            shapes = [((1, 9, 8), 70, 1), ((1, 20, 17), 5, 1), ((3, 16, 16), 9, 1)]
        for shape, images, window in shapes:
            for t in (0.05, 0.5, 0.95):
                case = Case("check", machine, shape, images, window, 2, None, t)
                yield case, _forms(case)
            floats = Case("check", machine, shape, images, window, 2, of_bytes=False)
            yield floats, _forms(floats)
            noisy = Case("check", machine, shape, images, window, 2, one_term=True)
            yield noisy, _forms(noisy)


def _forms(case: Case) -> tuple[Form | None, ...]:
    if case.geometry.whole or case.geometry.sources != "every":
        return (None,)
    small = case.shape[0] * case.window**2 <= 128
    # Without a form Hopper takes a kernel of its own.
    return (None, "direct", "diagonal") if small else (None, "diagonal")


def _timings() -> Iterator[Case]:
    for k in (9, 3, 5, 17):
        yield Case("cifar-10 step", _ZEROS, _COLOUR, 50_000, k, 16)
    for k in (3, 5, 7, 11, 17, 25):
        yield Case("window", _CIRCULAR, _GRAY, 4000, k, 4)
        yield Case("window", _CIRCULAR, _COLOUR, 2000, k, 4)
    for k in (3, 5):
        for form in ("direct", "diagonal"):
            yield Case("form", _CIRCULAR, _GRAY, 4000, k, 4, form)
            if k == 3:
                yield Case("form", _CIRCULAR, _COLOUR, 2000, k, 4, form)
    for k in (11, 17):
        yield Case("form", _CIRCULAR, _COLOUR, 2000, k, 4, "diagonal")
        yield Case("form", _CIRCULAR, _COLOUR, 2000, k, 4)
    for batch in (1, 4, 16, 64):
        yield Case("batch", _ZEROS, _GRAY, 6000, 9, batch)
    for images in (1000, 6000, 60_000):
        yield Case("bank", _ZEROS, _GRAY, images, 9, 4)
    yield Case("floats", _ZEROS, _COLOUR, 5000, 9, 4, of_bytes=False)
    yield Case("local", ("local", "zeros"), _COLOUR, 50_000, 9, 16)
    yield Case("ideal", ("ideal", "zeros"), _COLOUR, 50_000, 1, 16)
    yield Case("equivariant", ("equivariant", "circular"), _COLOUR, 5000, 1, 1)
    yield Case("valid", ("els", "valid"), _COLOUR, 5000, 9, 4)
    for k in (3, 7, 9, 13, 15, 21):
        yield Case("window", _ZEROS, _GRAY, 6000, k, 4)
        yield Case("window", _ZEROS, _COLOUR, 5000, k, 4)


def make_bank(case: Case, device: torch.device, seed: int) -> Tensor:
    """Return random images, smooth enough for posteriors of more than one image."""
    random = torch.Generator(device).manual_seed(seed)
    c, h, w = case.shape
    rough = torch.randn(case.images, c, h, w, device=device, generator=random)
    smooth = (torch.nn.functional.avg_pool2d(rough, 3, 1, 1) * 1.5).clamp(-1, 1)
    return ((smooth + 1) * 127.5).round() / 127.5 - 1 if case.of_bytes else smooth


def make_query(case: Case, bank: Tensor, seed: int) -> Tensor:
    """Return noisy images of the bank [B, C, H, W]."""
    random = torch.Generator(bank.device).manual_seed(seed)
    a, s = case.level
    clean = bank[torch.arange(case.batch, device=bank.device) % case.images]
    return a * clean + s * torch.randn(clean.shape, device=bank.device, generator=random)


def call(case: Case, attention: Implementation, x: Tensor) -> Tensor:
    """Return the mean."""
    a, s = case.level
    size = len(x)
    window = [1 if case.geometry.whole else case.window] * size
    ranges = [(0, case.images)] * size
    return attention(x, [a] * size, [s] * size, window, ranges, case.geometry).mean
