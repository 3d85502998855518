"""Whatever patch attention cannot answer it refuses, and says what it expected and got."""

import functools
import logging
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.kernels.cases import NAMES, operator, random_case

from els_kernels import GEOMETRIES, Geometry, PatchAttention

SHAPE = (4, 2, 5, 6)
BANK = torch.zeros(SHAPE)
NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("bank", "got"),
    [
        (BANK[0], r"torch.float32 \[2, 5, 6\]"),
        (BANK[None], r"torch.float32 \[1, 4, 2, 5, 6\]"),
        (BANK.double(), r"torch.float64 \[4, 2, 5, 6\]"),
        (BANK.to(torch.int8), r"torch.int8 \[4, 2, 5, 6\]"),
        (BANK[:0], r"\[0, 2, 5, 6\]"),
        (BANK[:, :0], r"\[4, 0, 5, 6\]"),
        (BANK[..., :0], r"\[4, 2, 5, 0\]"),
    ],
)
def test_a_bank_that_is_no_float32_images_is_refused(
    any_implementation: str, bank: torch.Tensor, got: str
) -> None:
    with pytest.raises(ValueError, match=rf"bank: expected float32 \[N, C, H, W\].*, got .*{got}"):
        operator(bank, any_implementation)


@pytest.mark.parametrize(("value", "got"), [(NAN, "nan"), (INF, "inf"), (-INF, "-inf")])
def test_a_bank_with_a_pixel_that_is_no_number_is_refused(
    any_implementation: str, value: float, got: str
) -> None:
    bank = BANK.clone()
    bank[1, 1, 2, 3] = value
    with pytest.raises(ValueError, match=f"bank: expected finite pixels, got {got}"):
        operator(bank, any_implementation)


def test_an_unknown_implementation_is_refused_with_those_there_are() -> None:
    with pytest.raises(
        ValueError, match=r"implementation: expected one of reference, torch.*, got 'abacus'"
    ):
        PatchAttention(BANK, implementation="abacus")


