"""The contract compiles for other languages, and a client in TypeScript works."""

from __future__ import annotations

import importlib.resources
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.support.processes import ServerProcess

from els_client import Client

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "clients" / "examples" / "typescript"
SOURCES = ("package.json", "buf.gen.yaml", "tsconfig.json", "denoise.ts")
PROTOC = shutil.which("protoc")
BUF = shutil.which("buf", path=str(Path(sys.executable).parent)) or shutil.which("buf")
NODE = shutil.which("node")


def run(*command: str | Path, folder: Path) -> str:
    tools = (EXAMPLE / "node_modules" / ".bin", Path(str(BUF)).parent)
    path = os.pathsep.join([*map(str, tools), os.environ["PATH"]])
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_package_has_the_contracts_with_all_that_they_import() -> None:
    packaged = importlib.resources.files("els_proto") / "protos"
    for name in (
        "denoise/v1/denoise.proto",
        "inference/grpc_service.proto",
        "google/rpc/status.proto",
        "google/LICENSE",
    ):
        assert (packaged / name).read_bytes() == (ROOT / "proto" / name).read_bytes()


@pytest.mark.skipif(PROTOC is None, reason="needs protoc: make compilers")
@pytest.mark.parametrize("language", ["java", "cpp", "csharp"])
def test_protoc_compiles_the_packaged_contracts(language: str, tmp_path: Path) -> None:
    packaged = Path(str(importlib.resources.files("els_proto") / "protos"))
    contracts = ("denoise/v1/denoise.proto", "inference/grpc_service.proto")
    run(str(PROTOC), f"-I{packaged}", f"--{language}_out={tmp_path}", *contracts, folder=tmp_path)
    assert next(tmp_path.rglob("*enoise*"))
    if language == "java":
        assert (tmp_path / "els" / "denoise" / "v1" / "DenoiseRequest.java").exists()


@pytest.mark.slow
@pytest.mark.skipif(
    None in (BUF, NODE) or not (EXAMPLE / "node_modules").exists(), reason="needs: make typescript"
)
def test_the_example_in_typescript_gets_what_the_client_gets(
    server: ServerProcess, client: Client, tmp_path: Path
) -> None:
    for name in SOURCES:
        shutil.copy(EXAMPLE / name, tmp_path)
    (tmp_path / "node_modules").symlink_to(EXAMPLE / "node_modules")
    proto = ROOT / "proto"
    run(str(BUF), "generate", proto, "--path", proto / "denoise", folder=tmp_path)
    run("tsc", folder=tmp_path)
    answer = json.loads(
        run(str(NODE), "build/denoise.js", f"http://{server.target}", "zeros", folder=tmp_path)
    )
    pixels = np.sin(np.arange(30)).astype(np.float32).reshape(1, 1, 6, 5)
    clean = client.denoise(pixels, model="zeros", sigma=0.5)
    assert np.array_equal(np.array(answer["denoised"], np.float32), clean.ravel())
    *_, last = client.sample(model="zeros", count=2, steps=4, seed=7)
    assert np.array_equal(np.array(answer["drawn"], np.float32), last.x.ravel())
