"""Serves the affine model with the KServe SDK: ``kserve_server.py PORT``; runs in its venv."""

from __future__ import annotations

import asyncio
import functools
import sys
from typing import Any

import uvicorn
import uvloop

PORT = int(sys.argv.pop(1))

# After changing the command line, which KServe reads when it is imported.
from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer  # noqa: E402
from kserve.protocol.grpc import server as kserve_grpc  # noqa: E402


class Affine(Model):
    """The posterior mean of a Gaussian prior of variance 1/4: ``x · v / (v + σ²)``."""

    def __init__(self) -> None:
        super().__init__("gaussian")
        self.ready = True

    def predict(
        self, payload: InferRequest, headers: dict[str, str] | None = None
    ) -> InferResponse:
        """Return ``denoised`` as raw contents."""
        inputs = {tensor.name: tensor.as_numpy() for tensor in payload.inputs}
        x, sigma = inputs["x"], inputs["sigma"].reshape(-1, 1, 1, 1)
        output = InferOutput("denoised", list(x.shape), "FP32")
        output.set_data_from_numpy(x * (0.25 / (0.25 + sigma**2)), binary_data=True)
        return InferResponse(payload.id, "gaussian", [output])


def bind_loopback() -> None:
    """Make KServe listen on 127.0.0.1: its options set the port only."""
    make_server: Any = kserve_grpc.aio.server
    configure = uvicorn.Config.__init__

    def server(*args: Any, **options: Any) -> Any:
        made = make_server(*args, **options)
        add_port = made.add_insecure_port
        made.add_insecure_port = lambda address: add_port(address.replace("[::]", "127.0.0.1"))
        return made

    @functools.wraps(configure)
    def config(self: uvicorn.Config, *args: Any, **options: Any) -> None:
        configure(self, *args, **options | {"host": "127.0.0.1"})

    kserve_grpc.aio.server = server
    # KServe creates the configuration itself, without an option for the host.
    uvicorn.Config.__init__ = config  # type: ignore[method-assign]


if __name__ == "__main__":
    bind_loopback()
    uvloop.install()
    asyncio.set_event_loop(uvloop.new_event_loop())
    ModelServer(http_port=0, grpc_port=PORT, enable_grpc=True).start([Affine()])
