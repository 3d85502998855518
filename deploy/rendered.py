"""Manifests built by ``kubectl kustomize``: each overlay, and each component added to one.

A component is added as an operator would: by a kustomization that lists the overlay and the
component.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).parent
OVERLAYS = tuple(sorted(path.parent.name for path in DEPLOY.glob("overlays/*/kustomization.yaml")))
COMPONENTS = tuple(
    sorted(path.parent.name for path in DEPLOY.glob("components/*/kustomization.yaml"))
)
BELOW = "cpu"
"""The overlay that components are added to."""

Document = dict[str, Any]


def combinations() -> list[tuple[str, tuple[str, ...]]]:
    """Return the checked combinations: each overlay, each component alone, and some together."""
    together = [
        ("gpu", ("keda", "model-volume-pvc", "tls", "tokens", "tracing")),
        (BELOW, ("gateway", "hpa", "model-volume-init", "tls")),
        (BELOW, ("keda", "model-volume-pvc", "podmonitor", "ray")),
    ]
    alone = [(BELOW, (component,)) for component in COMPONENTS]
    return [*((overlay, ()) for overlay in OVERLAYS), *alone, *together]


def title(overlay: str, components: tuple[str, ...]) -> str:
    """Return a combination's name, which is also a file name."""
    return "+".join((overlay, *components))


def kubectl() -> str | None:
    """Return the path of kubectl, of ``make deploy-tools`` or installed; None without either."""
    return shutil.which("kubectl", path=f"{DEPLOY.parent / '.venv-deploy' / 'bin'}:{os.defpath}")


def build(overlay: str, components: tuple[str, ...] = ()) -> str:
    """Return the manifests of an overlay with components, as YAML.

    Raises:
        RuntimeError: kustomize rejects them; the text has the reason.
    """
    program = kubectl()
    if program is None:
        raise RuntimeError("expected kubectl, found none: make deploy-tools")
    with tempfile.TemporaryDirectory(prefix=".try-", dir=DEPLOY) as folder:
        kustomization = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "namespace": "els-denoise",
            "resources": [f"../overlays/{overlay}"],
            "components": [f"../components/{component}" for component in components],
        }
        (Path(folder) / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        done = subprocess.run(
            [program, "kustomize", folder], capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise RuntimeError(f"{title(overlay, components)}: {done.stderr.strip()}")
    return done.stdout


def documents(overlay: str, components: tuple[str, ...] = ()) -> list[Document]:
    """Return the manifests of an overlay with components; raises the errors of ``build``."""
    return [one for one in yaml.safe_load_all(build(overlay, components)) if one]
