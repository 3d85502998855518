"""Writes the generated files: dashboard, rules, and the component for the Prometheus operator.

usage: python -m deploy.monitoring
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from deploy.monitoring import dashboard, manifests, rules

ROOT = Path(__file__).parents[2]
_HEADER = "# Generated from deploy/monitoring/*.py by `make deploy-monitoring`.\n"


class _Dumper(yaml.SafeDumper):
    """YAML dumper that writes multi-line texts as blocks, and no anchors."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def generated() -> dict[str, str]:
    """Return the content of every generated file, by its path from the root of the repository."""
    component = "deploy/components/podmonitor"
    documents = {
        "deploy/monitoring/alerts.yaml": rules.document(),
        f"{component}/kustomization.yaml": manifests.kustomization(),
        f"{component}/podmonitor.yaml": manifests.pod_monitor(),
        f"{component}/prometheusrule.yaml": manifests.prometheus_rule(),
    }
    return {
        "deploy/monitoring/dashboard.json": dashboard.document(),
        **{path: _HEADER + _yaml(document) for path, document in documents.items()},
    }


def _yaml(document: dict[str, Any]) -> str:
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=100, allow_unicode=True)


if __name__ == "__main__":
    for path, content in generated().items():
        (ROOT / path).write_text(content)
        print(path)
