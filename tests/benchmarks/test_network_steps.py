"""Images at few steps of a network are compared with those at many."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from benchmarks import network_steps

from els_service.denoisers.samplers import Options, sample
from els_service.experiments.comparison.subjects import open_network


def test_a_row_is_of_the_images_that_a_comparison_draws(tmp_path: Path) -> None:
    out = tmp_path / "steps.json"
    network_steps.main(
        ["fashion-unet", "--count", "2", "--many", "20", "--dirty", "--out", str(out)]
    )
    (row,) = json.loads(out.read_text())["rows"]
    # As many steps as few: the same images.
    assert row["r"] == row["r_least"] == 1.0
    assert 0.9 < row["cut"] <= 1.0
    assert row["largest_first"] > 1

    denoiser = open_network("fashion-unet").denoiser
    steps = sample(denoiser, count=2, seed=0, options=Options(steps=20), labels=[0, 1])
    *_, last = steps
    got, _ = network_steps._Trajectory(denoiser, 2).drawn(network_steps.times(20))
    assert np.abs(got - last.x.numpy()).max() < 1e-3


def test_a_step_is_cut_into_equal_parts() -> None:
    few = network_steps.times(4)
    assert few == [1.0, 0.75, 0.5, 0.25]
    assert network_steps.cut_at(few, 1) == [1.0, 0.75, 0.6875, 0.625, 0.5625, 0.5, 0.25]
