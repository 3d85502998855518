"""Run by ``make ray``, in its environment; the default run collects nothing here."""

from __future__ import annotations

import os
from importlib.util import find_spec

# Before Ray is imported, here and in what is forked.
os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_worker_niceness="0")
collect_ignore_glob = [] if find_spec("ray") else ["test_*.py"]
