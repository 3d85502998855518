"""Dashboard, rules, component and runbooks: of one source and well formed; alerts fire and clear.

Grafana itself is not asked: its own types read the dashboard back.
"""

from __future__ import annotations

import json
import subprocess
from itertools import combinations
from typing import Any

import pytest
import yaml
from deploy.monitoring.__main__ import ROOT, generated
from deploy.monitoring.rules import ALERTS, BURN_ALERTS, document, runbook
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard
from tests.deploy.prometheus import needs
from tests.deploy.promql import queries_of, selections

MONITORING = ROOT / "deploy" / "monitoring"
NAMES = sorted({alert.name for alert in (*ALERTS, *BURN_ALERTS)})
SECTIONS = ("Meaning", "Impact", "Diagnosis", "Mitigation")


def dashboard() -> dict[str, Any]:
    """Return the dashboard as it is committed."""
    document: dict[str, Any] = json.loads((MONITORING / "dashboard.json").read_text())
    return document


@pytest.mark.parametrize(("path", "content"), generated().items(), ids=generated())
def test_what_is_committed_is_what_is_generated(path: str, content: str) -> None:
    assert (ROOT / path).read_text() == content, "run make deploy-monitoring"


def test_the_operator_s_rules_are_the_plain_ones() -> None:
    path = ROOT / "deploy" / "components" / "podmonitor" / "prometheusrule.yaml"
    plain = yaml.safe_load((MONITORING / "alerts.yaml").read_text())
    assert yaml.safe_load(path.read_text())["spec"] == plain == document()


def test_grafana_s_own_types_read_the_dashboard_and_write_it_again() -> None:
    read = Dashboard.from_json(dashboard())
    assert json.loads(JSONEncoder().encode(read)) == dashboard()


def test_every_panel_has_a_place_of_its_own_a_unit_and_a_text() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for one, other in combinations((panel["gridPos"] for panel in panels), 2):
        apart = (
            one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"],
            one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"],
        )
        assert any(apart), (one, other)
    for panel in panels:
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        if panel["type"] != "row":
            assert panel["title"]
            assert panel["description"]
            assert panel["targets"]
            assert panel["fieldConfig"]["defaults"]["unit"]


def test_source_namespace_pod_and_model_are_chosen_in_the_dashboard() -> None:
    variables = {one["name"]: one for one in dashboard()["templating"]["list"]}
    assert list(variables) == ["datasource", "namespace", "pod", "model"]
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    panels = [panel for panel in dashboard()["panels"] if panel["type"] != "row"]
    for part in (*panels, *(target for panel in panels for target in panel["targets"])):
        assert part["datasource"] == chosen
    for name in ("namespace", "pod", "model"):
        assert variables[name]["datasource"] == chosen
        assert variables[name]["multi"]
        assert variables[name]["includeAll"]
    for target in (target for panel in panels for target in panel["targets"]):
        assert "$namespace" in target["expr"], target["expr"]


def test_every_alert_has_a_runbook_and_every_runbook_an_alert() -> None:
    assert sorted(path.stem for path in (MONITORING / "runbooks").glob("*.md")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_runbook_is_one_page_that_names_the_metrics_of_its_alert(name: str) -> None:
    text = (ROOT / runbook(name)).read_text()
    lines = text.splitlines()
    assert lines[0] == f"# {name}"
    assert [line[3:] for line in lines if line.startswith("## ")] == list(SECTIONS)
    assert len(lines) <= 50
    expressions = [alert.expression for alert in (*ALERTS, *BURN_ALERTS) if alert.name == name]
    asked = {one.name for expression in expressions for one in selections(expression)}
    named = {one.name for query in queries_of(text) for one in selections(query)}
    recorded = {name for name in asked if ":" in name}
    assert named >= asked - recorded
    assert named


@needs("promtool")
def test_prometheus_takes_the_rules() -> None:
    promtool("check", "rules", "alerts.yaml")


@pytest.mark.slow
@needs("promtool")
def test_each_alert_fires_and_clears() -> None:
    promtool("test", "rules", "alerts_test.yaml")


def test_the_rules_own_tests_have_each_alert_fire_and_clear() -> None:
    tests = yaml.safe_load((MONITORING / "alerts_test.yaml").read_text())["tests"]
    cleared = set()
    for test in tests:
        first, *later = test["alert_rule_test"][-2:]
        if first["exp_alerts"] and not later[0]["exp_alerts"]:
            (alert,) = first["exp_alerts"]
            cleared.add((first["alertname"], alert["exp_labels"].get("window")))
    expected = {(alert.name, dict(alert.labels).get("window")) for alert in (*ALERTS, *BURN_ALERTS)}
    assert cleared == expected


def promtool(*arguments: str) -> None:
    """Run promtool where the rules are."""
    done = subprocess.run(
        ["promtool", *arguments],
        cwd=MONITORING,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
