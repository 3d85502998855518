"""Networks beside plain code: written apart, it answers alike, and a wrong answer is not timed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from benchmarks.networks import __main__ as benchmark
from benchmarks.networks import cases, plain

TINY = ["--dirty", "--widths", "8", "16", "--batches", "2", "--rounds", "2", "--seconds", "0"]


@pytest.mark.slow
def test_every_network_answers_as_plain_code_does_and_is_timed_beside_it(tmp_path: Path) -> None:
    out = tmp_path / "networks.json"
    networks = [*benchmark.ARCHITECTURES, "diffusers"]
    benchmark.main([*TINY, "--only", *networks, "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert [row["network"] for row in rows] == networks
    for row in rows:
        assert row["difference"] <= 1e-5
        assert len(row["rounds"]) == 2
        assert row["interval"][0] <= row["ratio"] <= row["interval"][1]


def test_a_wrong_answer_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "relu", lambda x: x)
    out = tmp_path / "networks.json"
    with pytest.raises(SystemExit, match="wrong: float32 eager differs by"):
        benchmark.main([*TINY, "--only", "resnet", "--out", str(out)])
    assert not out.exists()


def test_what_is_missing_or_comes_too_late_is_named_in_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cases, "TERRAIN", tmp_path / "no.onnx")
    out = tmp_path / "networks.json"
    benchmark.main([*TINY, "--only", "onnx-terrain", "--out", str(out)])
    assert json.loads(out.read_text())["rows"][0]["left_out"] == "needs make terrain"
    benchmark.main([*TINY, "--minutes", "0", "--only", "unet", "--out", str(out)])
    assert json.loads(out.read_text())["rows"][0]["left_out"] == "no time left"


def test_each_image_has_a_level_and_a_label_of_its_own() -> None:
    pair = cases.paper("resnet", benchmark.EXECUTIONS["cpu"][0], "cpu", (8,))
    query = pair.query(4)
    assert len(np.unique(query.level.sigma)) == 4
    assert len(set(query.labels.tolist())) > 1
