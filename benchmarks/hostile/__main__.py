"""Tests a server with hostile callers: python -m benchmarks.hostile [--seconds 60] [--out FILE].

A server with the bundled models and a memory limit of 2 GiB (by a cgroup if possible) gets five
kinds of hostile calls at once: compressed structure, compressed zeros, unfinished messages, also to
the health service, and large requests for an unknown model. Meanwhile regular callers send small
images, and health is checked. With tokens, hostile callers have none. Checked are the peak memory,
the slowest health check, the rate of regular callers relative to that without an attack, and memory
five seconds later. Exits with 1 if one is out of bounds.

Hostile callers compute on the same cores as the server here, unlike real ones. So the rate is also
given for the processor time that they leave: ``left_rate`` is the rate divided by that without an
attack, and by the part of the cores' time that the hostile processes did not use themselves.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from tests.support.security import TokenFile

from benchmarks import record
from benchmarks.hostile.callers import KINDS
from els_proto.denoise.v1 import denoise_pb2 as pb

MIB = 1 << 20
LIMIT_MIB = 2048
PEAK_MIB = 1280
HEALTH_S = 1.0
RATE = 0.5
AFTER = 1.1
CALLERS = 4
_SAMPLE_S = 0.02
_MEMORY_V1 = Path("/sys/fs/cgroup/memory")
_CALM_S = 10.0

Metadata = tuple[tuple[str, str], ...]


@contextmanager
def limited() -> Iterator[Path | None]:
    """Yield the processes file of a new cgroup of ``LIMIT_MIB``; None if it cannot be created."""
    group = _MEMORY_V1 / f"els-hostile-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(LIMIT_MIB * MIB))
    except OSError:
        yield None
        return
    try:
        yield group / "cgroup.procs"
    finally:
        with contextlib.suppress(OSError):
            group.rmdir()


@contextmanager
def serving(procs: Path | None, *options: object) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield pid and ports of a server with the bundled models."""
    command = [str(Path(sys.executable).with_name("els-server")), "run", "--port=0"]
    command += ["--metrics-port=0", "--threads=1", *map(str, options)]
    variables = {"ELS_GRACE_S": "0", "ELS_HEALTH_PORT": "0", "ELS_LOG_LEVEL": "error"}
    if procs is None:
        variables["ELS_IN_FLIGHT_BYTES"] = str(LIMIT_MIB // 4 * MIB)
    join = f"echo $$ > {procs}; " if procs else ""
    server = subprocess.Popen(
        ["sh", "-c", join + 'exec "$@"', "sh", *command],
        stdout=subprocess.PIPE,
        env={**os.environ, **variables},
    )
    assert server.stdout is not None
    try:
        yield server.pid, json.loads(server.stdout.readline())
    finally:
        server.terminate()
        server.wait(60)


class Sampler:
    """Thread that samples resident memory and health until it is stopped."""

    def __init__(self, pid: int, health: str) -> None:
        self.peak_mib = 0.0
        self.health_s: list[float] = []
        self.health_failed = 0
        self._pid, self._health, self._stop = pid, health, threading.Event()
        self._threads = [threading.Thread(target=run) for run in (self._sample, self._ask)]

    def __enter__(self) -> Sampler:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLE_S):
            self.peak_mib = max(self.peak_mib, resident_mib(self._pid))

    def _ask(self) -> None:
        own = [("grpc.use_local_subchannel_pool", 1)]
        while not self._stop.wait(0.2):
            began = time.monotonic()
            # Like a probe, with a new connection each time.
            with grpc.insecure_channel(self._health, own) as channel:
                call: Any = channel.unary_unary("/grpc.health.v1.Health/Check")
                try:
                    call(b"", timeout=10)
                except grpc.RpcError:
                    self.health_failed += 1
            self.health_s.append(time.monotonic() - began)


