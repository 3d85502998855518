"""Calibration: finds known windows, repeats itself, goes on, leaves a model that serves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.commands import SEPARATE, run
from tests.support.comparing import SHAPE, squares, subjects, write_bank, write_network
from tests.support.processes import printed

from els_service.denoisers.base import make_query
from els_service.denoisers.levels import cosine
from els_service.denoisers.pca import PcaDenoiser
from els_service.denoisers.pca_masks import ThresholdTable
from els_service.denoisers.smoothed import SmoothedDenoiser
from els_service.denoisers.windows import WindowTable
from els_service.errors import LoadError
from els_service.experiments.calibrate_numbers import NumberSettings, calibrate_number_folder
from els_service.experiments.comparison.calibration import (
    Calibration,
    Journal,
    best_by_label,
    calibrate,
    trajectory,
)
from els_service.experiments.comparison.calibration import cosine as score_cosine
from els_service.experiments.comparison.machines import (
    Smoothing,
    build_machines,
    read_thresholds_of,
)
from els_service.experiments.comparison.sampling import SampleSpec
from els_service.experiments.comparison.subjects import (
    find_windows,
    open_network,
)
from els_service.repository import ModelRepository, bundled_models, read_thresholds

STEPS, SAMPLES = 5, 4
HIDDEN = (3, 3, 5, 7, 5)
CANDIDATES = (1, 3, 5, 7)


@pytest.fixture(scope="module")
def sigma() -> tuple[float, ...]:
    return tuple(cosine(np.arange(1, STEPS + 1) / STEPS).sigma.tolist())


@pytest.mark.parametrize("search", ["all", "climb"])
@pytest.mark.parametrize("labels", [0, 2])
def test_the_windows_of_a_machine_are_found_again(
    tmp_path: Path, sigma: tuple[float, ...], search: str, labels: int
) -> None:
    bank = squares()
    hidden = subjects(bank, WindowTable(sigma, HIDDEN), "els").machines["els"]
    how = SampleSpec(seed=3, steps=STEPS, label_count=labels)
    points = trajectory(hidden, how, SAMPLES)
    machine = subjects(bank, None, "els").machines["els"]
    journal = Journal(tmp_path / "journal.json", {})
    of = how.labels(0, SAMPLES)
    found = calibrate(machine, points, of, CANDIDATES, journal, search=search)
    assert found.table == WindowTable(sigma, HIDDEN)
    for k, row in zip(HIDDEN, found.cosines, strict=True):
        np.testing.assert_allclose(row[k], 1, atol=1e-12)
        assert len(row) == len(CANDIDATES) or search == "climb"
    if labels:
        assert best_by_label(found, of) == {0: list(HIDDEN), 1: list(HIDDEN)}


def test_the_median_over_samples_decides_and_each_label_may_differ() -> None:
    rows = {3: np.array([0.9, 0.1, 0.9, 0.1]), 5: np.array([0.6, 0.6, 0.6, 0.6])}
    found = Calibration((1.0,), (5,), (rows,))
    assert best_by_label(found, [0, 1, 0, 1]) == {0: [3], 1: [5]}


def test_a_run_goes_on_from_its_journal(tmp_path: Path, sigma: tuple[float, ...]) -> None:
    machine = subjects(squares(), None, "els").machines["els"]
    points = trajectory(machine, SampleSpec(steps=2), SAMPLES)
    computed: list[tuple[int, int]] = []

    def run(**settings: Any) -> Calibration:
        journal = Journal(tmp_path / "journal.json", {"seed": 0} | settings)
        report = computed.append
        return calibrate(
            machine,
            points,
            [-1] * SAMPLES,
            CANDIDATES,
            journal,
            report=lambda level, k: report((level, k)),
        )

    first = run()
    file = json.loads((tmp_path / "journal.json").read_text())
    # As if it had been killed in the middle: what is kept is trusted, what is not is computed.
    file["cosines"] = {key: kept for key, kept in file["cosines"].items() if key[0] == "1"}
    file["cosines"]["1/7"] = [2.0] * SAMPLES
    (tmp_path / "journal.json").write_text(json.dumps(file))
    second = run()
    assert second.k == (7, first.k[1])
    np.testing.assert_array_equal(second.cosines[1][3], first.cosines[1][3])
    with pytest.raises(LoadError, match="seed: expected 0 as begun, got 1"):
        run(seed=1)
    (tmp_path / "journal.json").write_text("{")
    with pytest.raises(LoadError, match="expected a calibration's journal"):
        run()


def options_of(folder: Path, *extra: str) -> list[str]:
    """The arguments of a small calibration."""
    text = f"{folder}/models/net --bank {folder}/models/_banks/squares.safetensors --samples 3"
    return [*f"{text} --steps 3 --windows 7,3,5 --device cpu --threads 1".split(), *extra]


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder of models with a network and a bank."""
    write_network(tmp_path / "models" / "net")
    write_bank(tmp_path / "models" / "_banks" / "squares.safetensors")
    return tmp_path / "models"


