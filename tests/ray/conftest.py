"""Run by ``make ray``, in its environment; the default run collects nothing here."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("ray") else ["test_*.py"]
