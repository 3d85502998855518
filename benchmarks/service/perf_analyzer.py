"""NVIDIA's load generator ``perf_analyzer``, unmodified, against the server and PyTriton.

It calls ``ServerMetadata``, ``ModelMetadata`` and ``ModelConfig``, then ``ModelInfer`` with the
tensors of ``perf_analyzer_input.json``, and ``ModelStatistics`` around every window. It requires:

- inputs that the file omits are ``optional`` in the config (one of three noise levels is given);
- ``max_batch_size`` is 0 and shapes include the batch: otherwise it removes the first axis of the
  metadata's shapes, and rejects inputs without a further axis;
- ``queue.count`` increases with every request, and the three ``compute_….count`` are equal.
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
"""Whether the server has the methods that the program requires."""

_WINDOWS = 3
_LIMIT_S = 120.0
_START_S = 90.0
# Without these it fails on a busy machine, as its windows differ.
_AGREE = ("--stability-percentage", "999", "--max-trials", str(_WINDOWS))


def measure(*, seconds: float, peers: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row for the server, if it has the methods, and one for PyTriton.

    Args:
        seconds: length of a window.
        peers: PyTriton is measured if it is among them.
    """
    rows = []
    for name in [*(["els"] if SERVABLE else []), *(["pytriton"] if "pytriton" in peers else [])]:
        with ExitStack() as stack:
            server = stack.enter_context(els_server() if name == "els" else peer(name))
            asyncio.run(load.first_answer(server.port, MODEL_INFER, _START_S))
            rows.append({"perf_analyzer": name} | run(server.port, seconds, name == "pytriton"))
    return rows


def run(port: int, seconds: float, adds_batch: bool) -> dict[str, Any]:
    """Return the results of the program: its table, and columns of its CSV file.

    Args:
        port: of the server.
        seconds: length of a window.
        adds_batch: whether the model's ``max_batch_size`` is not 0.

    Raises:
        RuntimeError: It failed; the text has its stderr.
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
