"""The packaged contract compiles for other languages; tests/languages runs clients in some."""

from __future__ import annotations

import importlib.resources
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROTOC = shutil.which("protoc")


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
    subprocess.run(
        [str(PROTOC), f"-I{packaged}", f"--{language}_out={tmp_path}", *contracts],
        check=True,
        timeout=90,
    )
    assert next(tmp_path.rglob("*enoise*"))
    if language == "java":
        assert (tmp_path / "els" / "denoise" / "v1" / "DenoiseRequest.java").exists()
