"""Variance, entropy, sources and Jacobian products of a fold against the whole posterior."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from tests.kernels.cases import random_bank
from tests.kernels.conftest import variant
from tests.kernels.fold_cases import FOLD_NAMES, FOLD_VARIANTS, FoldCase, fold_case
from tests.kernels.moment_budgets import Budgets, posterior_budgets
from torch import Tensor

from els_kernels import (
    FOLD_MOMENT_IMPLEMENTATIONS,
    ComputationStoppedError,
    Control,
    FoldedAttention,
    FoldedMoments,
    PatchAttention,
    PatchMoments,
    PosteriorStatistics,
    fold_pairs,
)
from els_kernels.native import NativeFoldMoments
from els_kernels.reference_fold_statistics import ReferenceFoldPosterior
from els_kernels.torch_fold import decoded

PAIRS = [(0.5, 0.1), (0.3, math.inf), (0.05, 0.5), (1e-4, 0.5), (0.2, 0.0)]
"""(s, ρ)."""
TOP = 5
UNEQUAL = [(5, 7), (8, 6), (8, 6)]
ROUNDING = 3e-6
"""Relative error of the native sums: of a logit of 20 bits, of 2^z, and of 2k taps, in float32."""
LEAST = 1e-8
"""Weight from which the native form lists a source: it skips 2^-26 of a patch's weights."""


@pytest.fixture(params=[variant(name) for name in FOLD_VARIANTS])
def form(request: pytest.FixtureRequest) -> str:
    """One implementation, if it is to be had."""
    return str(request.param)


def banks(name: str) -> list[tuple[tuple[int, int], list[Tensor], int]]:
    """Return sizes of queries, banks and windows: equal sizes, clipped patches, unequal sizes."""
    found = [((6, 5), list(random_bank((2, 2, 6, 5))), 3)]
    if name == "local-zeros":
        found.append(((4, 5), list(random_bank((2, 1, 4, 5))), 9))
    if name.startswith("els"):
        found.append(
            ((7, 6), [random_bank((1, 2, *size), i)[0] for i, size in enumerate(UNEQUAL)], 5)
        )
    return found


def cases(name: str) -> list[FoldCase]:
    return [
        fold_case(FOLD_NAMES[name], size, bank, window, PAIRS) for size, bank, window in banks(name)
    ]


def moments(case: FoldCase, form: str = "torch") -> FoldedMoments:
    kind, _, instruction_set = form.partition("-")
    with pytest.MonkeyPatch.context() as patch:
        if kind == "native":
            made = partial(NativeFoldMoments, instruction_set=instruction_set)
            patch.setitem(FOLD_MOMENT_IMPLEMENTATIONS, "native", made)
        return FoldedMoments(case.operator("torch"), implementation=kind)


def budgets(
    operator: FoldedMoments, case: FoldCase, b: int, reference: ReferenceFoldPosterior
) -> Budgets:
    """Return the budgets of one image: float64, or as far as logits may be wrong."""
    weights, mean = torch.cat(once("weights", reference), 1), once("mean", reference)
    implementation = operator._moments
    if not isinstance(implementation, NativeFoldMoments):
        # A logit of size 1e8 rounds at 1e-8, and with it the weights.
        even = torch.full_like(mean, 1e-7)
        return Budgets(even, even, even[0] + 1e-6, 1e-7, torch.full_like(weights, 1e-7))
    level = float(case.a[b]), float(case.s[b]), int(case.window[b])
    error = implementation.units(case.x[b], *level, case.geometry).error
    values = torch.cat([image.double().flatten(1) for image in reference.bank], 1)
    return posterior_budgets(weights, values, mean, error, ROUNDING)


def arguments(case: FoldCase) -> dict[str, Any]:
    return {
        "a": case.a,
        "s": case.s,
        "window": case.window,
        "fold": case.fold,
        "ranges": case.ranges,
        "geometry": case.geometry,
    }


def references(case: FoldCase) -> list[ReferenceFoldPosterior]:
    limits = [(0, len(case.bank))] * len(case.x) if case.ranges is None else case.ranges.tolist()
    return [
        ReferenceFoldPosterior(
            case.x[b],
            list(case.bank)[lo:hi],
            float(case.a[b]),
            float(case.s[b]),
            int(case.window[b]),
            float(case.fold[b]),
            case.geometry,
        )
        for b, (lo, hi) in enumerate(limits)
    ]


