"""Every implementation against the float64 reference, by every path through its tiles."""

from dataclasses import replace

import pytest
import torch
from tests.kernels.cases import assert_within_budget, random_case

from els_kernels import GEOMETRIES, Geometry, Posterior, max_window, tiled

SHAPES = [(13, 1, 5, 7), (7, 3, 6, 4), (3, 1, 1, 6), (1, 3, 5, 5), (2, 1, 1, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_equals_the_reference_at_every_window(
    implementation: str, geometry: Geometry, shape: tuple[int, int, int, int]
) -> None:
    case = random_case(geometry, shape)
    assert_within_budget(case, case.attend(implementation), case.attend("reference"))


@pytest.mark.parametrize(
    "shape",
    [
        # More places than the 64 keys of the smallest tile, so that it holds some rows of an image;
        (3, 1, 8, 9),
        # more images than that, so that it holds some images, and the last tile is ragged.
        (67, 2, 3, 4),
    ],
    ids=str,
)
@pytest.mark.parametrize(("tile", "block"), [(1, 1), (900, 2000)])
def test_it_equals_the_reference_however_small_its_tiles(
    monkeypatch: pytest.MonkeyPatch,
    implementation: str,
    geometry: Geometry,
    shape: tuple[int, int, int, int],
    tile: int,
    block: int,
) -> None:
    monkeypatch.setattr(tiled, "_TILE", tile)
    monkeypatch.setattr(tiled, "_BLOCK", block)
    windows = None if geometry.whole else [1, 3, max_window(geometry, *shape[2:])]
    case = random_case(geometry, shape, windows)
    assert_within_budget(case, case.attend(implementation), case.attend("reference"))


@pytest.mark.parametrize("padding", ["zeros", "circular", "valid"])
def test_it_equals_the_reference_on_a_bank_of_several_tiles_of_full_size(
    implementation: str, padding: str
) -> None:
    # At least 15 keys an image, 9e4 in all; a tile holds 2²⁰ logits of 15 queries or more, so 7e4.
    case = random_case(GEOMETRIES["els", padding], (6001, 1, 5, 7), [3])
    assert_within_budget(case, case.attend(implementation), case.attend("reference"))


def test_an_answer_does_not_depend_on_how_the_bank_lies_in_memory(
    implementation: str, geometry: Geometry
) -> None:
    case = random_case(geometry, (5, 3, 4, 5))
    want = case.attend(implementation)
    strided = replace(
        case,
        bank=case.bank.to(memory_format=torch.channels_last),
        x=case.x.to(memory_format=torch.channels_last),
    )
    assert_within_budget(case, strided.attend(implementation), want)


@pytest.mark.parametrize("sigma", [1e-4, 1e-2, 1.0, 1e3, 1e6])
@pytest.mark.parametrize("preserving", [False, True], ids=["exploding", "preserving"])
def test_it_stays_finite_and_within_the_bank_at_extreme_levels(
    any_implementation: str, geometry: Geometry, sigma: float, preserving: bool
) -> None:
    case = random_case(geometry, (5, 2, 4, 5), None if geometry.whole else [1, 3])
    a = torch.full_like(case.a, (1 + sigma**2) ** -0.5 if preserving else 1.0)
    sizes = torch.tensor([0.0, 1.0, 1e9, -1e9])[:, None, None, None]
    extreme = replace(case, a=a, s=a * sigma, x=case.x * sizes)
    mean, evidence = extreme.attend(any_implementation)
    assert evidence.isfinite().all()
    # A mean of the bank cannot leave the bank; dividing by the weights' sum rounds once or twice.
    assert (mean - mean.clamp(case.bank.min(), case.bank.max())).abs().max() <= 1e-6


def test_what_it_returns_is_float32_of_the_images_shape(
    any_implementation: str, geometry: Geometry
) -> None:
    case = random_case(geometry, (2, 3, 4, 5))
    posterior = case.attend(any_implementation)
    assert isinstance(posterior, Posterior)
    assert posterior.mean.shape == case.x.shape
    assert posterior.log_evidence.shape == (len(case), 4, 5)
    assert posterior.mean.dtype == posterior.log_evidence.dtype == torch.float32
