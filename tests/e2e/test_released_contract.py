"""A client of the contract of the last release against the server."""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.message_factory import GetMessageClass
from tests.golden.make_contract import CONTRACT
from tests.support.explained import images
from tests.support.models_folder import (
    tiny_bank,
)

from els_client import Client
from els_proto.denoise.v1 import denoise_pb2 as pb


class Released:
    """Client of the contract of the last release, which knows no field added since.

    Args:
        channel: to the server.
    """

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel
        self._pool = descriptor_pool.DescriptorPool()
        for file in FileDescriptorSet.FromString(CONTRACT.read_bytes()).file:
            self._pool.Add(file)

    def message(self, name: str) -> Any:
        return GetMessageClass(self._pool.FindMessageTypeByName(f"denoise.v1.{name}"))

    def request(self, name: str, **fields: Any) -> Any:
        request = self.message(name)(**fields)
        x = images(1)
        request.x.dtype, request.x.data = pb.DTYPE_F32, x.tobytes()
        request.x.shape.extend(x.shape)
        request.level.sigma.append(1.0)
        return request

    def call(self, kind: str, method: str, request: Any) -> Any:
        """Return the response; ``kind`` says which sides are streams."""
        streams = method.endswith("Stream")
        return getattr(self._channel, kind)(
            f"/denoise.v1.DenoiserService/{method}",
            lambda one: one.SerializeToString(),
            self.message(f"{method}Response").FromString,
        )(iter([request]) if streams else request, timeout=30)


def test_a_client_of_the_released_contract_works_as_before(
    channel: grpc.Channel, client: Client
) -> None:
    released, x = Released(channel), images(1)
    query = {"model": "zeros", "return_log_evidence": True}
    answer = released.call("unary_unary", "Denoise", released.request("DenoiseRequest", **query))
    want, evidence = client.denoise_with_evidence(x, model="zeros", sigma=1.0)
    assert answer.denoised.data == want.tobytes()
    assert answer.log_evidence.data == evidence.tobytes()
    request = released.request("DenoiseRequest", **query)
    (streamed,) = released.call("stream_stream", "DenoiseStream", request)
    assert streamed.response == answer
    scored = released.call("unary_unary", "Score", released.request("ScoreRequest", model="zeros"))
    assert scored.score.data == client.score(x, model="zeros", sigma=1.0).tobytes()
    sample = released.message("SampleRequest")(model="zeros", count=2, steps=3, seed=5)
    *_, last = released.call("unary_stream", "Sample", sample)
    *_, step = client.sample(model="zeros", count=2, steps=3, seed=5)
    assert last.x.data == step.x.tobytes()
    named = released.message("GetModelRequest")(name="zeros")
    described = released.call("unary_unary", "GetModel", named)
    assert described.model.bank.fingerprint == tiny_bank().fingerprint
    listed = released.call("unary_unary", "ListModels", released.message("ListModelsRequest")())
    assert described.model in listed.models
