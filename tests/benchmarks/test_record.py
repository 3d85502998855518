"""Records name commit, processor and versions, and are refused where the commit says too little."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
from pathlib import Path

import pytest
from benchmarks import record


def git(root: Path, *arguments: str) -> str:
    who = ("-c", "user.name=Tester", "-c", "user.email=tester@els.example")
    command = ["git", "-C", str(root), *who, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "checkout"
    results = root / "benchmarks" / "results"
    results.mkdir(parents=True)
    (results / "old.json").write_text("{}")
    (root / "code.py").write_text("x = 1\n")
    git(tmp_path, "init", "--quiet", str(root))
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message=First")
    monkeypatch.setattr(record, "ROOT", root)
    return root


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    record.add_arguments(parser)
    return parser.parse_args(arguments)


def test_a_record_names_commit_processor_and_versions(checkout: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "record.json"
    written = record.start("trial", options("--out", str(out))).write([{"row": 1}])
    assert written == out
    found = json.loads(out.read_text())
    assert found["benchmark"] == "trial"
    assert found["commit"] == git(checkout, "rev-parse", "--short=12", "HEAD")
    assert found["rows"] == [{"row": 1}]
    machine = found["machine"]
    assert machine["cpu"]
    assert machine["cores"] > 0
    assert machine["python"] == platform.python_version()
    assert {"torch", "numpy", "grpcio", "protobuf", "els-denoise"} <= machine.keys()


def test_a_tree_with_changes_is_recorded_only_if_told(checkout: Path) -> None:
    (checkout / "code.py").write_text("x = 2\n")
    with pytest.raises(SystemExit, match=r"expected a commit without changes, got .*-dirty"):
        record.start("trial", options())
    assert record.start("trial", options("--dirty")).commit.endswith("-dirty")


def test_earlier_records_and_new_files_are_no_changes(checkout: Path) -> None:
    (checkout / "benchmarks" / "results" / "old.json").write_text("[]")
    (checkout / "notes.txt").write_text("untracked")
    assert not record.start("trial", options()).commit.endswith("-dirty")


def test_outside_a_checkout_the_commit_is_unknown_and_has_to_be_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="got no git checkout"):
        record.start("trial", options())
    assert record.start("trial", options("--dirty")).commit == "unknown"
