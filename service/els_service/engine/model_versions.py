"""Versions of models, their states, and which of them share memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from els_service.denoisers.base import DenoiserInfo
from els_service.engine.loaded_model import LoadedModel, Statistics


@dataclass(slots=True, eq=False)
class ModelVersion:
    """Served version of a model."""

    model: str
    version: int
    info: DenoiserInfo
    loaded: LoadedModel | None
    """None while it is unloaded to save memory."""
    statistics: Statistics
    """Statistics that outlive an unload."""
    content: str = ""
    """See ``ModelSource.fingerprint``."""
    used: int = 0
    """Number of its latest use; a larger one is later."""


@dataclass(frozen=True)
class State:
    """State of one version in the index."""

    model: str
    version: int
    state: str
    """``READY``, ``LOADING`` or ``UNAVAILABLE``."""
    reason: str = ""


def memory_of(served: ModelVersion) -> object:
    """Return the key of a version's memory: a bank, which others may share, or the version."""
    info = served.info
    # Other kinds were computed from their bank but do not hold it.
    if info.bank is None or info.kind != "analytic":
        return served
    # Models of one bank hold the same copies of it if they hold as much.
    return info.bank.fingerprint, info.memory_bytes


def by_memory(versions: Iterable[ModelVersion]) -> dict[object, list[ModelVersion]]:
    """Return the loaded versions by the key of their memory."""
    holders: dict[object, list[ModelVersion]] = {}
    for served in versions:
        if served.loaded is not None:
            holders.setdefault(memory_of(served), []).append(served)
    return holders
