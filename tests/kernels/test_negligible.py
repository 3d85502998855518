"""Blocks of sources whose weights do not count: the bound, budgets and bits at low noise."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from tests.kernels.bank_parts import OwnParts
from tests.kernels.cases import (
    NAMES,
    VARIANTS,
    Case,
    evidence_budgets,
    operator,
    random_bank,
    relative_errors,
)
from tests.kernels.conftest import variant
from tests.kernels.test_batch_invariance import ask, assert_same_bits
from tests.support.rows import latin

from els_kernels import PatchAttention, Posterior
from els_kernels.native import Native

COUNTED = 28
"""Bits of a sum that count: ``kCounted`` of scratch.hpp."""
TILES, BLOCK = 8, 4
"""Vectors of images of a task at the same place, and of a block of it."""

LEVELS = (0.2, 0.05, 0.01, 1e-4)
SHAPE = (60, 1, 10, 9)
MACHINES = ("els-zeros", "els-circular", "els-valid", "local-zeros", "local-circular")


@pytest.fixture(params=[variant(name) for name in VARIANTS if name.startswith("native")])
def native(request: pytest.FixtureRequest) -> str:
    """One instruction set."""
    return str(request.param)


@pytest.mark.parametrize("counts", [True, False], ids=["just-above", "just-below"])
def test_all_but_the_nearest_image_just_above_and_just_below_the_bound(
    native: str, counts: bool
) -> None:
    # At the same place with a window of one pixel, sources are as many as images, in two blocks.
    instruction_set = native.removeprefix("native-")
    lanes = Native(torch.zeros(1, 1, 1, 1), instruction_set=instruction_set).lanes
    images = TILES * lanes
    bits = COUNTED + math.log2(images) + (-0.25 if counts else 0.25)
    a, s = 0.8, 0.1
    apart = s / a * math.sqrt(2 * bits * math.log(2))
    bank = torch.full((images, 1, 3, 3), -0.4)
    bank[1:] += apart
    # The nearest image is the centre, so that responses are those of the others alone.
    prepared = Native(bank, instruction_set=instruction_set, centre=bank[0, :, 0, 0].double())
    levels = [a], [s], [1], [(0, images)], NAMES["local-zeros"]
    responses = prepared.rows(a * bank[:1], *levels).sums[0, 1]
    seen = (TILES if counts else BLOCK) * lanes - 1
    expected = torch.full((3, 3), seen * apart * 2.0**-bits, dtype=torch.float64)
    torch.testing.assert_close(responses, expected, rtol=1e-3, atol=0)
    assert (TILES - BLOCK) * lanes * 2.0**-bits < 2.0**-COUNTED
    mean, _ = prepared.attend(a * bank[:1], *levels)
    assert torch.equal(mean, bank[:1])


@cache
def at_low_noise(name: str) -> tuple[Case, Posterior]:
    """Return queries at every level, near images of the bank and others, with their reference.

    Images of the bank stand in it once, twice and three times, far from each other.
    """
    generator = torch.Generator().manual_seed(5)
    bank, others = random_bank(SHAPE), random_bank((4, *SHAPE[1:]), 6)
    bank[50] = bank[33] = bank[2]
    bank[41] = bank[3]
    clean = torch.cat([bank[1:4], others[:1]]).repeat(len(LEVELS), 1, 1, 1)
    s = torch.tensor(LEVELS, dtype=torch.float64).repeat_interleave(4)
    a = (1 - s * s).sqrt()
    noise = torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    x = (a[:, None, None, None] * clean + s[:, None, None, None] * noise).float()
    window = torch.tensor([3, 5, 5, 3] * len(LEVELS))
    ranges = torch.tensor([[0, SHAPE[0]]] * 15 + [[7, 44]])
    case = Case(NAMES[name], bank, x, a, s, window, ranges)
    return case, case.attend("reference")


@latin(2, "native", "name")
@pytest.mark.parametrize("name", MACHINES)
def test_answers_at_low_noise_stay_within_budget_with_images_that_stand_in_the_bank_twice(
    native: str, name: str
) -> None:
    case, want = at_low_noise(name)
    got = case.attend(native)
    # Queries near bank images, where at each level one patch wins or equal ones do.
    near = [i for i in range(len(case)) if i % 4 < 3]
    assert (relative_errors(got.mean[near], want.mean[near]) <= 1e-4).all()
    errors = (got.log_evidence.double() - want.log_evidence).abs().flatten(1).amax(1)
    assert (errors <= evidence_budgets(case, want.log_evidence)).all()


@latin(2, "native", "name")
@pytest.mark.parametrize("name", MACHINES)
def test_bits_at_low_noise_depend_neither_on_company_nor_on_threads_nor_on_parts(
    native: str, name: str
) -> None:
    case, _ = at_low_noise(name)
    attention = operator(case.bank, native)
    alone = [ask(case[[i]], attention, 1) for i in range(len(case))]
    assert_same_bits(ask(case, attention, 2), alone)
    backwards = list(range(len(case)))[::-1]
    assert_same_bits(ask(case[backwards], attention, 1), alone[::-1])


@pytest.mark.parametrize("name", ["els-zeros", "local-circular"])
def test_bits_at_low_noise_do_not_depend_on_the_number_of_parts(name: str) -> None:
    # More blocks than parts, the last of which is short.
    case, _ = at_low_noise(name)
    bank = case.bank.repeat(70, 1, 1, 1)[:4150]
    case = Case(case.geometry, bank, case.x, case.a, case.s, case.window, case.ranges)[
        [1, 6, 9, 14]
    ]
    case.ranges[:3] = torch.tensor([0, 4150])
    want = case.ask(operator(bank, "native-avx2"))
    for count in (2, 3, 8):
        parts = PatchAttention.of_parts(OwnParts(bank, count), float(bank.abs().max()))
        got = case.ask(parts)
        assert torch.equal(got.mean, want.mean)
        assert torch.equal(got.log_evidence, want.log_evidence)
