"""Speed of the native kernel against an earlier build of its library, and a copy as control.

All three are loaded side by side and take turns on one thread, at noise levels of the cosine
schedule and over the states of whole trajectories of 20 steps. A speed-up is the median over rounds
of the earlier build's CPU time over the other's in the same round, with its quartiles; that of the
control shows what the machine adds. Builds are compared before timing.
"""

from __future__ import annotations

import ctypes
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.kernels.cpu import Setting
from els_kernels import GEOMETRIES, PatchAttention
from els_kernels.native import Native
from els_kernels.native.binding import LIBRARY
from els_service.denoisers.analytic import AnalyticDenoiser
from els_service.denoisers.banks import Bank, load_bank
from els_service.denoisers.base import Denoised, Query
from els_service.denoisers.samplers import Options, sample
from els_service.denoisers.windows import default_windows

Row = dict[str, Any]

PADDINGS = ("circular", "zeros")
LEVELS = (0.9, 0.5, 0.2, 0.1, 0.05, 0.02)
WINDOWS = (5, 11)
IMAGES = {"fashion": 480, "noise": 96}
"""Bank images: bundled photographs of clothes, 1×28×28, and smooth random ones, 3×32×32."""
STEPS = 20


@dataclass(frozen=True)
class Question:
    """One image at one level."""

    x: Tensor
    a: float
    s: float
    k: int


class Builds:
    """Libraries of several builds, over one bank.

    Args:
        libraries: by name, the earlier build first; for the same calls.
        bank: images [N, C, H, W].
    """

    def __init__(self, libraries: dict[str, ctypes.CDLL], bank: Tensor) -> None:
        self._libraries, self.bank = libraries, bank
        self._native = Native(bank)

    def seconds(self, question: Question, padding: str) -> dict[str, float]:
        """Return the CPU seconds of an answer of each build.

        Raises:
            RuntimeError: A build failed, or means differ by more than 10⁻⁵.
        """
        limits, geometry = (0, len(self.bank)), GEOMETRIES["els", padding]
        one = question
        merge = self._native.merging(one.x, [one.a], [one.s], [one.k], [limits], geometry)
        found, means = {}, []
        for name, library in self._libraries.items():
            begin = time.process_time()
            status = library.els_attend(ctypes.byref(merge.call.call))
            found[name] = time.process_time() - begin
            means.append(merge.answer.mean.clone())
            if status != 0 or not (means[-1] - means[0]).abs().max() <= 1e-5:
                raise RuntimeError(f"{name}: expected status 0 and equal means, got {status}")
        return found

    def row(self, questions: list[Question], padding: str, rounds: int) -> Row:
        """Return milliseconds of the earlier build, and the speed-up of the others over it."""
        for each in questions:
            self.seconds(each, padding)
        times = [
            {name: sum(part[name] for part in parts) for name in self._libraries}
            for parts in (
                [self.seconds(each, padding) for each in questions] for _ in range(rounds)
            )
        ]
        row: Row = {"earlier_ms": statistics.median(1000 * each["earlier"] for each in times)}
        for name in ("now", "copy"):
            low, middle, high = statistics.quantiles(
                [each["earlier"] / each[name] for each in times], n=4
            )
            row |= {f"{name}_speedup": middle, f"{name}_quartiles": [low, high]}
        return row


class Recording:
    """Denoiser that keeps the queries which it answers."""

    def __init__(self, denoiser: AnalyticDenoiser) -> None:
        self._denoiser, self.info = denoiser, denoiser.info
        self.questions: list[Question] = []

    def check(self, query: Query) -> None:
        """Raise if the denoiser rejects a query."""
        self._denoiser.check(query)

    def predict_seconds(self, query: Query) -> float:
        """Return the denoiser's prediction."""
        return self._denoiser.predict_seconds(query)

    def denoise(self, query: Query) -> Denoised:
        """Return the denoiser's answer, and keep the query."""
        level = query.level
        window = int(default_windows().at(level.sigma)[0])
        self.questions.append(
            Question(query.x.clone(), float(level.a[0]), float(level.s[0]), window)
        )
        return self._denoiser.denoise(query)


def trajectory(bank: Tensor, padding: str) -> list[Question]:
    """Return the queries of one image sampled by ddim with the published windows."""
    denoiser = Recording(
        AnalyticDenoiser(
            PatchAttention(bank),
            Bank(bank.numpy(), np.full(len(bank), -1)),
            machine="els",
            padding=padding,
            window=default_windows(),
        )
    )
    for _ in sample(denoiser, seed=1, options=Options(steps=STEPS)):
        pass
    return denoiser.questions


def banks() -> dict[str, tuple[Tensor, Tensor]]:
    """Return banks, each with an image [1, C, H, W] that it lacks."""
    path = Path(str(files("els_service") / "bundled/_banks/fashion-mnist-5000.safetensors"))
    clothes = load_bank(path).pixels()
    order = torch.randperm(len(clothes))
    noise = Setting(IMAGES["noise"] + 1, 3, 32).bank(IMAGES["noise"] + 1)
    found = {"fashion": clothes[order[: IMAGES["fashion"] + 1]], "noise": noise}
    return {name: (each[:-1].contiguous(), each[-1:]) for name, each in found.items()}


def rows(earlier: Path, rounds: int) -> Iterator[Row]:
    """Yield the speed-up at each level, and over trajectories, with one thread."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copy(earlier, folder))
        paths = {"earlier": earlier.resolve(), "copy": copy, "now": LIBRARY}
        libraries = {name: ctypes.CDLL(str(path)) for name, path in paths.items()}
        for name, (bank, clean) in banks().items():
            builds = Builds(libraries, bank)
            shared: Row = {"part": "builds", "bank": name, "images": len(bank), "rounds": rounds}
            for padding in PADDINGS:
                for k in WINDOWS:
                    for s in LEVELS:
                        a = math.sqrt(1 - s * s)
                        one = Question(a * clean + s * torch.randn_like(clean), a, s, k)
                        row = builds.row([one], padding, rounds)
                        yield {**shared, "padding": padding, "k": k, "s": s, **row}
                row = builds.row(trajectory(bank, padding), padding, rounds)
                yield {**shared, "padding": padding, "steps": STEPS, **row}
