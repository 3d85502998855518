"""Starts a server, samples one image of each label and plots its trajectory from noise.

A second picture shows which bank images one more sample was made of, as ``els explain`` does. A
third has new pictures of the world of one photograph, which ``els remix`` draws without training.

Usage: python clients/examples/demo.py --out demo.png --sources sources.png --remix remix.png
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from rich.progress import track

from els_client import Client, ElsError

SERVER = (Path(sys.executable).with_name("els-server"), "run", "--port=0", "--metrics-port=0")
ELS = Path(sys.executable).with_name("els")
# Launch site by SpaceX, public domain; its number of pictures is that of the strip.
PHOTO = Path(__file__).with_name("rocket.png")
REMIXED = 3
REMIX = (ELS, "remix", PHOTO, "--size=96x64", f"--count={REMIXED}", "--seed=1", "--json")
SERVER_LIFE_S = 600
PARTS = ("server start", "sampling", "drawing", "explaining", "remixing")
STEPS = 20
# The eighth row of the first picture.
EXPLAINED = ("--model=fashion-els", "--seed=0", "--first-image=7", "--label=7", "--step=16")
SHOWN = (2, 5, 8, 11, 14, 17)
ZOOM, GAP, MARGIN, CAPTION = 3, 6, 96, 28
PAPER, INK, FAINT = (13, 17, 23), (230, 237, 243), (139, 148, 158)

Column = tuple[str, npt.NDArray[np.float32]]


def main() -> None:
    """Run the demo; exits with 1 and the cause on stderr if it fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="picture to write")
    parser.add_argument(
        "--sources", type=Path, default=Path("demo-sources.png"), help="second picture to write"
    )
    parser.add_argument(
        "--remix", type=Path, default=Path("demo-remix.png"), help="third picture to write"
    )
    arguments = parser.parse_args()
    out: Path = arguments.out
    times = [time.perf_counter()]
    try:
        with running_server() as port, Client(f"127.0.0.1:{port}") as client:
            times.append(time.perf_counter())
            names = client.model("fashion-els").label_names
            columns = trajectory(client, len(names))
            times.append(time.perf_counter())
            draw(names, columns).save(out)
            times.append(time.perf_counter())
            explain(port, arguments.sources)
            times.append(time.perf_counter())
        remix(arguments.remix)
        times.append(time.perf_counter())
    except (ElsError, OSError, RuntimeError) as error:
        sys.exit(f"demo: {error}")
    for part, (began, ended) in zip(PARTS, pairwise(times), strict=True):
        print(f"{part:<14}{ended - began:5.1f} s")
    for name, path in (("pictures", out), ("", arguments.sources), ("", arguments.remix)):
        print(f"{name:<14}{path.resolve()}")


@contextmanager
def running_server() -> Iterator[int]:
    """Yield the port of a server process, which is drained on exit.

    Raises:
        RuntimeError: It did not start, or a call failed; the text has the end of the server's log.
    """
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(SERVER, stdout=subprocess.PIPE, stderr=log, text=True) as server,
    ):
        # Killing the server fails its calls, so that the demo ends even if something hangs.
        alarm = threading.Timer(SERVER_LIFE_S, server.kill)
        alarm.start()
        try:
            yield ready_port(server)
        except (ElsError, RuntimeError) as error:
            stop(server)
            log.seek(0)
            raise RuntimeError(f"{error}; the server's log ends:\n{log.read()[-2000:]}") from error
        finally:
            stop(server)
            alarm.cancel()


def ready_port(server: subprocess.Popen[str]) -> int:
    """Return the port in the server's ready line on stdout."""
    assert server.stdout is not None
    line = server.stdout.readline()
    if not line:
        raise RuntimeError(f"the server did not start (exit code {server.wait()})")
    return int(json.loads(line)["grpc_port"])


def stop(server: subprocess.Popen[str]) -> None:
    """Drain the server and wait for its exit."""
    server.terminate()
    server.wait()


def trajectory(client: Client, count: int) -> list[Column]:
    """Return columns of images [count, 1, H, W]: noise, denoised steps, samples."""
    steps = client.sample(
        model="fashion-els",
        label=list(range(count)),
        count=count,
        steps=STEPS,
        want=("denoised", "noise"),
    )
    way = list(track(steps, f"{count} samples", total=STEPS))
    expected = [(f"step {index}", way[index - 1].denoised) for index in SHOWN]
    return [("noise", way[0].noise), *expected, ("sample", way[-1].x)]


def explain(port: int, out: Path) -> None:
    """Write a sample beside its maps and the eight bank images that it took most from.

    Raises:
        RuntimeError: The command failed; the text is the end of its log.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [str(ELS), f"--target=127.0.0.1:{port}", "explain", *EXPLAINED, f"--out={folder}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        shutil.copyfile(Path(folder, "sheet.png"), out)


def remix(out: Path) -> None:
    """Write the photograph beside new pictures of its world, which a server of its own draws.

    Raises:
        RuntimeError: The command failed; the text is the end of its log.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [*map(str, REMIX), f"--out={folder}/new.png"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        files = [PHOTO, *json.loads(done.stdout)["each"]]
        pictures = [Image.open(file).convert("RGB") for file in files]
    width, height = (ZOOM * side for side in pictures[0].size)
    strip = Image.new("RGB", (len(files) * (width + GAP) - GAP, height), PAPER)
    for column, picture in enumerate(pictures):
        tile = picture.resize((width, height), Image.Resampling.NEAREST)
        strip.paste(tile, (column * (width + GAP), 0))
    strip.save(out)


def draw(names: Sequence[str], columns: Sequence[Column]) -> Image.Image:
    """Return the picture: one row per label with its name, and a caption above each column."""
    height, width = (ZOOM * side for side in columns[0][1].shape[2:])
    size = (MARGIN + len(columns) * (width + GAP), CAPTION + len(names) * (height + GAP))
    picture = Image.new("RGB", size, PAPER)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    for row, name in enumerate(names):
        middle = CAPTION + row * (height + GAP) + height / 2
        pen.text((MARGIN - 12, middle), name, INK, font, anchor="rm")
    for column, (caption, images) in enumerate(columns):
        left = MARGIN + column * (width + GAP)
        pen.text((left + width / 2, CAPTION / 2), caption, FAINT, font, anchor="mm")
        for row, image in enumerate(images):
            pixels = np.clip((image[0] + 1) * 127.5, 0, 255).round().astype(np.uint8)
            tile = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
            picture.paste(tile, (left, CAPTION + row * (height + GAP)))
    return picture


if __name__ == "__main__":
    main()
