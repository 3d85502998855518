from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from tests.support.environments import SOURCES, python_with
from tests.support.fake_server import FakeDenoiser

ROOT = Path(__file__).parents[2]


# Beside others its two seconds may pass before its users have begun.
@pytest.mark.alone
def test_locust_counts_the_calls_of_its_users(target: str, fake: FakeDenoiser) -> None:
    script = "from locust.main import main; main()"
    options = ("--headless", "-u", "2", "-r", "2", "-t", "2s", "--json", "--host", target)
    done = subprocess.run(
        [
            python_with("locust", "locust"),
            "-c",
            script,
            "-f",
            "clients/examples/locustfile.py",
            *options,
        ],
        cwd=ROOT,
        env={"PYTHONPATH": SOURCES},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    counts = {
        row["name"]: (row["num_requests"], row["num_failures"]) for row in json.loads(done.stdout)
    }
    assert done.returncode == 0, done.stderr
    assert "denoise" in counts
    assert sum(requests for requests, _ in counts.values()) > 10, counts
    assert not any(failures for _, failures in counts.values())
