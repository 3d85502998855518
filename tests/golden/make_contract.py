"""Writes ``contract.binpb``: the contract that clients in use were built against.

    python -m tests.golden.make_contract

After a release that adds to the contract, so that what was added is kept too.
"""

from __future__ import annotations

from pathlib import Path

from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorSet

from els_proto.denoise.v1 import denoise_pb2
from els_proto.inference import grpc_service_pb2

CONTRACT = Path(__file__).with_name("contract.binpb")
_PACKAGE = "els_proto/"
"""Folder of the generated package: part of the files' names there, not of the contract."""


def compiled() -> FileDescriptorSet:
    """Return both contracts with all that they import, each file after its imports."""
    found = FileDescriptorSet()

    def add(file: FileDescriptor) -> None:
        name = file.name.removeprefix(_PACKAGE)
        if name in {known.name for known in found.file}:
            return
        for imported in file.dependencies:
            add(imported)
        copy = found.file.add()
        file.CopyToProto(copy)
        copy.name = name
        copy.dependency[:] = [path.removeprefix(_PACKAGE) for path in copy.dependency]

    for module in (denoise_pb2, grpc_service_pb2):
        add(module.DESCRIPTOR)
    return found


if __name__ == "__main__":
    CONTRACT.write_bytes(compiled().SerializeToString(deterministic=True))
