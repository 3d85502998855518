"""Batches, tiles, modes, passes, memory and arguments of moments of patch attention."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.kernels.cases import (
    random_bank,
    random_case,
)
from tests.kernels.conftest import variant, widest
from tests.kernels.moment_cases import FORMS, arguments, directions, everything, moments, windows_of
from tests.support.processes import printed
from tests.support.rows import telling

from els_kernels import (
    GEOMETRIES,
    ComputationStoppedError,
    Control,
    Geometry,
    PatchAttention,
    PatchMoments,
    displacements,
    whole_moments,
)


@pytest.fixture(params=[variant(name) for name in FORMS])
def form(request: pytest.FixtureRequest) -> str:
    """One implementation, if it is to be had."""
    return str(request.param)


@telling(lambda form, geometry: widest(form) or geometry in ("els-zeros", "local-circular"))
def test_an_image_has_the_same_bits_alone_and_in_any_batch(form: str, geometry: Geometry) -> None:
    case = random_case(geometry, (9, 2, 3, 4), None if geometry.whole else [1, 3])
    g = directions(case)
    every = everything(case, g, form)
    order = list(range(len(case)))[::-1]
    for chosen in [*([b] for b in order), order]:
        for got, want in zip(everything(case[chosen], g[chosen], form), every, strict=True):
            assert torch.equal(got, want[chosen])


def test_tiles_change_results_by_rounding_only(
    monkeypatch: pytest.MonkeyPatch, geometry: Geometry
) -> None:
    case = random_case(geometry, (9, 2, 3, 4), None if geometry.whole else [3])
    g = directions(case)
    want = everything(case, g)
    monkeypatch.setattr(displacements, "_TILE", 100)
    monkeypatch.setattr(whole_moments, "_TILE", 50)
    for got, whole in zip(everything(case, g), want, strict=True):
        assert torch.allclose(got, whole, rtol=1e-5, atol=1e-6)


def test_a_bank_of_bytes_is_decoded_as_the_operator_sees_it(geometry: Geometry) -> None:
    case = random_case(geometry, (4, 2, 5, 4), None if geometry.whole else [3])
    images = ((random_bank((4, 2, 5, 4)) + 1) * 127.5).round().to(torch.uint8)
    pixels = images.float().div_(127.5).sub_(1)
    attention = PatchAttention(pixels, implementation="torch")
    g = directions(case)
    got = PatchMoments(attention, images).vjp(case.x, g, **arguments(case))
    want = PatchMoments(attention, pixels).vjp(case.x, g, **arguments(case))
    assert torch.equal(got[1], want[1])


def test_the_callers_modes_change_no_bit(form: str) -> None:
    case = random_case(GEOMETRIES["els", "zeros"], (5, 2, 6, 5), [3, 11])
    g = directions(case)
    want = everything(case, g, form)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = everything(replace(case, x=case.x.requires_grad_()), g, form)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)
        assert not one.requires_grad


@pytest.mark.parametrize("tile", [100, 1 << 18])
def test_the_number_of_steps_is_that_of_a_pass(
    monkeypatch: pytest.MonkeyPatch, geometry: Geometry, tile: int
) -> None:
    monkeypatch.setattr(displacements, "_TILE", tile)
    monkeypatch.setattr(whole_moments, "_TILE", tile)
    case = random_case(geometry, (9, 2, 3, 4), None if geometry.whole else [3])[[0]]
    image, bank = case.x[0].double(), case.bank
    passed: Any
    if geometry.whole:
        passed = whole_moments.Shifts(image, 1.0, bank, geometry)._tiles()
    else:
        passed = displacements.Sweep(image, 1.0, bank, 3, geometry)
    window = 1 if geometry.whole else 3
    assert moments(case).steps(9, window, geometry) == len(list(passed))


@telling(lambda form: form != "torch")
@pytest.mark.parametrize("form", [variant("torch"), variant("native-baseline")])
@pytest.mark.slow
def test_a_batch_of_sixteen_needs_less_than_64_mib_beside_the_bank(
    form: str, tmp_path: Path
) -> None:
    # In another process, whose peak is this alone; the small bank loads what torch loads once.
    # Tiles have their full size: 400 images are two of them.
    script = """
