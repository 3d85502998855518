"""Checks every overlay and component by Kubernetes' schemas and checkov: ``make deploy-checks``.

Runs in ``.venv-deploy``; exits with 1 and names each fault.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import kubernetes_validate
import yaml
from deploy import rendered, schemas

VERSIONS = ("1.30", "1.33", "1.37")
TOO_OLD = {("model-volume-oci", "1.30"): "volumes of images are newer"}
"""Combinations that must be rejected, as documented by the component, and the reason."""
CONFIG = rendered.DEPLOY / ".checkov.yaml"
CUSTOM = rendered.DEPLOY.parent / ".venv-deploy" / "crds.json"
CHECKOV = rendered.DEPLOY.parent / ".venv-checkov" / "bin" / "checkov"


def schema_faults(text: str, version: str, custom: schemas.Schemas) -> Iterator[str]:
    """Yield the faults of manifests by the schemas of one Kubernetes version."""
    for document in filter(None, yaml.safe_load_all(text)):
        name = f"{document['kind']} {document['metadata']['name']}"
        try:
            kubernetes_validate.validate(document, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            yield f"{name}: {'.'.join(map(str, error.path))}: {error.message}"
        except kubernetes_validate.SchemaNotFoundError:
            try:
                if fault := schemas.fault(custom, document):
                    yield f"{name}: {fault}"
            except KeyError:
                yield f"{name}: expected a kind with a schema, got {document['apiVersion']}"


def faults_by_schema(built: dict[str, str]) -> Iterator[str]:
    """Yield the faults of all combinations in all versions."""
    custom = json.loads(CUSTOM.read_text())
    for name, text in built.items():
        for version in VERSIONS:
            found = list(schema_faults(text, version, custom))
            expected = any((part, version) in TOO_OLD for part in name.split("+"))
            if expected and not found:
                yield f"{name}, Kubernetes {version}: expected a fault, got none"
            if not expected:
                yield from (f"{name}, Kubernetes {version}: {fault}" for fault in found)


def faults_by_policy(built: dict[str, str]) -> Iterator[str]:
    """Yield checkov's findings other than the exceptions in ``.checkov.yaml``."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in built.items():
            (Path(folder) / f"{name}.yaml").write_text(text)
        done = subprocess.run(
            [CHECKOV, "--config-file", CONFIG, "--directory", folder, "--output", "json"],
            capture_output=True,
            text=True,
            check=False,
        )
    try:
        results = json.loads(done.stdout)["results"]
    except (ValueError, KeyError, TypeError):
        yield f"checkov: expected results, got {done.stdout[-500:]} {done.stderr[-500:]}"
        return
    for error in results.get("parsing_errors", ()):
        yield f"checkov: cannot read {error}"
    for check in results.get("failed_checks", ()):
        file = Path(check["file_path"]).stem
        yield f"{file}: {check['check_id']} {check['check_name']}: {check['resource']}"


def main() -> int:
    """Check everything, or with ``--quick`` only the overlays' schemas; return 1 for a fault."""
    quick = "--quick" in sys.argv[1:]
    combinations = [one for one in rendered.combinations() if not (quick and one[1])]
    built = {rendered.title(*one): rendered.build(*one) for one in combinations}
    built["example-job"] = (rendered.DEPLOY / "example-job.yaml").read_text()
    faults = [*faults_by_schema(built), *(() if quick else faults_by_policy(built))]
    for fault in faults:
        print(fault, file=sys.stderr)
    judges = f"Kubernetes {', '.join(VERSIONS)}" + ("" if quick else " and checkov")
    print(f"{len(built)} builds × {judges}: {len(faults)} faults")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
