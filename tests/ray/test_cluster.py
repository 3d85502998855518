"""A bank in shards on a Ray cluster of three nodes on this machine, through the real server."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.cluster_utils import Cluster
from tests.support.processes import ServerProcess, serving
from tests.support.sharded_models import (
    FOLDS,
    MACHINES,
    SHAPE,
    eventually,
    write_sharded_models,
)

from els_client import Client, UnavailableError

STORE = 100 << 20
RECOVERY_S = 240
"""Far more than a restart takes on a machine of two cores."""
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore"),  # of Ray's
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    head = {"num_cpus": 1, "object_store_memory": STORE, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=2, object_store_memory=STORE)
        yield cluster
    finally:
        cluster.shutdown()


@pytest.fixture(scope="module")
def server(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    root = write_sharded_models(tmp_path_factory.mktemp("ray") / "models", shards=3)
    for name in [*MACHINES, *FOLDS]:
        path = root / f"{name}-sharded" / "model.yaml"
        path.write_text(f"{path.read_text()}engine: ray\n")
    options = {
        "ELS_RAY_ADDRESS": cluster.address,
        "ELS_SHARD_STALL_S": "4",
        "ELS_SHARD_RESTART_S": "2",
        "ELS_LOAD_S": "600",
    }
    with serving("--models", root, "--threads", 1, **options) as process:
        yield process


def actors() -> set[int]:
    """Return the processes of actors."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if command.startswith(b"ray::ShardActor"):
            found.add(int(folder.name))
    return found


def images() -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).normal(size=(3, *SHAPE)).astype(np.float32)


OPTIONS: dict[str, Any] = {"sigma": [0.3, 0.5, 2.0], "label": [-1, 1, 2]}
"""Levels, and labels whose ranges are on several shards."""


@pytest.mark.parametrize("machine", [*MACHINES, *FOLDS])
def test_three_nodes_have_the_bits_of_one_process(machine: str, server: ServerProcess) -> None:
    with Client(server.target, timeout_s=120) as client:
        x = images()
        want = client.denoise_with_evidence(x, model=machine, **OPTIONS)
        got = client.denoise_with_evidence(x, model=f"{machine}-sharded", **OPTIONS)
        variances = [
            client.denoise_with_variance(x, model=name, **OPTIONS)[1]
            for name in (machine, f"{machine}-sharded")
        ]
    for one, other in zip(want, got, strict=True):
        assert np.array_equal(one, other)
    assert np.array_equal(variances[0], variances[1])


class Load:
    """Callers that compare every answer, until they are stopped."""

    def __init__(self, server: ServerProcess, model: str, callers: int = 2) -> None:
        self.right = self.wrong = self.unavailable = 0
        self.longest_s = 0.0
        self._done = threading.Event()
        with Client(server.target, timeout_s=120) as client:
            self._want = client.denoise(images(), model=model, **OPTIONS)
        self._server, self._model = server, model
        self._threads = [threading.Thread(target=self._call) for _ in range(callers)]
        for thread in self._threads:
            thread.start()

    def _call(self) -> None:
        with Client(self._server.target, timeout_s=RECOVERY_S) as client:
            while not self._done.is_set():
                began = time.monotonic()
                try:
                    got = client.denoise(images(), model=f"{self._model}-sharded", **OPTIONS)
                except UnavailableError:
                    self.unavailable += 1
                else:
                    same = np.array_equal(got, self._want)
                    self.right += same
                    self.wrong += not same
                self.longest_s = max(self.longest_s, time.monotonic() - began)

    def stop(self) -> None:
        """End the callers; each call ends in bounded time."""
        self._done.set()
        for thread in self._threads:
            thread.join(RECOVERY_S)
            assert not thread.is_alive(), "a call hangs"


def kill_actor(cluster: Cluster) -> None:
    os.kill(min(actors()), signal.SIGKILL)


def stop_actor(cluster: Cluster) -> None:
    os.kill(max(actors()), signal.SIGSTOP)


def kill_node(cluster: Cluster) -> None:
    node = next(iter(cluster.worker_nodes))
    cluster.remove_node(node, allow_graceful=False)


@pytest.mark.parametrize("fault", [kill_actor, stop_actor, kill_node])
def test_no_answer_is_wrong_and_no_call_hangs_whatever_dies(
    fault: Callable[[Cluster], None], cluster: Cluster, server: ServerProcess
) -> None:
    eventually(lambda: is_complete(server), RECOVERY_S)
    before = actors()
    load = Load(server, "zeros")
    try:
        fault(cluster)
        began = time.monotonic()
        # The lost one is noticed, and another answers in its place.
        eventually(lambda: len(actors() - before) > 0 and is_complete(server), RECOVERY_S)
        recovered_s, answered = time.monotonic() - began, load.right
        eventually(lambda: load.right > answered + 2, RECOVERY_S)
    finally:
        load.stop()
    print(
        f"{fault.__name__}: recovered after {recovered_s:.1f} s; {load.right} right, "
        f"{load.wrong} wrong, {load.unavailable} UNAVAILABLE, longest {load.longest_s:.1f} s"
    )
    assert load.wrong == 0


def is_complete(server: ServerProcess) -> bool:
    """Return whether all shards are ready."""
    text = server.page("/metrics")[1]
    ready = [line for line in text.splitlines() if line.startswith("els_shard_ready{")]
    return len(ready) == 3 and all(line.endswith(" 1.0") for line in ready)
