"""Logs as JSON lines on stderr, for libraries too; the level can be changed at run time."""

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
    """Context of the call that a task processes."""

    @property
    def trace(self) -> object | None:
        """Span of the call, if it is traced."""
        ...

    def log_fields(self) -> Mapping[str, str]:
        """Return the fields of every log record of the call."""
        ...


CALL: ContextVar[CallContext | None] = ContextVar("els_call", default=None)
"""The call that the current task processes."""


class _Lines(logging.Handler):
    """Writes whole lines to a file descriptor; failures are counted, not raised."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.lost = 0
        self._descriptor, self._torn = descriptor, False

    def emit(self, record: logging.LogRecord) -> None:
        try:
            # A full disk may have truncated the previous line.
            line = ("\n" * self._torn + self.format(record) + "\n").encode(errors="replace")
            rest = line[os.write(self._descriptor, line) :]
            self._torn = bool(rest)
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
            self._torn = False
        except Exception:
            # The error cannot be logged either.
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
    # Without stderr its descriptor number may belong to something else, such as a connection.
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
    # gRPC's core logs to stderr itself, for example every failed handshake.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def set_level(level: str) -> None:
    """Set the minimum level of log records.

    Raises:
        ValueError: ``level`` is not in ``LEVELS``.
    """
    if level not in LEVELS:
        raise ValueError(f"level: expected one of {', '.join(LEVELS)}, got {level!r:.100}")
    root = logging.getLogger()
    root.setLevel(level.upper())
    # At debug level asyncio logs every iteration of its loop.
    logging.getLogger("grpc").setLevel(max(root.level, logging.INFO))


def level() -> str:
    """Return the current level, one of ``LEVELS``."""
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
    """Downgrade gRPC's error record for a client disconnect to DEBUG.

    gRPC logs it if a client disconnects while its response is being sent.
    """
    if record.levelno >= logging.ERROR and str(record.msg).startswith("ExecuteBatchError raised"):
        record.levelno, record.levelname = logging.DEBUG, "DEBUG"
        record.exc_info = record.exc_text = None
        return logging.getLogger().isEnabledFor(logging.DEBUG)
    return True
