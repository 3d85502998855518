import itertools

import pytest
import torch
from tests.kernels.cases import NAMES

from els_kernels import GEOMETRIES, Geometry, count_pairs, max_window
from els_kernels.geometry import band, zero_padded_spans
from els_kernels.reference import _sources

SIDES = [(1, 1), (1, 5), (4, 4), (5, 7), (6, 3)]
AXES = list(itertools.product(range(1, 9), range(1, 17, 2)))


def test_the_table_holds_the_machines_and_paddings_of_the_paper() -> None:
    assert set(GEOMETRIES) == {
        ("ideal", "zeros"),
        ("local", "zeros"),
        ("local", "circular"),
        ("equivariant", "circular"),
        ("els", "zeros"),
        ("els", "circular"),
        ("els", "valid"),
    }


@pytest.mark.parametrize("side", SIDES, ids=str)
@pytest.mark.parametrize("name", [name for name, g in NAMES.items() if not g.whole])
def test_pairs_are_as_many_as_the_reference_lets_answer(name: str, side: tuple[int, int]) -> None:
    geometry = NAMES[name]
    for window in range(1, max_window(geometry, *side) + 1, 2):
        allowed = int(_sources(*side, window, geometry, torch.device("cpu")).sum())
        assert count_pairs(geometry, *side, window) == allowed


@pytest.mark.parametrize("side", SIDES, ids=str)
@pytest.mark.parametrize("name", [name for name, g in NAMES.items() if g.whole])
def test_a_whole_window_counts_a_pixel_once_as_its_shifts_share_their_logits(
    name: str, side: tuple[int, int]
) -> None:
    assert count_pairs(NAMES[name], *side, 1) == side[0] * side[1]


@pytest.mark.parametrize(("length", "window"), AXES)
def test_spans_cover_an_axis_once(length: int, window: int) -> None:
    spans = zero_padded_spans(length, window)
    covered = sorted(i for span in spans for i in range(length)[span.places])
    assert covered == list(range(length))


@pytest.mark.parametrize(("length", "window"), AXES)
def test_the_places_of_a_span_share_a_signature_that_no_other_place_has(
    length: int, window: int
) -> None:
    r = window // 2
    signatures = [(min(i, r), min(length - 1 - i, r)) for i in range(length)]
    groups = [set(signatures[span.places]) for span in zero_padded_spans(length, window)]
    assert all(len(group) == 1 for group in groups)
    assert len(set().union(*groups)) == len(groups)


@pytest.mark.parametrize(("length", "window"), AXES)
def test_the_crop_of_a_span_is_what_its_clipped_windows_see(length: int, window: int) -> None:
    r = window // 2
    for span in zero_padded_spans(length, window):
        places, crop = range(length)[span.places], range(length)[span.crop]
        assert span.single == (len(places) == 1)
        for n, i in enumerate(places):
            assert list(crop[n : n + span.window]) == [
                j for j in range(i - r, i + r + 1) if 0 <= j < length
            ]
        assert len(crop) == len(places) + span.window - 1


@pytest.mark.parametrize("padding", ["zeros", "circular", "valid"])
def test_a_band_sums_each_places_window(padding: str) -> None:
    # A parameter of pytest is a plain string.
    geometry = Geometry("same", padding)  # type: ignore[arg-type]
    for length in range(1, 9):
        values = torch.arange(1.0, length + 1).double() ** 2
        for window in range(1, max_window(geometry, length, length) + 1, 2):
            r = window // 2
            for i, got in enumerate(band(length, window, geometry.padding) @ values):
                seen = range(i - r, i + r + 1)
                want = (
                    sum(values[j] for j in seen if 0 <= j < length)
                    if padding == "zeros"
                    else sum(values[j % length] for j in seen)
                )
                assert got == want


@pytest.mark.parametrize(
    ("name", "side", "largest"),
    [
        ("els-zeros", (5, 7), 13),
        ("local-zeros", (28, 28), 55),
        ("els-zeros", (1, 1), 1),
        ("els-circular", (5, 7), 5),
        ("local-circular", (6, 4), 3),
        ("els-valid", (28, 28), 27),
        ("els-circular", (1, 4), 1),
        ("els-valid", (2, 2), 1),
    ],
)
def test_the_largest_window_is_odd_and_counts_no_pixel_twice(
    name: str, side: tuple[int, int], largest: int
) -> None:
    assert max_window(NAMES[name], *side) == largest
