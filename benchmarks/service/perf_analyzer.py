"""NVIDIA's load generator, unmodified, against our server and PyTriton: a client that is not ours.

It asks ``ServerMetadata``, ``ModelMetadata`` and ``ModelConfig``, then ``ModelInfer`` with the
tensors of ``perf_analyzer_input.json``, and ``ModelStatistics`` around every window. It insists:

- inputs that the file leaves out are ``optional`` in the config (we need one noise level of three);
- ``max_batch_size`` is 0 and shapes have the batch in them: it cuts the batch off the metadata's
  shapes otherwise, and takes no input without an axis left;
- ``queue.count`` rises with every request, and the three ``compute_….count`` are equal.
"""

from __future__ import annotations

import asyncio
import csv
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.service import load
from benchmarks.service.messages import MODEL, MODEL_INFER
from benchmarks.service.peers import REQUIREMENTS, VENVS, peer
from benchmarks.service.servers import els_server
from els_proto.inference.grpc_service_pb2_grpc import GRPCInferenceServiceServicer
from els_service.server.services.inference import InferenceService

INPUT = Path(__file__).with_name("perf_analyzer_input.json")
SERVABLE = InferenceService.ModelStatistics is not GRPCInferenceServiceServicer.ModelStatistics
"""Whether our server has what the program needs."""

_WINDOWS = 3
_LIMIT_S = 120.0
_START_S = 90.0
# Otherwise it fails on a busy machine, whose windows differ.
_AGREE = ("--stability-percentage", "999", "--max-trials", str(_WINDOWS))


def measure(*, seconds: float, peers: Sequence[str]) -> list[dict[str, Any]]:
    """Return one row for our server, if it can be asked, and one for PyTriton.

    Args:
        seconds: length of a window.
        peers: PyTriton runs too if it is among them.
    """
    rows = []
    for name in [*(["els"] if SERVABLE else []), *(["pytriton"] if "pytriton" in peers else [])]:
        with ExitStack() as stack:
            server = stack.enter_context(els_server() if name == "els" else peer(name))
            asyncio.run(load.first_answer(server.port, MODEL_INFER, _START_S))
            rows.append({"perf_analyzer": name} | run(server.port, seconds, name == "pytriton"))
    return rows


def run(port: int, seconds: float, adds_batch: bool) -> dict[str, Any]:
    """Return what the program measures: its table, and the columns of its CSV.

    Args:
        port: of the server.
        seconds: length of a window.
        adds_batch: whether the model's ``max_batch_size`` is not 0.

    Raises:
        RuntimeError: It ends with an error; its text is told.
    """
    venv = VENVS / "perf_analyzer"
    (cuda,) = venv.glob("lib/python*/site-packages/nvidia/cuda_runtime/lib")
    with tempfile.TemporaryDirectory() as folder:
        table, data = Path(folder) / "table.csv", INPUT
        if adds_batch:
            data = Path(folder) / "input.json"
            data.write_text(json.dumps(_without_batch(json.loads(INPUT.read_text()))))
        command = (venv / "bin" / "perf_analyzer", "-m", MODEL, "-i", "grpc", "--async")
        target = ("-u", f"127.0.0.1:{port}", "--input-data", data, "-f", table)
        window = ("-p", str(round(1000 * seconds)), "--concurrency-range", str(load.CALLERS))
        done = subprocess.run(
            (*command, *target, *window, *_AGREE),
            env=os.environ | {"LD_LIBRARY_PATH": str(cuda)},
            capture_output=True,
            text=True,
            timeout=_LIMIT_S,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"perf_analyzer ended with {done.returncode}: {done.stderr}")
        (columns,) = csv.DictReader(table.read_text().splitlines())
    return {
        "version": REQUIREMENTS["perf_analyzer"][0],
        "per_second": float(columns["Inferences/Second"]),
        "p50_us": float(columns["p50 latency"]),
        "p99_us": float(columns["p99 latency"]),
        "table": done.stdout.splitlines(),
    }


def _without_batch(document: dict[str, Any]) -> dict[str, Any]:
    for step in document["data"]:
        for tensor in step.values():
            tensor["shape"] = tensor["shape"][1:] or [1]
    return document
