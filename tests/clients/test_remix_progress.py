"""Progress of ``els remix`` by the cost of steps."""

from __future__ import annotations

import pytest

from els_client._remix_progress import progress_of_steps

SCALES = ((4, 6), (8, 12))


def test_progress_is_the_share_of_pixels_compared_with_pixels() -> None:
    done = progress_of_steps(SCALES, 3, 6)
    # Steps of 24² and 96² comparisons; the first of a scale compares none.
    whole = 2 * 24**2 + 2 * 96**2
    costs = [0, 0, 24**2, 24**2, 0, 96**2, 96**2]
    assert done == pytest.approx([sum(costs[: index + 1]) / whole for index in range(7)])


def test_a_start_leaves_out_steps_of_the_coarsest_scale() -> None:
    done = progress_of_steps(SCALES, 3, 4)
    whole = 24**2 + 2 * 96**2
    assert done == pytest.approx([0, 24**2 / whole, 24**2 / whole, (24**2 + 96**2) / whole, 1])


def test_a_scale_with_more_patches_than_sources_compares_with_these() -> None:
    done = progress_of_steps(SCALES, 2, 4, sources=48)
    assert done == pytest.approx([0, 0, 24**2 / (24**2 + 96 * 48), 24**2 / (24**2 + 96 * 48), 1])