_KNOWN: dict[tuple[object, ...], Any] = {}


def once(name: str, reference: ReferenceFoldPosterior, *along: Tensor) -> Any:
    """Return a result of the reference; computed once for all implementations."""
    tensors = [t.numpy().tobytes() for t in (reference.x, *reference.bank, *along)]
    level = reference.s, reference.window, reference.fold, reference.geometry
    key = name, *level, *tensors
    if key not in _KNOWN:
        _KNOWN[key] = getattr(reference, name)(*along)
    return _KNOWN[key]


def directions(case: FoldCase, seed: int = 3) -> Tensor:
    return torch.randn(case.x.shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", FOLD_NAMES)
def test_statistics_equal_brute_force(form: str, name: str) -> None:
    for case in cases(name):
        operator = moments(case, form)
        got = operator.statistics(case.x, **arguments(case), top=TOP)
        for b, reference in enumerate(references(case)):
            assert_statistics(got, b, reference, 0, budgets(operator, case, b, reference))


def assert_statistics(
    got: PosteriorStatistics, b: int, reference: ReferenceFoldPosterior, lo: int, slack: Budgets
) -> None:
    """Assert the statistics of one image whose range starts at bank image ``lo``."""
    hi = lo + len(reference.bank)
    assert ((got.mean[b] - once("mean", reference)).abs() <= slack.mean).all()
    assert ((got.variance[b] - once("variance", reference)).abs() <= slack.variance).all()
    assert ((got.entropy[b] - once("entropy", reference)).abs() <= slack.entropy).all()
    assert (got.shares[b, lo:hi] - once("shares", reference)).abs().max() <= slack.shares
    assert abs(float(got.shares[b].sum()) - 1) <= 1e-9
    every = torch.cat(once("weights", reference), 1)
    largest = every.sort(descending=True).values[:, :TOP]
    given = got.weights[b].flatten(0, 1)
    within = slack.weights.amax(1)[:, None]
    assert ((given[:, : largest.shape[1]] - largest).abs() <= within).all()
    assert (given.diff(dim=1) <= 0).all()
    width = torch.tensor([image.shape[2] for image in reference.bank])
    sizes = torch.tensor([image[0].numel() for image in reference.bank])
    starts = sizes.cumsum(0) - sizes
    sources = got.sources[b].flatten(0, 1)
    listed = sources[..., 0] >= 0
    assert (listed.sum(1) >= (largest > LEAST).sum(1)).all()
    image = (sources[..., 0] - lo).clamp(min=0)
    place = starts[image] + sources[..., 1] * width[image] + sources[..., 2]
    place = place.masked_fill(~listed, -1)
    for row in place.tolist():
        kept = [source for source in row if source >= 0]
        assert len(set(kept)) == len(kept)
    at = place.clamp(min=0)
    gaps = (given - every.gather(1, at)).abs().masked_fill(~listed, 0)
    assert (gaps <= slack.weights.gather(1, at) + 1e-5 * given).all()
    assert (given[~listed] == 0).all()


@pytest.mark.parametrize("name", FOLD_NAMES)
def test_jacobian_products_equal_automatic_differentiation_and_are_adjoint(
    form: str, name: str
) -> None:
    for case in cases(name):
        g, u = directions(case, 1), directions(case, 2)
        operator = moments(case, form)
        mean, pulled = operator.vjp(case.x, g, **arguments(case))
        same, pushed = operator.jvp(case.x, u, **arguments(case))
        assert torch.equal(mean, same)
        for b, reference in enumerate(references(case)):
            slack = budgets(operator, case, b, reference)
            assert ((mean[b] - once("mean", reference)).abs() <= slack.mean).all()
            for got, want in (
                (pulled[b], once("vjp", reference, g[b])),
                (pushed[b], once("jvp", reference, u[b])),
            ):
                if form == "torch":
                    # At s = 1e-4 one patch has all the weight, and both are 0 up to rounding.
                    assert (got - want).norm() <= 1e-5 * want.norm() + 1e-9
                else:
                    # Of the product, or of a tenth of what it would be if D were x.
                    size = max(float(want.abs().max()), 0.1 * float(g[b].abs().max()))
                    assert (got - want).abs().max() <= 1e-4 * size
            left, right = (pulled[b].double() * u[b]).sum(), (g[b] * pushed[b].double()).sum()
            tolerance = 1e-5 if form == "torch" else 1e-4
            assert float(left) == pytest.approx(float(right), rel=tolerance, abs=10 * tolerance)


def test_at_low_noise_near_ties_have_the_products_of_automatic_differentiation() -> None:
    # Two images that differ by less than the noise: weights of 1e-4 of noise are far from 0 and 1.
    first = random_bank((1, 1, 6, 5))
    bank = torch.cat([first, first + 2e-5 * random_bank((1, 1, 6, 5), 7)])
    for name in ("els-inside", "els-zeros", "local-circular"):
        case = fold_case(FOLD_NAMES[name], (6, 5), bank, 3, [(1e-4, 0.5)])
        case = replace(case, x=bank[:1] + 1e-5 * directions(case))
        g = directions(case)
        _, pulled = moments(case).vjp(case.x, g, **arguments(case))
        _, pushed = moments(case).jvp(case.x, g, **arguments(case))
        (reference,) = references(case)
        for got, want in ((pulled[0], reference.vjp(g[0])), (pushed[0], reference.jvp(g[0]))):
            assert want.norm() > 1e-3
            assert (got - want).norm() <= 1e-4 * want.norm()
        found = moments(case).statistics(case.x, **arguments(case), top=TOP)
        assert float(reference.entropy().max()) > 0.1
        assert (found.entropy[0] - reference.entropy()).abs().max() <= 1e-5


@pytest.mark.parametrize("name", FOLD_NAMES)
def test_all_sources_together_are_the_denoised_image(form: str, name: str) -> None:
    local = name.startswith("local")
    bank = random_bank((12, 2, 3, 4)) if local else random_bank((1, 2, 3, 4))
    case = fold_case(FOLD_NAMES[name], (3, 4), bank, 3, PAIRS)
    got = moments(case, form).statistics(case.x, **arguments(case), top=16)
    used = got.sources.clamp(min=0)
    values = bank[used[..., 0], :, used[..., 1], used[..., 2]]
    rebuilt = (values * got.weights[..., None]).sum(3).permute(0, 3, 1, 2)
    assert (rebuilt - got.mean).abs().max() <= 2e-6


def test_ranges_of_a_bank_of_unequal_sizes_have_indices_of_the_whole_bank(form: str) -> None:
    case = cases("els-zeros")[-1][[0, 1, 2]]
    ranges = torch.tensor([[0, 2], [1, 3], [2, 3]])
    case = replace(case, ranges=ranges)
    operator = moments(case, form)
    got = operator.statistics(case.x, **arguments(case), top=TOP)
    g = directions(case)
    _, pulled = operator.vjp(case.x, g, **arguments(case))
    for b, reference in enumerate(references(case)):
        slack = budgets(operator, case, b, reference)
        assert_statistics(got, b, reference, int(ranges[b, 0]), slack)
        want = once("vjp", reference, g[b])
        assert (pulled[b] - want).norm() <= (1e-5 if form == "torch" else 1e-4) * want.norm()


@pytest.mark.parametrize("name", ["els-zeros", "els-circular", "els-valid", "local-zeros"])
def test_a_fold_of_zero_has_the_moments_of_patch_attention(form: str, name: str) -> None:
    bank = random_bank((4, 2, 6, 5))
    case = fold_case(FOLD_NAMES[name], (6, 5), bank, 3, [(0.5, 0.0), (0.1, 0.0)])
    plain = PatchMoments(PatchAttention(bank, implementation="torch"), bank)
    shared = {name: value for name, value in arguments(case).items() if name != "fold"}
    got = everything(case, form=form)
    g = directions(case)
    want = [
        *plain.statistics(case.x, **shared, top=TOP),
        plain.vjp(case.x, g, **shared)[1],
        plain.jvp(case.x, g, **shared)[1],
    ]
    tolerance = 1e-6 if form == "torch" else 5e-5
    listed = want[4] > LEAST
    for index, (one, other) in enumerate(zip(got, want, strict=True)):
        if index == 3:
            assert torch.equal(one[listed], other[listed])
        else:
            assert torch.allclose(one, other, rtol=10 * tolerance, atol=tolerance)


@pytest.mark.parametrize("name", FOLD_NAMES)
def test_an_image_has_the_same_bits_alone_and_in_any_batch(form: str, name: str) -> None:
    case = cases(name)[0]
    every = everything(case, form=form)
    for chosen in ([1], [4, 2, 0]):
        for got, want in zip(
            everything(case[chosen], directions(case)[chosen], form), every, strict=True
        ):
            assert torch.equal(got, want[chosen])


# Not torch: a matmul library partitions its work by the number of threads.
@pytest.mark.parametrize("form", [variant(n) for n in FOLD_VARIANTS if n.startswith("native")])
@pytest.mark.parametrize("name", ["els-inside", "els-circular", "local-zeros"])
def test_native_has_the_same_bits_for_any_number_of_threads(form: str, name: str) -> None:
    bank = random_bank((40, 1, 9, 8))
    bank[7:9] = bank[3:5]
    case = fold_case(FOLD_NAMES[name], (9, 8), bank, 5, PAIRS)
    before, answers = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            answers.append(everything(case, form=form))
    finally:
        torch.set_num_threads(before)
    for answer in answers[1:]:
        for got, want in zip(answer, answers[0], strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("s", [1.0, 1e-2, 1e-4])
def test_equal_patches_have_equal_weights_at_any_level(form: str, s: float) -> None:
    # Flat images, as the background of digits is: sources of one weight, in the order of the bank.
    bank = torch.full((7, 1, 12, 12), 0.3)
    x = torch.full((1, 1, 12, 12), 0.3) + 1e-3 * s * random_bank((1, 1, 12, 12), 7)
    case = replace(
        fold_case(FOLD_NAMES["els-circular"], (12, 12), bank, 5, [(s, 0.2)]),
        x=x,
        ranges=torch.tensor([[1, 7]]),
    )
    found = moments(case, form).statistics(case.x, **arguments(case), top=16)
    assert torch.allclose(found.entropy, torch.tensor(math.log(6 * 144)), rtol=1e-6)
    assert torch.allclose(found.weights, torch.tensor(1 / (6 * 144)), rtol=1e-5)
    assert torch.allclose(found.shares[0, 1:], torch.tensor(1 / 6, dtype=torch.float64), rtol=1e-6)
    assert (found.sources[..., 0] >= 1).all()


def everything(case: FoldCase, g: Tensor | None = None, form: str = "torch") -> list[Tensor]:
    operator, along = moments(case, form), directions(case) if g is None else g
    return [
        *operator.statistics(case.x, **arguments(case), top=TOP),
        operator.vjp(case.x, along, **arguments(case))[1],
        operator.jvp(case.x, along, **arguments(case))[1],
    ]


@pytest.mark.parametrize("tile", [1, 500])
@pytest.mark.parametrize("name", FOLD_NAMES)
def test_tiles_change_results_by_rounding_only(
    monkeypatch: pytest.MonkeyPatch, name: str, tile: int
) -> None:
    case = cases(name)[0][[0]]
    want = everything(case)
    monkeypatch.setattr(fold_pairs, "TILE", tile)
    for got, whole in zip(everything(case), want, strict=True):
        assert torch.allclose(got, whole, rtol=1e-5, atol=1e-6)


def test_the_callers_modes_change_no_bit(form: str) -> None:
    case = cases("els-zeros")[-1][[0, 1]]
    want = everything(case, form=form)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = everything(replace(case, x=case.x.requires_grad_()), form=form)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)
        assert not one.requires_grad


def test_shares_may_be_left_out(form: str) -> None:
    case = cases("els-inside")[0][[0]]
    with_shares, without = (
        moments(case, form).statistics(case.x, **arguments(case), shares=shares)
        for shares in (True, False)
    )
    assert without.shares.shape == (1, 0)
    for got, want in zip(without[:-1], with_shares[:-1], strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("form", [variant("torch"), variant("native-baseline")])
def test_a_batch_of_sixteen_needs_less_than_64_mib_beside_the_bank(form: str) -> None:
    # In another process, whose peak is this alone; the small bank loads what torch loads once.
    script = """
import resource, sys, torch
kind = sys.argv[1]
torch.set_num_threads(1)
from els_kernels import FOLD_GEOMETRIES, FoldedAttention, FoldedMoments
def prepared(size):
    bank = torch.rand(1, 3, *size)
    return FoldedMoments(FoldedAttention(bank, implementation=kind), implementation=kind)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def ask(moments, images):
    x = torch.rand(images, 3, 20, 28)
    arguments = {"a": torch.ones(images), "s": torch.full((images,), 0.01)}
    arguments["geometry"] = FOLD_GEOMETRIES["els", "inside"]
    arguments["window"] = torch.full((images,), 7)
    arguments["fold"] = torch.full((images,), 0.5)
    moments.vjp(x, x, **arguments)
    moments.jvp(x, x, **arguments)
    moments.statistics(x, **arguments, top=16)
small, large = prepared((9, 9)), prepared((28, 40))
ask(small, 1)
before = peak()
ask(large, 16)
print(peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, form.partition("-")[0]],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert float(done.stdout) <= 64


def results(operator: FoldedMoments, case: FoldCase, g: Tensor) -> list[Tensor]:
    found = operator.statistics(case.x, **arguments(case))
    products = [each(case.x, g, **arguments(case))[1] for each in (operator.vjp, operator.jvp)]
    return [found.mean, found.variance, found.entropy, found.shares.float(), *products]


def test_a_bank_in_bytes_has_the_moments_of_its_values_and_is_not_copied(form: str) -> None:
    stored = torch.randint(
        0, 256, (3, 2, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    case = fold_case(FOLD_NAMES["els-inside"], (6, 5), decoded(stored), 3, PAIRS[:2])
    kind = form.partition("-")[0]
    attention = FoldedAttention(stored, implementation=kind)
    operator = FoldedMoments(attention, implementation=kind)
    (group,) = attention.groups
    assert group.data_ptr() == stored.data_ptr()
    (kept,) = getattr(operator._moments, "groups" if kind == "native" else "_groups")
    assert kept.data_ptr() == stored.data_ptr()
    g = directions(case)
    want = FoldedMoments(FoldedAttention(case.bank, implementation=kind), implementation=kind)
    for one, other in zip(*(results(each, case, g) for each in (operator, want)), strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)
    reference = references(case)[0]
    assert torch.equal(replace(reference, bank=list(stored)).variance(), reference.variance())


@pytest.mark.parametrize("name", ["els-inside", "local-zeros"])
def test_a_stopped_computation_ends(form: str, name: str) -> None:
    case = cases(name)[0]
    control = Control()
    control.stop()
    for call in ("statistics", "vjp", "jvp"):
        along = [] if call == "statistics" else [case.x]
        with control, pytest.raises(ComputationStoppedError):
            getattr(moments(case, form), call)(case.x, *along, **arguments(case))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, c: m.vjp(c.x, c.x[:1], **arguments(c)), "cotangent: expected the shape of x"),
        (lambda m, c: m.jvp(c.x, c.x.double(), **arguments(c)), "tangent: expected torch.float32"),
        (lambda m, c: m.jvp(c.x, c.x * math.inf, **arguments(c)), "tangent: expected finite"),
        (lambda m, c: m.statistics(c.x, **arguments(c), top=17), "top: expected 1 to 16, got 17"),
        (lambda m, c: m.statistics(c.x, **arguments(c), top=0), "top: expected 1 to 16, got 0"),
        (lambda m, c: m.vjp(c.x[:, :1], c.x, **arguments(c)), "x: expected shape"),
        (
            lambda m, c: m.vjp(c.x, c.x, **{**arguments(c), "fold": c.s * 0 + 0.01}),
            "fold: expected 0 or at least 0.05, got 0.01",
        ),
        (
            lambda m, c: FoldedMoments(m.attention, implementation="jax"),
            f"implementation: expected auto or one of {', '.join(FOLD_MOMENT_IMPLEMENTATIONS)}, "
            "got 'jax'",
        ),
    ],
)
def test_a_bad_argument_is_named(call: Any, message: str) -> None:
    case = cases("els-inside")[0]
    with pytest.raises(ValueError, match=message):
        call(moments(case), case)


def test_auto_is_the_form_of_the_operator_or_torch() -> None:
    case = cases("els-inside")[0]
    attention = case.operator("reference")
    assert FoldedMoments(attention).implementation == "torch"
    assert FoldedMoments(case.operator("torch")).implementation == "torch"


def test_auto_is_native_beside_a_native_operator(form: str) -> None:
    case = cases("els-inside")[0]
    assert FoldedMoments(case.operator(form)).implementation == form.partition("-")[0]
