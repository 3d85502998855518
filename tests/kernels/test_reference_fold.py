"""The reference of the fold against its definition, in loops that anyone can check by eye."""

from __future__ import annotations

import math

import pytest
from tests.kernels.cases import random_bank
from tests.kernels.fold_cases import FOLD_NAMES, fold_case
from torch import Tensor

from els_kernels import Geometry

Place = tuple[int, int]
K, R = 3, 1
OFFSETS = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]


def pixel(image: Tensor, c: int, i: int, j: int, padding: str) -> float:
    height, width = image.shape[1:]
    if padding in ("circular", "valid"):
        return float(image[c, i % height, j % width])
    return float(image[c, i, j]) if 0 <= i < height and 0 <= j < width else 0.0


def patch(image: Tensor, place: Place, padding: str) -> list[list[float]]:
    i, j = place
    return [
        [pixel(image, c, i + di, j + dj, padding) for di, dj in OFFSETS]
        for c in range(image.shape[0])
    ]


def signature(image: Tensor, place: Place) -> tuple[int, ...]:
    height, width = image.shape[1:]
    i, j = place
    return min(i, R), min(height - 1 - i, R), min(j, R), min(width - 1 - j, R)


def places(image: Tensor, *, only_inside: bool) -> list[Place]:
    height, width = image.shape[1:]
    r = R if only_inside else 0
    return [(i, j) for i in range(r, height - r) for j in range(r, width - r)]


def sources(x: Tensor, q: Place, image: Tensor, geometry: Geometry) -> list[Place]:
    if geometry.sources == "same":
        return [q]
    everywhere = places(image, only_inside=geometry.padding in ("valid", "inside"))
    if geometry.padding != "zeros":
        return everywhere
    return [y for y in everywhere if signature(image, y) == signature(x, q)]


def mean_patch(
    x: Tensor, bank: Tensor, q: Place, a: float, s: float, geometry: Geometry
) -> tuple[list[list[float]], float]:
    query = patch(x, q, geometry.padding)
    keys = [
        patch(image, y, geometry.padding) for image in bank for y in sources(x, q, image, geometry)
    ]
    logits = [
        -math.fsum(
            (u - a * v) ** 2
            for us, vs in zip(query, key, strict=True)
            for u, v in zip(us, vs, strict=True)
        )
        / (2 * s * s)
        for key in keys
    ]
    top = max(logits)
    weights = [math.exp(logit - top) for logit in logits]
    total = math.fsum(weights)
    mean = [
        [
            math.fsum(w * key[c][o] for w, key in zip(weights, keys, strict=True)) / total
            for o in range(K * K)
        ]
        for c in range(x.shape[0])
    ]
    return mean, top + math.log(total)


def folded(
    means: dict[Place, list[list[float]]], p: Place, size: Place, rho: float, geometry: Geometry
) -> list[float]:
    """Return Σ g·mean / Σ g; g has no underflow, as ρ is large or the nearest patches are taken."""
    height, width = size
    reached = []
    for q, mean in means.items():
        for o, (di, dj) in enumerate(OFFSETS):
            i, j = q[0] + di, q[1] + dj
            if geometry.padding in ("circular", "valid"):
                i, j = i % height, j % width
            if (i, j) == p:
                reached.append((di * di + dj * dj, [channel[o] for channel in mean]))
    if rho == 0:
        nearest = min(distance for distance, _ in reached)
        weights = [float(distance == nearest) for distance, _ in reached]
    else:
        weights = [math.exp(-distance / (2 * rho * rho)) for distance, _ in reached]
    return [
        math.fsum(w * values[c] for w, (_, values) in zip(weights, reached, strict=True))
        / math.fsum(weights)
        for c in range(len(reached[0][1]))
    ]


@pytest.mark.parametrize("name", FOLD_NAMES)
@pytest.mark.parametrize("size", [(4, 3), (3, 5)])
def test_the_reference_is_the_definition(name: str, size: Place) -> None:
    geometry = FOLD_NAMES[name]
    if geometry.sources == "same" and size != (4, 3):
        return
    bank = random_bank((2, 2, 4, 3))
    case = fold_case(geometry, size, bank, K, [(0.5, 0.0), (0.7, 0.4), (0.3, math.inf)])
    got = case.attend("reference")
    for b, rho in enumerate(case.fold.tolist()):
        x, a, s = case.x[b].double(), float(case.a[b]), float(case.s[b])
        answers = {
            q: mean_patch(x, bank.double(), q, a, s, geometry)
            for q in places(x, only_inside=geometry.padding == "inside")
        }
        means = {q: mean for q, (mean, _) in answers.items()}
        for p in places(x, only_inside=False):
            want = folded(means, p, size, rho, geometry)
            # Both are float64, the reference rounded once to float32: half of eps32, relative.
            assert got.mean[b, :, p[0], p[1]].tolist() == pytest.approx(want, rel=6e-8, abs=1e-12)
            nearest = min(answers, key=lambda q: (q[0] - p[0]) ** 2 + (q[1] - p[1]) ** 2)
            evidence = answers[nearest][1]
            assert got.log_evidence[b][p].item() == pytest.approx(evidence, rel=6e-8, abs=1e-12)


def test_the_least_fold_of_a_large_window_does_not_underflow_at_a_border() -> None:
    # A corner of patches inside the image is reached at u = v = -1 alone: e^(-1/.05²) is 0.
    case = fold_case(FOLD_NAMES["els-inside"], (9, 9), random_bank((1, 1, 9, 9)), 7, [(0.5, 0.05)])
    got = case.attend("reference").mean
    assert got.isfinite().all()
    assert got.abs().max() <= 1
