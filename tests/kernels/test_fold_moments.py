"""Variance, entropy, sources and Jacobian products of a fold against the whole posterior."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.kernels.cases import random_bank
from tests.kernels.fold_cases import FOLD_NAMES, FoldCase, fold_case
from torch import Tensor

from els_kernels import (
    FOLD_MOMENT_IMPLEMENTATIONS,
    ComputationStoppedError,
    Control,
    FoldedMoments,
    PatchAttention,
    PatchMoments,
    PosteriorStatistics,
    fold_pairs,
)
from els_kernels.reference_fold_statistics import ReferenceFoldPosterior

PAIRS = [(0.5, 0.1), (0.3, math.inf), (0.05, 0.5), (1e-4, 0.5), (0.2, 0.0)]
"""(s, ρ)."""
TOP = 5
UNEQUAL = [(5, 7), (8, 6), (8, 6)]


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


def moments(case: FoldCase, implementation: str = "torch") -> FoldedMoments:
    return FoldedMoments(case.operator("torch"), implementation=implementation)


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


def directions(case: FoldCase, seed: int = 3) -> Tensor:
    return torch.randn(case.x.shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", FOLD_NAMES)
def test_statistics_equal_brute_force(name: str) -> None:
    for case in cases(name):
        got = moments(case).statistics(case.x, **arguments(case), top=TOP)
        for b, reference in enumerate(references(case)):
            assert_statistics(got, b, reference, 0)


def assert_statistics(
    got: PosteriorStatistics, b: int, reference: ReferenceFoldPosterior, lo: int
) -> None:
    """Assert the statistics of one image whose range starts at bank image ``lo``."""
    hi = lo + len(reference.bank)
    # A logit of size 1e8 rounds at 1e-8, and with it the weights.
    slack = 1e-7
    assert (got.mean[b] - reference.mean()).abs().max() <= slack
    assert (got.variance[b] - reference.variance()).abs().max() <= slack
    assert (got.entropy[b] - reference.entropy()).abs().max() <= 1e-6
    assert (got.shares[b, lo:hi] - reference.shares()).abs().max() <= slack
    assert abs(float(got.shares[b].sum()) - 1) <= 1e-9
    every = reference.weights()
    joined = torch.cat(every, 1)
    largest = joined.sort(descending=True).values[:, :TOP]
    given = got.weights[b].flatten(0, 1)
    assert (given[:, : largest.shape[1]] - largest).abs().max() <= slack
    assert (given.diff(dim=1) <= 0).all()
    for place, rows in enumerate(got.sources[b].flatten(0, 1).tolist()):
        kept = [source for source in rows if source[0] >= 0]
        assert len(set(map(tuple, kept))) == len(kept)
        assert len(kept) >= min(TOP, int((joined[place] > 1e-30).sum()))
        for (image, row, col), weight in zip(kept, given[place].tolist(), strict=False):
            width = reference.bank[image - lo].shape[2]
            want = float(every[image - lo][place, row * width + col])
            assert weight == pytest.approx(want, rel=1e-5, abs=slack)


@pytest.mark.parametrize("name", FOLD_NAMES)
def test_jacobian_products_equal_automatic_differentiation_and_are_adjoint(name: str) -> None:
    for case in cases(name):
        g, u = directions(case, 1), directions(case, 2)
        mean, pulled = moments(case).vjp(case.x, g, **arguments(case))
        same, pushed = moments(case).jvp(case.x, u, **arguments(case))
        assert torch.equal(mean, same)
        for b, reference in enumerate(references(case)):
            assert (mean[b] - reference.mean()).abs().max() <= 1e-7
            for got, want in ((pulled[b], reference.vjp(g[b])), (pushed[b], reference.jvp(u[b]))):
                # At s = 1e-4 one patch has all the weight, and both are 0 up to rounding.
                assert (got - want).norm() <= 1e-5 * want.norm() + 1e-9
            left, right = (pulled[b].double() * u[b]).sum(), (g[b] * pushed[b].double()).sum()
            assert float(left) == pytest.approx(float(right), rel=1e-5, abs=1e-5)


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
def test_all_sources_together_are_the_denoised_image(name: str) -> None:
    local = name.startswith("local")
    bank = random_bank((12, 2, 3, 4)) if local else random_bank((1, 2, 3, 4))
    case = fold_case(FOLD_NAMES[name], (3, 4), bank, 3, PAIRS)
    got = moments(case).statistics(case.x, **arguments(case), top=16)
    used = got.sources.clamp(min=0)
    values = bank[used[..., 0], :, used[..., 1], used[..., 2]]
    rebuilt = (values * got.weights[..., None]).sum(3).permute(0, 3, 1, 2)
    assert (rebuilt - got.mean).abs().max() <= 1e-6


def test_ranges_of_a_bank_of_unequal_sizes_have_indices_of_the_whole_bank() -> None:
    case = cases("els-zeros")[-1][[0, 1, 2]]
    ranges = torch.tensor([[0, 2], [1, 3], [2, 3]])
    case = replace(case, ranges=ranges)
    got = moments(case).statistics(case.x, **arguments(case), top=TOP)
    g = directions(case)
    _, pulled = moments(case).vjp(case.x, g, **arguments(case))
    for b, reference in enumerate(references(case)):
        assert_statistics(got, b, reference, int(ranges[b, 0]))
        want = reference.vjp(g[b])
        assert (pulled[b] - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("name", ["els-zeros", "els-circular", "els-valid", "local-zeros"])
def test_a_fold_of_zero_has_the_moments_of_patch_attention(name: str) -> None:
    bank = random_bank((4, 2, 6, 5))
    case = fold_case(FOLD_NAMES[name], (6, 5), bank, 3, [(0.5, 0.0), (0.1, 0.0)])
    plain = PatchMoments(PatchAttention(bank, implementation="torch"), bank)
    shared = {name: value for name, value in arguments(case).items() if name != "fold"}
    got = everything(case)
    g = directions(case)
    want = [
        *plain.statistics(case.x, **shared, top=TOP),
        plain.vjp(case.x, g, **shared)[1],
        plain.jvp(case.x, g, **shared)[1],
    ]
    for one, other in zip(got, want, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FOLD_NAMES)
def test_an_image_has_the_same_bits_alone_and_in_any_batch(name: str) -> None:
    case = cases(name)[0]
    every = everything(case)
    for chosen in ([1], [4, 2, 0]):
        for got, want in zip(
            everything(case[chosen], directions(case)[chosen]), every, strict=True
        ):
            assert torch.equal(got, want[chosen])


def everything(case: FoldCase, g: Tensor | None = None) -> list[Tensor]:
    operator, along = moments(case), directions(case) if g is None else g
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


def test_the_callers_modes_change_no_bit() -> None:
    case = cases("els-zeros")[-1][[0, 1]]
    want = everything(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = everything(replace(case, x=case.x.requires_grad_()))
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)
        assert not one.requires_grad


def test_shares_may_be_left_out() -> None:
    case = cases("els-inside")[0][[0]]
    with_shares, without = (
        moments(case).statistics(case.x, **arguments(case), shares=shares)
        for shares in (True, False)
    )
    assert without.shares.shape == (1, 0)
    for got, want in zip(without[:-1], with_shares[:-1], strict=True):
        assert torch.equal(got, want)


def test_a_batch_of_sixteen_needs_less_than_64_mib_beside_the_bank() -> None:
    # In another process, whose peak is this alone; the small bank loads what torch loads once.
    script = """
import resource, torch
torch.set_num_threads(1)
from els_kernels import FOLD_GEOMETRIES, FoldedAttention, FoldedMoments
def prepared(size):
    bank = torch.rand(1, 3, *size)
    return FoldedMoments(FoldedAttention(bank, implementation="torch"), implementation="torch")
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
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    assert float(done.stdout) <= 64


@pytest.mark.parametrize("name", ["els-inside", "local-zeros"])
def test_a_stopped_computation_ends(name: str) -> None:
    case = cases(name)[0]
    control = Control()
    control.stop()
    for call in ("statistics", "vjp", "jvp"):
        along = [] if call == "statistics" else [case.x]
        with control, pytest.raises(ComputationStoppedError):
            getattr(moments(case), call)(case.x, *along, **arguments(case))


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
