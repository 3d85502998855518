"""Variance, entropy, sources and Jacobian products against the whole posterior in float64."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.kernels.cases import (
    VARIANTS,
    Case,
    operator,
    random_bank,
    random_case,
    relative_errors,
)
from tests.kernels.conftest import variant
from tests.kernels.moment_budgets import Budgets, budgets
from torch import Tensor

from els_kernels import (
    GEOMETRIES,
    ComputationStoppedError,
    Control,
    Geometry,
    PatchAttention,
    PatchMoments,
    displacements,
    max_window,
    whole_moments,
)
from els_kernels.reference_statistics import ReferencePosterior

SHAPES = [(5, 2, 5, 4), (4, 1, 3, 5)]


def windows_of(geometry: Geometry, shape: tuple[int, ...]) -> list[int] | None:
    if geometry.whole:
        return None
    return sorted({1, 3, max_window(geometry, *shape[2:])})


FORMS = ["torch", *(name for name in VARIANTS if name.startswith("native"))]
"""Implementations of moments; the native ones leave whole windows to torch."""


@pytest.fixture(params=[variant(name) for name in FORMS])
def form(request: pytest.FixtureRequest) -> str:
    """One implementation, if it is to be had."""
    return str(request.param)


def moments(case: Case, form: str = "torch") -> PatchMoments:
    return PatchMoments(operator(case.bank, form), case.bank)


def arguments(case: Case) -> dict[str, Any]:
    return {
        "a": case.a,
        "s": case.s,
        "window": case.window,
        "ranges": case.ranges,
        "geometry": case.geometry,
    }


def references(case: Case) -> list[ReferencePosterior]:
    return [
        ReferencePosterior(
            case.x[b],
            case.bank[slice(*case.ranges[b].tolist())],
            float(case.a[b]),
            float(case.s[b]),
            1 if case.window is None else int(case.window[b]),
            case.geometry,
        )
        for b in range(len(case))
    ]


def directions(case: Case, seed: int = 3) -> Tensor:
    return torch.randn(case.x.shape, generator=torch.Generator().manual_seed(seed))


def low_noise(case: Case, s: float) -> Case:
    """Queries at a level at which the logits are of size 1/s², near-ties among them."""
    count = len(case)
    clean = case.bank[case.ranges[:, 0]] + s * directions(case)
    return replace(case, x=clean, a=torch.ones(count).double(), s=torch.full((count,), s).double())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_jacobian_products_equal_automatic_differentiation(
    form: str, geometry: Geometry, shape: tuple[int, int, int, int]
) -> None:
    case = random_case(geometry, shape, windows_of(geometry, shape))
    g = directions(case)
    mean, pulled = moments(case, form).vjp(case.x, g, **arguments(case))
    same_mean, pushed = moments(case, form).jvp(case.x, g, **arguments(case))
    assert torch.equal(mean, same_mean)
    for b, reference in enumerate(references(case)):
        own = reference.mean()
        least = 1e-7 * float(own.abs().max()) + 1e-12
        assert (mean[b] - own).abs().max() <= (least if exact(form, geometry) else 2e-6)
        for got, want in ((pulled[b], reference.vjp(g[b])), (pushed[b], reference.jvp(g[b]))):
            # Float64 throughout, rounded once to float32; or 1e-4 of the product, or of a tenth of
            # what it would be if D were x, where it is nearly 0 as one source has all the weight.
            slack = 1e-7 * float(want.abs().max()) + 1e-12
            if not exact(form, geometry):
                slack = 1e-4 * max(float(want.abs().max()), 0.1 * float(g[b].abs().max()))
            assert (got - want).abs().max() <= slack


def exact(form: str, geometry: Geometry) -> bool:
    """Return whether an implementation computes in float64."""
    return form == "torch" or geometry.whole


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


def test_jacobian_products_equal_central_differences(geometry: Geometry) -> None:
    case = random_case(geometry, (6, 2, 5, 4), windows_of(geometry, (6, 2, 5, 4)))
    u = directions(case)
    _, pushed = moments(case).jvp(case.x, u, **arguments(case))
    for b, reference in enumerate(references(case)):
        step = 1e-5 * reference.s
        x = reference.x.double()
        ahead, behind = (reference.mean(x + d * u[b].double()) for d in (step, -step))
        difference = (ahead - behind) / (2 * step)
        assert (pushed[b] - difference).abs().max() <= 1e-6 * difference.abs().max() + 1e-9


def test_the_two_products_are_adjoint_and_symmetric_for_whole_windows_alone(
    form: str, geometry: Geometry
) -> None:
    case = random_case(geometry, (9, 2, 5, 4), None if geometry.whole else [3])
    case = replace(case, a=torch.full_like(case.a, 0.8), s=torch.full_like(case.s, 0.6))
    g, u = directions(case, 1), directions(case, 2)
    _, pulled = moments(case, form).vjp(case.x, g, **arguments(case))
    _, pushed = moments(case, form).jvp(case.x, u, **arguments(case))
    left = (pulled.double() * u).sum((1, 2, 3))
    right = (g * pushed.double()).sum((1, 2, 3))
    atol = 1e-6 if exact(form, geometry) else 1e-5
    assert torch.allclose(left, right, rtol=1e-5, atol=atol)
    _, symmetric = moments(case, form).jvp(case.x, g, **arguments(case))
    if geometry.whole:
        assert torch.equal(symmetric, pulled)
    else:
        assert relative_errors(symmetric, pulled).max() > 1e-3


@pytest.mark.parametrize("s", [None, 1e-2, 1e-4])
def test_statistics_equal_brute_force(form: str, geometry: Geometry, s: float | None) -> None:
    shape = (5, 2, 5, 4)
    case = random_case(geometry, shape, windows_of(geometry, shape))
    if s is not None:
        case = low_noise(case, s)
    operator = moments(case, form)
    got = operator.statistics(case.x, **arguments(case), top=5)
    for b, reference in enumerate(references(case)):
        lo, hi = case.ranges[b].tolist()
        slack = budgets(operator, case, b, reference)
        assert ((got.mean[b] - reference.mean()).abs() <= slack.mean).all()
        assert ((got.variance[b] - reference.variance()).abs() <= slack.variance).all()
        assert ((got.entropy[b] - reference.entropy()).abs() <= slack.entropy).all()
        shares = got.shares[b]
        assert ((shares[lo:hi] - reference.shares()).abs() <= slack.shares).all()
        assert abs(float(shares.sum()) - 1) <= 1e-9
        assert_sources(got.sources[b], got.weights[b], reference.log_weights().exp(), lo, slack)


def assert_sources(
    sources: Tensor, weights: Tensor, every: Tensor, lo: int, slack: Budgets
) -> None:
    """Assert that sources have the weights that are given, and that these are the largest."""
    width = sources.shape[1]
    listed, given = sources.flatten(0, 1), weights.flatten(0, 1)
    largest = every.flatten(1).sort(descending=True).values[:, : given.shape[1]]
    within = slack.weights.flatten(1).amax(1)[:, None] + 1e-6 * largest
    assert ((given[:, : largest.shape[1]] - largest).abs() <= within).all()
    assert (given[:, largest.shape[1] :] == 0).all()
    assert (given.diff(dim=1) <= 0).all()
    for place, (rows, own) in enumerate(zip(listed, given, strict=True)):
        kept = [tuple(source) for source in rows.tolist() if source[0] >= 0]
        assert len(set(kept)) == len(kept)
        assert len(kept) >= min(len(rows), int((every[place] > 0).sum()))
        for (image, row, col), weight in zip(kept, own.tolist(), strict=False):
            want = float(every[place, image - lo, row * width + col])
            error = float(slack.weights[place, image - lo, row * width + col])
            assert weight == pytest.approx(want, rel=1e-6, abs=error)


def test_all_sources_together_are_the_denoised_image(form: str, geometry: Geometry) -> None:
    case = random_case(geometry, (3, 2, 2, 2), None if geometry.whole else [1])
    got = moments(case, form).statistics(case.x, **arguments(case), top=16)
    used = got.sources.clamp(min=0)
    values = case.bank[used[..., 0], :, used[..., 1], used[..., 2]]
    rebuilt = (values * got.weights[..., None]).sum(3).permute(0, 3, 1, 2)
    assert (rebuilt - got.mean).abs().max() <= 1e-6


def test_the_variance_is_the_jacobian_of_a_pixel_by_itself(form: str, geometry: Geometry) -> None:
    case = random_case(geometry, (5, 1, 4, 5), None if geometry.whole else [3])[[0]]
    variance = moments(case, form).statistics(case.x, **arguments(case)).variance[0, 0]
    scale = float(case.a[0] / case.s[0] ** 2)
    for row, col in [(0, 0), (1, 3), (3, 4)]:
        unit = torch.zeros_like(case.x)
        unit[0, 0, row, col] = 1
        _, pushed = moments(case, form).jvp(case.x, unit, **arguments(case))
        assert float(pushed[0, 0, row, col]) == pytest.approx(
            scale * float(variance[row, col]),
            rel=1e-5,
            abs=1e-9 if exact(form, geometry) else 1e-6 * scale,
        )


@pytest.mark.parametrize("s", [10.0, 1e-3])
def test_removing_an_image_equals_the_bank_without_it(geometry: Geometry, s: float) -> None:
    case = random_case(geometry, (5, 2, 4, 5), None if geometry.whole else [3])
    case = low_noise(replace(case, ranges=torch.tensor([[0, 5]] * len(case))), s)
    # The queries are image 0 with noise: at low noise it weighs 1 and has to be recomputed.
    removed = moments(case).without(case.x, 0, **arguments(case))
    assert (float(removed.weight.max()) > 1 - 1e-6) == (s == 1e-3)
    for b, reference in enumerate(references(case)):
        rest = replace(reference, bank=reference.bank[1:])
        assert (removed.mean[b] - rest.mean()).abs().max() <= 1e-6
        weight = reference.log_weights().exp()[:, 0].sum(1).view(4, 5)
        assert (removed.weight[b] - weight).abs().max() <= 1e-6


def test_removing_an_image_outside_the_range_changes_nothing() -> None:
    case = random_case(GEOMETRIES["els", "zeros"], (5, 1, 4, 5), [3])
    case = replace(case, ranges=torch.tensor([[1, 4]] * len(case)))
    removed = moments(case).without(case.x, 4, **arguments(case))
    assert (removed.mean - case.attend("reference").mean).abs().max() <= 1e-7
    assert removed.weight.abs().max() == 0


def test_an_image_has_the_same_bits_alone_and_in_any_batch(form: str, geometry: Geometry) -> None:
    case = random_case(geometry, (9, 2, 3, 4), None if geometry.whole else [1, 3])
    g = directions(case)
    every = everything(case, g, form)
    order = list(range(len(case)))[::-1]
    for chosen in [*([b] for b in order), order]:
        for got, want in zip(everything(case[chosen], g[chosen], form), every, strict=True):
            assert torch.equal(got, want[chosen])


def everything(case: Case, g: Tensor, form: str = "torch") -> list[Tensor]:
    operator = moments(case, form)
    return [
        *operator.statistics(case.x, **arguments(case)),
        operator.vjp(case.x, g, **arguments(case))[1],
        operator.jvp(case.x, g, **arguments(case))[1],
        *operator.without(case.x, 0, **arguments(replace(case, ranges=_two_or_more(case)))),
    ]


def _two_or_more(case: Case) -> Tensor:
    return torch.tensor([[0, len(case.bank)]] * len(case))


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


@pytest.mark.parametrize("form", [variant("torch"), variant("native-baseline")])
def test_a_batch_of_sixteen_needs_less_than_64_mib_beside_the_bank(form: str) -> None:
    # In another process, whose peak is this alone; the small bank loads what torch loads once.
    # Tiles have their full size: 400 images are two of them.
    implementation = form.partition("-")[0]
    script = (
        f"implementation = {implementation!r}"
        + """
import resource, torch
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
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    assert float(done.stdout) <= 64


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
