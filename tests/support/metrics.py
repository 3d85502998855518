"""Metrics of a server process, as its page shows them."""

from __future__ import annotations

from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families
from tests.support.processes import ServerProcess
from tests.support.refusals import TIMEOUT_S


def metrics(server: ServerProcess) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Return every sample as sample name → [(labels, value)]."""
    with urlopen(server.metrics_url, timeout=TIMEOUT_S) as page:
        families = text_string_to_metric_families(page.read().decode())
        found: dict[str, list[tuple[dict[str, str], float]]] = {}
        for family in families:
            for sample in family.samples:
                found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def value(server: ServerProcess, name: str, **labels: str) -> float:
    """Return one sample's value, 0 where there is none yet."""
    return sum(number for found, number in metrics(server).get(name, []) if found == labels)
