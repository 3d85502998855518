"""A real Prometheus scrapes a real server: all that dashboard, rules and scalers ask for is there.

The target's labels are those that a PodMonitor attaches.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from deploy.monitoring.rules import error_ratio
from tests.deploy import traffic
from tests.deploy.prometheus import Prometheus, needs, scraping
from tests.deploy.promql import TARGET, as_grafana, queries_of, selections
from tests.support.processes import FAULT_SERVER, ServerProcess, serving

from els_service.engine.request_context import REASONS

DEPLOY = Path(__file__).parents[2] / "deploy"
RULES = DEPLOY / "monitoring" / "alerts.yaml"
POD = {
    "namespace": "els-denoise",
    "pod": "els-denoise-0",
    "container": "server",
    "endpoint": "metrics",
    "job": "els-denoise/els-denoise",
}
CODES = (
    *("OK", "Canceled", "DeadlineExceeded", "FailedPrecondition", "Internal", "InvalidArgument"),
    *("NotFound", "ResourceExhausted"),
)
LABEL = re.compile(r"{{(\w+)}}")

pytestmark = [pytest.mark.e2e, needs("prometheus")]


def documents(path: Path) -> Iterator[Any]:
    """Yield every mapping of a YAML file, however deep."""
    waiting = list(yaml.safe_load_all(path.read_text()))
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            yield node
        if isinstance(node, dict | list):
            waiting.extend(node.values() if isinstance(node, dict) else node)


def panels() -> list[tuple[str, str]]:
    """Return (legend, expression) of every query of the dashboard."""
    dashboard = json.loads((DEPLOY / "monitoring" / "dashboard.json").read_text())
    targets = [target for panel in dashboard["panels"] for target in panel.get("targets", ())]
    return [(target["legendFormat"], as_grafana(target["expr"])) for target in targets]


def variables() -> list[str]:
    """Return the selectors from which the dashboard takes its variables."""
    dashboard = json.loads((DEPLOY / "monitoring" / "dashboard.json").read_text())
    queries = [one["query"] for one in dashboard["templating"]["list"] if one["type"] == "query"]
    return [as_grafana(query.removeprefix("label_values(").rpartition(",")[0]) for query in queries]


def rules() -> list[str]:
    """Return every expression of the rules."""
    return [rule["expr"] for rule in documents(RULES) if "expr" in rule]


def runbooks() -> list[str]:
    """Return every query and metric that a runbook tells to look at."""
    pages = sorted((DEPLOY / "monitoring" / "runbooks").glob("*.md"))
    return [query for page in pages for query in queries_of(page.read_text())]


def scalers() -> list[str]:
    """Return every PromQL query, and every name of a metric, of what scales."""
    found = [one for path in DEPLOY.rglob("*.yaml") for one in documents(path)]
    return [
        value
        for one in found
        for key in ("query", "metricName")
        if isinstance(value := one.get(key), str)
    ]


def asked() -> dict[str, list[str]]:
    """Return every expression that anything under ``deploy`` has, by where it comes from."""
    return {
        "dashboard": [expression for _, expression in panels()],
        "variables": variables(),
        "rules": rules(),
        "runbooks": runbooks(),
        "scalers": scalers(),
    }


@dataclass(frozen=True)
class World:
    """A server, and a Prometheus that saw all that can become of its calls."""

    server: ServerProcess
    prometheus: Prometheus


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("sight")
    options = {"ELS_QUEUE_S": traffic.QUEUE_S, "ELS_DRAIN_S": traffic.DRAIN_S}
    root = traffic.models(folder / "models")
    with serving("--models", root, "--threads", 1, program=FAULT_SERVER, **options) as server:
        target = f"127.0.0.1:{server.ready['metrics_port']}"
        with scraping(folder, target, RULES, POD) as prometheus:
            prometheus.until("els_serving == 1")
            asyncio.run(traffic.most_ends(server.target))
            # A rate needs a sample from before.
            prometheus.until('els_dropped_total{reason="rejected_full"} == 0')
            asyncio.run(traffic.overload(server.target))
            prometheus.until('rate(els_dropped_total{reason="rejected_full"}[1m]) > 0')
            prometheus.until(f"{error_ratio('1h')} > 0")
            yield World(server, prometheus)


@pytest.mark.parametrize("place", ["dashboard", "variables", "rules", "runbooks", "scalers"])
def test_every_metric_label_and_value_that_is_asked_for_is_there(world: World, place: str) -> None:
    expressions = asked()[place]
    assert expressions
    for selected in (one for expression in expressions for one in selections(expression)):
        found = world.prometheus.series(selected.name)
        assert found, f"no metric {selected.name}"
        for label in selected.labels:
            assert any(label in one for one in found), f"{selected.name} has no {label}"
        for label, values in selected.matchers:
            there = {one[label] for one in found if label in one}
            assert there, f"{selected.name} has no {label}"
            # Which namespaces and pods there are is not ours to say.
            missing = set() if label in TARGET else set(values) - {".*"} - there
            assert not missing, f"{selected.name}: {label} is never {missing}"


def test_every_panel_has_lines_and_every_legend_its_labels(world: World) -> None:
    for legend, expression in panels():
        # Nobody drains yet.
        samples = world.prometheus.until(expression.removesuffix(" > 0"))
        for name in LABEL.findall(legend):
            assert all(name in sample["metric"] for sample in samples), (legend, expression)


def test_each_query_of_a_scaler_has_one_number(world: World) -> None:
    for query in scalers():
        (sample,) = world.prometheus.until(query)
        assert math.isfinite(float(sample["value"][1])), query


def test_all_that_can_become_of_a_question_was_seen(world: World) -> None:
    for reason in set(REASONS) - {"interrupted"}:
        world.prometheus.until(f'els_dropped_total{{reason="{reason}"}} > 0')
    for code in CODES:
        world.prometheus.until(f'grpc_server_handled_total{{grpc_code="{code}"}} > 0')


# The last, as it ends the server.
async def test_a_drain_that_a_call_outlives_is_alerted_even_when_the_replica_is_gone(
    world: World,
) -> None:
    cut_short = 'ALERTS{alertname="ElsDrainCutShort", alertstate="firing", pod="els-denoise-0"}'
    async with grpc.aio.insecure_channel(world.server.target) as channel:
        call = await traffic.trajectory(channel)
        world.server.terminate()
        for expression in ("els_draining_seconds > 0 and els_serving == 0", cut_short):
            await asyncio.to_thread(world.prometheus.until, expression)
        with pytest.raises(grpc.aio.AioRpcError, match="the server is shutting down"):
            await traffic.rest_of(call)
    assert await asyncio.to_thread(world.server.wait) == (0, "")
    await asyncio.to_thread(world.prometheus.until, f"up == 0 and on (pod) {cut_short}")
