"""Machines with a fold, with padding inside and for queries of any size, against brute force."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from els_kernels import (
    FOLD_GEOMETRIES,
    ComputationStoppedError,
    Control,
    FoldedAttention,
    FoldedMoments,
    PatchAttention,
)
from els_kernels.fold_plan import FoldQuery
from els_kernels.reference_fold import FoldReference
from els_service.denoisers.analytic import AnalyticDenoiser
from els_service.denoisers.banks import make_bank
from els_service.denoisers.base import Denoised, Query, SizeRange, concatenate, make_query
from els_service.denoisers.folded import FoldedDenoiser
from els_service.denoisers.levels import from_sigma
from els_service.denoisers.samplers import options_for, sample
from els_service.denoisers.windows import WindowTable
from els_service.errors import InvalidArgumentError

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 2, 7, 6)).astype(np.uint8)
BANK = make_bank(PIXELS, np.arange(6) % 3)
SIGMA = [0.3, 1.0, 4.0]
LABELS = [-1, 0, 2]
RANGES = [(0, 6), (0, 2), (4, 6)]
TABLE = WindowTable((0.5, 2.0), (3, 5))
ANY = SizeRange((1, 40), (1, 40))
SAME = (7, 6)


def machine(name: str = "els", padding: str = "inside", **options: Any) -> FoldedDenoiser:
    attention = FoldedAttention(BANK.pixels(), implementation=options.pop("kernel", "auto"))
    given = {"window": TABLE, "fold": 0.2, **options}
    return FoldedDenoiser(FoldedMoments(attention), BANK, machine=name, padding=padding, **given)


def query(size: tuple[int, int] = SAME, seed: int = 1) -> Query:
    x = np.random.default_rng(seed).normal(size=(3, 2, *size)).astype(np.float32)
    return make_query(x, from_sigma(SIGMA), LABELS)


def brute_force(model: FoldedDenoiser, asked: Query) -> list[tuple[np.ndarray[Any, Any], ...]]:
    info = model.info
    geometry = FOLD_GEOMETRIES[info.machine, info.padding]
    reference = FoldReference([BANK.pixels()])
    return [
        tuple(
            part.numpy()
            for part in reference(FoldQuery(x, 1.0, sigma, k, limits, info.fold, geometry))
        )
        for x, sigma, k, limits in zip(
            asked.x, SIGMA, TABLE.at(np.array(SIGMA)).tolist(), RANGES, strict=True
        )
    ]


def assert_close(got: Denoised, want: list[tuple[np.ndarray[Any, Any], ...]]) -> None:
    assert got.log_evidence is not None
    for b, (mean, evidence) in enumerate(want):
        assert np.abs(got.pixels[b] - mean).max() <= 1e-5
        assert got.log_evidence[b] == pytest.approx(evidence, rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("kernel", ["auto", "torch"])
@pytest.mark.parametrize("fold", [0.0, 0.05, 0.2, math.inf])
@pytest.mark.parametrize(("name", "padding"), FOLD_GEOMETRIES)
def test_an_answer_is_that_of_brute_force(
    name: str, padding: str, fold: float, kernel: str
) -> None:
    model = machine(name, padding, fold=fold, kernel=kernel)
    assert_close(model.denoise(query()), brute_force(model, query()))


@pytest.mark.parametrize("size", [(5, 5), (7, 9), (12, 6), (23, 17)])
@pytest.mark.parametrize("padding", ["zeros", "circular", "valid", "inside"])
@pytest.mark.slow
def test_a_query_of_another_size_is_answered_as_by_brute_force(
    padding: str, size: tuple[int, int]
) -> None:
    for fold in (0.0, 0.5):
        model = machine(padding=padding, fold=fold, sizes=ANY)
        model.check(query(size))
        assert_close(model.denoise(query(size)), brute_force(model, query(size)))


@pytest.mark.parametrize("padding", ["zeros", "circular", "valid"])
def test_without_a_fold_queries_of_the_banks_size_have_the_bits_of_the_plain_machine(
    padding: str,
) -> None:
    plain = AnalyticDenoiser(
        PatchAttention(BANK.pixels()), BANK, machine="els", padding=padding, window=TABLE
    )
    model = machine(padding=padding, fold=0.0, sizes=ANY, plain=plain)
    got, want = model.denoise(query()), plain.denoise(query())
    assert np.array_equal(got.pixels, want.pixels)
    assert model.predict_seconds(query()) == plain.predict_seconds(query())
    assert model.info.memory_bytes == machine(fold=0.2).info.memory_bytes + 4 * PIXELS.size
    assert_close(model.denoise(query((9, 8))), brute_force(model, query((9, 8))))


@pytest.mark.parametrize("size", [SAME, (11, 8)])
@pytest.mark.slow
def test_an_image_has_the_same_bits_alone_and_in_any_batch(size: tuple[int, int]) -> None:
    model = machine(padding="zeros", sizes=ANY)
    asked = query(size)
    together = model.denoise(concatenate([query(size, 2), asked[slice(None, None, -1)], asked]))
    for b in range(3):
        alone = model.denoise(asked[b : b + 1])
        assert np.array_equal(alone.pixels[0], together.pixels[6 + b])
        assert np.array_equal(alone.pixels[0], together.pixels[5 - b])
        assert alone.log_evidence is not None
        assert together.log_evidence is not None
        assert np.array_equal(alone.log_evidence[0], together.log_evidence[6 + b])


def test_a_size_outside_the_range_is_rejected_with_the_range() -> None:
    model = machine(sizes=SizeRange((5, 9), (6, 20)))
    for size in ((4, 6), (7, 5), (10, 6), (7, 21)):
        with pytest.raises(InvalidArgumentError, match=r"x: expected shape \[B, 2, 5 to 9, 6 to"):
            model.check(query(size))
    with pytest.raises(InvalidArgumentError, match=r"x: expected shape \[B, 2, 7, 6\]"):
        machine().check(query((8, 6)))
    deeper = make_query(np.zeros((1, 3, 7, 6), np.float32), from_sigma([1.0]))
    with pytest.raises(InvalidArgumentError, match="x: expected shape"):
        model.check(deeper)


def test_a_window_is_at_most_the_shortest_side_of_query_and_bank() -> None:
    model = machine(sizes=ANY, padding="zeros")
    wide = query((20, 20))
    for k, expected in ((5, None), (7, "windows: expected odd from 1 to 5, got 7")):
        asked = make_query(wide.pixels, wide.level, windows=k)
        if expected is None:
            model.check(asked)
        else:
            with pytest.raises(InvalidArgumentError, match=expected):
                model.check(asked)
    small = query((4, 9))
    with pytest.raises(InvalidArgumentError, match="x: expected sides of at least 5"):
        model.check(small)
    model.check(make_query(small.pixels, small.level, windows=3))


def test_windows_of_auto_are_reduced_to_the_query() -> None:
    model, fixed = machine(sizes=ANY, clip=True), machine(sizes=ANY)
    small = query((3, 9))
    model.check(small)
    want = fixed.denoise(make_query(small.pixels, small.level, LABELS, windows=3))
    assert np.array_equal(model.denoise(small).pixels, want.pixels)


@pytest.mark.parametrize("sampler", ["ddim", "ddim_released"])
def test_a_sample_of_a_small_size_takes_windows_that_fit(sampler: str) -> None:
    model = machine(sizes=ANY, clip=True)
    start = torch.zeros(1, 2, 3, 4)
    asked = make_query(start, from_sigma([50.0]))
    model.check(asked)
    assert model.denoise(asked).pixels.shape == (1, 2, 3, 4)
    (*_, last) = sample(model, sampler=sampler, options=options_for(model.info, steps=2))
    assert last.x.shape == (1, *model.info.shape)


def test_the_estimate_grows_with_the_query_and_the_window() -> None:
    model = machine(sizes=ANY)
    small, large = (model.predict_seconds(query(size)) for size in ((7, 6), (40, 40)))
    assert small < large
    one = query()[:1]
    by_window = [
        model.predict_seconds(make_query(one.pixels, one.level, windows=k)) for k in (1, 3, 5)
    ]
    assert all(seconds > 0 for seconds in by_window)
    uniform = machine(sizes=ANY, fold=math.inf)
    assert uniform.predict_seconds(query((40, 40))) < large


@pytest.mark.parametrize("kernel", ["auto", "torch"])
def test_a_stopped_computation_ends_and_shows_its_progress_before(kernel: str) -> None:
    model = machine(kernel=kernel)
    with Control() as control:
        model.denoise(query())
    assert control.progress > 3
    control.stop()
    with control, pytest.raises(ComputationStoppedError):
        model.denoise(query())
