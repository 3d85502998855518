"""Asks a server with a stock ``tritonclient.http``; runs in an environment of its own, prints JSON.

usage: tritonclient_http_script.py HOST:PORT
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np

# Runs in an environment of its own, where tritonclient is installed.
import tritonclient.http as triton

SHAPE = [2, 1, 6, 5]
PIXELS = np.linspace(-1, 1, 60, dtype=np.float32).reshape(SHAPE)
EVERY = ("denoised", "score", "log_evidence")


def inputs(sigma: tuple[float, ...] = (0.5, 2.0), *, binary: bool = True) -> list[Any]:
    x = triton.InferInput("x", SHAPE, "FP32")
    x.set_data_from_numpy(PIXELS, binary_data=binary)
    levels = triton.InferInput("sigma", [len(sigma)], "FP32")
    levels.set_data_from_numpy(np.array(sigma, np.float32), binary_data=binary)
    labels = triton.InferInput("label", [2], "INT64")
    labels.set_data_from_numpy(np.array([1, -1], np.int64), binary_data=binary)
    return [x, levels, labels]


def values(result: Any) -> dict[str, list[float] | None]:
    found = {name: result.as_numpy(name) for name in EVERY}
    return {name: None if a is None else a.ravel().tolist() for name, a in found.items()}


def wanted(*names: str, binary: bool) -> list[Any]:
    return [triton.InferRequestedOutput(name, binary_data=binary) for name in names]


def repository_states(client: Any, model: str) -> list[Any]:
    """Return the entries of a model in the index: served, unloaded, and loaded again."""

    def state() -> Any:
        index = client.get_model_repository_index()
        return next(entry["state"] for entry in index if entry["name"] == model)

    states = [state()]
    client.unload_model(model)
    states += [state(), client.is_model_ready(model)]
    client.load_model(model)
    return [*states, state(), client.is_model_ready(model)]


def main(target: str) -> None:
    client = triton.InferenceServerClient(target)
    report: dict[str, Any] = {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model_ready": client.is_model_ready("zeros"),
        "other_ready": client.is_model_ready("absent"),
        "server": client.get_server_metadata(),
        "model": client.get_model_metadata("zeros"),
        "config": client.get_model_config("zeros"),
        "statistics": client.get_inference_statistics("zeros")["model_stats"],
        "log": [
            client.update_log_settings({"log_verbose_level": 1})["log_level"],
            client.update_log_settings({"log_verbose_level": 0, "log_info": True})["log_level"],
        ],
        "repository": repository_states(client, "valid"),
        "binary": values(client.infer("zeros", inputs(), request_id="7")),
        "id": client.infer("zeros", inputs(), request_id="7").get_response()["id"],
        "json": values(
            client.infer("zeros", inputs(binary=False), outputs=wanted(*EVERY, binary=False))
        ),
        "one": values(client.infer("zeros", inputs(), outputs=wanted("score", binary=True))),
        "gzip": values(client.infer("zeros", inputs(), request_compression_algorithm="gzip")),
        "urgent": values(client.infer("zeros", inputs(), priority=1, timeout=9_000_000)),
        "async": values(client.async_infer("zeros", inputs()).get_result()),
    }
    try:
        client.infer("zeros", inputs(sigma=(-1.0, 1.0)))
    except triton.InferenceServerException as refusal:
        report["refusal"] = [refusal.status(), refusal.message()]
    client.close()
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
