"""Seconds of a step of PCA-locality over 5,000 images, at levels in use and at new ones.

    python -m benchmarks.pca [--images 5000] [--rounds 5] [--only grey colour] [--out FILE.json]

Banks are of noise at several scales, with masks like those of photographs; ``dense`` has a
threshold that no entry is below, so that no part of the product is skipped. Each answer is checked
against the formula in float64 on some coordinates before it is timed.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks import record
from els_service.denoisers.banks import Bank, make_bank
from els_service.denoisers.base import make_query
from els_service.denoisers.levels import from_sigma
from els_service.denoisers.pca import PcaDenoiser
from els_service.denoisers.pca_masks import DEFAULT_THRESHOLD, mask_of

SHAPES = {"grey": (1, 28, 28), "colour": (3, 32, 32)}
SIGMAS = (0.05, 0.3, 1.0, 5.0, 30.0)
DENSE = 1e-12
_CHECKED = 8
"""Coordinates of an answer that are computed in float64."""
_TOLERANCE = 1e-3


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=5000, help="images of the bank")
    parser.add_argument("--rounds", type=int, default=5, help="answers at each level")
    parser.add_argument("--only", nargs="+", choices=SHAPES, default=list(SHAPES))
    record.add_arguments(parser)
    options = parser.parse_args(arguments)
    recorder = record.start("pca", options)
    rows = [row for name in options.only for row in measured(name, options.images, options.rounds)]
    recorder.write(rows)


def noise_bank(shape: tuple[int, int, int], images: int) -> Bank:
    """Return images of noise at sides 4, 8 and all, which fall off as those of photographs do."""
    generator = torch.Generator().manual_seed(0)
    channels, height, width = shape
    pixels = torch.zeros(images, *shape)
    for side, scale in ((4, 0.35), (8, 0.2), (height, 0.05)):
        coarse = torch.randn(images, channels, side, side, generator=generator)
        pixels += scale * torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return make_bank(pixels.clamp(-1, 1).numpy())


def measured(name: str, images: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each level: median seconds of an answer, and of the first at a level."""
    bank = noise_bank(SHAPES[name], images)
    begin = time.perf_counter()
    machine = PcaDenoiser(bank)
    machine.spectra.of_label(-1)
    load_s = time.perf_counter() - begin
    for tau in (DEFAULT_THRESHOLD, DENSE):
        one = machine.with_threshold(tau)
        for sigma in SIGMAS if tau != DENSE else SIGMAS[2:3]:
            noise = torch.randn(bank.shape, generator=torch.Generator().manual_seed(1))
            query = make_query(bank.pixels()[:1] + sigma * noise, from_sigma([sigma]))
            seconds = []
            for _ in range(rounds + 1):
                begin = time.perf_counter()
                answer = one.denoise(query)
                seconds.append(time.perf_counter() - begin)
            _check(machine, query.x[0], answer.pixels[0], sigma, tau)
            row = {
                "case": name,
                "shape": list(bank.shape),
                "images": images,
                "threads": torch.get_num_threads(),
                "threshold": "dense" if tau == DENSE else tau,
                "sigma": sigma,
                "load_s": load_s,
                "first_s": seconds[0],
                "step_s": statistics.median(seconds[1:]),
                "rounds_s": seconds[1:],
            }
            print({key: row[key] for key in ("case", "threshold", "sigma", "first_s", "step_s")})
            yield row


def _check(
    machine: PcaDenoiser, x: torch.Tensor, answer: np.ndarray[Any, Any], sigma: float, tau: float
) -> None:
    """Exit unless some coordinates of an answer are those of the formula.

    Raises:
        SystemExit: One is not.
    """
    spectra = machine.spectra
    images = spectra.centred.double() + spectra.centre.double()
    z = spectra.ordered(x).double()
    mask = mask_of(spectra.of_label(-1), sigma, tau, "correlation")
    for m in np.linspace(0, len(z) - 1, _CHECKED).astype(int).tolist():
        rows = mask[:, m]
        logits = -(z[rows] - images[:, rows]).square().sum(1) / (2 * sigma**2)
        want = float(logits.softmax(0) @ images[:, m])
        got = float(spectra.ordered(torch.from_numpy(answer))[m])
        if not math.isclose(got, want, abs_tol=_TOLERANCE):
            raise SystemExit(f"coordinate {m} at σ = {sigma}: expected {want}, got {got}")


if __name__ == "__main__":
    main()
