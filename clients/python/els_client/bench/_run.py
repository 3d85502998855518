"""Runs plans: starts their processes, synchronises their start, and sums their results."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta

from els_client._client import Client
from els_client.bench.plan import Plan
from els_client.bench.report import Report, summed
from els_client.bench.tally import histogram
from els_client.errors import UnavailableError

# Seconds between the last process being ready and the first call.
_HEAD_START_S = 0.1


def run(plan: Plan) -> Report:
    """Run one load on a server and return its report.

    Raises:
        ElsError: The server does not know the model, or cannot be reached.
    """
    (report,) = run_all([plan])
    return report


def run_all(plans: Sequence[Plan]) -> list[Report]:
    """Run several loads at the same time, and return their reports.

    Each plan has its own processes; all start at the same time. Raises the errors of ``run``.
    """
    histogram()  # Fails here rather than in every process if the extra is missing.
    with ExitStack() as stack:
        workers = [[stack.enter_context(_Worker(job)) for job in _jobs(plan)] for plan in plans]
        everyone = [worker for group in workers for worker in group]
        for worker in everyone:
            worker.read("ready")
        begin = time.monotonic() + _HEAD_START_S
        now = datetime.now(UTC) + timedelta(seconds=_HEAD_START_S)
        for worker in everyone:
            worker.write(repr(begin))
        counted = [[json.loads(worker.read()) for worker in group] for group in workers]
    return [
        summed(plan, documents, (now + timedelta(seconds=plan.warm_up_s)).isoformat("T", "seconds"))
        for plan, documents in zip(plans, counted, strict=True)
    ]


def _jobs(plan: Plan) -> list[str]:
    """Return the job of each process of a plan, sent by a pipe: argv would show the token."""
    with Client(plan.target, tls=plan.tls, token=plan.token, timeout_s=10.0) as client:
        shape = client.model(plan.model).shape
    document = dataclasses.asdict(plan)
    if plan.tls is not None:
        document["tls"] = {name: path and str(path) for name, path in document["tls"].items()}
    return [
        json.dumps({"plan": document, "index": index, "shape": shape})
        for index in range(plan.processes)
    ]


class _Worker:
    """A load process, which is killed when the context ends."""

    def __init__(self, job: str) -> None:
        self._job = job

    def __enter__(self) -> _Worker:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "els_client.bench._worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C reaches this process only, which ends that one.
            # The load process has the same import path.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        self.write(self._job)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def write(self, line: str) -> None:
        """Write a line."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def read(self, expected: str | None = None) -> str:
        """Read a line.

        Raises:
            UnavailableError: The process ended instead; the reason is on stderr.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line or (expected is not None and line != expected):
            raise UnavailableError(f"a load process ended early, exit code {self._process.wait()}")
        return line