def resident_mib(pid: int, field: str = "VmRSS") -> float:
    """Return a memory field of a process in MiB."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) / 1024


def regular_rate(target: str, metadata: Metadata, seconds: float) -> float:
    """Return responses per second of ``CALLERS`` callers of small images, a connection each."""
    until = time.monotonic() + seconds
    x = np.zeros((1, 1, 28, 28), "<f4")
    with ThreadPoolExecutor(CALLERS) as pool:
        counts = pool.map(lambda _: _ask(target, metadata, x, until), range(CALLERS))
        return sum(counts) / seconds


def _ask(target: str, metadata: Metadata, x: np.ndarray[Any, Any], until: float) -> int:
    answered, options = 0, [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(target, options) as channel:
        call: Any = channel.unary_unary("/denoise.v1.DenoiserService/Denoise")
        while time.monotonic() < until:
            tensor = pb.Tensor(dtype=pb.DTYPE_F32, shape=x.shape, data=x.tobytes())
            request = pb.DenoiseRequest(model="fashion-wiener", x=tensor)
            request.level.sigma.append(1.0 + 1e-6 * answered)
            with contextlib.suppress(grpc.RpcError):
                call(request.SerializeToString(), timeout=10, metadata=metadata)
                answered += 1
    return answered


class Attack:
    """Processes of hostile callers, one for each kind and address.

    Args:
        target: address of the server.
        health: address of its health service.
        seconds: duration of the attack.
        nice: niceness of the processes, as real callers do not share two cores with the server.
    """

    def __init__(self, target: str, health: str, seconds: float, nice: int) -> None:
        command = ("nice", "-n", str(nice), sys.executable, "-m", "benchmarks.hostile.callers")
        self._processes = [
            subprocess.Popen(
                (*command, kind, address, str(seconds)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for kind in KINDS
            for address in ((target, health) if kind == "unfinished health" else (target,))
        ]
        for process in self._processes:
            assert process.stdout is not None
            process.stdout.readline()

    def used_s(self) -> float:
        """Return the processor seconds that the processes have used."""
        return sum(_used_s(process.pid) for process in self._processes)

    def begin(self) -> None:
        """Let all processes begin."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write("begin\n")
            process.stdin.flush()

    def end(self) -> None:
        """Wait for the end of the processes."""
        for process in self._processes:
            process.wait()

    def kill(self) -> None:
        """End the processes at once."""
        for process in self._processes:
            process.kill()
            process.wait()


def hold(seconds: float, tokens: bool, nice: int) -> dict[str, Any]:
    """Return the measurements of one run."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        metadata: Metadata = ()
        options: list[object] = []
        if tokens:
            file = TokenFile(folder / "tokens.json")
            metadata = (("authorization", f"Bearer {file.add('regular')}"),)
            options = ["--tokens", folder / "tokens.json"]
        procs = stack.enter_context(limited())
        pid, ports = stack.enter_context(serving(procs, *options))
        target = f"127.0.0.1:{ports['grpc_port']}"
        health = f"127.0.0.1:{ports['health_port']}"
        attack = Attack(target, health, seconds, nice)
        stack.callback(attack.kill)
        calm = regular_rate(target, metadata, _CALM_S)
        before = resident_mib(pid)
        began, used = time.monotonic(), attack.used_s()
        with Sampler(pid, health) as sampler:
            attack.begin()
            besieged = regular_rate(target, metadata, seconds)
            hostile = (attack.used_s() - used) / (time.monotonic() - began) / cores()
            attack.end()
        time.sleep(5)
        return {
            "tokens": tokens,
            "cgroup": procs is not None,
            "seconds": seconds,
            "nice": nice,
            "before_mib": round(before, 1),
            "peak_mib": round(max(sampler.peak_mib, resident_mib(pid, "VmHWM")), 1),
            "after_mib": round(resident_mib(pid), 1),
            "health_s": round(max(sampler.health_s), 3),
            "health_median_s": round(statistics.median(sampler.health_s), 4),
            "health_failed": sampler.health_failed,
            "calm_per_s": round(calm, 1),
            "besieged_per_s": round(besieged, 1),
            "hostile_share": round(hostile, 3),
            "left_rate": round(besieged / calm / (1 - hostile), 3),
        }


def cores() -> int:
    """Return the processor cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _used_s(pid: int) -> float:
    """Return the processor seconds of a process, of all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def faults(row: dict[str, Any]) -> list[str]:
    """Return the bounds that a run exceeded."""
    checks = {
        f"peak of memory {row['peak_mib']} MiB > {PEAK_MIB}": row["peak_mib"] > PEAK_MIB,
        f"health after {row['health_s']} s > {HEALTH_S}": row["health_s"] > HEALTH_S,
        f"{row['health_failed']} health checks failed": row["health_failed"] > 0,
        "memory five seconds after": row["after_mib"] > AFTER * row["before_mib"],
        "rate of regular callers": row["besieged_per_s"] < RATE * row["calm_per_s"],
    }
    return [text for text, broken in checks.items() if broken]


def main() -> int:
    """Measure with and without tokens; return 1 if a bound is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--nice", type=int, default=5, help="niceness of the hostile callers")
    record.add_arguments(parser)
    options = parser.parse_args()
    recorder = record.start("hostile", options)
    rows = []
    for tokens in (False, True):
        row = hold(options.seconds, tokens, options.nice)
        row["faults"] = faults(row)
        print(json.dumps(row, indent=1), flush=True)
        rows.append(row)
    print(recorder.write(rows))
    return int(any(row["faults"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
