"""A real Prometheus on a free port, its data in a folder of the test, gone afterwards."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
import yaml

WAIT_S = 30
_LISTENS = re.compile(r'msg="Listening on" address=(\S+)')


def needs(program: str) -> pytest.MarkDecorator:
    """Return what skips a test where a program is not installed."""
    # Debian has it, as others do; without it the rest can still be tested.
    absent = shutil.which(program) is None
    return pytest.mark.skipif(absent, reason=f"needs {program}: apt-get install prometheus")


class Prometheus:
    """Asked over HTTP.

    Args:
        address: host and port.
    """

    def __init__(self, address: str) -> None:
        self._url = f"http://{address}/api/v1/"

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the samples that an expression has now."""
        result: list[dict[str, Any]] = self._get("query", {"query": expression})["result"]
        return result

    def series(self, selector: str) -> list[dict[str, str]]:
        """Return the labels of every series that was ever seen and that a selector selects."""
        found: list[dict[str, str]] = self._get("series", {"match[]": selector})
        return found

    def until(self, expression: str) -> list[dict[str, Any]]:
        """Return an expression's samples once it has any; a busy machine misses scrapes."""
        waited(lambda: bool(self.query(expression)), expression)
        return self.query(expression)

    def _get(self, path: str, parameters: Mapping[str, str]) -> Any:
        with urlopen(f"{self._url}{path}?{urlencode(parameters)}", timeout=WAIT_S) as page:
            return json.load(page)["data"]


def waited(condition: Callable[[], bool], what: str) -> None:
    """Wait until something is so; there is no event to wait for in another process."""
    until = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < until, f"not so after {WAIT_S} s: {what}"
        time.sleep(0.05)


@contextmanager
def scraping(
    folder: Path, target: str, rules: Path, labels: Mapping[str, str]
) -> Iterator[Prometheus]:
    """Yield a Prometheus that scrapes a target twice a second and evaluates rules.

    Args:
        folder: for its configuration, data and log.
        target: host and port.
        rules: its rule file.
        labels: what a pod's discovery would add; ``job`` among them.
    """
    static = {"targets": [target], "labels": dict(labels)}
    often = dict.fromkeys(("scrape_interval", "scrape_timeout", "evaluation_interval"), "500ms")
    config = {
        "global": often,
        "rule_files": [str(rules)],
        "scrape_configs": [{"job_name": labels["job"], "static_configs": [static]}],
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    log = folder / "log"
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder / 'prometheus.yaml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                "--web.listen-address=127.0.0.1:0",
            ],
            stderr=stderr,
        )
    try:
        waited(lambda: "Server is ready" in log.read_text(), "prometheus is ready")
        found = _LISTENS.search(log.read_text())
        assert found, log.read_text()
        yield Prometheus(found[1])
    finally:
        process.terminate()
        process.wait(WAIT_S)
