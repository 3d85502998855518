"""Options of execution engines, from ``model.yaml`` and the server's settings."""

from __future__ import annotations

from dataclasses import dataclass

import torch

ENGINES = ("torch", "openvino", "onnxruntime", "compile", "auto")
"""Engines of a torch module; of an ONNX graph, ``onnxruntime`` is the own one."""
MAX_THREADS = 1024


class EngineError(ValueError):
    """An engine cannot compute a network on this machine; the text says why."""


class PrecisionError(EngineError):
    """The processor, or the engine, lacks a precision."""


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Options of the engine of one network."""

    engine: str = "torch"
    """An engine, or ``auto`` for the fastest on this machine."""
    precision: str = "float32"
    threads: int | None = None
    """Threads of OpenVINO and onnxruntime; None for as many as torch has."""
    fallback: bool = True
    """Whether an engine or precision that this machine lacks is replaced; otherwise the model is
    rejected."""
    deterministic: bool = False
    """Whether the choice must not depend on a measurement."""
    buckets: tuple[int, ...] = ()
    """Batch sizes of compiled graphs; empty for a choice by speed."""

    @property
    def thread_count(self) -> int:
        """Threads of a computation."""
        return self.threads or torch.get_num_threads()


@dataclass(frozen=True, kw_only=True)
class EngineDefaults:
    """Settings of the server, for models whose ``model.yaml`` does not name them."""

    engine: str = "torch"
    precision: str = "float32"
    fallback: bool = True
