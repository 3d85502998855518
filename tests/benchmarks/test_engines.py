"""Engines beside the libraries: every network answers alike, and a wrong answer is not timed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks.engines import __main__ as benchmark
from benchmarks.networks import plain

TINY = ["--dirty", "--widths", "8", "16", "--batches", "2", "--rounds", "2", "--seconds", "0"]
FAST = [*TINY, "--threads", "1", "--steps", "2"]


@pytest.mark.slow
def test_ours_is_timed_beside_every_library_that_answers_alike(tmp_path: Path) -> None:
    out = tmp_path / "engines.json"
    peers = ["--peers", "plain", "onnxruntime", "openvino"]
    options = ["--only", "unet", "--sample", "unet", "--engine", "openvino", "--out", str(out)]
    benchmark.main([*FAST, *peers, *options])
    record = json.loads(out.read_text())
    assert record["machine"]["openvino"]
    timed = [row for row in record["rows"] if "batch" in row and row["precision"] == "float32"]
    assert [row["network"] for row in timed] == ["unet"]
    for row in timed:
        assert row["engine"] == "openvino"
        assert set(row["images_per_s"]) == {"ours", "plain", "onnxruntime", "openvino"}
        assert max(row["differences"].values()) < 1e-5
        assert row["best"] in ("plain", "onnxruntime", "openvino")
        assert row["interval"][0] <= row["ratio"] <= row["interval"][1]
    drawn = [row for row in record["rows"] if "trajectories" in row]
    assert {row["steps"] for row in drawn} == {2}
    assert {row["best"] for row in drawn} == {"torch"}
    half = [row for row in record["rows"] if row["precision"] == "bfloat16"]
    assert half
    assert all(row["error"] > 1e-4 for row in half)


def test_a_run_continues_the_record_of_one_that_ended(tmp_path: Path) -> None:
    options = ["--only", "unet", "--engine", "torch", "--peers", "plain"]
    options += [*FAST, "--out", str(tmp_path / "engines.json")]

    def rows() -> list[dict[str, Any]]:
        benchmark.main(options)
        found: list[dict[str, Any]] = json.loads(Path(options[-1]).read_text())["rows"]
        return found

    options[:0] = ["--minutes", "0"]
    assert {row.get("left_out") for row in rows()} == {"no time left"}
    options[:2] = []
    measured = rows()
    assert [row["precision"] for row in measured] == ["float32", "bfloat16"]
    assert not any("left_out" in row for row in measured)
    assert rows() == measured


@pytest.mark.slow
def test_diffusers_is_compared_with_its_own_code(tmp_path: Path) -> None:
    out = tmp_path / "engines.json"
    options = ["--only", "diffusers", "--engine", "torch", "--peers", "plain"]
    benchmark.main([*FAST, *options, "--out", str(out)])
    row, *_ = json.loads(out.read_text())["rows"]
    assert (row["engine"], row["best"]) == ("torch", "plain")


@pytest.mark.slow
def test_a_wrong_answer_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "relu", lambda x: x)
    out = tmp_path / "engines.json"
    options = ["--only", "resnet", "--peers", "plain", "openvino", "--out", str(out)]
    with pytest.raises(SystemExit, match="wrong: ours differs by"):
        benchmark.main([*FAST, "--engine", "torch", *options])
    assert not out.exists()
