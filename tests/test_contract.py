"""The contract breaks no client that was built against an earlier one, and keeps buf's rules."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import (
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)
from tests.golden.make_contract import CONTRACT, compiled

MODULE = Path(__file__).parents[1] / "proto"
RULES = MODULE / "buf.yaml"
BUF = shutil.which("buf", path=str(Path(sys.executable).parent)) or shutil.which("buf")

pytestmark = pytest.mark.skipif(BUF is None, reason="needs buf: pip install buf-bin")


def run(*arguments: object) -> str:
    """Return the faults that buf finds, one a line."""
    done = subprocess.run(
        [str(BUF), *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )
    # 100 with faults.
    assert done.returncode in (0, 100), done.stderr
    assert (done.returncode == 0) == (not done.stdout)
    return done.stdout


def buf(command: str, contract: FileDescriptorSet, folder: Path, *arguments: str) -> str:
    """Return the faults that buf finds in a compiled contract."""
    image = folder / "contract.binpb"
    image.write_bytes(contract.SerializeToString())
    return run(command, image, "--config", RULES, *arguments)


def test_no_client_of_the_released_contract_breaks(tmp_path: Path) -> None:
    assert buf("breaking", compiled(), tmp_path, "--against", str(CONTRACT)) == ""


def test_the_contract_keeps_the_rules(tmp_path: Path) -> None:
    assert buf("lint", compiled(), tmp_path) == ""


def test_the_folder_of_contracts_is_a_module_that_needs_no_other(tmp_path: Path) -> None:
    assert run("lint", MODULE) == ""
    image = tmp_path / "module.binpb"
    assert run("build", MODULE, "--as-file-descriptor-set", "-o", image) == ""
    built = FileDescriptorSet.FromString(image.read_bytes())
    assert {file.name for file in built.file if not file.name.startswith("google/protobuf/")} == {
        "denoise/v1/denoise.proto",
        "google/rpc/error_details.proto",
        "google/rpc/status.proto",
        "inference/grpc_service.proto",
    }


def test_a_method_that_is_removed_from_the_module_breaks_its_clients(tmp_path: Path) -> None:
    changed = tmp_path / "proto"
    shutil.copytree(MODULE, changed, ignore=shutil.ignore_patterns("python"))
    assert run("breaking", changed, "--against", MODULE) == ""
    contract = changed / "denoise" / "v1" / "denoise.proto"
    text = contract.read_text()
    method = "  rpc Score(ScoreRequest) returns (ScoreResponse);\n"
    assert method in text
    contract.write_text(text.replace(method, ""))
    assert 'RPC "Score"' in run("breaking", changed, "--against", MODULE)


def scalar(file: FileDescriptorProto) -> FieldDescriptorProto:
    """Return the first field of a scalar type."""
    fields = (field for message in file.message_type for field in message.field)
    return next(field for field in fields if not field.type_name)


def renumbered(file: FileDescriptorProto) -> None:
    scalar(file).number = 99


def retyped(file: FileDescriptorProto) -> None:
    scalar(file).type = FieldDescriptorProto.TYPE_SFIXED64


def renamed(file: FileDescriptorProto) -> None:
    file.service[0].method[0].name = "Other"


def removed(file: FileDescriptorProto) -> None:
    del file.enum_type[0].value[-1]


@pytest.mark.parametrize("contract", ["denoise/v1/denoise.proto", "inference/grpc_service.proto"])
@pytest.mark.parametrize("change", [renumbered, retyped, renamed, removed])
def test_a_breaking_change_is_found(
    tmp_path: Path, contract: str, change: Callable[[FileDescriptorProto], None]
) -> None:
    changed = compiled()
    (file,) = (file for file in changed.file if file.name == contract)
    change(file)
    assert buf("breaking", changed, tmp_path, "--against", str(CONTRACT)) != ""
