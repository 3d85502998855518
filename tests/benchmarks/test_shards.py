"""The benchmark of shards: its model of more devices, and how it measures memory."""

from __future__ import annotations

import os
import subprocess
import sys

from benchmarks.shards.cluster_model import cluster_rows
from benchmarks.shards.memory import children_of, pss_mb


def test_more_devices_take_less_time_until_merging_takes_most_of_it() -> None:
    rows = cluster_rows(coordination_s=0.002, merge_s=1e-8)
    assert [row["devices"] for row in rows] == [8, 64, 512]
    assert rows[0]["step_s"] > 5 * rows[1]["step_s"] > 5 * rows[2]["step_s"]
    slow = cluster_rows(coordination_s=0.002, merge_s=1e-6)
    assert slow[2]["merge_s"] > slow[2]["compute_s"]


def test_memory_is_that_of_a_process_and_of_its_children() -> None:
    command = [sys.executable, "-S", "-c", "import sys; print(flush=True); sys.stdin.read()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert child.pid in children_of(os.getpid())
        assert 1 < pss_mb(child.pid) < pss_mb(os.getpid())
        child.communicate()
