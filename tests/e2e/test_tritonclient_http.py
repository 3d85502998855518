"""A stock client of the Open Inference Protocol over REST, in an environment of its own."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.e2e.test_tritonclient import PYTHON
from tests.support.processes import ServerProcess

from els_client import Client
from els_service.version import FULL

SCRIPT = Path(__file__).with_name("tritonclient_http_script.py")


@pytest.fixture(scope="module")
def report(server: ServerProcess) -> Any:
    """Output of the script."""
    assert PYTHON.exists(), "`make install` makes .venv-tritonclient"
    command = [str(PYTHON), str(SCRIPT), f"127.0.0.1:{server.ready['http_port']}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_binary_and_json_answers_are_those_of_our_client(report: Any, client: Client) -> None:
    x = np.linspace(-1, 1, 60, dtype=np.float32).reshape(2, 1, 6, 5)
    options: dict[str, Any] = {"model": "zeros", "sigma": [0.5, 2.0], "label": [1, -1]}
    denoised, evidence = client.denoise_with_evidence(x, **options)
    expected = {
        "denoised": denoised.ravel().tolist(),
        "score": client.score(x, **options).ravel().tolist(),
        "log_evidence": evidence.ravel().tolist(),
    }
    for form in ("binary", "json", "gzip", "urgent", "async"):
        assert report[form] == expected, form
    assert report["one"] == {**expected, "denoised": None, "log_evidence": None}
    assert report["id"] == "7"


def test_the_other_calls_of_the_client_are_answered(report: Any) -> None:
    assert (report["live"], report["ready"]) == (True, True)
    assert (report["model_ready"], report["other_ready"]) == (True, False)
    assert (report["server"]["name"], report["server"]["version"]) == ("els-denoise", FULL)
    assert report["model"]["inputs"][0]["shape"] == [-1, 1, 6, 5]
    assert report["config"]["parameters"]["batch_invariant"] == {"string_value": "true"}
    assert report["statistics"][0]["name"] == "zeros"
    assert report["log"] == ["debug", "info"]
    assert report["repository"] == ["READY", "UNAVAILABLE", False, "READY", True]


def test_a_bad_input_is_refused_in_our_words(report: Any) -> None:
    assert report["refusal"] == ["400", "level.sigma: expected s/a from 0.0001 to 1e+06, got -1.0"]
