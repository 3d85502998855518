"""Load generator: runs a plan against a server and reports latencies and rates.

>>> from els_client.bench import Plan, run
>>> report = run(Plan(model="fashion-els", rate_per_s=50, deadline_s=1.0, duration_s=30))
>>> report.goodput_per_s, report.total.latency.p99_ms

A call takes about 0.12 ms of a core in a load process, like a plain grpc.aio call, and 0.1 ms on a
stream: on two shared cores one process reached 5,000 and 8,000 calls per second. Requires the extra
``bench``.
"""

from els_client.bench._run import run, run_all
from els_client.bench.plan import Kind, Plan
from els_client.bench.report import Generator, Latency, Outcome, Report, Second
from els_client.bench.sweep import Sweep, sweep

__all__ = [
    "Generator",
    "Kind",
    "Latency",
    "Outcome",
    "Plan",
    "Report",
    "Second",
    "Sweep",
    "run",
    "run_all",
    "sweep",
]
