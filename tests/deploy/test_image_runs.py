"""An image runs as an operator would run it: confined, asked from outside, ended by SIGTERM.

``make image-test`` builds one and names it in ``IMAGE_UNDER_TEST``; it takes minutes and root.
"""

from __future__ import annotations

import gzip
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deploy.image.build import local_paths, pip_configuration
from tests.support import networks
from tests.support.models_folder import write_models
from tests.support.onnx_models import gaussian, write
from tests.support.pretrained import (
    autoencoder,
    conditional_unet,
    scheduler,
    unet,
    write_folder,
)
from tests.support.processes import run

from els_client import Client

IMAGE = os.environ.get("IMAGE_UNDER_TEST", "")
LARGEST_BYTES = 450_000_000
"""Compressed, as a registry holds it."""
START_S = 300
"""Ample: it takes seconds where cores are free."""
CONFINED = (
    *("--runtime=runc", "--network=host", "--read-only", "--cap-drop=all", "--user=10001:10001"),
    *("--security-opt=no-new-privileges", "--memory=2g"),
    *("--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024"),
)
needs_image = pytest.mark.skipif(not IMAGE, reason="needs an image: make image-test")
pytestmark = [needs_image, pytest.mark.timeout(1800)]


def podman(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = ["podman", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=check, timeout=START_S)


def inside(script: str) -> str:
    """Return what a shell in a confined container says."""
    return podman("run", "--rm", *CONFINED, "--entrypoint=sh", IMAGE, "-c", script).stdout


def free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


@contextmanager
def container(*options: str) -> Iterator[tuple[str, int]]:
    """Yield a confined container whose probe says SERVING, and its port; it is gone afterwards."""
    grpc_port, metrics_port = free_ports(2)
    ports = (f"--env=ELS_PORT={grpc_port}", f"--env=ELS_METRICS_PORT={metrics_port}")
    name = podman("run", "--detach", *CONFINED, *ports, *options, IMAGE).stdout.strip()
    try:
        until = time.monotonic() + START_S
        while podman("exec", name, "els-server", "probe", check=False).returncode:
            assert time.monotonic() < until, podman("logs", name).stderr
            assert running(name), podman("logs", name).stderr
        yield name, grpc_port
    finally:
        podman("rm", "--force", "--time=0", name)


def state(name: str) -> dict[str, Any]:
    (found,) = json.loads(podman("inspect", name).stdout)
    return dict(found["State"])


def running(name: str) -> bool:
    return bool(state(name)["Running"])


def test_it_serves_the_bundled_models_confined_and_ends_in_order(tmp_path: Path) -> None:
    with container() as (name, port):
        assert podman("healthcheck", "run", name, check=False).returncode == 0
        asked = {"ELS_TARGET": f"127.0.0.1:{port}"}
        grid, clean = tmp_path / "grid.png", tmp_path / "clean.png"
        drawn = run("els", "sample", "--label=7", "--out", grid, timeout_s=START_S, **asked)
        assert (drawn.returncode, grid.is_file()) == (0, True), drawn.stderr
        picture = ("--resize", grid, clean)
        cleaned = run("els", "denoise", "--sigma=0.3", *picture, timeout_s=START_S, **asked)
        assert (cleaned.returncode, clean.is_file()) == (0, True), cleaned.stderr
        podman("stop", "--time=60", name)
        assert state(name)["ExitCode"] == 0, podman("logs", name).stderr
        assert "torch will serve" not in podman("logs", name).stderr


def test_every_kind_of_model_answers_from_a_volume(tmp_path: Path) -> None:
    root = write_models(tmp_path / "models")
    for architecture in networks.WIDTHS:
        networks.write_folder(root / f"net-{architecture}", networks.config(architecture))
    for engine in ("openvino", "onnxruntime"):
        networks.write_folder(root / engine, networks.config(), engine=engine, fallback=False)
    parts = {"unet": conditional_unet(), "vae": autoencoder(), "scheduler": scheduler()}
    write_folder(root / "latent", "kind: latent\n", **parts)
    write_folder(root / "pixels", "kind: diffusers\n", unet=unet(), scheduler=scheduler())
    write(root, gaussian())
    # diffusers keeps weights to their owner, who the server is not.
    subprocess.run(["chmod", "-R", "a+rX", root.parent], check=True)
    with container(f"--volume={root}:/models:ro", "--env=ELS_MODELS=/models") as (name, port):
        with Client(f"127.0.0.1:{port}") as client:
            models = {model.name: model for model in client.models()}
            assert set(models) == {path.name for path in root.iterdir() if path.name[0] != "_"}
            for model in models.values():
                if model.name == "latent":
                    continue  # It wants conditions; that it was warmed says that it computes.
                noisy = np.ones((1, *model.shape), np.float32)
                result = client.denoise(noisy, model=model.name, sigma=0.5)
                assert np.isfinite(result).all(), model.name
        checked = podman("exec", name, "els-server", "check")
        assert checked.stdout.count(": ok") == len(models) + 1


def test_there_is_no_compiler_no_pip_and_nothing_that_only_builds() -> None:
    names = "cc gcc g++ c++ clang tcc ld as make pip pip3"
    assert inside(f"for name in {names}; do command -v $name; done; true") == ""
    site = "/opt/els/lib/python3.11/site-packages"
    left = (
        f"ls -d {site}/torch/include {site}/torch/test {site}/triton {site}/pip 2>/dev/null; true"
    )
    assert inside(left) == ""
    assert inside(f"find {site} -name '*.a' -o -name '*.h' -path '*/torch/*'") == ""


def test_nothing_can_be_written_but_what_podman_mounts() -> None:
    assert (
        inside("id -u; touch $TMPDIR/x && find / -xdev -writable -not -type l 2>/dev/null; true")
        == "10001\n/tmp\n/var/tmp\n"
    )


def test_the_bill_of_materials_and_the_licences_name_what_is_installed() -> None:
    folder = "/usr/share/doc/els-denoise"
    bill = json.loads(inside(f"cat {folder}/sbom.cdx.json"))
    listed = {one["name"].lower() for one in bill["components"]}
    installed = inside(
        "python -c 'from importlib.metadata import distributions as d;"
        'print(*(one.metadata["name"].lower() for one in d()))\''
    ).split()
    assert bill["bomFormat"] == "CycloneDX"
    assert set(installed) - {"els-denoise"} <= listed
    notices = inside(f"cat {folder}/THIRD_PARTY.txt").lower()
    assert [name for name in installed if f"{name}\n" not in notices] == ["els-denoise"]
    assert "Zalando" in inside(f"cat {folder}/THIRD_PARTY_NOTICES.md")


def test_no_layer_tells_where_packages_came_from_and_all_are_small_enough(tmp_path: Path) -> None:
    saved, packed = tmp_path / "image.tar", tmp_path / "image.tar.gz"
    podman("save", "--format=docker-archive", f"--output={saved}", IMAGE)
    configuration = pip_configuration()
    secrets = {part for value in configuration.values() for part in value.split() if "/" in part}
    secrets -= {str(path) for path in local_paths([configuration.get("cert", "")])}
    with saved.open("rb") as archive, gzip.open(packed, "wb", compresslevel=6) as out:
        tail = b""
        while block := archive.read(1 << 24):
            found = [one for one in secrets if one.encode() in tail + block]
            assert not found, "a layer holds pip's configuration"
            out.write(block)
            tail = block[-4096:]
    print(f"unpacked {saved.stat().st_size:,} bytes, compressed {packed.stat().st_size:,} bytes")
    assert packed.stat().st_size <= LARGEST_BYTES
