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

RULES = Path(__file__).parents[1] / "proto" / "buf.yaml"
BUF = shutil.which("buf", path=str(Path(sys.executable).parent)) or shutil.which("buf")

pytestmark = pytest.mark.skipif(BUF is None, reason="needs buf: pip install buf-bin")


def buf(command: str, contract: FileDescriptorSet, folder: Path, *arguments: str) -> str:
    """Return what buf finds, one fault a line."""
    image = folder / "contract.binpb"
    image.write_bytes(contract.SerializeToString())
    done = subprocess.run(
        [str(BUF), command, str(image), "--config", str(RULES), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    # 100 with faults.
    assert done.returncode in (0, 100), done.stderr
    assert (done.returncode == 0) == (not done.stdout)
    return done.stdout


def test_no_client_of_the_released_contract_breaks(tmp_path: Path) -> None:
    assert buf("breaking", compiled(), tmp_path, "--against", str(CONTRACT)) == ""


def test_the_contract_keeps_the_rules(tmp_path: Path) -> None:
    assert buf("lint", compiled(), tmp_path) == ""


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