@pytest.mark.slow
def test_a_calibrated_machine_serves_and_both_commands_agree(tmp_path: Path, models: Path) -> None:
    result = run("calibrate", *options_of(tmp_path))
    assert result.exit_code == 0, result.output
    out = models / "net-els"
    assert sorted(path.name for path in out.iterdir()) == [
        "calibration.json",
        "model.yaml",
        "windows.yaml",
    ]
    record = json.loads((out / "calibration.json").read_text())
    served = ModelRepository(models).load("net-els")
    assert served.info.window is not None
    assert list(served.info.window.k) == [level["k"] for level in record["levels"]]
    served.denoise(make_query(np.zeros((1, *SHAPE), np.float32), cosine(np.array([0.5])), 1))
    network = open_network("net", models)
    assert find_windows(network).source == "net-els/windows.yaml"
    assert record["network"]["fingerprint"] == network.fingerprint
    assert (record["samples"], record["seed"], record["search"]) == (3, 1, "all")
    assert all(set(level["median_cosine"]) == {"3", "5", "7"} for level in record["levels"])
    assert set(record["k_by_label"]) == {"0", "1"}
    shown = run("calibrate", "--help")
    assert (shown.exit_code, "--search" in shown.output) == (0, True)
    again = tmp_path / "again" / "net-els"
    printed(SEPARATE, tmp_path, "calibrate", *options_of(tmp_path, "--out", str(again)))
    # Beside no bank it could not be served.
    assert sorted(path.name for path in again.iterdir()) == ["calibration.json", "windows.yaml"]
    ours = json.loads((again / "calibration.json").read_text())
    assert ours | {"command": ""} == record | {"command": ""}


def test_calibrated_thresholds_serve_and_are_those_of_a_comparison(
    tmp_path: Path, models: Path
) -> None:
    options = [word for word in options_of(tmp_path) if word not in ("--windows", "7,3,5")]
    arguments = [*options, "--machine", "pca", "--thresholds", "0.3,0.05"]
    result = run("calibrate", *arguments)
    assert result.exit_code == 0, result.output
    out = models / "net-pca"
    assert {path.name for path in out.iterdir()} == {
        *("calibration.json", "model.yaml", "thresholds.yaml"),
    }
    table = read_thresholds(out / "thresholds.yaml")
    levels = json.loads((out / "calibration.json").read_text())["levels"]
    for level, tau in zip(levels, table.tau, strict=True):
        medians = level["median_cosine"]
        assert set(medians) == {"0.05", "0.3"}
        assert f"{tau:g}" == max(medians, key=medians.__getitem__)
    # The same trajectories, each machine by itself.
    network, bank = open_network("net", models), squares()
    how = SampleSpec(1, 3, "ddim", 2)
    lowest = trajectory(network.denoiser, how, 3)[0]
    machine = PcaDenoiser(bank, threshold=ThresholdTable.constant(0.3))
    found = np.median(score_cosine(machine, lowest, 0, how.labels(0, 3)))
    assert levels[0]["median_cosine"]["0.3"] == pytest.approx(found)
    served = ModelRepository(models).load("net-pca")
    assert isinstance(served, PcaDenoiser)
    assert served.threshold == table == read_thresholds_of(str(out))[""]
    (out / "model.yaml").write_text("kind: pca\nrule: released\nbank: x\n")
    refused = run("calibrate", *arguments)
    assert "rule: expected correlation, got released" in refused.stderr


