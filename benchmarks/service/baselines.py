"""Bare handlers, the minimum of a Python server: ``python -m benchmarks.service.baselines PORT``.

grpc.aio on uvloop; each handler parses the request, copies its tensor and serialises the answer.
No engine, no checks, no metrics. ``Echo`` does not parse either: it returns its request's bytes.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import uvloop

from benchmarks.service.messages import DENOISE, DENOISE_STREAM, ECHO, MODEL_INFER, Method
from els_proto.denoise.v1 import denoise_pb2
from els_proto.inference import grpc_service_pb2


async def _denoise(
    request: denoise_pb2.DenoiseRequest, context: object
) -> denoise_pb2.DenoiseResponse:
    x = np.frombuffer(request.x.data, "<f4").copy()
    tensor = denoise_pb2.Tensor(dtype=request.x.dtype, shape=request.x.shape, data=x.tobytes())
    return denoise_pb2.DenoiseResponse(denoised=tensor)


async def _denoise_stream(
    requests: AsyncIterator[denoise_pb2.DenoiseRequest], context: object
) -> AsyncIterator[denoise_pb2.DenoiseStreamResponse]:
    async for request in requests:
        yield denoise_pb2.DenoiseStreamResponse(response=await _denoise(request, context))


async def _model_infer(
    request: grpc_service_pb2.ModelInferRequest, context: object
) -> grpc_service_pb2.ModelInferResponse:
    x = np.frombuffer(request.raw_input_contents[0], "<f4").copy()
    response = grpc_service_pb2.ModelInferResponse(
        model_name=request.model_name, model_version="1", id=request.id
    )
    response.outputs.add(name="denoised", datatype="FP32", shape=request.inputs[0].shape)
    response.raw_output_contents.append(x.tobytes())
    return response


async def _echo(message: bytes, context: object) -> bytes:
    return message


def _handlers() -> dict[Method, Any]:
    return {
        DENOISE: grpc.unary_unary_rpc_method_handler(
            _denoise,
            denoise_pb2.DenoiseRequest.FromString,
            denoise_pb2.DenoiseResponse.SerializeToString,
        ),
        MODEL_INFER: grpc.unary_unary_rpc_method_handler(
            _model_infer,
            grpc_service_pb2.ModelInferRequest.FromString,
            grpc_service_pb2.ModelInferResponse.SerializeToString,
        ),
        DENOISE_STREAM: grpc.stream_stream_rpc_method_handler(
            _denoise_stream,
            denoise_pb2.DenoiseRequest.FromString,
            denoise_pb2.DenoiseStreamResponse.SerializeToString,
        ),
        ECHO: grpc.unary_unary_rpc_method_handler(_echo),
    }


async def _serve(port: int) -> None:
    server = grpc.aio.server()
    for method, handler in _handlers().items():
        service, name = method.name[1:].split("/")
        generic = grpc.method_handlers_generic_handler(service, {name: handler})
        server.add_generic_rpc_handlers((generic,))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(int(sys.argv[1])))
