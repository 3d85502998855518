"""Memory and seconds of pictures that a server draws."""

from __future__ import annotations

import re
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.fold.matmul import picture
from benchmarks.pyramid.matmul import STEPS
from benchmarks.service.servers import Running, free_port, running
from els_client import Client, ElsError

MODEL = "photo"
_READY_S = 60.0
_TIMEOUT_S = 600.0


def memory_row(size: tuple[int, int], patch: int) -> dict[str, Any]:
    """Return the memory of a server that draws one picture, above that of the idle server."""
    with served(size, patch) as (server, client):
        loaded = memory_mib(server, "VmRSS")
        (server_root(server) / "clear_refs").write_text("5")
        began = time.perf_counter()
        *_, last = client.sample(model=MODEL, sampler="pyramid", size=size, seed=1, want=())
        drawn = time.perf_counter() - began
        peak = memory_mib(server, "VmHWM")
    assert last.x.shape[2:] == size
    return {
        "size": list(size),
        "patch": patch,
        "steps": STEPS,
        "served_s": round(drawn, 3),
        "loaded_mib": round(loaded, 1),
        "peak_mib": round(peak, 1),
        "above_mib": round(peak - loaded, 1),
    }


@contextmanager
def served(size: tuple[int, int], patch: int) -> Iterator[tuple[Running, Client]]:
    """Yield a server of one model of kind picture, and its client."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / MODEL
        folder.mkdir()
        pixels = ((picture(*size)[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
        Image.fromarray(pixels).save(folder / "photo.png")
        keys = f"patch: {patch}\nfinest: {max(size)}\nsteps: {STEPS}\n"
        (folder / "model.yaml").write_text(f"kind: picture\npictures: [photo.png]\n{keys}")
        port = free_port()
        program = Path(sys.executable).with_name("els-server")
        command = (program, "run", "--models", root, f"--port={port}", "--metrics-port=0")
        target = f"127.0.0.1:{port}"
        with running(command, port) as server, Client(target, timeout_s=_TIMEOUT_S) as client:
            _when_ready(client)
            yield server, client


def server_root(server: Running) -> Path:
    """Return the folder of a server's process in /proc."""
    return Path("/proc") / str(server.pid)


def memory_mib(server: Running, name: str) -> float:
    """Return a number of a server's status file in MiB: VmRSS, now, or VmHWM, at most."""
    text = (server_root(server) / "status").read_text()
    found = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


def _when_ready(client: Client) -> None:
    deadline = time.monotonic() + _READY_S
    while True:
        try:
            client.model(MODEL)
        except ElsError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
        else:
            return
