"""Properties of the native moments alone, for every instruction set of this processor."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from benchmarks.fold.matmul import picture
from tests.kernels.cases import NAMES, VARIANTS, Case, operator, random_bank, random_case
from tests.kernels.conftest import variant, widest
from tests.support.rows import latin, telling
from torch import Tensor

from els_kernels import GEOMETRIES, PatchMoments, PosteriorStatistics
from els_kernels.native.moments_binding import NativeQuery, units

WINDOWED = [name for name in NAMES if not NAMES[name].whole]
few_rows = telling(lambda native, name: widest(native) or name in ("els-zeros", "local-circular"))
"""Narrower vectors: the machine of two kinds of patches, and the one of one place."""


@pytest.fixture(params=[variant(name) for name in VARIANTS if name.startswith("native")])
def native(request: pytest.FixtureRequest) -> str:
    """One instruction set, if it is to be had."""
    return str(request.param)


def ask(
    case: Case, moments: PatchMoments, threads: int, top: int = 4
) -> tuple[PosteriorStatistics, Tensor, Tensor]:
    arguments: dict[str, Any] = {
        "a": case.a,
        "s": case.s,
        "window": case.window,
        "ranges": case.ranges,
        "geometry": case.geometry,
    }
    along = torch.randn(case.x.shape, generator=torch.Generator().manual_seed(5))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return (
            moments.statistics(case.x, **arguments, top=top),
            moments.vjp(case.x, along, **arguments)[1],
            moments.jvp(case.x, along, **arguments)[1],
        )
    finally:
        torch.set_num_threads(before)


def large(name: str) -> Case:
    """Queries whose work is split into many tasks, by tiles and by displacements."""
    return random_case(NAMES[name], (70, 3, 9, 8), [5, 7], of_bytes=True)[[0, 3]]


@few_rows
@pytest.mark.parametrize("name", WINDOWED)
def test_the_number_of_threads_changes_no_bit(native: str, name: str) -> None:
    case = large(name)
    moments = PatchMoments(operator(case.bank, native), case.bank)
    one, three = ask(case, moments, 1), ask(case, moments, 3)
    for got, want in zip([*three[0], *three[1:]], [*one[0], *one[1:]], strict=True):
        assert torch.equal(got, want)


@few_rows
@pytest.mark.parametrize("name", WINDOWED)
def test_it_equals_the_float64_form_where_work_is_split(native: str, name: str) -> None:
    case = large(name)
    assert case.window is not None
    moments = PatchMoments(operator(case.bank, native), case.bank)
    exact = PatchMoments(operator(case.bank, native), case.bank, implementation="torch")
    got, want = ask(case, moments, 2), ask(case, exact, 2)
    for b in range(len(case)):
        # Logits that are wrong by δ change a weight by a factor of e^2δ at most.
        (query,) = moments._queries(
            case.x[[b]], case.a[[b]], case.s[[b]], case.window[[b]], case.ranges[[b]], case.geometry
        )
        assert isinstance(query, NativeQuery)
        slack = 5e-6 + 2 * math.log(2) * query.units.error
        assert slack <= 5e-3
        ours, exactly = got[0], want[0]
        assert (ours.mean[b] - exactly.mean[b]).abs().max() <= slack
        assert (ours.variance[b] - exactly.variance[b]).abs().max() <= slack
        assert (ours.weights[b] - exactly.weights[b]).abs().max() <= slack
        assert (ours.shares[b] - exactly.shares[b]).abs().max() <= slack
        # Each surprise is wrong by at most 2δ, and so is its mean under either posterior.
        assert (ours.entropy[b] - exactly.entropy[b]).abs().max() <= 10 * slack
        for product, exact_product in zip(got[1:], want[1:], strict=True):
            error = (product[b] - exact_product[b]).abs().max()
            assert error <= (1e-4 + slack) * exact_product[b].abs().max()


@pytest.mark.slow
def test_logits_use_every_unit_that_fits_so_that_products_are_right_to_1e_4(native: str) -> None:
    # Units that were a power of two of a bit, and held logits that no source has: 1.3e-4.
    bank = torch.cat([picture(16, 16, 500 + seed) for seed in range(4)])
    generator = torch.Generator().manual_seed(5)
    noise, along = torch.randn(2, *bank[:1].shape, generator=generator)
    a = math.sqrt(1 - 0.1**2)
    x = a * bank[:1].flip(3) + 0.1 * noise
    options: dict[str, Any] = {"a": torch.tensor([a]), "s": torch.tensor([0.1])}
    options |= {"window": torch.tensor([9]), "geometry": GEOMETRIES["els", "valid"]}
    attention = operator(bank, native)
    want = PatchMoments(attention, bank, implementation="torch").vjp(x, along, **options)[1]
    got = PatchMoments(attention, bank).vjp(x, along, **options)[1]
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


@pytest.mark.parametrize("s", [1.0, 1e-2, 1e-4])
def test_equal_patches_have_equal_weights_at_any_level(native: str, s: float) -> None:
    # Flat images, as the background of digits is: float logits of equal patches differ by rounding.
    bank = random_bank((9, 1, 12, 12))
    bank[:7] = torch.tensor(0.3)
    x = torch.full((1, 1, 12, 12), 0.3) + 1e-3 * s * random_bank((1, 1, 12, 12), 7)
    case = Case(
        GEOMETRIES["els", "circular"],
        bank,
        x,
        torch.ones(1),
        torch.tensor([s]),
        torch.tensor([5]),
        torch.tensor([[0, 7]]),
    )
    found, *_ = ask(case, PatchMoments(operator(bank, native), bank), 2, top=16)
    assert torch.allclose(found.entropy, torch.tensor(math.log(7 * 144)), rtol=1e-6)
    assert torch.allclose(found.weights, torch.tensor(1 / (7 * 144)), rtol=1e-5)
    assert torch.allclose(found.shares[0, :7], torch.tensor(1 / 7, dtype=torch.float64))
    assert found.shares[0, 7:].abs().max() == 0
    # In the order of the sweep: from the first tile of images.
    first = found.sources[..., 0]
    assert first.max() < 16
    assert (found.sources[..., 0] >= 0).all()


def test_a_source_that_has_all_the_weight_leaves_no_product(native: str) -> None:
    case = random_case(NAMES["els-zeros"], (3, 2, 6, 5), [3])
    case = replace(case, ranges=torch.tensor([[1, 2]] * len(case)), geometry=NAMES["local-zeros"])
    found, *products = ask(case, PatchMoments(operator(case.bank, native), case.bank), 1)
    assert found.entropy.abs().max() == 0
    for product in products:
        # But for one rounding, of e = mean.
        assert product.abs().max() <= 1e-8


@pytest.mark.parametrize("s", [1.0, 1e-2, 1e-4, 1e-8])
def test_logits_fit_their_integers(s: float) -> None:
    found = units(query=20.0, key=17.0, pixels=729, a=1.0, s=s)
    highest = found.product * 20 * 17
    for logit in (highest, -highest + found.norm * 17**2):
        assert found.lowest <= logit <= found.lowest + 2**31
        # What is no source is never taken for one, and does not wrap around.
        assert logit + found.forbidden - highest - found.lowest >= -(2**31)
    assert highest + found.forbidden < found.lowest


@few_rows
@latin(2, "name", "size")
@pytest.mark.parametrize("size", [3.0, 1e4])
@pytest.mark.parametrize("name", WINDOWED)
def test_a_query_far_from_the_bank_has_the_statistics_of_its_nearest_patches(
    native: str, name: str, size: float
) -> None:
    # One unit of a logit is up to 2^30 bits here, which no weight may underflow or overflow by.
    case = random_case(NAMES[name], (3, 2, 6, 5), [3], of_bytes=True)
    case = replace(case, a=torch.ones(2), s=torch.tensor([1e-4, 2e-3]), x=size * case.x)
    moments = PatchMoments(operator(case.bank, native), case.bank)
    exact = PatchMoments(operator(case.bank, native), case.bank, implementation="torch")
    (found, *products), (want, *_) = ask(case, moments, 1, top=1), ask(case, exact, 1, top=1)
    assert torch.equal(found.sources, want.sources)
    for ours, exactly in zip(found, want, strict=True):
        assert (ours - exactly).abs().max() <= 1e-5
    for product in products:
        assert product.abs().max() <= 1e-4
