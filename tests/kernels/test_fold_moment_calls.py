"""Batches, threads, tiles, modes, memory and arguments of moments of a fold."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.kernels.cases import random_bank
from tests.kernels.conftest import has_fold_row, variant
from tests.kernels.fold_cases import FOLD_NAMES, FOLD_VARIANTS, FoldCase, fold_case
from tests.kernels.fold_moment_cases import (
    PAIRS,
    arguments,
    cases,
    directions,
    everything,
    moments,
    references,
)
from tests.support.processes import printed
from tests.support.rows import telling
from torch import Tensor

from els_kernels import (
    FOLD_MOMENT_IMPLEMENTATIONS,
    ComputationStoppedError,
    Control,
    FoldedAttention,
    FoldedMoments,
    fold_pairs,
    fold_plan,
)
from els_kernels.torch_fold import decoded

few_rows = telling(lambda form, name: has_fold_row(form, name))


@pytest.fixture(params=[variant(name) for name in FOLD_VARIANTS])
def form(request: pytest.FixtureRequest) -> str:
    """One implementation, if it is to be had."""
    return str(request.param)


@few_rows
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
@pytest.mark.slow
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


@few_rows
@pytest.mark.parametrize("name", FOLD_NAMES)
def test_a_large_image_is_answered_some_rows_at_a_time(
    monkeypatch: pytest.MonkeyPatch, form: str, name: str
) -> None:
    # Blocks of two windows, whose patches overlap.
    size = (13, 4)
    case = fold_case(FOLD_NAMES[name], size, random_bank((1, 1, *size)), 3, PAIRS[:1])
    want = everything(case, form=form)
    passes = case.operator("torch").validate(case.x, **arguments(case))[0]
    monkeypatch.setattr(fold_plan, "_BLOCK_BYTES", 1)
    assert [rows.stop - rows.start for rows in passes.blocks(1)] == [4, 4, 5]
    got = everything(case, form=form)
    for index, (one, other) in enumerate(zip(got, want, strict=True)):
        if index == 3:
            assert torch.equal(one[..., 0, :], other[..., 0, :])
        else:
            assert torch.allclose(one, other, rtol=2e-5, atol=2e-5)


@pytest.mark.slow
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


@telling(lambda form: form != "torch")
@pytest.mark.parametrize("form", [variant("torch"), variant("native-baseline")])
@pytest.mark.slow
def test_a_batch_of_sixteen_needs_less_than_64_mib_beside_the_bank(
    form: str, tmp_path: Path
) -> None:
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
    assert float(printed(script, tmp_path, form.partition("-")[0])) <= 64


@pytest.mark.parametrize("form", [variant("native-baseline")])
@pytest.mark.slow
def test_a_large_image_needs_less_than_64_mib_beside_bank_and_answer(
    form: str, tmp_path: Path
) -> None:
    # As many pixels as 362 x 362, which are few pairs with a small bank.
    script = """
import ctypes, resource, torch
torch.set_num_threads(1)
# What is freed goes back to the system at once, so that the peak is that of what is held: mallopt
# with M_MMAP_THRESHOLD.
ctypes.CDLL(None).mallopt(-3, 1 << 20)
from els_kernels import FOLD_GEOMETRIES, FoldedAttention, FoldedMoments
moments = FoldedMoments(FoldedAttention(torch.rand(1, 3, 9, 9), implementation="native"))
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def ask(height):
    x = torch.rand(1, 3, height, 16)
    arguments = {"a": torch.ones(1), "s": torch.full((1,), 0.1), "fold": torch.full((1,), 0.5)}
    arguments |= {"window": torch.full((1,), 7), "geometry": FOLD_GEOMETRIES["els", "zeros"]}
    given = x, *moments.vjp(x, x, **arguments), *moments.statistics(x, **arguments, top=16)
    return sum(one.nbytes for one in given) / 2**20
ask(32)
before = peak()
answer = ask(8192)
print(peak() - before - answer)
"""
    assert float(printed(script, tmp_path)) <= 64


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
