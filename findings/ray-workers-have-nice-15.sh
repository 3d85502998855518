#!/usr/bin/env bash
# Guess: an actor that asks for a CPU gets as much of it as any process of the machine.
#
# Real behaviour: Ray starts every worker with nice 15 (`worker_niceness`), whatever `num_cpus` says. Beside
# one busy process of ordinary priority on the same core an actor gets a thirtieth of it or less: an import of
# two seconds takes a minute, an actor that restarts beside load is away for minutes, and nothing in its
# state, its logs or the dashboard says so. The reservation of `num_cpus` counts for Ray's scheduler only.
# Version: ray 2.60.0, CPython 3.11, Linux.
# Source: "Adjusted worker niceness to", src/ray/core_worker/core_worker_process.cc;
# RAY_CONFIG(int, worker_niceness, 15), src/ray/common/ray_config_def.h.
# Bitten: whoever serves from actors on a machine that does other work: a server beside its shards, a node
# shared with other containers (nice is relative within a cgroup only), tests of recovery times under load.
# Remedy: start the node with RAY_worker_niceness=0.
#
# Output seen, on a machine that did other work too:
#   nice of the driver 0, of an actor 15
#   one second of CPU beside a busy process on the same core: 99.3 s
#   with RAY_worker_niceness=0: nice of an actor 0, one second of CPU: 3.6 s
#
# Exits 1 if that is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet ray==2.60.0
cat > "$folder/measure.py" <<'PYTHON'
import multiprocessing
import os
import time

import ray

CORE = {min(os.sched_getaffinity(0))}


def spin() -> None:
    os.sched_setaffinity(0, CORE)
    while True:
        pass


@ray.remote(num_cpus=1)
class Actor:
    def measure(self) -> tuple[int, float]:
        os.sched_setaffinity(0, CORE)
        began, used = time.monotonic(), time.process_time()
        # At most a minute, as other machines may be busier still.
        while time.process_time() - used < 1 and time.monotonic() - began < 60:
            pass
        share = (time.process_time() - used) / (time.monotonic() - began)
        return os.getpriority(os.PRIO_PROCESS, 0), 1 / share


ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False,
         object_store_memory=80 << 20, _temp_dir=os.environ["FOLDER"])
actor = Actor.remote()
busy = multiprocessing.get_context("spawn").Process(target=spin, daemon=True)
ray.get(actor.__ray_ready__.remote())
busy.start()
time.sleep(1)
print(*ray.get(actor.measure.remote()))
busy.kill()
ray.shutdown()
PYTHON
measure() {
  FOLDER=$(mktemp -d "$folder/XXXX") RAY_USAGE_STATS_ENABLED=0 "$@" "$folder/venv/bin/python" \
    "$folder/measure.py" 2> /dev/null | tail -1
}
read -r nice seconds < <(measure env)
echo "nice of the driver $(nice), of an actor $nice"
printf 'one second of CPU beside a busy process on the same core: %.1f s\n' "$seconds"
read -r other others < <(measure env RAY_worker_niceness=0)
printf 'with RAY_worker_niceness=0: nice of an actor %s, one second of CPU: %.1f s\n' "$other" "$others"
[[ $nice == 15 && $other == 0 && ${seconds%.*} -gt $((2 * ${others%.*})) ]]