import resource, sys, torch
implementation = sys.argv[1]
torch.set_num_threads(1)
from els_kernels import GEOMETRIES, PatchAttention, PatchMoments
def prepared(images):
    bank = torch.zeros(images, 1, 28, 28, dtype=torch.uint8)
    return PatchMoments(PatchAttention(bank.float(), implementation=implementation), bank)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def ask(moments):
    x = torch.zeros(16, 1, 28, 28)
    arguments = {"a": torch.ones(16), "s": torch.ones(16), "geometry": GEOMETRIES["els", "zeros"]}
    arguments["window"] = torch.full((16,), 27)
    moments.vjp(x, x, **arguments)
    moments.jvp(x, x, **arguments)
    moments.statistics(x, **arguments, top=16)
small, large = prepared(2), prepared(400)
ask(small)
before = peak()
ask(large)
print(peak() - before)
"""
    assert float(printed(script, tmp_path, form.partition("-")[0])) <= 64


def test_a_stopped_computation_ends(form: str, geometry: Geometry) -> None:
    case = random_case(geometry, (4, 1, 5, 4), None if geometry.whole else [3])
    control = Control()
    control.stop()
    with control, pytest.raises(ComputationStoppedError):
        moments(case, form).statistics(case.x, **arguments(case))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, c: m.vjp(c.x, c.x[:1], **arguments(c)), "cotangent: expected the shape of x"),
        (lambda m, c: m.jvp(c.x, c.x.double(), **arguments(c)), "tangent: expected torch.float32"),
        (lambda m, c: m.jvp(c.x, c.x * math.inf, **arguments(c)), "tangent: expected finite"),
        (lambda m, c: m.statistics(c.x, **arguments(c), top=17), "top: expected 1 to 16, got 17"),
        (lambda m, c: m.statistics(c.x, **arguments(c), top=0), "top: expected 1 to 16, got 0"),
        (lambda m, c: m.without(c.x, 5, **arguments(c)), "image: expected 0 to 4, got 5"),
        (lambda m, c: m.vjp(c.x[:, :1], c.x, **arguments(c)), "x: expected shape"),
        (lambda m, c: PatchMoments(m._attention, c.bank.double()), "bank: expected uint8 or"),
        (
            lambda m, c: PatchMoments(m._attention, c.bank, implementation="native"),
            "implementation: native needs a native operator, got torch",
        ),
        (
            lambda m, c: PatchMoments(m._attention, c.bank, implementation="jax"),
            "implementation: expected auto, torch, native or triton, got 'jax'",
        ),
    ],
)
def test_a_bad_argument_is_named(call: Any, message: str) -> None:
    case = random_case(GEOMETRIES["els", "zeros"], (5, 2, 6, 5), [3])
    with pytest.raises(ValueError, match=message):
        call(moments(case), case)


def test_an_image_that_is_alone_in_its_range_cannot_be_removed() -> None:
    case = random_case(GEOMETRIES["els", "zeros"], (5, 2, 6, 5), [3])
    case = replace(case, ranges=torch.tensor([[0, 1]] * len(case)))
    with pytest.raises(ValueError, match="ranges: expected two images or more"):
        moments(case).without(case.x, 0, **arguments(case))


def test_evidence_spares_the_first_pass(
    monkeypatch: pytest.MonkeyPatch, geometry: Geometry
) -> None:
    case = random_case(geometry, (5, 2, 5, 4), windows_of(geometry, (5, 2, 5, 4)))[[0]]
    passes = []

    def counted(original: Any) -> Any:
        def method(*given: Any, **options: Any) -> Any:
            passes.append(1)
            return original(*given, **options)

        return method

    monkeypatch.setattr(displacements.Sweep, "_tiles", counted(displacements.Sweep._tiles))
    monkeypatch.setattr(whole_moments.Shifts, "_tiles", counted(whole_moments.Shifts._tiles))
    operator = moments(case)
    evidence = operator.evidence(case.x, **arguments(case))
    assert len(passes) == 1
    operator.vjp(case.x, directions(case), **arguments(case), evidence=evidence)
    assert len(passes) == 2
