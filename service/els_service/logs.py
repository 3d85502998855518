"""Logs as JSON lines on stderr, ours and the libraries' alike."""

from __future__ import annotations

import logging
import sys

import structlog

_GRPC = "grpc._cython.cygrpc"
LEVELS = ("debug", "info", "warning", "error")


def set_level(level: str) -> None:
    """Change from which of ``LEVELS`` on records are written."""
    root = logging.getLogger()
    root.setLevel(level.upper())
    # At debug it tells every turn of its loop.
    logging.getLogger("grpc").setLevel(max(root.level, logging.INFO))


def level() -> str:
    """Return from which of ``LEVELS`` on records are written."""
    return logging.getLevelName(logging.getLogger().level).lower()


def configure(level: str) -> None:
    """Send every record at ``level`` (debug, info, warning, error) or above to stderr."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
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
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    logging.getLogger(_GRPC).addFilter(_calm)
    root = logging.getLogger()
    root.handlers = [handler]
    set_level(level)


def _calm(record: logging.LogRecord) -> bool:
    """Turn what grpc calls an error of the server, and is a caller who left, into a debug record.

    It says so where a caller hangs up while its answer is on its way.
    """
    if record.levelno >= logging.ERROR and str(record.msg).startswith("ExecuteBatchError raised"):
        record.levelno, record.levelname = logging.DEBUG, "DEBUG"
        record.exc_info = record.exc_text = None
        return logging.getLogger().isEnabledFor(logging.DEBUG)
    return True
