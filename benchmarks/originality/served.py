"""Servers of the bundled models, of machines of whole data sets, and of photographs."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.service.servers import free_port, running
from els_client import Client, UnavailableError
from els_service.repository import bundled_models

ELS = Path(sys.executable).with_name("els")
FULL = {
    "fashion-full-ideal": ("ideal", 0),
    "fashion-full-els": ("els", 0),
    "mnist-full-ideal": ("ideal", 1),
    "mnist-full-els": ("els", 1),
}
"""Model of a whole data set → its machine, and which of the two banks."""
FULL_BANKS = {"fashion-unet": "fashion-full-els", "mnist-resnet-64": "mnist-full-els"}
"""Bundled network → the model whose bank it is compared with."""
_READY_S = 60.0


@contextmanager
def full_models(full: Sequence[Path] | None) -> Iterator[Path | None]:
    """Yield a folder of models of whole data sets; None, for the bundled models, without any."""
    if full is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name, (machine, bank) in FULL.items():
            (root / name).mkdir()
            text = f"kind: analytic\nmachine: {machine}\nbank: bank.safetensors\n"
            (root / name / "model.yaml").write_text(text)
            _linked(full[bank], root / name / "bank.safetensors")
        for name in FULL_BANKS:
            shutil.copytree(bundled_models() / name, root / name)
        yield root


def _linked(file: Path, name: Path) -> None:
    try:
        os.link(file, name)
    except OSError:  # Another file system.
        shutil.copyfile(file, name)


@contextmanager
def served(root: Path | None) -> Iterator[Client]:
    """Yield the client of a server of a folder's or the bundled models, when it is ready."""
    with serving(root) as target, Client(target, timeout_s=3600) as client:
        yield client


@contextmanager
def serving(root: Path | None) -> Iterator[str]:
    """Yield the address of such a server."""
    port = free_port()
    own = () if root is None else (f"--models={root}",)
    command = (ELS.with_name("els-server"), "run", f"--port={port}", "--metrics-port=0", *own)
    with running(command, port):
        with Client(f"127.0.0.1:{port}") as client:
            _when_ready(client)
        yield f"127.0.0.1:{port}"


def _when_ready(client: Client) -> None:
    deadline = time.monotonic() + _READY_S
    while True:
        try:
            client.models()
        except UnavailableError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
        else:
            return
