"""Networks, banks, machines and windows as a comparison finds them."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.support.comparing import (
    SHAPE,
    squares,
    subjects,
    write_bank,
    write_network,
)

from els_service.denoisers.banks import make_bank
from els_service.denoisers.base import make_query
from els_service.denoisers.levels import from_sigma
from els_service.denoisers.noise import standard_normal
from els_service.denoisers.pca_masks import ThresholdTable
from els_service.denoisers.smoothed import SmoothedDenoiser
from els_service.denoisers.windows import WindowTable
from els_service.errors import ElsError, InvalidArgumentError, LoadError
from els_service.experiments.comparison.machines import (
    Smoothing,
    build_machines,
    read_thresholds_of,
)
from els_service.experiments.comparison.run import describe_machine
from els_service.experiments.comparison.subjects import (
    Windows,
    find_windows,
    open_bank,
    open_network,
    windows_of,
)
from els_service.repository import bundled_models, model_folder

TABLE = "sigma: [0.1, 1.0]\nk: [3, 5]\n"


def test_machines_take_the_network_s_padding_unless_they_are_told_another() -> None:
    bank = squares(labelled=False)
    zeros = subjects(bank, None, "els").network.denoiser.info
    names = ("els", "local", "ideal", "equivariant", "els-valid", "els-circular")
    for padding in ("zeros", "circular"):
        machines = build_machines(names, bank, replace(zeros, padding=padding))
        found = {name: machine.info.padding for name, machine in machines.items()}
        assert found == {
            "els": padding,
            "local": padding,
            "ideal": "zeros",
            "equivariant": "circular",
            "els-valid": "valid",
            "els-circular": "circular",
        }


def test_machines_without_a_padding_have_names_and_a_description_of_their_own() -> None:
    bank = squares(labelled=False)
    info = subjects(bank, None, "els").network.denoiser.info
    names = ("wiener", "pca", "pca-released", "pspc")
    machines = build_machines(names, bank, info, thresholds={"": ThresholdTable.constant(0.2)})
    table = {"sigma": [1.0], "tau": [0.2]}
    described = {name: describe_machine(machine) for name, machine in machines.items()}
    assert described["wiener"] == {"machine": "wiener", "padding": ""}
    for name in ("pca", "pca-released"):
        assert described[name] == {"machine": name, "padding": "", "thresholds": table}
    pspc = described["pspc"]
    assert (pspc["machine"], pspc["padding"], pspc["fold"]) == ("local", "inside", "inf")
    with pytest.raises(InvalidArgumentError, match="thresholds: expected a number or a table for"):
        build_machines(["pca-released"], bank, info)
    lone = replace(bank, images=bank.images[:1], labels=bank.labels[:1])
    with pytest.raises(InvalidArgumentError, match=r"machines: .* expected at least 2 images"):
        build_machines(["pca"], lone, info)


def test_pspc_is_the_mean_of_the_mean_crops_that_hold_a_pixel() -> None:
    # Niedoba et al. 2025, equations 9 to 11, crop by crop in float64.
    bank, k, sigma = squares(labelled=False), 3, 0.7
    info = subjects(bank, None, "els").network.denoiser.info
    given = Windows(WindowTable.constant(k), "given")
    machine = build_machines(["pspc"], bank, info, windows=given)["pspc"]
    z = bank.pixels()[:1].double() + sigma * torch.from_numpy(standard_normal(0, 0, 0, 64)).view(
        1, *SHAPE
    )
    images, total = bank.pixels().double(), torch.zeros(SHAPE, dtype=torch.float64)
    count = torch.zeros_like(total)
    for top, left in itertools.product(range(SHAPE[1] - k + 1), range(SHAPE[2] - k + 1)):
        crop = (..., slice(top, top + k), slice(left, left + k))
        distance = (z.float().double()[crop] - images[crop]).square().sum((1, 2, 3))
        weights = (-distance / (2 * sigma**2)).softmax(0)
        total[crop] += torch.einsum("n,nchw->chw", weights, images[crop])
        count[crop] += 1
    got = machine.denoise(make_query(z.float(), from_sigma([sigma]))).mean[0]
    torch.testing.assert_close(got.double(), total / count, rtol=0, atol=2e-5)


def test_thresholds_of_a_command_line_are_a_number_or_a_table(tmp_path: Path) -> None:
    (tmp_path / "thresholds.yaml").write_text("sigma: [0.1, 1.0]\ntau: [0.2, 0.05]\n")
    constant, table = ThresholdTable.constant(0.2), ThresholdTable((0.1, 1.0), (0.2, 0.05))
    assert read_thresholds_of(None) == {}
    assert read_thresholds_of("0.2") == {"": constant}
    for name in (tmp_path, tmp_path / "thresholds.yaml"):
        assert read_thresholds_of(str(name)) == {"": table}
    each = read_thresholds_of(f"pca-released=0.2,pca={tmp_path}")
    assert each == {"pca-released": constant, "pca": table}
    for wrong in ("0", "2", "nan", "nowhere", ""):
        with pytest.raises(InvalidArgumentError, match="thresholds: expected a number above 0"):
            read_thresholds_of(wrong)
    (tmp_path / "thresholds.yaml").write_text("sigma: [0.1]\ntau: [x]\n")
    with pytest.raises(LoadError, match="expected thresholds: tau: numbers"):
        read_thresholds_of(str(tmp_path))


def test_windows_are_those_shipped_with_the_network_else_auto(tmp_path: Path) -> None:
    network = open_network(str(write_network(tmp_path / "net")))
    assert find_windows(network).source == "auto"
    beside = tmp_path / "net-els"
    beside.mkdir()
    (beside / "windows.yaml").write_text(TABLE)
    for fingerprint, machine, found in (
        ("another", "els", "auto"),
        (network.fingerprint, "local", "auto"),
        (network.fingerprint, "els", "net-els/windows.yaml"),
    ):
        content = {"network": {"fingerprint": fingerprint}, "machine": machine}
        (beside / "calibration.json").write_text(json.dumps(content))
        assert find_windows(network).source == found
    (tmp_path / "net" / "windows.yaml").write_text(TABLE.replace("5", "7"))
    table = find_windows(network).table
    assert table is not None
    assert table.k == (3, 7)
    assert find_windows(network, "auto").table is None
    assert find_windows(network, str(beside)).source == "net-els/windows.yaml"
    # A table whose record names other weights is not this network's.
    (tmp_path / "net" / "calibration.json").write_text(json.dumps(content))
    assert find_windows(network).source == "net/windows.yaml"
    assert find_windows(replace(network, fingerprint="trained anew")).source == "auto"
    constant = find_windows(network, "5").table
    assert constant is not None
    assert constant.at(np.array([0.1, 10])).tolist() == [5, 5]


def test_a_machine_with_a_table_of_its_own_has_that_and_all_others_the_general_one(
    tmp_path: Path,
) -> None:
    network, bank = open_network(str(write_network(tmp_path / "net"))), squares()
    (tmp_path / "fitted").mkdir()
    (tmp_path / "fitted" / "windows.yaml").write_text(TABLE)
    names = ("els", "local", "pspc", "wiener")
    given = windows_of(network, f"7,pspc={tmp_path}/fitted,els=3", names)
    machines = build_machines(names, bank, network.denoiser.info, windows=given)
    tables = {name: machine.info.window for name, machine in machines.items()}
    assert tables == {
        "els": WindowTable.constant(3),
        "local": WindowTable.constant(7),
        "pspc": WindowTable((0.1, 1.0), (3, 5)),
        "wiener": None,
    }
    assert [given.of(name).source for name in names[:3]] == [
        *("constant", "constant", "fitted/windows.yaml"),
    ]
    only = windows_of(network, "pspc=5", names)
    assert (only.source, only.of("els").source, only.of("pspc").table) == (
        *("auto", "auto", WindowTable.constant(5)),
    )
    # A folder whose name has what separates tables.
    odd = tmp_path / "a=b,c"
    shutil.copytree(tmp_path / "fitted", odd)
    assert windows_of(network, str(odd), names).source == "a=b,c/windows.yaml"
    for wrong, got in (("5,7,els=3", "7"), ("els=3,els=5", "els=5"), ("elz=3", "elz=3")):
        with pytest.raises(InvalidArgumentError, match=f"windows: expected one table.* got {got}"):
            windows_of(network, wrong, names)
    none = windows_of(network, "wiener=3", names)
    with pytest.raises(InvalidArgumentError, match="tables of machines with windows, got wiener"):
        build_machines(names, bank, network.denoiser.info, windows=none)


def test_smoothing_and_draws_are_those_of_the_machine() -> None:
    bank = squares(labelled=False)
    info = subjects(bank, None, "els").network.denoiser.info
    for given, eta, draws in ((None, 0.2, 16), (Smoothing(0.05, 3), 0.05, 3)):
        machine = build_machines(["smoothed"], bank, info, smoothing=given)["smoothed"]
        assert isinstance(machine, SmoothedDenoiser)
        assert (machine.smoothing, machine.draws) == (eta, draws)
    with pytest.raises(InvalidArgumentError, match="smoothing: expected a number, 0 or more, got"):
        Smoothing(float("inf"))
    with pytest.raises(InvalidArgumentError, match="draws: expected 1 to 1024, got 1025"):
        Smoothing(draws=1025)


@pytest.mark.parametrize(
    "content",
    [
        *("sigma: [1]\nk: [2]", "sigma: [1]\nk: [3.7]", "sigma: 1\nk: 3", "k: [3]"),
        *("[]", "{", 20_000 * "["),
    ],
)
def test_a_table_that_is_none_is_refused_by_its_file(tmp_path: Path, content: str) -> None:
    network = open_network(str(write_network(tmp_path / "net")))
    (tmp_path / "net" / "windows.yaml").write_text(content)
    with pytest.raises(LoadError, match=r"windows\.yaml: expected (windows|YAML)"):
        find_windows(network)
    with pytest.raises(InvalidArgumentError, match="windows: expected calibrated"):
        find_windows(network, str(tmp_path / "nowhere"))


def test_a_bank_is_cut_to_as_many_of_each_label(tmp_path: Path) -> None:
    labels = np.array([0] * 10 + [1] * 3)
    names = [f"{i}.png" for i in range(13)]
    whole = make_bank(squares(images=13).images, labels, file_names=names)
    write_bank(tmp_path / "bank.safetensors", whole)
    info = open_network(str(write_network(tmp_path / "net"))).denoiser.info
    cut = open_bank(tmp_path / "bank.safetensors", info, 9)
    assert np.bincount(cut.labels).tolist() == [4, 3]
    np.testing.assert_array_equal(cut.images, whole.images[[0, 1, 2, 3, 10, 11, 12]])
    with pytest.raises(InvalidArgumentError, match="bank-limit: expected at least 2"):
        open_bank(tmp_path / "bank.safetensors", info, 1)


def test_a_name_is_a_served_model_a_path_a_folder_and_neither_leads_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = tmp_path / "models"
    served, other = write_network(models / "net"), write_network(tmp_path / "here" / "net")
    write_network(tmp_path / "here" / "own")
    monkeypatch.chdir(tmp_path / "here")
    assert open_network("./net", models).folder.samefile(other)
    assert open_network("own", models).name == "own"
    for name in ("", "nowhere", "../models"):
        with pytest.raises(ElsError, match="expected"):
            open_network(name, models)
    with pytest.raises(InvalidArgumentError, match=r"network: expected one model: .* \./net"):
        open_network("net", models)
    # A folder of that name that holds no model, as what a comparison wrote, is not meant.
    (tmp_path / "here" / "net" / "model.yaml").unlink()
    assert open_network("net", models).folder.samefile(served)
    assert open_network("net/", models).folder.samefile(served)
    second = write_network(models / "versions" / "2")
    assert open_network("versions/2", models).folder.samefile(second)
    assert model_folder(open_network("versions", models).folder) == (models / "versions").resolve()
    monkeypatch.chdir(models)
    assert open_network("net", models).folder.samefile(served)
    (served / "model.yaml").write_text("kind: gaussian")
    with pytest.raises(LoadError, match=r"kind: expected network, got gaussian"):
        open_network("net", models)


def test_a_name_without_a_models_folder_is_a_bundled_model() -> None:
    network = open_network("fashion-resnet")
    assert network.folder == bundled_models() / "fashion-resnet"
    assert find_windows(network).source == "fashion-resnet/windows.yaml"
