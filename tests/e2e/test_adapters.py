"""Algorithms of deepinv, k-diffusion, smalldiffusion and azula run against a server."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from tests.support.environments import ROOT, SOURCES, python_with
from tests.support.processes import environment, serving

from els_service.denoisers.banks import load_bank, make_bank, save_bank
from els_service.repository import bundled_models

TESTS = ROOT / "tests" / "adapters"
LABEL, IMAGES = 7, 200
MACHINES = {"ideal": "machine: ideal\n", "els": "machine: els\nwindow: auto\n"}


def write_pictures(folder: Path) -> None:
    """Write models over a bank of shoes, and the bank beside a picture that it does not have."""
    whole = load_bank(bundled_models() / "_banks" / "fashion-mnist-5000.safetensors")
    shoes = whole.images[whole.labels == LABEL]
    bank, picture = shoes[:IMAGES], shoes[IMAGES : IMAGES + 1]
    np.savez(folder / "pictures.npz", bank=bank, picture=picture)
    for name, document in MACHINES.items():
        model = folder / "models" / name
        model.mkdir(parents=True)
        save_bank(make_bank(bank), model / "bank.safetensors")
        text = f"kind: analytic\n{document}bank: bank.safetensors\n"
        (model / "model.yaml").write_text(text)


@pytest.mark.timeout(900)
def test_every_library_s_own_algorithms_run_with_its_adapter(tmp_path: Path) -> None:
    python = python_with("deepinv", "adapters")
    write_pictures(tmp_path)
    with serving("--models", tmp_path / "models") as server:
        done = subprocess.run(
            [
                *(python, "-m", "pytest", "-c", TESTS / "pytest.ini", "--confcutdir", TESTS),
                *("--rootdir", ROOT, "--target", server.target),
                *("--pictures", tmp_path / "pictures.npz", TESTS),
            ],
            cwd=ROOT,
            env=environment(PYTHONPATH=SOURCES),
            capture_output=True,
            text=True,
            timeout=880,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " skipped" not in done.stdout
