"""Checks of the live page in Chromium: ``python -m tests.page.run [SCREENSHOTS_FOLDER]``.

Needs the packages of ``package.json``; ``make page`` installs them.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from PIL import Image
from tests.support.processes import COMMAND, serving

from els_service.denoisers.banks import load_bank, make_bank, save_bank
from els_service.repository import bundled_models

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
CHECK_S = 240
EACH = 6


def picture(folder: Path) -> Path:
    """Write a picture of another size than a model's, in colour; return its path."""
    rows, columns = np.mgrid[0:90, 0:160]
    inside = (rows - 45) ** 2 + (columns - 80) ** 2 < 35**2
    pixels = np.stack([np.where(inside, 230, 20), np.where(inside, 120, 60), columns], axis=2)
    file = folder / "picture.png"
    Image.fromarray(pixels.astype(np.uint8)).save(file)
    return file


def models(folder: Path) -> Path:
    """Write models of six pictures of each of ten labels, which answer at once; return the root."""
    bank = load_bank(bundled_models() / "_banks" / "fashion-mnist-5000.safetensors")
    chosen = np.concatenate([np.flatnonzero(bank.labels == label)[:EACH] for label in range(10)])
    few = make_bank(
        bank.images[chosen],
        bank.labels[chosen],
        label_names=bank.label_names,
        source=bank.source,
        licence=bank.licence,
    )
    root = folder / "models"
    (root / "_banks").mkdir(parents=True)
    save_bank(few, root / "_banks" / "few.safetensors")
    for name, machine in (("fashion", "els"), ("fashion-ideal", "ideal")):
        (root / name).mkdir()
        window = "window: fashion-mnist-resnet\n" if machine == "els" else ""
        text = f"kind: analytic\nmachine: {machine}\nbank: ../_banks/few.safetensors\n{window}"
        (root / name / "model.yaml").write_text(text)
    return root


def main(screenshots: str = str(DOCS)) -> int:
    """Run the checks against a server; return their exit code."""
    options = {"ELS_HTTP_PAGE": "draw"}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        arguments = "--models", models(Path(folder)), "--threads", 1, "--http-port", 0
        server = stack.enter_context(serving(*arguments, program=COMMAND, **options))
        url = f"http://127.0.0.1:{server.ready['http_port']}/"
        script = HERE / "page.mjs"
        command = ["node", str(script), url, str(picture(Path(folder))), screenshots]
        return subprocess.run(command, timeout=CHECK_S, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
