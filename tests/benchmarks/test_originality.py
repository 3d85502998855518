"""The benchmark of originality: its rows, for a part of its work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from benchmarks.originality import __main__ as benchmark
from benchmarks.originality import cost

from els_service.repository import bundled_models

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_the_cost_of_a_report_is_that_of_samples_with_one_and_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cost, "_STEPS", 1)
    monkeypatch.setattr(cost, "_REPEATS", 1)
    # The one model that is measured: all of the bundled ones take seconds to load.
    for name in ("_banks", "fashion-ideal"):
        shutil.copytree(bundled_models() / name, tmp_path / "models" / name)
    monkeypatch.setenv("ELS_MODELS", str(tmp_path / "models"))
    out = tmp_path / "originality.json"
    words = ["--only", "cost", "--models", "fashion-ideal", "--rounds", "2", "--side", "24"]
    benchmark.main([*words, "--dirty", "--out", str(out)])
    machine, picture, constants = json.loads(out.read_text())["rows"]
    assert (machine["model"], picture["model"]) == ("fashion-ideal", "picture rocket.png")
    for row in (machine, picture):
        shares = [
            with_report / without - 1
            for with_report, without in zip(row["raw"]["True"], row["raw"]["False"], strict=True)
        ]
        assert row["report_share"] == pytest.approx(sum(shares) / 2, abs=1e-2)
    assert constants["distance_s"] > 0
