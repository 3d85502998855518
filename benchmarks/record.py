"""Dated records of benchmarks: what was measured, on which machine, of which commit.

A benchmark adds the common arguments with :func:`add_arguments`, calls :func:`start` before it
measures, and :meth:`Recorder.write` afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")
ROOT = RESULTS.parents[1]
PACKAGES = (
    *("els-denoise", "torch", "numpy", "grpcio", "protobuf", "triton", "onnxruntime"),
    *("openvino", "diffusers"),
)
"""Distributions whose versions are part of every record, where they are installed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--out`` and ``--dirty``."""
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="another file to write")
    parser.add_argument(
        "--dirty", action="store_true", help="record even if the working tree has changes"
    )


@dataclass(frozen=True)
class Recorder:
    """Writes the record of one run.

    Args:
        name: of the benchmark; the file is ``results/DATE-name.json``.
        commit: that is measured; it ends with ``-dirty`` if the working tree had changes.
        out: another file to write.
    """

    name: str
    commit: str
    out: Path | None = None

    def write(self, rows: list[dict[str, Any]]) -> Path:
        """Write ``rows``, one flat dict each, with date, machine, versions and commit.

        Returns:
            The file.
        """
        now = datetime.now(UTC)
        path = self._path(now)
        record = {
            "benchmark": self.name,
            "date": now.isoformat(timespec="seconds"),
            "commit": self.commit,
            "machine": machine(),
            "rows": rows,
        }
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")
        return path

    def earlier(self) -> list[dict[str, Any]]:
        """Return the rows of an earlier run of this day on this machine at this commit."""
        path = self._path(datetime.now(UTC))
        record = json.loads(path.read_text()) if path.exists() else {}
        same = (record.get("commit"), record.get("machine")) == (self.commit, machine())
        return list(record["rows"]) if same else []

    def _path(self, now: datetime) -> Path:
        return self.out or RESULTS / f"{now:%Y-%m-%d}-{self.name}.json"


def start(name: str, options: argparse.Namespace) -> Recorder:
    """Return the recorder of a run that begins now.

    To be called before the first measurement: a run of an hour is then not lost at its end, and the
    record names the measured commit.

    Args:
        name: of the benchmark.
        options: has ``out`` and ``dirty``, see :func:`add_arguments`.

    Raises:
        SystemExit: The working tree has changes or is no checkout, and ``--dirty`` is not given.
    """
    commit = commit_of(ROOT)
    if not options.dirty and (not commit or commit.endswith("-dirty")):
        raise SystemExit(
            "working tree: expected a commit without changes, got "
            f"{commit or 'no git checkout'}; commit first, or record with --dirty"
        )
    return Recorder(name, commit or "unknown", options.out)


def commit_of(root: Path) -> str:
    """Return the commit of a checkout, with ``-dirty`` if tracked files have changes.

    Earlier records do not count: a series of benchmarks writes them one after another. Empty if
    there is no git or no checkout.
    """
    if shutil.which("git") is None:
        return ""
    commit = _git(root, "rev-parse", "--short=12", "HEAD")
    changes = _git(
        root,
        "status",
        "--porcelain",
        "--untracked-files=no",
        "--",
        ".",
        ":(exclude)benchmarks/results",
    )
    return f"{commit}-dirty" if commit and changes else commit


def machine() -> dict[str, Any]:
    """Return processor, cores, system and versions."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: found for name in PACKAGES if (found := _version(name))},
    }


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
