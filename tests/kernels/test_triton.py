"""The Triton kernels against the float64 reference, interpreted where there is no GPU."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from tests.kernels.triton_process import Query, attend, start

from els_kernels import GEOMETRIES, PatchAttention, max_window
from els_kernels.attention import fastest
from els_kernels.reference import Reference

pytest.importorskip("triton", reason="triton is not installed: pip install 'els-denoise[gpu]'")

EPS = torch.finfo(torch.float32).eps
LEVELS = (0.05, 0.3, 0.95)
"""Times of the cosine schedule: low, middle and high noise, one image of the batch each."""

# (C, H, W, N, k): both axes the longer one, windows that fit, clip and outgrow the image.
SHAPES = [(1, 6, 8, 5, 3), (3, 7, 5, 4, 5), (2, 9, 6, 4, 7), (1, 5, 5, 3, 9), (3, 1, 6, 4, 1)]
BANKS = [(shape, True) for shape in SHAPES] + [(shape, False) for shape in SHAPES[:2]]


@pytest.fixture(scope="module")
def worker() -> Iterator[ProcessPoolExecutor]:
    with start() as pool:
        yield pool


def make(
    machine: tuple[str, str],
    shape: tuple[int, int, int, int, int],
    *,
    levels: tuple[float, ...] = LEVELS,
    of_bytes: bool = True,
    form: Literal["direct", "diagonal"] | None = None,
    seed: int = 0,
) -> Query:
    """Return a query of noisy bank images, each with its own level and range."""
    c, h, w, n, k = shape
    geometry = GEOMETRIES[machine]
    random = np.random.default_rng(seed)
    if of_bytes:
        bank = (random.integers(0, 256, (n, c, h, w)) / 127.5 - 1).astype(np.float32)
    else:
        bank = (0.7 * random.standard_normal((n, c, h, w)) + 0.3).astype(np.float32)
    a, s = zip(*map(schedule, levels), strict=True)
    x = np.stack([a[i] * bank[i % n] + s[i] * random.standard_normal((c, h, w))
                  for i in range(len(levels))]).astype(np.float32)  # fmt: skip
    k = min(k, max_window(geometry, h, w))
    window = [1 if geometry.whole else max(1, k - 2 * (i == 1)) for i in range(len(levels))]
    ranges = [(0, n) if i != 2 else (1, n) for i in range(len(levels))]
    return Query(bank, x, list(a), list(s), window, ranges, geometry, form)


def schedule(t: float) -> tuple[float, float]:
    alpha_bar = math.cos(math.pi * t / (2 * 1.008)) ** 2
    return math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)


def check(worker: ProcessPoolExecutor, query: Query) -> None:
    """Hold an answer to the budgets: mean 1e-4, score 2e-4, log evidence 8·eps32·max|logit|."""
    mean, evidence = (torch.from_numpy(part) for part in worker.submit(attend, query).result())
    bank, x = torch.from_numpy(query.bank), torch.from_numpy(query.x)
    want = Reference(bank)(x, query.a, query.s, query.window, query.ranges, query.geometry)
    for b, (a, s) in enumerate(zip(query.a, query.s, strict=True)):
        assert distance(mean[b], want.mean[b]) <= 1e-4
        score, wanted = ((a * m - x[b]) / s**2 for m in (mean[b], want.mean[b]))
        assert distance(score, wanted) <= 2e-4
        largest = largest_logit(query, b)
        assert (evidence[b] - want.log_evidence[b]).abs().max() <= 8 * EPS * largest


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


def largest_logit(query: Query, b: int) -> float:
    """Return a lower bound of the largest |logit|: of patches at their own place."""
    lo, hi = query.ranges[b]
    gap = torch.from_numpy(query.x[b] - query.a[b] * query.bank[lo:hi]).double().square().sum(1)
    k = 2 * max(gap.shape[-2:]) - 1 if query.geometry.whole else query.window[b]
    boxes = torch.nn.functional.avg_pool2d(gap[:, None], k, 1, k // 2, divisor_override=1)
    return float(boxes.max()) / (2 * query.s[b] ** 2)


FORMS = [
    pytest.param(machine, form, id="-".join([*machine, *([form] if form else [])]))
    for machine, geometry in GEOMETRIES.items()
    for form in (
        ("direct", "diagonal") if geometry.sources == "every" and not geometry.whole else (None,)
    )
]


@pytest.mark.parametrize(("shape", "of_bytes"), BANKS, ids=str)
@pytest.mark.parametrize(("machine", "form"), FORMS)
def test_every_machine_and_form_meets_the_budgets_at_every_level(
    worker: ProcessPoolExecutor, machine: Any, form: Any, shape: Any, of_bytes: bool
) -> None:
    if form == "direct" and shape[0] * shape[4] ** 2 > 128:
        # The table never sends a longer patch to it: there is nothing to compare.
        pytest.skip("the direct form serves patches of at most 128 elements")
    check(worker, make(machine, shape, of_bytes=of_bytes, form=form))


def test_several_tiles_of_places_and_chunks_of_the_bank_are_merged_exactly(
    worker: ProcessPoolExecutor,
) -> None:
    check(worker, make(("els", "zeros"), (1, 12, 11, 300, 5), levels=(0.2,), form="diagonal"))
    check(worker, make(("els", "circular"), (1, 9, 10, 40, 3), levels=(0.2,), form="direct"))
    check(worker, make(("local", "zeros"), (1, 35, 33, 20, 5), levels=(0.2,)))


@pytest.mark.parametrize(("machine", "form"), FORMS)
def test_an_image_has_the_same_bits_alone_and_in_any_batch(
    worker: ProcessPoolExecutor, machine: Any, form: Any
) -> None:
    query = make(machine, (1, 6, 7, 5, 3), levels=(0.1, 0.1, 0.7, 0.1), form=form)
    query = query._replace(ranges=[(0, 5)] * 4, window=[query.window[0]] * 4)
    together = worker.submit(attend, query).result()
    for b in (3, 1):
        alone = worker.submit(attend, pick(query, b)).result()
        for whole, part in zip(together, alone, strict=True):
            np.testing.assert_array_equal(whole[b : b + 1], part)


def pick(query: Query, b: int) -> Query:
    one = slice(b, b + 1)
    return query._replace(
        x=query.x[one], a=query.a[one], s=query.s[one], window=query.window[one],
        ranges=query.ranges[one],
    )  # fmt: skip


@pytest.mark.parametrize(("a", "s"), [(1.0, 1e-4), (1.0, 1e4), (1e-6, 1.0), (1e3, 1e-2)])
@pytest.mark.parametrize(("machine", "form"), FORMS)
def test_nothing_but_numbers_comes_out_at_extremes(
    worker: ProcessPoolExecutor, machine: Any, form: Any, a: float, s: float
) -> None:
    query = make(machine, (1, 5, 6, 4, 3), levels=(0.5,), form=form)
    query = query._replace(x=a * query.x, a=[a], s=[s])
    mean, evidence = worker.submit(attend, query).result()
    assert np.isfinite(mean).all()
    assert np.isfinite(evidence).all()
    assert query.bank.min() - 1e-5 <= mean.min() <= mean.max() <= query.bank.max() + 1e-5


def test_a_query_and_a_bank_without_any_contrast_are_answered(worker: ProcessPoolExecutor) -> None:
    query = make(("els", "circular"), (1, 5, 5, 3, 3), levels=(0.5,))
    query = query._replace(bank=np.zeros_like(query.bank), x=np.zeros_like(query.x))
    for form in ("direct", "diagonal"):
        mean, evidence = worker.submit(attend, query._replace(form=form)).result()
        np.testing.assert_allclose(mean, 0, atol=1e-6)
        np.testing.assert_allclose(evidence, math.log(75), rtol=1e-5)


def test_who_asks_for_triton_without_a_gpu_is_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=r"triton: expected a bank on a GPU .* got one on cpu"):
        PatchAttention(torch.zeros(1, 1, 2, 2), implementation="triton")


def test_who_asks_for_triton_without_the_package_is_told_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("els_kernels.triton.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="the package triton is not installed"):
        PatchAttention(torch.zeros(1, 1, 2, 2), implementation="triton")


def test_auto_takes_triton_for_a_bank_on_a_gpu() -> None:
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda"))
    assert fastest(on_gpu) == "triton"


def test_importing_the_kernels_and_a_bank_on_the_cpu_do_not_import_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import torch, els_kernels;"
        "els_kernels.PatchAttention(torch.zeros(1, 1, 2, 2))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