def test_the_smoothing_of_a_machine_is_found_again_and_serves(tmp_path: Path, models: Path) -> None:
    network, bank = open_network("net", models), squares()
    names, info = ["smoothed"], network.denoiser.info
    hidden = build_machines(names, bank, info, smoothing=Smoothing(0.1, 3))["smoothed"]
    settings = NumberSettings(
        machine="smoothed", samples=3, steps=3, candidates=(0.0, 0.1, 0.4), draws=3
    )
    out, best = calibrate_number_folder(
        replace(network, denoiser=hidden),
        bank,
        settings,
        models / "net-smoothed",
        bank_file=models / "_banks" / "squares.safetensors",
        device="cpu",
        command="",
        progress=lambda done, total: None,
    )
    assert best == (0.1,)
    record = json.loads((out / "calibration.json").read_text())
    assert (record["eta"], record["draws"], record["smoothing"]) == (0.1, 3, [0.0, 0.1, 0.4])
    for level in record["levels"]:
        assert level["median_cosine"]["0.1"] == pytest.approx(1, abs=1e-12)
    served = ModelRepository(models).load("net-smoothed")
    assert isinstance(served, SmoothedDenoiser)
    assert (served.smoothing, served.draws) == (0.1, 3)


@pytest.mark.parametrize("text", ["x", "", "-0.1", "inf", "nan"])
def test_what_is_no_smoothing_is_refused(tmp_path: Path, models: Path, text: str) -> None:
    options = [word for word in options_of(tmp_path) if word not in ("--windows", "7,3,5")]
    result = run("calibrate", *options, "--machine", "smoothed", "--smoothing", text)
    assert result.exit_code == 2
    assert "smoothing: expected numbers, 0 or more" in result.stderr


def test_the_command_fits_a_smoothing_and_keeps_a_model_that_is_there(
    tmp_path: Path, models: Path
) -> None:
    options = [word for word in options_of(tmp_path) if word not in ("--windows", "7,3,5")]
    arguments = [*options, *["--machine", "smoothed", "--smoothing", "0.3,0", "--draws", "2"]]
    result = run("calibrate", *arguments)
    assert result.exit_code == 0, result.output
    record = json.loads((models / "net-smoothed" / "calibration.json").read_text())
    assert f"smoothing {record['eta']}" in result.output
    assert record["smoothing"] == [0.0, 0.3]
    refused = run("calibrate", *arguments)
    assert "model.yaml: expected no model" in refused.stderr


@pytest.mark.slow
def test_windows_are_written_into_a_model_that_is_there_and_fits(
    tmp_path: Path, models: Path
) -> None:
    folder = models / "mine"
    folder.mkdir()
    fits = "kind: analytic\nmachine: els\nbank: ../_banks/squares.safetensors\n"
    for content, expected in (
        ("kind: wiener\nbank: x", "kind: expected analytic, got wiener"),
        (fits + "padding: circular", "padding: expected zeros, got circular"),
        (fits + "window: 5", "window: expected auto, got 5"),
        ("- 1", "expected a model"),
        (fits, ""),
    ):
        (folder / "model.yaml").write_text(content)
        result = run("calibrate", *options_of(tmp_path, "--out", str(folder)))
        assert (result.exit_code, expected in result.stderr) == (2 if expected else 0, True)
    assert (folder / "model.yaml").read_text() == fits
    assert ModelRepository(models).load("mine").info.window is not None


@pytest.mark.slow
def test_what_cannot_be_calibrated_is_refused_by_name(tmp_path: Path, models: Path) -> None:
    for extra, expected in (
        (["--machine", "ideal"], "machine: expected one with a window, got ideal"),
        (["--machine", "elz"], "machines: expected some of"),
        (["--windows", "4"], "windows: expected odd numbers from 1 to 15, got 4"),
        (["--windows", "17"], "windows: expected odd numbers from 1 to 15, got 17"),
        (["--seed", "-1"], "seed: expected"),
        (["--thresholds", "0.1"], "thresholds: expected none for els"),
        (["--smoothing", "0.1"], "smoothing: expected none for els"),
        (["--machine", "pca"], "windows: expected none for pca"),
        (["--machine", "pca", "--smoothing", "0.1"], "smoothing: expected none for pca"),
        (["--machine", "smoothed", "--draws", "2000"], "windows: expected none for smoothed"),
        (["--machine", "pspc", "--folds", "0.5"], "folds: expected none for pspc"),
        (["--bank-limit", "1"], "bank-limit: expected at least 2"),
        (["--out", str(bundled_models() / "new")], "out: expected a folder outside the package"),
    ):
        result = run("calibrate", *options_of(tmp_path), *extra)
        assert (result.exit_code, expected in result.stderr) == (2, True), result.stderr
    assert not (models / "net-els").exists()
