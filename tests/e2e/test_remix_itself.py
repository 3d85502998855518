"""``els remix`` with a server of the photograph that it starts itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from tests.support.hills import write_hills
from tests.support.processes import run

from els_service.denoisers.pyramids import PyramidPlan, asked_sizes
from els_service.denoisers.samplers import options_for, sample
from els_service.repository import ModelRepository


def test_els_remix_serves_a_photograph_itself(tmp_path: Path) -> None:
    models = write_hills(tmp_path)
    out, gif = tmp_path / "out.png", tmp_path / "steps.gif"
    photo = str(models / "hills" / "photo.png")
    words = ("--size", "24x20", "--patch", "5", "--steps", "3", "--seed", "3", "--gif", str(gif))
    done = run("els", "remix", photo, "--out", str(out), *words, ELS_TOKENS="/none")
    assert done.returncode == 0, done.stderr
    with Image.open(out) as picture, Image.open(gif) as frames:
        assert picture.size == (24, 20)
        # Small frames are enlarged. Steps of two scales; frames that are alike are one.
        assert frames.size == (96, 80)
        assert 4 <= getattr(frames, "n_frames", 1) <= 6
    model = ModelRepository(models).load("hills")
    plan = PyramidPlan(asked_sizes(model.info.scales, (20, 24), 5), 5)
    chosen = options_for(model.info, steps=3, pyramid=plan)
    *_, last = sample(model, sampler="pyramid", options=chosen, seed=3, count=1)
    drawn = np.clip(np.rint((last.x[0].float().numpy() + 1) * 127.5), 0, 255)
    with Image.open(out) as picture:
        np.testing.assert_array_equal(np.asarray(picture), drawn.transpose(1, 2, 0))
