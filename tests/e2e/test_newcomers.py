"""What newcomers do first: own photographs, and samplers of k-diffusion with a served model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from tests.support.environments import SOURCES, python_with
from tests.support.processes import ServerProcess, serving

from els_client import Client

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "clients" / "examples"
ELS = "from els_client.cli import main; main()"
ELS_SERVER = "from els_service.cli import main; main()"
SIDE = 12
SIZES = ((40, 30), (30, 40), (48, 48))


def run(program: str, *arguments: object) -> str:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def take_photographs(folder: Path) -> None:
    """Write colour pictures of several sizes, formats and orientations, in folders by label."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index, (width, height) in enumerate(SIZES * 2):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
        exif = Image.Exif()
        exif[0x0112] = 6 if index % 2 else 1
        place = folder / ("cats" if index % 2 else "dogs")
        place.mkdir(exist_ok=True)
        path = place / f"{index}.{'jpg' if index < 3 else 'png'}"
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(path, exif=exif)


def test_own_photographs_become_a_model_that_denoises_them(tmp_path: Path) -> None:
    take_photographs(photographs := tmp_path / "photographs")
    models = tmp_path / "models"
    (models / "mine").mkdir(parents=True)
    bank = models / "mine" / "bank.safetensors"
    run(ELS_SERVER, "bank", "build", photographs, bank, "--resize", SIDE)
    (models / "mine" / "model.yaml").write_text(
        "kind: analytic\nmachine: els\nbank: bank.safetensors\nwindow: 5\n"
    )
    with serving("--models", models, "--threads", 1) as server:
        target = ("--target", server.target, "--model", "mine")
        original = photographs / "dogs" / "0.jpg"
        run(ELS, *target, "denoise", original, tmp_path / "out.png", "--sigma", 0.1, "--resize")
        run(ELS, *target, "sample", tmp_path / "drawn.png", "--label", "0,1", "--steps", 4)
        with Client(server.target) as client:
            model = client.model("mine")
            assert (model.shape, model.label_names) == ((3, SIDE, SIDE), ("cats", "dogs"))
    with Image.open(tmp_path / "out.png") as out:
        assert (out.size, out.mode) == ((SIDE, SIDE), "RGB")
    assert (tmp_path / "drawn.png").exists()


def test_k_diffusion_draws_with_a_served_model(server: ServerProcess, tmp_path: Path) -> None:
    python = python_with("k_diffusion", "adapters")
    out = tmp_path / "drawn.npy"
    arguments = ("--target", server.target, "--model", "zeros", "--steps", 8, "--out", out)
    command = [python, EXAMPLES / "k_diffusion_sampling.py", "--label", 1, *arguments]
    words = [str(word) for word in command]
    subprocess.run(words, check=True, timeout=280, env={**os.environ, "PYTHONPATH": SOURCES})
    drawn = np.load(out)
    assert drawn.shape == (4, 1, 6, 5)
    assert np.abs(drawn).max() <= 1.01
