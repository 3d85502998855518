"""What an operator relies on, in every overlay and with every component on top of one."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import grpc
import numpy as np
import pytest
import yaml
from deploy import rendered
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub
from prometheus_client.parser import text_string_to_metric_families
from tests.deploy.manifests import (
    COMMAND,
    Combination,
    built,
    each_combination,
    environment,
    needs_kubectl,
    numbers,
    of_kind,
    pods,
    selected,
    settings,
)
from tests.support.environments import python_of
from tests.support.processes import ServerProcess, run, serving

from els_client import Client
from els_service.server.health import ALIVE
from els_service.server.server import stop_at_most_s

pytestmark = needs_kubectl

USER = 10001
SLACK_S = 30
"""For a batch that is being computed when the rest has ended."""
BARE_BYTES = 1 << 30
"""Ample for a server with the bundled models: 0.4 GiB resident, measured, and its messages."""


@each_combination
def test_every_container_is_confined(combination: Combination) -> None:
    found = pods(combination)
    assert found.spec["automountServiceAccountToken"] is False
    assert found.spec["enableServiceLinks"] is False
    whole = found.spec["securityContext"]
    assert whole["seccompProfile"] == {"type": "RuntimeDefault"}
    assert (whole["runAsNonRoot"], whole["runAsUser"], whole["runAsGroup"]) == (True, USER, USER)
    for container in found.containers:
        confined = container["securityContext"]
        assert confined["readOnlyRootFilesystem"] is True
        assert confined["allowPrivilegeEscalation"] is False
        assert confined["capabilities"] == {"drop": ["ALL"]}
        assert not {"privileged", "runAsUser"} & confined.keys()
        # The last words of a container that fails are what `kubectl describe pod` shows.
        assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"


@each_combination
def test_the_account_has_no_token_and_secrets_are_referenced_never_contained(
    combination: Combination,
) -> None:
    (account,) = of_kind(combination, "ServiceAccount")
    assert account["automountServiceAccountToken"] is False
    assert account["metadata"]["name"] == pods(combination).spec["serviceAccountName"]
    assert of_kind(combination, "Secret") == []


@each_combination
def test_probes_ask_the_health_port_and_only_readiness_asks_for_models(
    combination: Combination,
) -> None:
    server, port = pods(combination).server, settings(combination).health_port
    for name in ("startupProbe", "livenessProbe"):
        assert server[name]["grpc"] == {"port": port, "service": ALIVE}
    assert server["readinessProbe"]["grpc"] == {"port": port}


@each_combination
def test_the_grace_period_is_the_pause_before_sigterm_and_what_the_drain_takes(
    combination: Combination,
) -> None:
    found = pods(combination)
    before = found.server["lifecycle"]["preStop"]
    pause_s = before["sleep"]["seconds"] if "sleep" in before else int(before["exec"]["command"][1])
    assert pause_s > 0
    least = pause_s + stop_at_most_s(settings(combination))
    grace_s = found.spec["terminationGracePeriodSeconds"]
    assert least + SLACK_S / 2 <= grace_s <= least + SLACK_S


@each_combination
def test_ports_are_those_of_the_settings_and_services_find_them(combination: Combination) -> None:
    found, chosen = pods(combination), settings(combination)
    ports = {port["name"]: port["containerPort"] for port in found.server["ports"]}
    http = [] if chosen.http_port is None else [chosen.http_port]
    expected = {chosen.port, chosen.metrics_port, chosen.health_port, *http}
    assert set(ports.values()) == expected
    assert len(found.server["ports"]) == len(expected)
    services = of_kind(combination, "Service")
    assert {one["metadata"]["name"] for one in services} == {"els-denoise", "els-denoise-headless"}
    for service in services:
        assert selected(service["spec"]["selector"], found.labels)
        assert [port["port"] for port in service["spec"]["ports"]] == [chosen.port, *http]
        assert [ports[port["targetPort"]] for port in service["spec"]["ports"]] == [
            *(chosen.port, *http),
        ]


@each_combination
def test_nothing_gets_in_or_out_that_no_policy_names(combination: Combination) -> None:
    found = pods(combination)
    policies = {one["metadata"]["name"]: one for one in of_kind(combination, "NetworkPolicy")}
    for policy in policies.values():
        assert selected(policy["spec"]["podSelector"]["matchLabels"], found.labels)
    denied = policies.pop("els-denoise-default-deny")["spec"]
    assert denied["policyTypes"] == ["Ingress", "Egress"]
    assert not {"ingress", "egress"} & denied.keys()
    rules = [
        (rule.get("from") or rule.get("to"), rule["ports"])
        for policy in policies.values()
        for rule in [*policy["spec"].get("ingress", []), *policy["spec"].get("egress", [])]
    ]
    entries = [rule for one in policies.values() for rule in one["spec"].get("ingress", [])]
    named = {port["name"] for port in found.server["ports"]}
    admitted = {port["port"] for entry in entries for port in entry["ports"]}
    assert {port for port in admitted if isinstance(port, str)} <= named
    # A rule without peers would be one for everybody.
    assert rules
    assert all(peers and all(peers) and ports for peers, ports in rules)


@each_combination
def test_the_disruption_budget_finds_the_pods_and_blocks_no_drain(combination: Combination) -> None:
    (budget,) = of_kind(combination, "PodDisruptionBudget")
    assert selected(budget["spec"]["selector"]["matchLabels"], pods(combination).labels)
    assert budget["spec"]["maxUnavailable"] == 1
    assert budget["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow"


@each_combination
def test_pods_are_spread_and_what_they_may_use_suffices(combination: Combination) -> None:
    found = pods(combination)
    assert found.spec["topologySpreadConstraints"]
    for container in found.containers:
        limits, requests = (container["resources"][name] for name in ("limits", "requests"))
        assert limits.keys() == requests.keys() >= {"cpu", "memory", "ephemeral-storage"}
    limits = found.server["resources"]["limits"]
    memory, disk = numbers([limits["memory"], limits["ephemeral-storage"]])
    # A share of the limit unless set, and where it is set it is the bound of all that is in flight.
    in_flight = settings(combination).in_flight_bytes or memory // 6
    assert memory >= BARE_BYTES + in_flight
    # What the pod's volumes may grow to counts against its limit, and evicts it beyond.
    volumes = [one["emptyDir"]["sizeLimit"] for one in found.spec["volumes"] if "emptyDir" in one]
    assert sum(numbers(volumes)) < disk


@each_combination
def test_only_named_places_are_writable_and_there_is_one_for_temporary_files(
    combination: Combination,
) -> None:
    found = pods(combination)
    volumes = {one["name"]: one for one in found.spec["volumes"]}
    mounts = {one["mountPath"]: one for one in found.server["volumeMounts"]}
    variables = {one["name"]: one["value"] for one in found.server["env"]}
    writable = [path for path, one in mounts.items() if not one.get("readOnly")]
    assert all("emptyDir" in volumes[mounts[path]["name"]] for path in writable)
    places = ("TMPDIR", "HOME", "TRITON_CACHE_DIR")
    for value in (variables[name] for name in places if name in variables):
        assert any(Path(value).is_relative_to(path) for path in writable)


@each_combination
def test_every_object_is_in_the_namespace_that_admits_only_the_confined(
    combination: Combination,
) -> None:
    (namespace,) = of_kind(combination, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for one in built(combination):
        if one is not namespace:
            assert one["metadata"]["namespace"] == namespace["metadata"]["name"]


@each_combination
def test_plain_text_is_asked_for_where_there_is_no_tls_and_nowhere_else(
    combination: Combination,
) -> None:
    chosen = settings(combination)
    assert chosen.insecure is ("tls" not in combination[1])
    assert (chosen.tls_certificate is None) is chosen.insecure


@pytest.mark.parametrize(("component", "protocol"), [("kserve", "grpc-v2"), ("kserve-rest", "v2")])
def test_under_kserve_the_first_port_speaks_the_protocol_of_the_service(
    component: str, protocol: str
) -> None:
    combination = ("cpu", (component,))
    (runtime,), (service,) = (
        of_kind(combination, kind) for kind in ("ServingRuntime", "InferenceService")
    )
    model, chosen = service["spec"]["predictor"]["model"], settings(combination)
    assert model["protocolVersion"] == protocol
    assert runtime["spec"]["protocolVersions"] == ["v2", "grpc-v2"][protocol == "grpc-v2" :]
    assert model["runtime"] == runtime["metadata"]["name"]
    assert model["modelFormat"]["name"] in {
        one["name"] for one in runtime["spec"]["supportedModelFormats"]
    }
    # The predictor's Service forwards port 80, which KServe's address ends at, to the first.
    first = runtime["spec"]["containers"][0]["ports"][0]
    asked = chosen.port if protocol == "grpc-v2" else chosen.http_port
    assert first["containerPort"] == asked
    assert first["protocol"] == "TCP"
    assert first["name"] == ("h2c" if protocol == "grpc-v2" else "http")


@pytest.mark.parametrize("scaler", ["hpa", "keda"])
def test_a_scaler_has_the_number_of_replicas_to_itself(scaler: str) -> None:
    combination = ("cpu", (scaler,))
    (deployment,) = of_kind(combination, "Deployment")
    assert "replicas" not in deployment["spec"]
    (target,) = of_kind(
        combination, {"hpa": "HorizontalPodAutoscaler", "keda": "ScaledObject"}[scaler]
    )
    assert target["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    """A real server with the settings of overlays/cpu, on free ports."""
    variables = {**environment(("cpu", ())), "ELS_HEALTH_PORT": "0", "ELS_THREADS": "1"}
    with serving(**variables) as process:
        yield process


@pytest.mark.e2e
def test_with_the_settings_of_an_overlay_a_server_is_probed_and_asked(
    server: ServerProcess, tmp_path: Path
) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{server.ready['health_port']}") as channel:
        stub: Any = HealthStub(channel)
        for probe in ("startupProbe", "readinessProbe"):
            asked = pods(("cpu", ())).server[probe]["grpc"].get("service", "")
            status = stub.Check(health_pb2.HealthCheckRequest(service=asked), timeout=30).status
            assert status == health_pb2.HealthCheckResponse.SERVING
    out = tmp_path / "grid.png"
    shared = ("--target", server.target, "--model", "fashion-wiener", "--out", out)
    done = run("els", "sample", "--label", "7", "--steps", 2, *shared)
    assert (done.returncode, out.exists()) == (0, True), done.stderr


@pytest.mark.slow
def test_scalers_ask_for_metrics_and_labels_that_the_server_has(server: ServerProcess) -> None:
    (scaled,) = of_kind(("cpu", ("keda",)), "ScaledObject")
    queries = [trigger["metadata"]["query"] for trigger in scaled["spec"]["triggers"]]
    with Client(server.target) as client:
        client.denoise(np.zeros((1, 1, 28, 28), np.float32), model="fashion-wiener", sigma=1)
    with urlopen(server.metrics_url, timeout=30) as page:
        families = text_string_to_metric_families(page.read().decode())
        samples = [sample for family in families for sample in family.samples]
    asked = [one for query in queries for one in re.findall(r"(els_\w+)\{(.*?)\}", query)]
    assert [name for name, _ in asked] == [
        "els_queue_cost_seconds",
        "els_device_busy_seconds_total",
        "els_request_seconds_bucket",
    ]
    for name, matchers in asked:
        wanted = dict(re.findall(r'(\w+)="(.*?)"', matchers))
        # Prometheus' own label of what it scrapes.
        assert wanted.pop("namespace") == scaled["metadata"]["namespace"]
        assert any(one.name == name and wanted.items() <= one.labels.items() for one in samples)


def test_names_in_the_certificate_are_those_of_the_services() -> None:
    combination = ("cpu", ("tls",))
    (certificate,) = of_kind(combination, "Certificate")
    for service in of_kind(combination, "Service"):
        name, namespace = service["metadata"]["name"], service["metadata"]["namespace"]
        for end in ("", f".{namespace}", f".{namespace}.svc", f".{namespace}.svc.cluster.local"):
            assert name + end in certificate["spec"]["dnsNames"]
    secrets = [
        one["secret"]["secretName"] for one in pods(combination).spec["volumes"] if "secret" in one
    ]
    assert secrets == [certificate["spec"]["secretName"]]


@pytest.mark.slow
def test_the_init_container_sees_the_same_settings_and_files_as_the_server() -> None:
    for combination in rendered.combinations():
        found = pods(combination)
        check = found.spec["initContainers"][0]
        assert tuple(check["command"]) == COMMAND
        assert check["image"] == found.server["image"]
        assert check["envFrom"] == found.server["envFrom"]
        paths = {one["mountPath"] for one in check["volumeMounts"]}
        files = [value for value in environment(combination).values() if value.startswith("/etc/")]
        assert all(any(Path(file).is_relative_to(path) for path in paths) for file in files)


@pytest.mark.slow
def test_schemas_of_three_kubernetes_versions_know_every_field_of_the_overlays() -> None:
    # They are fetched, not shipped.
    python = python_of(".venv-deploy", "make deploy-tools")
    done = subprocess.run(
        [python, "-m", "deploy.checks", "--quick"],
        cwd=rendered.DEPLOY.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_caller_in_the_cluster_is_let_in_and_asks_the_service_by_its_name() -> None:
    job, _ = yaml.safe_load_all((rendered.DEPLOY / "example-job.yaml").read_text())
    template = job["spec"]["template"]
    (callers,) = (
        one
        for one in of_kind(("cpu", ()), "NetworkPolicy")
        if one["metadata"]["name"] == "els-denoise-callers"
    )
    ((peer,),) = (rule["from"] for rule in callers["spec"]["ingress"])
    assert selected(peer["podSelector"]["matchLabels"], template["metadata"]["labels"])
    (container,) = template["spec"]["containers"]
    assert container["image"] == pods(("cpu", ())).server["image"]
    variables = {one["name"]: one["value"] for one in container["env"]}
    assert variables["ELS_TARGET"] in {
        f"dns:///{one['metadata']['name']}.{one['metadata']['namespace']}.svc.cluster.local:"
        f"{one['spec']['ports'][0]['port']}"
        for one in of_kind(("cpu", ()), "Service")
    }


def test_every_exception_of_the_policies_has_its_reason_above_it() -> None:
    text = (rendered.DEPLOY / ".checkov.yaml").read_text()
    lines = text.splitlines()
    skipped = yaml.safe_load(text)["skip-check"]
    for check in skipped:
        assert lines[lines.index(f"  - {check}") - 1].strip().startswith("# ")