def test_auto_says_what_it_chose(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        attention = PatchAttention(BANK)
    assert f"chose {attention.implementation} for device cpu" in caplog.text


@functools.cache
def prepared(implementation: str) -> PatchAttention:
    return operator(BANK, implementation)


def test_numbers_may_be_lists() -> None:
    case = random_case(GEOMETRIES["els", "zeros"], SHAPE)
    assert case.window is not None
    lists = operator(case.bank, "reference")(
        case.x,
        geometry=case.geometry,
        a=case.a.tolist(),
        s=case.s.tolist(),
        window=case.window.tolist(),
        ranges=case.ranges.tolist(),
    )
    assert torch.equal(lists.mean, case.attend("reference").mean)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 5, 6)}, r"x: expected shape \[B, 2, 5, 6\], got .* \[2, 5, 6\]"),
        (
            {"x": torch.zeros(2, 2, 6, 5)},
            r"x: expected shape \[B, 2, 5, 6\], got .* \[2, 2, 6, 5\]",
        ),
        ({"x": torch.zeros(0, 2, 5, 6)}, r"x: expected shape .* got .* \[0, 2, 5, 6\]"),
        ({"x": [[0.0]]}, r"x: expected shape \[B, 2, 5, 6\], got list"),
        ({"x": torch.zeros(2, 2, 5, 6).to_sparse()}, "x: expected .*, got torch.sparse_coo "),
        ({"x": torch.zeros(2, 2, 5, 6).double()}, "x: expected torch.float32 .*got torch.float64"),
        ({"x": torch.zeros(2, 2, 5, 6, device="meta")}, "x: expected .* on .*, got .* on meta"),
        ({"x": torch.full((2, 2, 5, 6), NAN)}, "x: expected finite pixels, got nan"),
        ({"x": torch.full((2, 2, 5, 6), INF)}, "x: expected finite pixels, got inf"),
        ({"a": torch.ones(3)}, r"a: expected numbers \[2\], got .* \[3\]"),
        ({"a": torch.tensor(1.0)}, r"a: expected numbers \[2\], got .* \[\]"),
        ({"a": torch.tensor([1.0, 0.0])}, r"a: expected finite and > 0, got 0.0"),
        ({"s": torch.ones(1)}, r"s: expected numbers \[2\], got .* \[1\]"),
        ({"s": torch.ones(2, 1)}, r"s: expected numbers \[2\], got .* \[2, 1\]"),
        ({"s": 0.5}, r"s: expected numbers \[2\], got float"),
        ({"s": torch.ones(2) + 0j}, r"s: expected numbers \[2\], got torch.complex64 \[2\]"),
        ({"s": torch.tensor([1.0, 0.0])}, r"s: expected finite and > 0, got 0.0"),
        ({"s": torch.tensor([1.0, -0.5])}, r"s: expected finite and > 0, got -0.5"),
        ({"s": torch.tensor([NAN, 1.0])}, r"s: expected finite and > 0, got nan"),
        ({"s": torch.tensor([1.0, INF])}, r"s: expected finite and > 0, got inf"),
        # Logits that no float32 holds were once a NaN, or an error that named no argument.
        ({"s": torch.full((2,), 1e-20)}, r"s: expected .* fit a float32, s >= .*e-1\d here, got"),
        ({"s": torch.full((2,), 1e-300, dtype=torch.float64)}, "s: expected .* fit a float32"),
        ({"a": torch.full((2,), 1e30)}, r"s: expected .* fit a float32, s >= .*e\+1\d here, got"),
        ({"x": torch.full((2, 2, 5, 6), 3e38)}, r"s: expected .* fit a float32"),
        ({"window": None}, r"window: expected integers \[2\], got None"),
        ({"s": [0.5]}, r"s: expected numbers \[2\], got list of 1 float"),
        ({"s": [0.5, True]}, r"s: expected numbers \[2\], got list of 2 bool, float"),
        ({"s": [0.5, -1.0]}, "s: expected finite and > 0, got -1.0"),
        ({"window": [3, 3.0]}, r"window: expected integers \[2\], got list of 2 float, int"),
        ({"window": [3]}, r"window: expected integers \[2\], got list of 1 int"),
        ({"ranges": [(0, 1)]}, r"ranges: expected integers \[2, 2\], got list of 1 tuple"),
        ({"ranges": [(0, 1), (0, 1.0)]}, r"ranges, a pair: expected integers \[2\], got tuple"),
        ({"s": [10**400, 1]}, "s: expected finite and > 0, got inf"),
        ({"window": torch.tensor([True, True])}, "window: expected integers .* got torch.bool"),
        ({"window": torch.tensor([3])}, r"window: expected integers \[2\], got torch.int64 \[1\]"),
        ({"window": torch.tensor([3.0, 3.0])}, r"window: expected integers .* got torch.float32"),
        ({"window": torch.tensor([3, 4])}, "window: expected odd from 1 to 11, got 4"),
        ({"window": torch.tensor([3, 0])}, "window: expected odd from 1 to 11, got 0"),
        ({"window": torch.tensor([-3, 3])}, "window: expected odd from 1 to 11, got -3"),
        ({"window": torch.tensor([3, 13])}, "window: expected odd from 1 to 11, got 13"),
        (
            {"ranges": torch.tensor([[0, 4]])},
            r"ranges: expected integers \[2, 2\], got .* \[1, 2\]",
        ),
        ({"ranges": torch.zeros(2, 2)}, r"ranges: expected integers \[2, 2\], got torch.float32"),
        ({"ranges": torch.tensor([[0, 4], [2, 2]])}, "ranges: expected .*, got lo 2, hi 2"),
        ({"ranges": torch.tensor([[0, 4], [3, 2]])}, "ranges: expected .*, got lo 3, hi 2"),
        ({"ranges": torch.tensor([[0, 5], [0, 4]])}, "ranges: expected .* <= 4, got lo 0, hi 5"),
        ({"ranges": torch.tensor([[-1, 3], [0, 4]])}, "ranges: expected .*, got lo -1, hi 3"),
        ({"geometry": "els"}, "geometry: expected a Geometry, got 'els'"),
    ],
)
def test_a_query_that_does_not_fit_is_refused(
    any_implementation: str, change: dict[str, Any], message: str
) -> None:
    case = replace(random_case(NAMES["els-zeros"], SHAPE, [3]), **change)
    with pytest.raises(ValueError, match=message):
        prepared(any_implementation)(
            case.x,
            a=case.a,
            s=case.s,
            window=case.window,
            ranges=case.ranges,
            geometry=case.geometry,
        )


@pytest.mark.parametrize("name", ["local-circular", "els-circular", "els-valid"])
@pytest.mark.parametrize("window", [7, 9, 2])
def test_a_window_larger_than_the_torus_is_refused(
    any_implementation: str, name: str, window: int
) -> None:
    case = random_case(NAMES[name], SHAPE, [3])
    case = replace(case, window=torch.tensor([3, window]))
    with pytest.raises(ValueError, match=f"window: expected odd from 1 to 5, got {window}"):
        case.attend(any_implementation)


@pytest.mark.parametrize("name", ["ideal-zeros", "equivariant-circular"])
def test_a_window_for_a_whole_image_is_refused(any_implementation: str, name: str) -> None:
    case = replace(random_case(NAMES[name], SHAPE, [1]), window=torch.tensor([3, 3]))
    with pytest.raises(ValueError, match="window: expected None for a whole-image window"):
        case.attend(any_implementation)


def test_a_whole_window_of_every_place_is_refused_but_on_the_torus() -> None:
    with pytest.raises(ValueError, match=r"geometry: expected .* on the torus, got padding zeros"):
        Geometry("every", "zeros", whole=True)


def test_ranges_left_out_mean_the_whole_bank() -> None:
    case = random_case(NAMES["els-zeros"], SHAPE, [3])
    case = replace(case, ranges=torch.tensor([[0, 4]] * 2))
    got = PatchAttention(case.bank, implementation="torch")(
        case.x, a=case.a, s=case.s, window=case.window, geometry=GEOMETRIES["els", "zeros"]
    )
    assert torch.equal(got.mean, case.attend("torch").mean)
