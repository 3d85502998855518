"""Writes the ConfigMap's settings from the typed ones: ``python -m deploy.settings``.

``base/settings.env`` lists every setting: those that differ on Kubernetes with their value, the
others as a comment with their default. With ``--check`` the file is compared, not written.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from els_service.config import Settings

FILE = Path(__file__).with_name("base") / "settings.env"

CHOSEN: Mapping[str, Any] = {
    # NetworkPolicies control who may connect.
    "host": "0.0.0.0",
    "metrics_host": "0.0.0.0",
    "health_port": 50052,
    # Clients resolve DNS when a connection closes, and so find new replicas within this time.
    "max_connection_age_s": 300.0,
    # Beside 0.4 GiB of the server itself in a limit of 2 GiB.
    "queue_bytes": 512 << 20,
    # Time for clients and proxies to see NOT_SERVING and use other replicas.
    "grace_s": 5.0,
    # terminationGracePeriodSeconds depends on it.
    "drain_s": 30.0,
}
"""Settings on Kubernetes; overlays and components add to them."""

_HEAD = """\
Settings of els-server run. Written by `python -m deploy.settings` (make deploy-settings): change
CHOSEN there, or set a key in an overlay's configMapGenerator with `behavior: merge`.
"""


def render() -> str:
    """Return the file's content, which ``kubectl kustomize`` reads as an env file."""
    # Validates the chosen values, and writes them as the server parses them.
    settings = Settings.model_validate(CHOSEN)
    parts = [_comment(_HEAD)]
    for name, field in Settings.model_fields.items():
        value = getattr(settings, name)
        line = f"ELS_{name.upper()}={'' if value is None else _text(value)}"
        if not field.description:
            raise ValueError(f"{name}: expected a docstring below the setting, got none")
        parts.append(f"{_comment(field.description)}\n{line if name in CHOSEN else '# ' + line}")
    return "\n\n".join(parts) + "\n"


def _comment(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 98, initial_indent="# ", subsequent_indent="# ")


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def main() -> int:
    """Write the file, or compare it; return 1 if it differs."""
    if "--check" not in sys.argv[1:]:
        FILE.write_text(render())
        return 0
    if FILE.read_text() == render():
        return 0
    print(f"{FILE}: differs from the settings; run python -m deploy.settings", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
