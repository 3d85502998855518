"""Folds by noise level: the table, the machine, and their calibration to a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.comparing import SHAPE, pretended, squares, write_bank
from typer.testing import CliRunner

from els_kernels import FoldedMoments
from els_service.cli.main import app
from els_service.denoisers.base import DenoiserInfo, make_query
from els_service.denoisers.explanations import Explanation
from els_service.denoisers.fold_levels import FoldTable, LevelFoldDenoiser
from els_service.denoisers.folded import FoldedDenoiser, fold_of
from els_service.denoisers.levels import from_sigma
from els_service.denoisers.windows import WindowTable
from els_service.engine.derived import derived
from els_service.errors import ElsError, InvalidArgumentError, LoadError
from els_service.experiments.calibrate import CalibrationSettings, calibrate_folder
from els_service.experiments.comparison.folds import parse_folds
from els_service.experiments.comparison.machines import build_machines
from els_service.experiments.comparison.run import describe_machine
from els_service.experiments.comparison.subjects import Windows, find_windows
from els_service.repository import ModelRepository, read_folds

INFO = DenoiserInfo(kind="network", shape=SHAPE, padding="zeros")
TABLE = FoldTable((0.1, 1.0, 10.0), (3, 5, 7), (0.5, 0.0, 0.2))


def test_a_level_has_the_fold_of_the_nearest_entry() -> None:
    sigma = np.array([1e-3, 0.1, 0.3, 0.33, 1.0, 3.0, 3.3, 1e6])
    assert TABLE.at(sigma).tolist() == [0.5, 0.5, 0.5, 0.0, 0.0, 0.0, 0.2, 0.2]


@pytest.mark.parametrize(
    ("rho", "reason"),
    [((0.5, 0.0), "rho: expected 3 values"), ((0.5, 0.01, 1.0), "rho: expected 0, at least 0.05")],
)
def test_a_table_out_of_range_is_rejected(rho: tuple[float, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        FoldTable((0.1, 1.0, 10.0), (3, 5, 7), rho)


def folded(rho: float, table: WindowTable) -> FoldedDenoiser:
    bank = squares()
    moments = FoldedMoments(fold_of(bank, "cpu"))
    return FoldedDenoiser(
        moments, bank, machine="els", padding="zeros", fold=rho, window=table, clip=True
    )


@pytest.mark.slow
def test_each_image_is_answered_with_the_fold_of_its_level_alone_and_in_a_batch() -> None:
    built = build_machines(
        ["els", "els+fold"], squares(), INFO, windows=Windows(None, "given", TABLE)
    )
    machine = built["els+fold"]
    assert isinstance(machine, LevelFoldDenoiser)
    assert machine.info.window == TABLE.windows
    x = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(0))
    levels, folds = [0.1, 0.2, 1.0, 20.0, 0.1], [0.5, 0.5, 0.0, 0.2, 0.5]
    together = machine.denoise(make_query(x, from_sigma(levels)))
    assert together.log_evidence is not None
    for index, (sigma, rho) in enumerate(zip(levels, folds, strict=True)):
        query = make_query(x[index : index + 1], from_sigma([sigma]))
        alone = machine.denoise(query)
        np.testing.assert_array_equal(alone.pixels[0], together.pixels[index])
        np.testing.assert_array_equal(alone.log_evidence, together.log_evidence[index : index + 1])
        plain = folded(rho, TABLE.windows).denoise(query)
        np.testing.assert_allclose(plain.pixels, alone.pixels, atol=1e-5)
    assert describe_machine(machine)["folds"]["rho"] == ["0.5", "0", "0.2"]
    assert "folds" not in describe_machine(built["els"])


@pytest.mark.slow
def test_sources_and_products_of_each_image_are_those_of_the_machine_of_its_level() -> None:
    machine = build_machines(["els+fold"], squares(), INFO, windows=Windows(None, "given", TABLE))[
        "els+fold"
    ]
    assert isinstance(machine, LevelFoldDenoiser)
    info = machine.info
    assert (info.has_sources, info.has_gradients, info.has_originality) == (True, True, True)
    assert derived(machine, "explain")
    assert derived(machine, "vjp")
    assert derived(machine, "originality")
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(3, *SHAPE, generator=generator) for _ in range(2))
    query, along = make_query(x, from_sigma([0.1, 1.0, 20.0])), g.numpy()
    together = machine.explain(query, 4)
    assert together.bank is machine.bank
    got = [*answers_of(together), machine.variance(query)]
    got += [machine.vjp(query, along).product, machine.jvp(query, along).product]
    for index, rho in enumerate((0.5, 0.0, 0.2)):
        own, part = folded(rho, TABLE.windows), slice(index, index + 1)
        want = [*answers_of(own.explain(query[part], 4)), own.variance(query[part])]
        want += [each(query[part], along[part]).product for each in (own.vjp, own.jvp)]
        for one, other in zip(got, want, strict=True):
            np.testing.assert_allclose(one[part], other, rtol=1e-3, atol=1e-4)


def answers_of(found: Explanation) -> list[np.ndarray[Any, Any]]:
    return [found.pixels, found.variance, found.entropy, found.weights, found.shares]


def test_a_machine_with_a_fold_needs_a_table() -> None:
    with pytest.raises(InvalidArgumentError, match="windows: expected a folder of windows with"):
        build_machines(["els+fold"], squares(), INFO)


@pytest.mark.parametrize("text", ["0.01", "a", "0.2;0.5", "-1", "nan"])
def test_folds_of_a_command_line_are_numbers_in_range(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"folds: expected numbers from 0\.05, or inf"):
        parse_folds(text)
    assert parse_folds("0.5,inf,0.2,0") == (0.2, 0.5, float("inf"))


@pytest.mark.parametrize("rho", [0.5, pytest.param(float("inf"), marks=pytest.mark.nightly)])
@pytest.mark.slow
def test_calibration_finds_window_and_fold_of_a_machine_in_the_place_of_the_network(
    tmp_path: Path, rho: float
) -> None:
    network = pretended(folded(rho, WindowTable.constant(5)))
    bank = write_bank(tmp_path / "bank.safetensors")
    settings = CalibrationSettings(samples=2, steps=3, windows=(3, 5), folds=(0.5, float("inf")))
    out, _ = calibrate_folder(
        network, squares(), settings, tmp_path / "fitted", bank_file=bank, device="cpu",
        command="", progress=lambda done, total: None,
    )  # fmt: skip
    table = read_folds(out / "folds.yaml")
    assert table.rho == (rho,) * 3
    assert table.k == (5,) * 3
    levels = json.loads((out / "calibration.json").read_text())["folds"]
    assert [level["rho"] for level in levels] == [rho if rho < 1 else "inf"] * 3
    assert list(levels[0]["median_cosine"]) == ["0", "0.5", "inf"]
    assert sorted(file.name for file in out.iterdir()) == [
        *("calibration.json", "folds.yaml", "model.yaml", "windows.yaml"),
    ]
    served = ModelRepository(tmp_path).load("fitted")
    assert served.info.fold == rho
    query = make_query(torch.randn(1, *SHAPE), from_sigma([1.0]))
    wanted = network.denoiser.denoise(query).pixels
    np.testing.assert_array_equal(served.denoise(query).pixels, wanted)
    assert find_windows(network, str(out)).folds == table


def test_a_damaged_table_of_folds_is_refused_by_name(tmp_path: Path) -> None:
    write_bank(tmp_path / "bank.safetensors")
    (tmp_path / "model").mkdir()
    document = "kind: analytic\nmachine: els\nbank: ../bank.safetensors\nfold: auto\n"
    (tmp_path / "model" / "model.yaml").write_text(document)
    for text, reason in [
        ("sigma: [1]\nk: [3]\n", "expected folds, a mapping of sigma, k and rho, got sigma, k"),
        ("sigma: [1]\nk: [3]\nrho: [x]\n", "expected folds: rho: numbers"),
        ("sigma: [1]\nk: [4]\nrho: [0.2]\n", "window.k: expected odd numbers"),
    ]:
        (tmp_path / "model" / "folds.yaml").write_text(text)
        with pytest.raises(LoadError, match=r"folds\.yaml") as caught:
            ModelRepository(tmp_path).load("model")
        assert reason in str(caught.value)
    (tmp_path / "model" / "folds.yaml").unlink()
    with pytest.raises(ElsError, match=r"folds\.yaml"):
        ModelRepository(tmp_path).load("model")


def test_the_command_rejects_folds_out_of_range_before_it_computes() -> None:
    result = CliRunner().invoke(
        app, ["calibrate", "fashion-resnet", "--bank", "none.safetensors", "--folds", "0.01"]
    )
    assert result.exit_code != 0
    assert "folds: expected numbers from 0.05, or inf" in f"{result.output}{result.exception}"
