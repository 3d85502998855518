"""A stock client of the Open Inference Protocol works; in a process and environment of its own."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.processes import ServerProcess

from els_client import Client
from els_service.version import FULL

PYTHON = Path(__file__).parents[2] / ".venv-tritonclient" / "bin" / "python"
SCRIPT = Path(__file__).with_name("tritonclient_script.py")


@pytest.fixture(scope="module")
def report(server: ServerProcess) -> Any:
    """What the script saw."""
    assert PYTHON.exists(), "`make install` makes .venv-tritonclient"
    command = [str(PYTHON), str(SCRIPT), server.target]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_server_and_model_are_live_and_ready(report: Any) -> None:
    assert (report["live"], report["ready"]) == (True, True)
    assert (report["model_ready"], report["other_ready"]) == (True, False)


def test_metadata_of_server_and_model_are_read(report: Any) -> None:
    assert (report["server"]["name"], report["server"]["version"]) == ("els-denoise", FULL)
    shapes = {tensor["name"]: tensor["shape"] for tensor in report["model"]["inputs"]}
    assert shapes["x"] == ["-1", "1", "6", "5"]
    assert [output["name"] for output in report["model"]["outputs"]] == [
        "denoised",
        "score",
        "log_evidence",
    ]


def test_it_gets_the_answers_that_our_client_gets(report: Any, client: Client) -> None:
    x = np.linspace(-1, 1, 60, dtype=np.float32).reshape(2, 1, 6, 5)
    options: dict[str, Any] = {"model": "zeros", "sigma": [0.5, 2.0], "label": [1, -1]}
    denoised, evidence = client.denoise_with_evidence(x, **options)
    assert report["all"] == {
        "denoised": denoised.ravel().tolist(),
        "score": client.score(x, **options).ravel().tolist(),
        "log_evidence": evidence.ravel().tolist(),
    }
    assert report["id"] == "7"


def test_only_the_requested_outputs_come(report: Any) -> None:
    assert report["one"] == {**report["all"], "denoised": None, "log_evidence": None}


def test_an_asynchronous_inference_is_answered(report: Any) -> None:
    assert report["async"] == {"denoised": report["all"]["denoised"]}


def test_a_bad_input_is_refused_in_our_words(report: Any) -> None:
    assert report["refusal"] == [
        "StatusCode.INVALID_ARGUMENT",
        "level.sigma: expected s/a from 0.0001 to 1e+06, got -1.0",
    ]


def test_priority_and_timeout_are_taken(report: Any) -> None:
    assert report["urgent"] == report["all"]


def test_the_configuration_has_the_fields_that_a_load_generator_needs(report: Any) -> None:
    config = report["config"]
    # Shapes have the batch in them, so there is no largest batch beside them.
    assert (config["name"], config.get("max_batch_size", 0)) == ("zeros", 0)
    inputs = {tensor["name"]: tensor for tensor in config["input"]}
    assert inputs["x"]["dims"] == ["-1", "1", "6", "5"]
    assert inputs["sigma"]["dims"] == inputs["window"]["dims"] == ["-1"]
    optional = sorted(name for name, tensor in inputs.items() if tensor.get("optional"))
    assert optional == ["alpha_bar", "label", "sigma", "time", "window"]
    types = {tensor["name"]: tensor["data_type"] for tensor in config["input"] + config["output"]}
    assert [types[name] for name in ("x", "label", "denoised")] == [
        *("TYPE_FP32", "TYPE_INT64", "TYPE_FP32")
    ]
    assert [output["name"] for output in config["output"]] == ["denoised", "score", "log_evidence"]
    batching = config["dynamic_batching"]
    assert (batching["priority_levels"], batching["default_priority_level"]) == ("3", "2")
    assert config["parameters"]["batch_invariant"] == {"string_value": "true"}


def test_the_statistics_count_the_requests(report: Any) -> None:
    (statistics,) = report["statistics"]
    assert (statistics["name"], statistics["version"]) == ("zeros", "1")
    images = sum(
        int(batch["batch_size"]) * int(batch["compute_infer"]["count"])
        for batch in statistics["batch_stats"]
    )
    batches = sum(int(batch["compute_infer"]["count"]) for batch in statistics["batch_stats"])
    assert int(statistics["inference_count"]) == images >= 10
    assert int(statistics["execution_count"]) == batches >= 5
    assert int(statistics["inference_stats"]["success"]["count"]) >= 5
    assert int(statistics["inference_stats"]["compute_infer"]["ns"]) > 0
    assert int(statistics["last_inference"]) > 1_700_000_000_000


def test_the_level_of_the_log_is_read_and_changed(report: Any) -> None:
    assert report["log"] == ["info", "debug", "warning", "info"]


def test_a_model_is_unloaded_and_loaded(report: Any) -> None:
    served, unloaded, ready, again, ready_again = report["repository"]
    assert served == again == {"name": "valid", "version": "1", "state": "READY"}
    assert (unloaded["state"], unloaded["reason"]) == ("UNAVAILABLE", "unloaded")
    assert (ready, ready_again) == (False, True)
