"""Networks that ship: what is packed of a training run, and that all that ship were packed so."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from benchmarks import package_model
from tests.support.commands import run
from tests.support.denoisers import random_images

from els_service.denoisers.banks import make_bank, save_bank
from els_service.denoisers.base import make_query
from els_service.denoisers.levels import from_sigma
from els_service.repository import bundled_models, load_network_folder

NOTICES = Path(__file__).parents[2] / "THIRD_PARTY_NOTICES.md"
FILES = ["README.md", "loss.csv", "loss.png", "model.yaml", "training.json", "weights.safetensors"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    bank = make_bank(random_images((24, 1, 8, 8)).numpy(), np.arange(24) % 3)
    save_bank(bank, folder / "bank.safetensors")
    arguments = ["--data", folder / "bank.safetensors", "--out", folder / "net", "--widths", "8"]
    given = ["--source", "https://images.example/a", "--licence", "MIT (Someone)"]
    amounts = ["--epochs", "4", "--batch", "8", "--log-steps", "2", "--label-names", "a/b,c,d"]
    assert run("train", *arguments, *given, *amounts).exit_code == 0
    return folder / "net"


@pytest.mark.slow
def test_a_folder_ships_without_checkpoint_or_paths_and_answers_the_same(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calibrated = tmp_path / "net-els"
    calibrated.mkdir()
    (calibrated / "windows.yaml").write_text("sigma: [1.0]\nk: [3]\n")
    digest = hashlib.sha256((trained / "weights.safetensors").read_bytes()).hexdigest()
    record = {"command": f"els-server calibrate {trained}", "network": {"fingerprint": digest}}
    (calibrated / "calibration.json").write_text(json.dumps(record))
    out = tmp_path / "tiny"
    assert package_model.main([str(trained), str(out), "--windows", str(calibrated)]) == 0
    assert "written: " in capsys.readouterr().out
    found = {path.name for path in out.iterdir()}
    assert found == {*FILES, "windows.yaml", "calibration.json"}
    _check_texts(out)
    card = (out / "README.md").read_text()
    fingerprint = json.loads((trained / "training.json").read_text())["data"]["fingerprint"]
    for part in ("# tiny", fingerprint, "--data bank.safetensors", "a/b,c,d", "MIT (Someone)"):
        assert part in card
    query = make_query(random_images((3, 1, 8, 8)), from_sigma([0.1, 1.0, 9.0]), [0, 1, 2])
    half, whole = (load_network_folder(folder).denoise(query).pixels for folder in (out, trained))
    np.testing.assert_allclose(half, whole, atol=1e-2)
    assert package_model.main([str(trained), str(out)]) == 2
    assert "out: expected a folder that does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"step": 1}, "step: expected 12, a finished run, got 1"),
        ({"data": {"source": "here", "licence": ""}}, "data.licence: expected a run with"),
    ],
)
def test_what_is_not_finished_or_has_no_licence_does_not_ship(
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, object],
    reason: str,
) -> None:
    for name in ("weights.safetensors", "model.yaml"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    record = json.loads((trained / "training.json").read_text()) | change
    (tmp_path / "training.json").write_text(json.dumps(record))
    assert package_model.main([str(tmp_path), str(tmp_path / "out")]) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_networks_that_ship_were_packed_so_are_small_and_stand_in_the_notices() -> None:
    # None may ship; those that do must keep to this.
    shipped = sorted(path.parent for path in bundled_models().glob("*/weights.safetensors"))
    for folder in shipped:
        assert {path.name for path in folder.iterdir()} >= set(FILES)
        assert not (folder / "checkpoint.safetensors").exists()
        assert package_model.size_of(folder) <= package_model.MOST_BYTES
        _check_texts(folder)
        assert folder.name in NOTICES.read_text()
    assert sum(map(package_model.size_of, shipped)) <= package_model.MOST_BYTES_TOGETHER


def _check_texts(folder: Path) -> None:
    for path in folder.iterdir():
        if path.suffix in (".json", ".md", ".yaml"):
            assert tempfile.gettempdir() not in path.read_text()
            assert "/home/" not in path.read_text()
