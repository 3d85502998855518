"""The specification itself against its definition, in loops that anyone can check by eye."""

import math

import pytest
import torch
from tests.kernels.cases import random_case

from els_kernels import Geometry

Place = tuple[int, int]
Image = list[list[list[float]]]

HEIGHT, WIDTH, CHANNELS = 4, 3, 2
PLACES = [(i, j) for i in range(HEIGHT) for j in range(WIDTH)]


def pixel(image: Image, channel: int, place: Place, wraps: bool) -> float:
    i, j = place
    if wraps:
        return image[channel][i % HEIGHT][j % WIDTH]
    return image[channel][i][j] if 0 <= i < HEIGHT and 0 <= j < WIDTH else 0.0


def signature(place: Place, r: int) -> tuple[int, ...]:
    i, j = place
    return min(i, r), min(HEIGHT - 1 - i, r), min(j, r), min(WIDTH - 1 - j, r)


def sources(u: Place, k: int, geometry: Geometry) -> list[Place]:
    r = k // 2
    if geometry.sources == "same":
        return [u]
    if geometry.padding == "valid":
        return [(i, j) for i, j in PLACES if r <= i < HEIGHT - r and r <= j < WIDTH - r]
    if geometry.padding == "circular":
        return PLACES
    return [y for y in PLACES if signature(y, r) == signature(u, r)]


def squared_distance(x: Image, image: Image, u: Place, y: Place, k: int, g: Geometry) -> float:
    if g.whole and g.padding == "zeros":
        places = [((i - u[0], j - u[1])) for i, j in PLACES]
    elif g.whole:
        places = PLACES
    else:
        offsets = range(-(k // 2), k // 2 + 1)
        places = [(i, j) for i in offsets for j in offsets]
    wraps = g.padding != "zeros"
    return sum(
        (pixel(x, c, (u[0] + i, u[1] + j), wraps) - pixel(image, c, (y[0] + i, y[1] + j), wraps))
        ** 2
        for i, j in places
        for c in range(CHANNELS)
    )


def posterior(
    x: Image, bank: list[Image], a: float, s: float, u: Place, k: int, g: Geometry
) -> tuple[list[float], float]:
    """Return D(x)[u], one number a channel, and log Z(u)."""
    scaled = [[[[a * v for v in row] for row in plane] for plane in image] for image in bank]
    answers = [(n, y) for n in range(len(bank)) for y in sources(u, k, g)]
    logits = [-squared_distance(x, scaled[n], u, y, k, g) / (2 * s * s) for n, y in answers]
    peak = max(logits)
    weights = [math.exp(logit - peak) for logit in logits]
    total = math.fsum(weights)
    mean = [
        math.fsum(w * bank[n][c][i][j] for w, (n, (i, j)) in zip(weights, answers, strict=True))
        / total
        for c in range(CHANNELS)
    ]
    return mean, peak + math.log(total)


def test_the_reference_is_the_definition(geometry: Geometry) -> None:
    case = random_case(geometry, (3, CHANNELS, HEIGHT, WIDTH))
    got = case.attend("reference")
    for b, (lo, hi) in enumerate(case.ranges.tolist()):
        k = 1 if case.window is None else int(case.window[b])
        x, bank = case.x[b].tolist(), case.bank[lo:hi].tolist()
        for i, j in PLACES:
            a, s = float(case.a[b]), float(case.s[b])
            mean, evidence = posterior(x, bank, a, s, (i, j), k, geometry)
            # Both are float64, the reference rounded once to float32: half of eps32, relative.
            assert got.mean[b, :, i, j].tolist() == pytest.approx(mean, rel=6e-8, abs=1e-12)
            assert got.log_evidence[b, i, j].item() == pytest.approx(evidence, rel=6e-8, abs=1e-12)


def test_the_reference_leaves_its_bank_and_query_as_they_were(geometry: Geometry) -> None:
    case = random_case(geometry, (3, CHANNELS, HEIGHT, WIDTH))
    bank, x = case.bank.clone(), case.x.clone()
    case.attend("reference")
    assert torch.equal(case.bank, bank)
    assert torch.equal(case.x, x)
