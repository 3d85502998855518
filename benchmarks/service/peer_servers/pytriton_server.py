"""Serves the affine model with PyTriton: ``pytriton_server.py PORT``; runs in its venv."""

from __future__ import annotations

import sys

import numpy as np
import numpy.typing as npt
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig, TritonSecurityConfig

MAX_BATCH = 16
QUEUE_DELAY_US = 500


@batch
def affine(x: npt.NDArray[np.float32], sigma: npt.NDArray[np.float32]) -> list[np.ndarray]:
    """Return the posterior mean of a Gaussian prior of variance 1/4: ``x · v / (v + σ²)``."""
    return [x * (0.25 / (0.25 + sigma.reshape(-1, 1, 1, 1) ** 2))]


if __name__ == "__main__":
    config = TritonConfig(
        grpc_address="127.0.0.1",
        grpc_port=int(sys.argv[1]),
        allow_http=False,
        allow_metrics=False,
    )
    # perf_analyzer reads the statistics, which are off by default.
    security = TritonSecurityConfig(restricted_endpoints=[])
    with Triton(config=config, security_config=security) as triton:
        triton.bind(
            model_name="gaussian",
            infer_func=affine,
            inputs=[
                Tensor(name="x", dtype=np.float32, shape=(3, 32, 32)),
                Tensor(name="sigma", dtype=np.float32, shape=(1,)),
            ],
            outputs=[Tensor(name="denoised", dtype=np.float32, shape=(3, 32, 32))],
            config=ModelConfig(
                max_batch_size=MAX_BATCH,
                batcher=DynamicBatcher(max_queue_delay_microseconds=QUEUE_DELAY_US),
            ),
        )
        triton.serve()
