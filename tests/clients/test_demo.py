from __future__ import annotations

import sys
from pathlib import Path

import pytest
from clients.examples import demo
from PIL import Image
from tests.support.fake_pictures import FakePictures
from tests.support.fake_server import served

ROOT = Path(__file__).parents[2]
SERVE = """
import json, signal
from tests.support.fake_server import FakeDenoiser, served
with served(FakeDenoiser()) as target:
    port = int(target.rpartition(":")[2])
    print(json.dumps({"event": "ready", "grpc_port": port, "metrics_port": 0}), flush=True)
    signal.pause()
"""


def run(monkeypatch: pytest.MonkeyPatch, script: str, out: Path) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(demo, "SERVER", (sys.executable, "-c", script))
    files = ["--sources", str(out.with_name("sources.png"))]
    files += ["--remix", str(out.with_name("remix.png"))]
    monkeypatch.setattr(sys, "argv", ["demo.py", "--out", str(out), *files])
    with served(FakePictures()) as target:
        monkeypatch.setattr(demo, "REMIX", (*demo.REMIX, f"--target={target}"))
        demo.main()


@pytest.mark.slow
def test_the_demo_draws_a_row_for_each_label_and_tells_where_and_how_long(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "demo.png"
    run(monkeypatch, SERVE, out)
    with Image.open(out) as picture:
        rows = (picture.height - demo.CAPTION) / (4 * demo.ZOOM + demo.GAP)
    assert rows == 2
    with Image.open(tmp_path / "sources.png") as sheet:
        # One bank image below the maps, in columns of four.
        assert sheet.width > sheet.height > 0
    with Image.open(tmp_path / "remix.png") as strip, Image.open(demo.PHOTO) as photo:
        # The photograph, and the new pictures beside it.
        assert strip.width == (1 + demo.REMIXED) * (demo.ZOOM * photo.width + demo.GAP) - demo.GAP
        first = strip.crop((0, 0, demo.ZOOM * photo.width, strip.height))
        assert first.resize(photo.size, Image.Resampling.NEAREST).tobytes() == photo.tobytes()
    printed = capfd.readouterr().out
    assert str(out) in printed
    assert all(part in printed for part in demo.PARTS)


def test_a_server_that_does_not_start_ends_the_demo_with_its_last_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=r"(?s)did not start \(exit code 3\).*no bank here"):
        run(
            monkeypatch,
            "import sys; print('no bank here', file=sys.stderr); sys.exit(3)",
            tmp_path / "demo.png",
        )


@pytest.mark.slow
def test_a_server_that_dies_at_work_ends_the_demo_with_its_last_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    dying = SERVE.replace("    signal.pause()", "    raise SystemExit('the bank burnt down')")
    with pytest.raises(SystemExit, match=r"(?s)demo: .*the bank burnt down"):
        run(monkeypatch, dying, tmp_path / "demo.png")
