"""Asks a server with a stock ``tritonclient``; runs in an environment of its own, prints JSON.

usage: tritonclient_script.py HOST:PORT
"""

from __future__ import annotations

import json
import queue
import sys
from typing import Any

import numpy as np

# Runs in an environment of its own, where tritonclient is installed.
import tritonclient.grpc as triton

SHAPE = [2, 1, 6, 5]
PIXELS = np.linspace(-1, 1, 60, dtype=np.float32).reshape(SHAPE)


def inputs(sigma: tuple[float, ...] = (0.5, 2.0)) -> list[Any]:
    x = triton.InferInput("x", SHAPE, "FP32")
    x.set_data_from_numpy(PIXELS)
    levels = triton.InferInput("sigma", [len(sigma)], "FP32")
    levels.set_data_from_numpy(np.array(sigma, np.float32))
    labels = triton.InferInput("label", [2], "INT64")
    labels.set_data_from_numpy(np.array([1, -1], np.int64))
    return [x, levels, labels]


def outputs(*names: str) -> list[Any]:
    return [triton.InferRequestedOutput(name) for name in names]


def values(result: Any, *names: str) -> dict[str, list[float] | None]:
    return {
        name: None if array is None else array.ravel().tolist()
        for name, array in ((name, result.as_numpy(name)) for name in names)
    }


def log_levels(client: Any) -> list[str]:
    """Return the level of the log: before, more of it, less of it, and as it was."""
    answers = [
        client.get_log_settings(as_json=True),
        client.update_log_settings({"log_verbose_level": 1}, as_json=True),
        client.update_log_settings({"log_verbose_level": 0, "log_info": False}, as_json=True),
        client.update_log_settings({"log_info": True}, as_json=True),
    ]
    return [answer["settings"]["log_level"]["string_param"] for answer in answers]


def repository_states(client: Any, model: str) -> list[Any]:
    """Return what the index says of a model: served, unloaded, and loaded again."""

    def state() -> Any:
        index = client.get_model_repository_index(as_json=True)["models"]
        return next(entry for entry in index if entry["name"] == model)

    states = [state()]
    client.unload_model(model)
    states += [state(), client.is_model_ready(model)]
    client.load_model(model)
    return [*states, state(), client.is_model_ready(model)]


def main(target: str) -> None:
    every = ("denoised", "score", "log_evidence")
    client = triton.InferenceServerClient(target)
    answers: queue.Queue[Any] = queue.Queue()
    report: dict[str, Any] = {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model_ready": client.is_model_ready("zeros"),
        "other_ready": client.is_model_ready("nobody"),
        "server": client.get_server_metadata(as_json=True),
        "model": client.get_model_metadata("zeros", as_json=True),
        "all": values(client.infer("zeros", inputs(), request_id="7"), *every),
        "one": values(client.infer("zeros", inputs(), outputs=outputs("score")), *every),
        "id": client.infer("zeros", inputs(), request_id="7").get_response().id,
    }
    client.async_infer(
        "zeros",
        inputs(),
        lambda result, error: answers.put((result, error)),
        outputs=outputs("denoised"),
    )
    result, error = answers.get(timeout=30)
    assert error is None, error
    report["async"] = values(result, "denoised")
    try:
        client.infer("zeros", inputs(sigma=(-1.0, 1.0)))
    except triton.InferenceServerException as refusal:
        report["refusal"] = [refusal.status(), refusal.message()]
    report["urgent"] = values(
        client.infer("zeros", inputs(), priority=1, timeout=9_000_000), *every
    )
    report["config"] = client.get_model_config("zeros", as_json=True)["config"]
    report["statistics"] = client.get_inference_statistics("zeros", as_json=True)["model_stats"]
    report["log"] = log_levels(client)
    report["repository"] = repository_states(client, "valid")
    client.close()
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
