"""The kustomize component that has the pods scraped, and the rules evaluated, by an operator."""

from __future__ import annotations

from typing import Any

from deploy.monitoring import rules

SCRAPE_INTERVAL = "15s"
"""At least four scrapes fit a drain of a minute, and one that is half done is seen."""
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
    """Return what has every pod scraped, ready or not: those that are not tell why."""
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
            # Some hundred a model: more is a fault that would fill the store.
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
