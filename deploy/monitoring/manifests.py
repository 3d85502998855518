"""The kustomize component for the Prometheus operator: PodMonitor and PrometheusRule."""

from __future__ import annotations

from typing import Any

from deploy.monitoring import rules

SCRAPE_INTERVAL = "15s"
"""Scrape interval: at least four scrapes in a drain of a minute."""
SERVER = {"app.kubernetes.io/name": "els-denoise", "app.kubernetes.io/component": "server"}
_METADATA = {
    "name": "els-denoise",
    "labels": {"app.kubernetes.io/name": "els-denoise", "app.kubernetes.io/part-of": "els-denoise"},
}


def kustomization() -> dict[str, Any]:
    """Return the component."""
    return {
        "apiVersion": "kustomize.config.k8s.io/v1alpha1",
        "kind": "Component",
        "resources": ["podmonitor.yaml", "prometheusrule.yaml"],
    }


def pod_monitor() -> dict[str, Any]:
    """Return the PodMonitor of all pods; metrics of those that are not ready show the reason."""
    endpoint = {
        "port": "metrics",
        "path": "/metrics",
        "interval": SCRAPE_INTERVAL,
        "scrapeTimeout": "10s",
    }
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": _METADATA,
        "spec": {
            "selector": {"matchLabels": SERVER},
            "podMetricsEndpoints": [endpoint],
            # A model has some hundred; more is a bug that would fill the storage.
            "sampleLimit": 50000,
        },
    }


def prometheus_rule() -> dict[str, Any]:
    """Return the same rules as ``alerts.yaml``."""
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": _METADATA,
        "spec": rules.document(),
    }
