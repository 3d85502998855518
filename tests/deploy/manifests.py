"""What the tests read of manifests: each combination built once, its pods, its settings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
from deploy import rendered

from els_service.config import Settings

COMMAND = ("els-server", "check", "--config-only", "--strict")
Combination = tuple[str, tuple[str, ...]]

needs_kubectl = pytest.mark.skipif(
    rendered.kubectl() is None, reason="needs kubectl: make deploy-tools"
)
each_combination = pytest.mark.parametrize(
    "combination", rendered.combinations(), ids=lambda one: rendered.title(*one)
)


@cache
def built(combination: Combination) -> list[rendered.Document]:
    return rendered.documents(*combination)


def of_kind(combination: Combination, kind: str) -> list[rendered.Document]:
    return [one for one in built(combination) if one["kind"] == kind]


@dataclass(frozen=True)
class Pods:
    """The pods of a workload: their labels and spec, the server among the containers."""

    labels: dict[str, str]
    spec: dict[str, Any]
    server: dict[str, Any]

    @property
    def containers(self) -> list[dict[str, Any]]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]


def pods(combination: Combination) -> Pods:
    """Return the pods of the Deployment, or those that KServe makes of its two resources."""
    if deployments := of_kind(combination, "Deployment"):
        (deployment,) = deployments
        template = deployment["spec"]["template"]
        labels, spec = template["metadata"]["labels"], template["spec"]
        (server,) = (one for one in spec["containers"] if one["name"] == "server")
        return Pods(labels, spec, server)
    (runtime,), (service,) = (
        of_kind(combination, kind) for kind in ("ServingRuntime", "InferenceService")
    )
    predictor = service["spec"]["predictor"]
    (server,) = runtime["spec"]["containers"]
    return Pods(predictor["labels"], {**predictor, **runtime["spec"]}, server)


def environment(combination: Combination) -> dict[str, str]:
    """Return what the settings' ConfigMap puts into the server's environment."""
    (reference,) = pods(combination).server["envFrom"]
    (data,) = (
        one["data"]
        for one in of_kind(combination, "ConfigMap")
        if one["metadata"]["name"] == reference["configMapRef"]["name"]
    )
    return dict(data)


def settings(combination: Combination) -> Settings:
    """Return the settings of the server, typed."""
    names = {f"ELS_{name.upper()}": name for name in Settings.model_fields}
    return Settings.model_validate(
        {names[name]: value for name, value in environment(combination).items()}
    )


def selected(selector: dict[str, str], labels: dict[str, str]) -> bool:
    return selector.items() <= labels.items()


def numbers(quantities: list[str]) -> Iterator[float]:
    """Yield quantities of Kubernetes, such as 256Mi, as numbers."""
    units = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "m": 1e-3}
    for quantity in quantities:
        unit = next((unit for unit in units if quantity.endswith(unit)), "")
        yield float(quantity.removesuffix(unit)) * units.get(unit, 1.0)
