"""The pages of the RPC methods have every method, message, field and value of the contract."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
from google.protobuf.descriptor import Descriptor

from els_proto.denoise.v1 import denoise_pb2
from els_proto.inference import grpc_service_pb2

ROOT = Path(__file__).parents[1]
CONTRACTS = {
    "denoise/v1/denoise.proto": denoise_pb2.DESCRIPTOR,
    "inference/grpc_service.proto": grpc_service_pb2.DESCRIPTOR,
}


@pytest.fixture(scope="module")
def pages() -> ModuleType:
    """The module that writes the pages."""
    spec = spec_from_file_location("contract", ROOT / "docs" / "site" / "contract.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules["contract"] = module
    spec.loader.exec_module(module)
    return module


def fields(message: Descriptor) -> dict[str, list[str]]:
    """Return the names of a message's fields, and of those inside it."""
    found = {message.name: [field.name for field in message.fields]}
    for nested in message.nested_types:
        if not nested.GetOptions().map_entry:
            found |= fields(nested)
    return found


@pytest.mark.parametrize("name", CONTRACTS)
def test_nothing_of_the_contract_is_left_out(pages: ModuleType, name: str) -> None:
    file = CONTRACTS[name]
    known = pages.declarations(ROOT / "proto" / name)
    found = {each.name: [one.name for one in each.entries] for each in known.values()}
    want: dict[str, list[str]] = {}
    for message in file.message_types_by_name.values():
        want |= fields(message)
    for enum in file.enum_types_by_name.values():
        want[enum.name] = [value.name for value in enum.values]
    for service in file.services_by_name.values():
        want[service.name] = [method.name for method in service.methods]
    assert found == want


def test_each_method_and_field_is_described(pages: ModuleType) -> None:
    known = pages.declarations(ROOT / "proto" / "denoise" / "v1" / "denoise.proto")
    assert all(method.comment for method in known["DenoiserService"].entries)
    (sigma,) = (one for one in known["NoiseLevel"].entries if one.name == "sigma")
    assert (sigma.type, sigma.comment.startswith("Variance exploding")) == ("repeated double", True)
    page = pages.method_page(known["DenoiserService"].entries[3], known, "print(1)\n")
    assert "`SampleRequest → stream SampleResponse`" in page
    assert "| `x` | [Tensor](messages.md#tensor) |" in page
