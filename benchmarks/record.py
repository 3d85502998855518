"""Writes dated records of measurements with machine, versions and commit."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).with_name("results")


def write(name: str, rows: list[dict[str, Any]], out: Path | None = None) -> Path:
    """Write ``rows`` with date, machine, versions and commit; return the file.

    Args:
        name: name of the benchmark; the default file is ``results/DATE-name.json``.
        rows: measurements, one flat dict each.
        out: file to write instead.
    """
    now = datetime.now(UTC)
    path = out or RESULTS / f"{now:%Y-%m-%d}-{name}.json"
    record = {
        "benchmark": name,
        "date": now.isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": {
            "cpu": _cpu(),
            "cores": len(os.sched_getaffinity(0)),
            "python": platform.python_version(),
            "torch": str(torch.__version__),
        },
        "rows": rows,
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def _commit() -> str:
    git = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
    ]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
