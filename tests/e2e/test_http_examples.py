"""The examples of docs/http.md with curl, at a server of tiny models."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.support.processes import ServerProcess

PAGE = (Path(__file__).parents[2] / "docs" / "http.md").read_text()
EXAMPLES = [block for block in re.findall(r"(?:^    .*\n)+", PAGE, re.MULTILINE) if "curl" in block]
TINY = {
    "fashion-wiener": "zeros",
    "fashion-local": "zeros",
    "28, 28]": "6, 5]",
    "784": "30",
    "label=3": "label=1",
    "curl ": "curl --silent --show-error --fail-with-body ",
}
"""Words of the examples → those for the tests' models, and options with which a failure shows."""


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_commands_of_an_example_succeed(
    server: ServerProcess, tmp_path: Path, example: str
) -> None:
    assert shutil.which("curl"), "the tests need curl"
    generator = np.random.default_rng(0)
    for name, shape in (("noisy", (6, 5)), ("photo", (60, 50, 3))):
        pixels = generator.integers(0, 256, shape).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    text = example.replace("localhost:8080", f"127.0.0.1:{server.ready['http_port']}")
    for word, other in TINY.items():
        text = text.replace(word, other)
    command = ["bash", "-euo", "pipefail", "-c", text]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b""), done.stdout
    for name in re.findall(r"-o (\S+\.png)", text):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) >= 5
