"""Logs as JSON lines on stderr, ours and the libraries' alike; their level may change any time."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, MutableMapping
from contextvars import ContextVar
from typing import Any, Protocol

import structlog

_GRPC = "grpc._cython.cygrpc"
LEVELS = ("debug", "info", "warning", "error")


class CallContext(Protocol):
    """What is known of the call that a task works for."""

    @property
    def trace(self) -> object | None:
        """What its part of a trace hangs on, where it is traced."""
        ...

    def log_fields(self) -> Mapping[str, str]:
        """Return what every record of the call carries."""
        ...


CALL: ContextVar[CallContext | None] = ContextVar("els_call", default=None)
"""The call that the current task works for."""


class _Lines(logging.Handler):
    """Writes whole lines to a file descriptor; what cannot be written is counted, never raised."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.lost = 0
        self._descriptor, self._torn = descriptor, False

    def emit(self, record: logging.LogRecord) -> None:
        try:
            # A full disk may have taken half of the line before.
            line = ("\n" * self._torn + self.format(record) + "\n").encode(errors="replace")
            rest = line[os.write(self._descriptor, line) :]
            self._torn = bool(rest)
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
            self._torn = False
        except Exception:
            # There is nowhere left to tell why.
            self.lost += 1


def configure(level: str) -> None:
    """Send every record at ``level`` (debug, info, warning, error) or above to stderr."""
    shared: list[structlog.typing.Processor] = [
        _add_call,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    # Without a stderr its number may be anyone's by now, a caller's connection for one.
    handler = logging.NullHandler() if sys.stderr is None else _Lines(sys.stderr.fileno())
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(default=repr),
            ],
        )
    )
    logging.getLogger(_GRPC).addFilter(_calm)
    logging.getLogger().handlers = [handler]
    set_level(level)
    # gRPC's core writes lines of its own to stderr, such as every handshake that a stranger fails.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def set_level(level: str) -> None:
    """Log at ``level`` or above from the next record on.

    Raises:
        ValueError: ``level`` is none of ``LEVELS``.
    """
    if level not in LEVELS:
        raise ValueError(f"level: expected one of {', '.join(LEVELS)}, got {level!r:.100}")
    root = logging.getLogger()
    root.setLevel(level.upper())
    # At debug it tells every turn of its loop.
    logging.getLogger("grpc").setLevel(max(root.level, logging.INFO))


def level() -> str:
    """Return the level in force: one of ``LEVELS``."""
    return logging.getLevelName(logging.getLogger().level).lower()


def lost() -> int:
    """Return how many records could not be written."""
    return sum(h.lost for h in logging.getLogger().handlers if isinstance(h, _Lines))


def _add_call(
    logger: Any, method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    if (call := CALL.get()) is not None:
        event.update(call.log_fields())
    return event


def _calm(record: logging.LogRecord) -> bool:
    """Turn what grpc calls an error of the server, and is a caller who left, into a debug record.

    It says so where a caller hangs up while its answer is on its way.
    """
    if record.levelno >= logging.ERROR and str(record.msg).startswith("ExecuteBatchError raised"):
        record.levelno, record.levelname = logging.DEBUG, "DEBUG"
        record.exc_info = record.exc_text = None
        return logging.getLogger().isEnabledFor(logging.DEBUG)
    return True
