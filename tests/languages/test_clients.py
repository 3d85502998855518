"""Each client gets what the client in Python gets: images, steps, and details of errors."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tests.languages.conftest import ROOT
from tests.support.processes import ServerProcess

from els_client import Client, InvalidArgumentError

CLIENTS = ROOT / "clients"
INVALID_ARGUMENT, DEADLINE_EXCEEDED = 3, 4
PIXELS = (np.arange(30) % 17 / 8 - 1).astype(np.float32).reshape(1, 1, 6, 5)

COMMANDS: dict[str, Callable[[str, str], list[str]]] = {
    "typescript": lambda target, model: ["node", "build/main.js", target, model],
    "java": lambda target, model: ["make", "-s", "run", f"TARGET={target}", f"MODEL={model}"],
    "go": lambda target, model: ["build/denoise", target, model],
}


def answer(language: str, target: str, model: str) -> dict[str, Any]:
    """Return the output of a language's program."""
    done = subprocess.run(
        COMMANDS[language](target, model),
        cwd=CLIENTS / language,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module", params=COMMANDS)
def found(request: pytest.FixtureRequest, server: ServerProcess) -> dict[str, Any]:
    return answer(request.param, server.target, "zeros")


def test_an_image_is_denoised_to_the_same_bits(found: dict[str, Any], client: Client) -> None:
    want = client.denoise(PIXELS, model="zeros", sigma=0.5)
    assert np.array_equal(np.array(found["denoised"], np.float32), want.ravel())


def test_a_sample_is_streamed_step_by_step(found: dict[str, Any], client: Client) -> None:
    steps = list(client.sample(model="zeros", count=2, steps=4, seed=7))
    assert found["steps"] == [step.index for step in steps] == [1, 2, 3, 4]
    assert np.array_equal(np.array(found["drawn"], np.float32), steps[-1].x.ravel())


def test_an_invalid_field_is_named_by_the_details(found: dict[str, Any], client: Client) -> None:
    with pytest.raises(InvalidArgumentError) as raised:
        client.denoise(PIXELS, model="zeros", sigma=-1)
    assert found["invalid"]["code"] == INVALID_ARGUMENT
    fields = found["invalid"]["fields"]
    assert fields == [one.field for one in raised.value.violations] == ["level.sigma"]
    assert found["invalid"]["retryAfterS"] is None


@pytest.mark.parametrize("language", COMMANDS)
def test_the_time_of_a_retry_is_read_from_the_details(language: str, server: ServerProcess) -> None:
    late = answer(language, server.target, "slow")["late"]
    assert (late["code"], late["fields"]) == (DEADLINE_EXCEEDED, [])
    assert 0 < late["retryAfterS"] < 5
