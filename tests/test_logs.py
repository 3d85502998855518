from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from els_service import logs

_WRITER = """
import logging, sys
from els_service import logs
logs.configure("info")
print("ready", flush=True)
sys.stdin.readline()
for number in range(50):
    logging.getLogger("mine").info("x" * 1000, extra={"number": number})
    logging.getLogger("mine").error("x", exc_info=ValueError("oh"))
print(logs.lost(), flush=True)
"""
"""Waits for a line, logs 100 records, and prints how many were lost."""


class Call:
    """A call, as a log sees it."""

    trace = None

    def log_fields(self) -> dict[str, str]:
        return {"request_id": "mine"}


@pytest.fixture
def configured(capfd: pytest.CaptureFixture[str]) -> Any:
    """Configure logs on the captured stderr and restore what was; returns the records so far."""
    root, grpc = logging.getLogger(), logging.getLogger("grpc")
    before = root.handlers, root.level, grpc.level
    # pytest's own stderr is the captured descriptor 2.
    with open(2, "w", closefd=False) as stderr, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        logs.configure("info")
    yield lambda: [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    root.handlers = before[0]
    root.setLevel(before[1])
    grpc.setLevel(before[2])


def test_the_level_changes_from_the_next_record_on(configured: Any) -> None:
    log = logging.getLogger("mine")
    assert logs.level() == "info"
    log.debug("unheard")
    logs.set_level("debug")
    log.debug("heard")
    assert logs.level() == "debug"
    logs.set_level("error")
    log.warning("unheard")
    assert [record["event"] for record in configured()] == ["heard"]


def test_debug_leaves_out_the_turns_of_grpc_s_loop(configured: Any) -> None:
    logs.set_level("debug")
    assert not logging.getLogger("grpc._cython.cygrpc").isEnabledFor(logging.DEBUG)
    logs.set_level("error")
    assert not logging.getLogger("grpc").isEnabledFor(logging.WARNING)


def test_an_unknown_level_is_refused_and_changes_nothing(configured: Any) -> None:
    with pytest.raises(ValueError, match="expected one of debug, info, warning, error, got 'loud'"):
        logs.set_level("loud")
    assert logs.level() == "info"


def test_records_of_a_call_carry_its_ids_and_others_do_not(configured: Any) -> None:
    log = logging.getLogger("mine")
    token = logs.CALL.set(Call())
    log.info("inside")
    logs.CALL.reset(token)
    log.info("outside")
    inside, outside = configured()
    assert inside["request_id"] == "mine"
    assert "request_id" not in outside


def test_what_json_does_not_know_is_written_as_text(configured: Any) -> None:
    logging.getLogger("mine").info("path", extra={"path": Path("x"), "lone": "\udc80"})
    (record,) = configured()
    assert "'x'" in record["path"]


def writer(stderr: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _WRITER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )


def logged(process: subprocess.Popen[str]) -> tuple[int, int]:
    """Let a writer write; return its exit code and how many records it lost."""
    assert process.stdout is not None
    process.stdout.readline()
    out, _ = process.communicate("\n", timeout=60)
    return process.returncode, int(out)


def test_a_full_disk_loses_records_and_nothing_else() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    process = writer(full)
    os.close(full)
    assert logged(process) == (0, 100)


def test_a_closed_pipe_loses_records_and_nothing_else() -> None:
    reading, writing = os.pipe()
    process = writer(writing)
    os.close(writing)
    assert process.stdout is not None
    os.close(reading)
    assert logged(process) == (0, 100)


def test_a_process_without_stderr_logs_nothing_and_lives() -> None:
    script = (
        "import os, sys; os.close(2); os.execv(sys.executable, [sys.executable, '-c', sys.argv[1]])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, _WRITER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert logged(process) == (0, 0)


def test_a_record_after_a_torn_one_has_a_line_of_its_own(tmp_path: Path) -> None:
    torn = tmp_path / "log"
    script = (
        "import resource, logging, signal; from els_service import logs\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "logs.configure('info'); log = logging.getLogger('mine')\n"
        "_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard)); log.info('x' * 200)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard)); log.info('whole')\n"
    )
    with torn.open("wb") as stderr:
        subprocess.run([sys.executable, "-c", script], stderr=stderr, check=True, timeout=60)
    half, whole = torn.read_text().splitlines()
    assert len(half) == 100
    assert json.loads(whole)["event"] == "whole"
