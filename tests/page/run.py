"""Checks of the live page in Chromium: ``python -m tests.page.run [SCREENSHOTS_FOLDER]``.

Needs the packages of ``package.json``; ``make page`` installs them.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from tests.support.processes import COMMAND, serving

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
CHECK_S = 240


def picture(folder: Path) -> Path:
    """Write a picture of another size than a model's, in colour; return its path."""
    rows, columns = np.mgrid[0:90, 0:160]
    inside = (rows - 45) ** 2 + (columns - 80) ** 2 < 35**2
    pixels = np.stack([np.where(inside, 230, 20), np.where(inside, 120, 60), columns], axis=2)
    file = folder / "picture.png"
    Image.fromarray(pixels.astype(np.uint8)).save(file)
    return file


def main(screenshots: str = str(DOCS)) -> int:
    """Run the checks against a server of the bundled models; return their exit code."""
    options = {"ELS_HTTP_PAGE": "draw"}
    with (
        tempfile.TemporaryDirectory() as folder,
        serving("--http-port", 0, "--threads", 1, program=COMMAND, **options) as server,
    ):
        url = f"http://127.0.0.1:{server.ready['http_port']}/"
        script = HERE / "page.mjs"
        command = ["node", script, url, picture(Path(folder)), screenshots]
        return subprocess.run(command, timeout=CHECK_S, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
